"""A lock for one run per folder: two would delete each other's checkpoints or resume them."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from one4d_pl.config import ConfigError
from one4d_pl.data.file_lock import locked

log = logging.getLogger(__name__)

LOCK = "fit.lock"
# how long to wait for a lock: a killed process keeps it until its memory is freed; a file server
# keeps a lost node's until the lease ends (NFS: 90 s)
PATIENCE_S, PATIENCE_ELSEWHERE_S = 5.0, 120.0
POLL_S = 0.2
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # NFS or Lustre without them


@contextmanager
def sole_run(run_dir: str) -> Iterator[None]:
    """Keep other processes from training in the run folder; for rank 0.

    The lock ends with the process. Raises ConfigError where another one is training there; warns
    where the file system has no locks.
    """
    path = Path(run_dir) / LOCK
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(_locked(path))
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}".encode())
            file.flush()
        except TimeoutError:
            raise ConfigError(
                f"run_dir: {_owner(path) or 'another process'} is training in {run_dir}; wait until it is done, or set "
                "another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ConfigError(f"run_dir: cannot write to {run_dir} ({error.strerror}); set another") from None
            log.warning("run_dir: no file locks at %s (%s): see to it that only one run uses it", path, error.strerror)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Lock the file; TimeoutError where the process that holds it does not end soon."""
    owner = _owner(path)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(locked(path, PATIENCE_S, POLL_S))
        except TimeoutError:
            if not owner or owner.endswith(f" of {socket.gethostname()}"):
                raise
            log.warning("run_dir: %s has the lock %s; waiting %g s for it", owner, path, PATIENCE_ELSEWHERE_S)
            file = stack.enter_context(locked(path, PATIENCE_ELSEWHERE_S, POLL_S))
        yield file


def _owner(path: Path) -> str:
    """Read which process last held the lock, as it wrote into it. Returns "" where nothing can be read."""
    try:
        return path.read_text(errors="replace")[:200]
    except OSError:
        return ""
