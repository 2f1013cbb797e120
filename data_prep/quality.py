"""Rejection of clips that are not worth training on: cuts, frozen frames, hardly any depth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from one4d_pl.types import Clip

GRID = 24  # cells per side of the small pictures that are compared
FROZEN_STEP = 0.5  # levels (of 255); between two frozen frames no cell changes by more
FROZEN_SHARE = 0.5  # of a clip's steps
CUT_STEP = 8.0  # levels; a cut changes the mean cell by at least this ...
CUT_RATIO = 3.5  # ... and by this many times the clip's median step
CUT_HISTOGRAM = 0.1  # ... and moves at least this share of the pixels to other grey levels
MIN_VALID = 0.02  # share of a clip's pixels with known depth


def reject_reason(clip: Clip) -> str | None:
    """Say why a clip should be dropped; None if it should not."""
    valid = float(clip.valid.float().mean())
    if valid < MIN_VALID:
        return f"hardly any depth: {100 * valid:.1f} % of the pixels, need {100 * MIN_VALID:.0f} %"
    # channel by channel, so that a change of colour alone counts
    small = torch.stack([adaptive_avg_pool2d(frame.permute(2, 0, 1).float(), GRID) for frame in clip.frames])
    steps = (small[1:] - small[:-1]).abs()  # [T - 1, 3, GRID, GRID]
    frozen = float((steps.amax((1, 2, 3)) <= FROZEN_STEP).float().mean())
    if frozen > FROZEN_SHARE:
        return f"frozen: {100 * frozen:.0f} % of the frames repeat the one before"
    if (cut := _find_cut(clip.frames, steps.mean((1, 2, 3)))) is not None:
        return f"a cut before frame {cut}"
    return None


def _find_cut(
    frames: Tensor,  # [T, H, W, 3] uint8
    steps: Tensor,  # [T - 1], mean change of a cell
) -> int | None:
    """Find the first frame that starts another shot.

    A cut changes the cells within one step and also the histogram of levels. Motion, a pan or a
    flash do only one of the two.
    """
    jumps = (steps >= CUT_STEP) & (steps >= CUT_RATIO * steps.median())
    for step in jumps.nonzero()[:, 0].tolist():
        before, after = (_histogram(frames[t]) for t in (step, step + 1))
        if float((before - after).abs().sum()) / 2 >= CUT_HISTOGRAM:
            return step + 1
    return None


def _histogram(frame: Tensor) -> Tensor:  # [H, W, 3] uint8 -> [16], sums to 1
    grey = frame.float().mean(-1)
    return torch.histc(grey, 16, 0, 255) / grey.numel()
