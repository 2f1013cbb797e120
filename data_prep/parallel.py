"""One function over many items in several processes; an error in one of them ends the run."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from one4d_pl.data.worker import become_worker
from one4d_pl.errors import UserError
from one4d_pl.interrupts import before_workers, uninterrupted

QUIET_S = 600.0  # without a result; then a warning says what may be the cause

log = logging.getLogger("data_prep")

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Item], Result],  # of a module, so that a new process can import it
    items: Iterable[Item],
    jobs: int,
) -> Iterator[Result]:
    """Yield the results as they come, in any order.

    Two items per process are under way, so that a slow one holds up no other. One job runs in this
    process. Several run in new ones with a thread each (forked copies of a process that uses OpenMP
    can hang); they end when this one does, however it ends. UserError where one of them was killed.
    """
    if jobs == 1:
        yield from map(function, items)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by OpenMP when a new process loads it
    before_workers()
    context = multiprocessing.get_context("spawn")
    queue, running = deque(items), set[Future[Result]]()
    executor = ProcessPoolExecutor(min(jobs, len(queue) or 1), context, initializer=become_worker)
    try:
        while queue or running:
            while queue and len(running) < 2 * jobs:
                with uninterrupted():  # submit may start a process
                    running.add(executor.submit(function, queue.popleft()))
            done, running = wait(running, QUIET_S, return_when=FIRST_COMPLETED)
            if not done:
                log.warning("nothing was finished for %g s; a disk may hang, or the next item is a long one", QUIET_S)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        remedy = "start again to go on, with fewer --jobs where memory ran out"
        raise UserError(f"a process of the pool was killed from outside; {remedy}") from error
    finally:
        executor.shutdown(cancel_futures=True)
