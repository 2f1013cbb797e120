"""Clips on their way from the loaders' workers lie in shared memory; where it is small, training would hang."""

from __future__ import annotations

import shutil
from pathlib import Path

from one4d_pl.config import Config, ConfigError
from one4d_pl.data.encoded import trains_on_encoded

PREFETCH = 2  # batches that a worker makes ahead
PLACE = Path("/dev/shm")  # where torch puts them on Linux
BYTES_PER_PIXEL = 2 * 3 * 4 + 2  # of a raw clip: frames and pointmap in float32, two masks


def needed_bytes(config: Config) -> int:
    """Count one node's bytes: the batches that its workers have ready in training, and a validation's beside them."""
    data, train = config.data, config.train
    clip = data.num_frames * data.height * data.width * BYTES_PER_PIXEL
    ready = PREFETCH * data.num_workers
    training = 0 if trains_on_encoded(config) else ready * train.micro_batch_size
    validation = min(ready, -(-config.val.clips // train.world_size))
    return train.devices * clip * (training + validation)


def refuse_small_shared_memory(config: Config) -> None:
    """Raise ConfigError where the clips in flight are more than this node's shared memory can take."""
    if not config.data.num_workers or not PLACE.is_dir():
        return
    needed, free = needed_bytes(config), shutil.disk_usage(PLACE).free
    if needed > free:
        raise ConfigError(
            f"data.num_workers: {config.data.num_workers} workers of {config.train.devices} processes keep "
            f"{needed / 1e9:.2g} GB of clips ready in shared memory, {PLACE} has {free / 1e9:.2g} GB free here; give a "
            f"container more (docker run --shm-size={-(-needed // 10**9) + 1}g), lower data.num_workers, or train on "
            "encoded shards"
        )
