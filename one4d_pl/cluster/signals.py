"""Signals remembered from the first moment on, and how a process of a run ends; nothing heavier than the stdlib.

A signal only sets a flag (Stop.number). callbacks/survival.py lets all ranks agree on it at a step boundary, saves,
leaves a marker (preemption.py) and ends the run; saving inside a signal handler deadlocks, since the ranks are at
different places.

Exit codes of `fit`: 0 done, 1 a failure, 2 a mistake of the user, 75 preempted (saved, marker left: start it again),
76 hung (watchdog.py), 130 interrupted from the keyboard (saved if training had begun, no marker). Only rank 0 exits
with 75 or 130, the others with 0: launchers kill every process as soon as one of them fails.
"""

from __future__ import annotations

import _thread
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import NoReturn

from one4d_pl import interrupts
from one4d_pl.interrupts import INTERRUPTED

log = logging.getLogger(__name__)

PREEMPTED = 75  # sysexits' "temporary failure, try again"
LAUNCHER_VARIABLE = "ONE4D_LAUNCHER_PID"  # set by a process whose children are ranks of the same run
PR_SET_PDEATHSIG = 1
PARENT_POLL_S = 1.0


class Stop:
    """Which signal asked this process to stop; one object per process, made before the heavy imports.

    The signals are blocked in every thread and fetched by one that waits for them. So nothing is interrupted, handlers
    that libraries install later are never called, and processes that are started (loader workers, other ranks) inherit
    the block: a signal to the whole job does not kill them, one that comes while they start waits for their own Stop.
    """

    def __init__(self) -> None:
        self.number = 0  # 0: none; a termination outranks an interrupt from the keyboard
        self.training = False  # whether there is something to save
        self._interrupts = 0

    def watch(self) -> None:
        """Begin to remember SIGUSR1, SIGTERM and SIGINT; to be called first, in the main thread."""
        watched = {signal.SIGUSR1, signal.SIGTERM}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: a shell's background job
            watched.add(signal.SIGINT)
            interrupts.prepare()
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        threading.Thread(target=self._wait, args=(watched,), daemon=True, name="signals").start()
        # multiprocessing starts this helper with the first loader worker, and unblocks two signals as it does
        signal.signal(signal.SIGTERM, lambda number, frame: self._remember(number))
        # it frees what workers share when this process leaves at once (end_process), which is no news to anybody
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def _wait(self, watched: set[signal.Signals]) -> None:
        while True:
            number = signal.sigwait(watched)
            self._remember(number)
            log.warning("%s received", signal.Signals(number).name)
            if number == signal.SIGINT:
                self._interrupts += 1
                self._interrupt()

    def _remember(self, number: int) -> None:
        self.number = max(self.number, number)

    def _interrupt(self) -> None:
        """From the keyboard: after the step at hand, then at once (a KeyboardInterrupt), then by force.

        Before training there is nothing to save: at once, as every other command (interrupts.py).
        """
        if not self.training:
            interrupts.end()
        elif self._interrupts == 1:
            log.warning("stopping after this step; interrupt again to stop without saving")
        elif self._interrupts == 2:
            _thread.interrupt_main()
        else:
            os._exit(INTERRUPTED)


STOP = Stop()  # of this process; `fit` watches it


def exit_code(number: int) -> int:
    """Of a run that a signal made stop."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def early_rank(devices: int) -> int:
    """This process's rank in the run, as its launcher put it into the environment; `devices` per node."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or int(launcher) == os.getpid():  # else a rank that rank 0 started, with rank 0's environment
        for name in ("RANK", "SLURM_PROCID"):
            if name in os.environ:
                return int(os.environ[name])
    return int(os.environ.get("NODE_RANK", 0)) * devices + int(os.environ.get("LOCAL_RANK", 0))


def die_with_launcher() -> None:
    """Ranks that rank 0 starts as its children end when it ends, however it ends; others are left alone."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
        return
    end_with_parent(int(launcher), signal.SIGKILL)


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Let this process get a signal when its parent ends, however that ends; exits at once where it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    else:
        threading.Thread(target=_watch_parent, args=(parent, number), daemon=True, name="follow-parent").start()
    if os.getppid() != parent:  # it was gone before prctl
        os._exit(1)


def _watch_parent(parent: int, number: signal.Signals) -> None:
    """For systems whose kernel does not tell: a process whose parent is gone gets another one."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), number)


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run a door and leave with its exit code, without waiting for anyone.

    Python would terminate loader workers by SIGTERM and wait for them, who have it blocked (Stop); they end by
    themselves when this process is gone (data/worker.py).
    """
    code = 1
    try:
        code = main()
    except SystemExit as stop:  # argparse
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        log.exception("the run failed")
    finally:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
