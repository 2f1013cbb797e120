"""Tests that fork do so from a process of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

from one4d_pl.data.worker import follow_parent


def in_own_process(function: Callable[..., None], *arguments: object, seconds: float = 240) -> None:
    """Run a module's function in a fresh interpreter; fails if it raises or takes longer.

    The process of the tests has threads by then, of torch, servers and pools: what is forked from it may wait for ever
    for a lock that one of them held.
    """
    process = multiprocessing.get_context("spawn").Process(target=_followed, args=(function, *arguments))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{function.__name__} was not done after {seconds} s")
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}: see its traceback above"


def _followed(function: Callable[..., None], *arguments: object) -> None:
    follow_parent()  # tests that are killed leave nothing behind
    function(*arguments)
