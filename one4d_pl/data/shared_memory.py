"""The shared memory that clips from the loaders' workers need; where it is too small, training would hang."""

from __future__ import annotations

import shutil
from pathlib import Path

from one4d_pl.config import Config, ConfigError
from one4d_pl.data.encoded import trains_on_encoded

PREFETCH = 2  # batches that a worker makes ahead
SHARED_MEMORY = Path("/dev/shm")  # where torch puts them on Linux
BYTES_PER_PIXEL = 2 * 3 * 4 + 2  # of a raw clip: frames and pointmap in float32, two masks


def needed_bytes(config: Config) -> int:
    """Count one node's bytes of batches that workers keep ready for training and validation."""
    data, train = config.data, config.train
    clip = data.num_frames * data.height * data.width * BYTES_PER_PIXEL
    ready = PREFETCH * data.num_workers
    training = 0 if trains_on_encoded(config) else ready * train.micro_batch_size
    validation = min(ready, -(-config.val.clips // train.world_size))
    return train.devices * clip * (training + validation)


def refuse_small_shared_memory(config: Config) -> None:
    """Raise ConfigError where this node's shared memory is too small for the clips in it."""
    if not config.data.num_workers or not SHARED_MEMORY.is_dir():
        return
    needed, free = needed_bytes(config), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"data.num_workers: {config.data.num_workers} workers of {config.train.devices} processes keep "
            f"{needed / 1e9:.2g} GB of clips ready in shared memory, {SHARED_MEMORY} has {free / 1e9:.2g} GB free "
            f"here; give a container more (docker run --shm-size={-(-needed // 10**9) + 1}g), lower data.num_workers, "
            "or train on encoded shards"
        )
