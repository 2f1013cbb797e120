"""Ctrl-C: the process ends at once with exit code 130.

It leaves no traceback, no child and no half-written file. A KeyboardInterrupt would have to pass
through imports, C extensions and other people's `except:`, which swallow it, print it or turn it
into another error. So SIGINT raises nothing:

1. `watch` blocks it in the main thread; later threads and processes inherit that. Ctrl-C goes to every process of a
   terminal, and children would print a traceback each.
2. One thread waits for it. It lets the main thread stop at its next bytecode, outside `uninterrupted` sections.
3. Then nothing of ours runs any more: what `at_interrupt` has registered is called, children are ended, and the process
   exits without unwinding the stack. After a second Ctrl-C all that has one second; a third exits at once.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # exit code 128 + SIGINT, as in shells
# how long to wait for the main thread to stop; inside a long call of C it is left, and stops when that returns
STOP_S = 0.5
CHILDREN_S = 3.0  # how long children may take to end after SIGTERM; then SIGKILL
UNDO_S, HURRY_S = 120.0, 1.0  # for all of the ending; the same after a second Ctrl-C

_undo: dict[object, Callable[[], object]] = {}
_section = threading.RLock()
_sections = 0  # how many `uninterrupted` sections are open, nested ones counted
_ending, _hurried, _stopped = threading.Event(), threading.Event(), threading.Event()
_watcher: threading.Thread | None = None


def watch() -> None:
    """Let Ctrl-C end this process from now on. Call it in the main thread before heavy imports start threads."""
    global _watcher
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell: Ctrl-C is not for it
        return
    prepare()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _watcher = threading.Thread(target=_wait, daemon=True, name="interrupts")
    _watcher.start()


def prepare() -> None:
    """Install, in the main thread, the handler by which `end` stops it; until then SIGINT is a KeyboardInterrupt."""
    signal.signal(signal.SIGINT, _on_interrupt)


def before_workers() -> None:
    """Start multiprocessing's resource tracker, which unblocks SIGINT, and block it again before workers start."""
    from multiprocessing import resource_tracker

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def follow_parent() -> None:
    """End this worker process, as `end` does, when its parent ends or terminates it."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None
    prepare()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C reaches the parent too, which decides
    signal.signal(signal.SIGTERM, lambda number, frame: end())

    def follow() -> None:
        parent.join()
        end()

    _in_thread(follow)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Make interrupts wait for a short section: some renames, or the start of a child."""
    global _sections
    with _section:
        _sections += 1
        try:
            yield
        finally:
            _sections -= 1
    if _ending.is_set() and threading.current_thread() is threading.main_thread():
        _stop()


@contextlib.contextmanager
def at_interrupt(undo: Callable[[], object]) -> Iterator[None]:
    """Register `undo`: an interrupt in this section calls it, from another thread, the last registered one first."""
    key = object()
    _undo[key] = undo
    try:
        yield
    finally:
        del _undo[key]


def end(message: str = "") -> None:
    """End the process with code 130, as the module's docstring says; a second call within a second, a third at once."""
    if _hurried.is_set():
        os._exit(INTERRUPTED)
    elif _ending.is_set():
        _hurried.set()
        _in_thread(lambda: _leave_after(HURRY_S))
    else:
        _ending.set()
        _in_thread(lambda: _leave_after(UNDO_S))
        _in_thread(lambda: _leave(message))


def _leave(message: str) -> NoReturn:
    _thread.interrupt_main()
    _stopped.wait(STOP_S)
    _section.acquire(timeout=UNDO_S)
    if message:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # other threads may print tracebacks from here on; nobody needs them
    for undo in reversed(list(_undo.values())):
        with contextlib.suppress(Exception):
            undo()
    _end_children()
    _bounded(sys.stdout.flush)
    os._exit(INTERRUPTED)


def _wait() -> None:
    while True:
        signal.sigwait({signal.SIGINT})
        end("interrupted")


def _leave_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(INTERRUPTED)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT, which Python does in the main thread, between two bytecodes."""
    if _stopped.is_set():
        end()
    elif _ending.is_set():
        if not _sections:
            _stop()
    elif _watcher is not None and _watcher.ident is not None:
        # the signal reached a thread that was started before `watch` and does not block it
        signal.pthread_kill(_watcher.ident, signal.SIGINT)
    else:
        raise KeyboardInterrupt


def _stop() -> NoReturn:
    _stopped.set()
    while True:
        time.sleep(0.1)


def _end_children() -> None:
    """End multiprocessing's children; free their semaphores, of which its tracker would warn."""
    multiprocessing, util = sys.modules.get("multiprocessing"), sys.modules.get("multiprocessing.util")
    if multiprocessing is None or util is None:
        return
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    deadline = time.monotonic() + CHILDREN_S
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()
    _bounded(lambda: util._run_finalizers(0))


def _bounded(work: Callable[[], object]) -> None:
    """Run `work` for a second at most. The stopped main thread may hold a lock that it waits for."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    _in_thread(quietly).join(1.0)


def _in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _forget() -> None:
    """Forget, in a forked child, the parent's registered functions and its waiting thread."""
    global _section, _sections, _watcher
    _undo.clear()
    _section, _sections, _watcher = threading.RLock(), 0, None


os.register_at_fork(after_in_child=_forget)
