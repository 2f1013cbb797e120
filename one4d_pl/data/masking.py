"""The frames that are given: Unified Masked Conditioning's draw (One4D, sec. 3.3, 4.1)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from one4d_pl.config import MaskingConfig
from one4d_pl.types import TASKS, Task


def _probs(config: MaskingConfig) -> tuple[float, ...]:  # of TASKS
    return config.text_prob, config.image_prob, config.sparse_prob, config.video_prob


def trained_tasks(config: MaskingConfig) -> list[Task]:
    """List the tasks that are drawn at all."""
    return [task for task, prob in zip(TASKS, _probs(config), strict=True) if prob > 0]


def draw_task(config: MaskingConfig, generator: np.random.Generator) -> Task:
    """Draw one of the four tasks with the configured probabilities."""
    bounds = np.cumsum(_probs(config))
    # from uniform numbers alone: numpy may change how choice and permutation work, and runs must resume exactly
    drawn = np.searchsorted(bounds / bounds[-1], generator.random(), side="right")
    return TASKS[int(drawn)]


def draw_frame_mask(task: Task, num_frames: int, generator: np.random.Generator) -> Tensor:  # [T] bool, 1 = given
    """Draw a task's given frames. Sparse: frame 0, with probability 0.5 the last; in all 2..T-1, log-uniform."""
    given = torch.zeros(num_frames, dtype=torch.bool)
    if task == "video":
        given[:] = True
    elif task == "image":
        given[0] = True
    elif task == "sparse":
        # floor of a log-uniform number in [2, T): every count 2..T-1 occurs
        count = int(math.exp(generator.uniform(math.log(2), math.log(num_frames))))
        count = min(max(count, 2), num_frames - 1)
        given[0] = True  # frame 0 defines the world
        given[-1] = bool(generator.random() < 0.5)
        inner = 1 + np.argsort(generator.random(num_frames - 2))[: count - int(given.sum())]
        given[torch.from_numpy(inner)] = True
    return given


def task_of(frame_mask: Tensor) -> Task:  # [T] bool
    """Return the task that a set of given frames amounts to."""
    count = int(frame_mask.sum())
    if count == 0:
        return "text"
    if count == len(frame_mask):
        return "video"
    return "image" if count == 1 and bool(frame_mask[0]) else "sparse"
