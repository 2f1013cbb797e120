"""Worker processes: one thread each, and they end when the process they work for does."""

from __future__ import annotations

from one4d_pl.interrupts import follow_parent


def become_worker(number: int = 0) -> None:
    """Prepare a process of multiprocessing's; to be called first. A DataLoader passes its number.

    A worker that waits for work would wait for ever once its employer is gone, and keep the output open that it
    inherited (`fit | tee log`). Its parent may be a fork server, which itself waits for its workers. So it watches the
    process that asked for it, through a pipe that closes however that process ends.
    """
    import torch  # here, so that commands which start workers need not import it

    torch.set_num_threads(1)  # the cores are the training process's
    follow_parent()
