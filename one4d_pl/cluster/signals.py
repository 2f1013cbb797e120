"""Signals, remembered from the start of a process, and how a process of a run ends.

Imports only the stdlib. A signal only sets a flag (Stop.number). survival.py lets all ranks agree
on it at a step boundary, saves a checkpoint, leaves a marker (restarts.py) and ends the run. Saving
inside a signal handler would deadlock, since the ranks are at different places.

Exit codes of `fit`: 0 done, 1 a failure, 2 a mistake of the user, 75 preempted (saved, marker left: start it again), 76
hung (watchdog.py), 130 interrupted from the keyboard (saved if training had begun, no marker). Only rank 0 exits with
75 or 130, the others with 0: launchers kill every process as soon as one of them fails.
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
    """The signal that asked this process to stop.

    One object per process, made before the heavy imports. The signals are blocked in every thread, and one thread waits
    for them. So nothing is interrupted, and handlers that libraries install later are never called. Processes that are
    started (loader workers, other ranks) inherit the block: a signal to the whole job does not kill them, and one that
    comes while they start waits for their own Stop.
    """

    def __init__(self) -> None:
        self.number = 0  # 0 = none; a termination takes precedence over an interrupt from the keyboard
        self.training = False  # True once there is something to save
        self._interrupts = 0

    def watch(self) -> None:
        """Begin to remember SIGUSR1, SIGTERM and SIGINT; to be called first, in the main thread."""
        watched = {signal.SIGUSR1, signal.SIGTERM}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
            watched.add(signal.SIGINT)
            interrupts.prepare()
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        threading.Thread(target=self._wait, args=(watched,), daemon=True, name="signals").start()
        # multiprocessing would start its resource tracker with the first loader worker, and unblock
        # SIGINT and SIGTERM for that moment: start it now, with a handler, and block them again
        signal.signal(signal.SIGTERM, lambda number, frame: self._remember(number))
        # the tracker frees what workers share after end_process, and need not warn about that
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
        """Handle Ctrl-C: stop after the present step; a second one stops at once, a third by force.

        Before training there is nothing to save, and the first one ends the process as in every
        other command (interrupts.py).
        """
        if not self.training:
            interrupts.end()
        elif self._interrupts == 1:
            log.warning("stopping after this step; interrupt again to stop without saving")
        elif self._interrupts == 2:
            _thread.interrupt_main()
        else:
            os._exit(INTERRUPTED)


STOP = Stop()  # this process's; `fit` calls its `watch`


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal has stopped."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def early_rank(devices: int) -> int:
    """Read this process's rank from its launcher's variables; `devices` is the number per node."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    # a rank that rank 0 has started has rank 0's environment, and so another process's RANK
    if launcher is None or int(launcher) == os.getpid():
        for name in ("RANK", "SLURM_PROCID"):
            if name in os.environ:
                return int(os.environ[name])
    return int(os.environ.get("NODE_RANK", 0)) * devices + int(os.environ.get("LOCAL_RANK", 0))


def die_with_launcher() -> None:
    """End this process when rank 0 ends, however it ends, if rank 0 has started it as its child."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
        return
    end_with_parent(int(launcher), signal.SIGKILL)


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Send this process a signal when its parent ends, however it ends. Exit at once if it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    else:
        threading.Thread(target=_watch_parent, args=(parent, number), daemon=True, name="follow-parent").start()
    if os.getppid() != parent:  # it ended before prctl
        os._exit(1)


def _watch_parent(parent: int, number: signal.Signals) -> None:
    """Send the signal when the parent is gone, for systems whose kernel does not do so."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), number)


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run a command's `main` and exit with its code, without waiting for other processes.

    Python would send loader workers SIGTERM, which they have blocked (Stop), and wait for them.
    They end by themselves when this process is gone (data/worker.py).
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
