"""Processes that work for another one: one thread each, and no life after it."""

from __future__ import annotations

from one4d_pl.interrupts import follow_parent


def become_worker(number: int = 0) -> None:
    """Prepare a process of multiprocessing's, with its number where a DataLoader calls; to be called first.

    A worker that waits for work would wait for ever once nobody is left to ask, and hold the output it inherited: what
    reads that (`fit | tee log`) would wait as well. Its parent may be a fork server, which in turn waits for its
    workers. So what is followed is the process that asked for this one, by a pipe that ends with it however it ends:
    no process id that another may have got since.
    """
    import torch  # doors that start workers need not have it

    torch.set_num_threads(1)  # the cores are the training process's
    follow_parent()
