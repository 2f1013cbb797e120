"""Which part of a video becomes a clip: what is measured of it, and the bounds that it is held to.

The measures are simple on purpose: each is one number that can be recomputed by hand and stands in the table beside the
decision. None of them knows what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from data_prep.shots import SMALL
from one4d_pl.scene.media import VideoReader

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])  # Rec. 709
TEXT_WIDTH = 640  # pixels; larger pictures are looked for text at this width
BLOCK = (8, 32)  # height, width of a block of it
STROKE = 48  # levels of 255; a step from one pixel to the next that may be the edge of a stroke
STROKES = 1.5  # of a block's mean row: so many rising steps and so many falling ones make it text
REPEATED = 1  # level; no cell of the small picture differs by more from the frame before: a repeated frame


@dataclass(frozen=True)
class Survey:
    """What one pass over a video keeps of it: 4 kB per frame."""

    fps: float
    size: tuple[int, int]  # height, width
    small: Tensor  # [T, 27, 48, 3] uint8
    text: Tensor  # [S, rows, columns] bool, blocks that look like text, every `text_step` frames
    text_step: int


@dataclass(frozen=True)
class Measures:
    """The numbers of one clip."""

    brightness: float  # mean luma, 0 .. 255
    motion: float  # mean change of a cell of the 48x27 picture within half a second, levels of 255
    still: float  # share of the frames that repeat the one before
    text: float  # share of the picture whose blocks look like text in at least half of the looks


@dataclass(frozen=True)
class Rules:
    """What a clip is held to."""

    num_frames: int
    min_side: int
    min_brightness: float
    min_motion: float
    max_motion: float
    max_still: float
    max_text: float

    def complaints(self, frames: int, size: tuple[int, int], measures: Measures) -> list[str]:
        """List what speaks against a clip; empty = it is kept. Of a short one nothing else is said."""
        if frames < self.num_frames:
            return [f"short: {frames} frames, need {self.num_frames}"]
        still, text = 100 * measures.still, 100 * measures.text
        found = {
            f"small: {size[1]}x{size[0]}, need {self.min_side} pixels on the short side": min(size) < self.min_side,
            f"dark: {measures.brightness:.0f} of 255": measures.brightness < self.min_brightness,
            f"frozen: {still:.0f} % of the frames repeat the one before": measures.still > self.max_still,
            f"hardly moves: {measures.motion:.2f} levels in half a second": measures.motion < self.min_motion,
            f"flickers or races: {measures.motion:.0f} levels in half a second": measures.motion > self.max_motion,
            f"text: on {text:.1f} % of the picture": measures.text > self.max_text,
        }
        return [reason for reason, raised in found.items() if raised]


def survey(video: VideoReader) -> Survey:
    """Look at every frame once; MediaError where the video is broken."""
    step = max(1, round(video.fps / 2))
    small, text = [], []
    size = (0, 0)
    for number, frame in enumerate(video):
        if number and frame.shape[:2] != size:
            raise ValueError(f"{video.path}: the picture's size changes from {size[1]}x{size[0]} at frame {number}")
        size = (frame.shape[0], frame.shape[1])
        channels = frame.permute(2, 0, 1).float()
        small.append(adaptive_avg_pool2d(channels, SMALL).round().byte().permute(1, 2, 0))
        if number % step == 0:
            text.append(text_blocks(channels))
    if not small:
        raise ValueError(f"{video.path}: no frame in it")
    return Survey(video.fps, size, torch.stack(small), torch.stack(text), step)


def text_blocks(picture: Tensor) -> Tensor:  # [3, H, W] float, 0 .. 255 -> [rows, columns] bool
    """Find blocks whose rows rise and fall as steeply and as often as those of letters."""
    _, height, width = picture.shape
    if width > TEXT_WIDTH:
        picture = adaptive_avg_pool2d(picture, (round(height * TEXT_WIDTH / width), TEXT_WIDTH))
    luma = (picture * LUMA[:, None, None]).sum(0)
    steps = luma.diff(dim=1, append=luma[:, -1:])  # [H, W]
    rows, columns = max(1, steps.shape[0] // BLOCK[0]), max(1, steps.shape[1] // BLOCK[1])
    blocks = steps[: rows * BLOCK[0], : columns * BLOCK[1]].reshape(rows, -1, columns, min(BLOCK[1], steps.shape[1]))
    rising, falling = ((blocks * sign >= STROKE).float().sum(3).mean(1) for sign in (1, -1))  # [rows, columns]
    return torch.minimum(rising, falling) >= STROKES


def measure(video: Survey, frames: range) -> Measures:
    """Measure a run of a video's frames."""
    small = video.small[frames.start : frames.stop].float()
    luma = small @ LUMA  # [T, 27, 48]
    changes = (small[1:] - small[:-1]).abs().amax((1, 2, 3)) if len(small) > 1 else torch.zeros(1)
    reach = min(max(1, round(video.fps / 2)), max(1, len(small) - 1))
    moved = (luma[reach:] - luma[:-reach]).abs() if len(small) > 1 else torch.zeros(1)
    looks = video.text[-(-frames.start // video.text_step) : max(1, -(-frames.stop // video.text_step))]
    looks = looks if len(looks) else video.text[frames.start // video.text_step :][:1]
    return Measures(
        brightness=float(luma.mean()),
        motion=float(moved.mean()),
        still=float((changes <= REPEATED).float().mean()),
        text=float((looks.float().mean(0) >= 0.5).float().mean()),
    )
