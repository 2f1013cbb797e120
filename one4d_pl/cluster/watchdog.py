"""Every rank's log file, and the watchdog that writes its threads' stacks when a run hangs."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

HUNG = 76  # exit code of a process that the watchdog ended
LINGER_S = 15.0  # lets every rank write its stacks before the first exit makes the launcher kill all
FORMAT = "%(asctime)s %(message)s"


def rank_log_file(run_dir: str, rank: int) -> Path:
    """Return a rank's log file."""
    return Path(run_dir) / "logs" / f"rank-{rank:04d}.log"


@contextmanager
def rank_log(run_dir: str, rank: int) -> Iterator[None]:
    """Write all logs of this section to the rank's file, too; on stderr ranks but 0 show only warnings."""
    file = rank_log_file(run_dir, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    to_stderr = logging.StreamHandler()
    to_stderr.setLevel(logging.WARNING if rank else logging.INFO)
    logging.basicConfig(level=logging.INFO, format=FORMAT, datefmt="%H:%M:%S", handlers=[to_stderr])
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(to_file)
    first_line = f"rank {rank} starts: pid {os.getpid()} on {socket.gethostname()}"
    to_file.handle(logging.LogRecord(__name__, logging.INFO, __file__, 0, first_line, (), None))
    try:
        yield
    finally:
        logging.getLogger().removeHandler(to_file)
        to_file.close()


class HangWatchdog(threading.Thread):
    """Ends the process with code 76 once `beat` was not called for `timeout_s`.

    Its stacks go to the rank's log. This is a thread, not a signal handler, since Python runs
    handlers in the main thread, which hangs.
    """

    def __init__(self, run_dir: str, rank: int, timeout_s: float) -> None:
        super().__init__(daemon=True, name="hang-watchdog")
        self.file, self.rank, self.timeout_s = rank_log_file(run_dir, rank), rank, timeout_s
        self.last = time.monotonic()
        self.stopped = threading.Event()

    def beat(self) -> None:
        """Note that the run has made progress."""
        self.last = time.monotonic()

    def stop(self) -> None:
        """End the watch: the run is over, and its last work may take any time."""
        self.stopped.set()

    def run(self) -> None:
        while not self.stopped.wait(min(1.0, self.timeout_s / 4)):
            seen = self.last
            if time.monotonic() - seen <= self.timeout_s:
                continue
            self._write_stacks()
            if self.stopped.wait(min(LINGER_S, self.timeout_s / 4)) or self.last > seen:
                log.warning("rank %d goes on after all", self.rank)
                continue
            os._exit(HUNG)

    def _write_stacks(self) -> None:
        message = f"rank {self.rank}: nothing has moved for {self.timeout_s / 60:g} minutes (train.hang_minutes)"
        print(f"error: {message}; the stacks of its threads are in {self.file}", file=sys.stderr, flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}; every thread's stack:\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
