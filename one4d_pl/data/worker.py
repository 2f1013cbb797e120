"""Worker processes: one thread each, and they end when the process they work for does."""

from __future__ import annotations

from one4d_pl.interrupts import follow_parent


def become_worker(number: int = 0) -> None:
    """Prepare a process of multiprocessing's; to be called first. A DataLoader passes its number.

    A worker that waits for work would wait for ever once its employer is gone. It would also keep
    the output open that it inherited, so that whatever reads that (`fit | tee log`) would wait,
    too. The worker's parent may be a fork server, which itself waits for its workers. So the worker
    watches the process that asked for it, through a pipe that closes however that process ends; a
    process id might belong to another one by then.
    """
    import torch  # here, so that commands which start workers need not import it

    torch.set_num_threads(1)  # the cores are the training process's
    follow_parent()
