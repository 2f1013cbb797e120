"""Would a clip's files fit better if they were read by another convention? One answer per convention, with its margin.

A source that is read the wrong way round still gives finite numbers. So every clip is read again in each way that
files are commonly mistaken, and the readings are compared on several pairs of frames, near and far apart:

1. Points of frame i are lifted, moved by the cameras and projected into frame j.
2. Their depth there is compared with frame j's depth, their colour (locally normalised, so that exposure counts for
   nothing) with frame j's colour. Errors are cut: what moves or is hidden is wrong under every reading.
3. A pair counts by how far the two readings land apart in it: a camera that hardly moves tells nothing.

A margin is the share of the misfit that another reading takes away; below 0 it adds as much. Another reading is
believed where it takes away a third of the misfit of depth or of colour and adds nothing to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, pad

from one4d_pl.geometry.camera import camera_rays
from one4d_pl.geometry.se3 import (
    invert_se3,
    matrix_to_xyzw,
    relative_se3,
    rotate,
    se3_matrix,
    split_se3,
    xyzw_to_matrix,
)
from one4d_pl.types import Clip

CLEAR_MARGIN = 1 / 3  # of the misfit of depth or of colour: another reading is believed, or the given one confirmed
SLACK = 0.03  # of the other one's misfit, which a right reading may add by chance
DEPTH_CUT = 0.1  # error of log depth that counts as wrong altogether
COLOUR_CUT = 1.5  # ... of colour, in local standard deviations
POINTS = 1200  # of each frame of a pair, about
FACTOR_EVERY = 4  # factors on depth are many and far apart: every fourth point tells them
THIN_WIDTH = 320  # pixels; larger maps are thinned out to about that
LEAST_SEEN = 0.25  # share of a frame's points that must land in the other one
FURTHEST = 0.1  # image widths (and relative depth): landing further apart makes a pair no more telling
# Factors on depth, five per decade; within lie millimetres for metres (1000), raw codes of TUM and Bonn (5000) and of
# sensors with steps of 0.1 mm (10000), and the other way round. Below a factor of 2 a focal length explains as much.
FACTORS = [f for f in torch.logspace(-4, 4, 41).tolist() if abs(math.log(f)) > math.log(2)]

# What is said of a clip that another reading fits. The first three and the quaternions are about its rotations.
READINGS = {
    "world-to-camera": "cameras look like world-to-camera",
    "OpenGL axes": "camera axes look like OpenGL's (y up, z backward)",
    "body axes": "camera axes look like x forward, y right, z down",
    "quaternions wxyz": "rotations look like quaternions w x y z that were read as x y z w",
    "quaternions xyzw": "rotations look like quaternions x y z w that were read as w x y z",
    "cameras early": "frame t looks to have the camera of frame t + 1",
    "cameras late": "frame t looks to have the camera of frame t - 1",
    "focal / 2": "the focal length looks twice too long",
    "focal x 2": "the focal length looks twice too short",
    "ray length": "depth looks like ray length, not z",
    "disparity": "depth looks like 1 / z",
}


@dataclass(frozen=True)
class ReadingMargins:
    """What the readings of one clip say about each other."""

    static_error: float  # of depth as given: median over pairs of frames of the points' median; nan = no shared view
    margins: dict[str, tuple[float, float]]  # by reading: of depth, of colour; {} = nothing can be compared
    depth_scale: float  # factor on depth that the cameras ask for; 1 = none; nan = their motion cannot tell


def believed_reading(margins: dict[str, tuple[float, float]]) -> str | None:
    """The clearest of the readings that are believed; None = the given one stays."""
    told = [name for name, margin in margins.items() if verdict(margin) > 0]
    return max(told, key=lambda name: sum(margins[name]), default=None)


def verdict(margin: tuple[float, float]) -> int:
    """1 = the other reading is believed, -1 = the given one is confirmed against it, 0 = cannot be told."""
    if max(margin) >= CLEAR_MARGIN and min(margin) >= -SLACK:
        return 1
    return -1 if min(margin) <= -CLEAR_MARGIN and max(margin) <= SLACK else 0


def compare_readings(clip: Clip) -> ReadingMargins:
    """Compare the given reading of a clip with every other; it needs a valid pixel."""
    pairs = _pairs(clip.num_frames)
    if not pairs:
        return ReadingMargins(math.nan, {}, math.nan)
    views = _Views.of(clip, pairs)
    given = views.land(views.given(), 1)
    if not bool(given.usable.any()):
        return ReadingMargins(math.nan, {}, math.nan)
    static = given.depth_error.where(given.inside, torch.nan).nanmedian(1).values
    margins = {
        name: _margin(given, views.land(reading, 1), reading.usable(views.pairs))
        for name, reading in views.other_readings(clip.num_frames)
    }
    every = views.land(views.given(), FACTOR_EVERY)
    scaled = {
        factor: _margin(every, views.land(views.scaled(factor), FACTOR_EVERY), torch.ones(len(pairs), dtype=torch.bool))
        for factor in FACTORS
    }
    clearest = max(FACTORS, key=lambda factor: (verdict(scaled[factor]), sum(scaled[factor])))
    margins[f"depth x{clearest:.3g}"] = scaled[clearest]
    if believed_reading(margins) == f"depth x{clearest:.3g}":
        scale = clearest
    else:
        scale = 1.0 if max(verdict(margin) for margin in scaled.values()) < 0 else math.nan
    return ReadingMargins(float(static.where(given.seen, torch.nan).nanmedian()), margins, scale)


@dataclass(frozen=True)
class _Reading:
    """Depth and cameras of the views, by some convention."""

    depth: Tensor  # [V, H, W]
    intrinsics: Tensor  # [V, 3, 3]
    cam2world: Tensor  # [V, 4, 4] float64
    known: Tensor  # [V] bool, the camera is there

    def usable(self, pairs: Tensor) -> Tensor:  # [P, 2] -> [P] bool
        return self.known[pairs].all(1)


@dataclass(frozen=True)
class _Landing:
    """Where the points of each pair's first frame land in its second one, and what is there."""

    pixels: Tensor  # [P, N, 2], image widths
    depth: Tensor  # [P, N]
    depth_error: Tensor  # [P, N], of log depth
    colour_error: Tensor  # [P, N], local standard deviations
    inside: Tensor  # [P, N] bool, lands on a known static surface
    seen: Tensor  # [P] bool, enough do
    usable: Tensor  # [P, N] bool, can be lifted at all


@dataclass(frozen=True)
class _Views:
    """The frames that the pairs need, thinned out."""

    pairs: Tensor  # [P, 2], numbers of views
    frames: Tensor  # [V], their frame numbers
    depth: Tensor  # [V, H, W] float32
    static: Tensor  # [V, H, W] bool, known and not moving
    grey: Tensor  # [V, H, W], locally normalised
    intrinsics: Tensor  # [V, 3, 3] float64, pixels of the thinned maps
    cam2world: Tensor  # [T, 4, 4] float64, of all frames
    maps: Tensor  # [P, 3, H, W], what lies in each pair's second frame: see _maps

    @staticmethod
    def of(clip: Clip, pairs: list[tuple[int, int]]) -> _Views:
        frames = sorted({frame for pair in pairs for frame in pair})
        every = max(1, round(clip.depth.shape[2] / THIN_WIDTH))
        first = every // 2  # the middle of each square, where `every` is odd
        grey = _blurred(clip.frames[frames].float().mean(-1), 2 * (every // 2) + 1)[:, first::every, first::every]
        static = clip.valid[frames]
        if clip.moving is not None:
            static = static & ~clip.moving[frames]
        static = static[:, first::every, first::every]
        depth = clip.depth[frames][:, first::every, first::every].float().where(static, 1.0)
        intrinsics = clip.intrinsics[frames].double()
        intrinsics[:, :2, 2] -= first + 0.5 - 0.5 * every  # pixel first + every · n becomes pixel n
        intrinsics[:, :2] /= every
        grey = _locally_normalised(grey)
        numbers = torch.tensor([[frames.index(frame) for frame in pair] for pair in pairs])
        maps = _maps(depth, static, grey)[numbers[:, 1]]
        return _Views(numbers, torch.tensor(frames), depth, static, grey, intrinsics, clip.cam2world.double(), maps)

    def given(self) -> _Reading:
        return self._reading(self.depth, self.intrinsics, self.cam2world)

    def scaled(self, factor: float) -> _Reading:
        """Depth times a factor; the cameras nearer to each other are the same, and leave the depth maps as they are."""
        rotation, centre = split_se3(self.cam2world)
        return self._reading(self.depth, self.intrinsics, se3_matrix(rotation, (centre - centre[:1]) / factor))

    def other_readings(self, num_frames: int) -> Iterator[tuple[str, _Reading]]:
        """What the files would mean by each of READINGS."""
        rotation, centre = split_se3(self.cam2world)
        yield "world-to-camera", self._reading(self.depth, self.intrinsics, invert_se3(self.cam2world))
        flip = torch.diag(torch.tensor([1.0, -1, -1], dtype=torch.float64))
        body = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)  # of OpenCV's axes
        quaternion = matrix_to_xyzw(rotation)
        for name, turned in (
            ("OpenGL axes", rotation @ flip),
            ("body axes", rotation @ body),
            ("quaternions wxyz", xyzw_to_matrix(quaternion.roll(-1, -1))),
            ("quaternions xyzw", xyzw_to_matrix(quaternion.roll(1, -1))),
        ):
            yield name, self._reading(self.depth, self.intrinsics, se3_matrix(turned, centre))
        for name, step in (("cameras early", -1), ("cameras late", 1)):
            numbers = torch.arange(num_frames) + step
            cameras = self.cam2world[numbers.clamp(0, num_frames - 1)]
            known = (numbers >= 0) & (numbers < num_frames)
            yield name, self._reading(self.depth, self.intrinsics, cameras, known)
        for name, zoom in (("focal / 2", 0.5), ("focal x 2", 2.0)):
            zoomed = self.intrinsics.clone()
            zoomed[:, 0, 0], zoomed[:, 1, 1] = zoom * zoomed[:, 0, 0], zoom * zoomed[:, 1, 1]
            yield name, self._reading(self.depth, zoomed, self.cam2world)
        height, width = self.depth.shape[1:]
        rays = camera_rays(height, width, self.intrinsics).norm(dim=-1).float()
        yield "ray length", self._reading(self.depth / rays, self.intrinsics, self.cam2world)
        yield "disparity", self._reading(1 / self.depth, self.intrinsics, self.cam2world)

    def _reading(self, depth: Tensor, intrinsics: Tensor, cam2world: Tensor, known: Tensor | None = None) -> _Reading:
        known = torch.ones(len(cam2world), dtype=torch.bool) if known is None else known
        return _Reading(depth, intrinsics, cam2world[self.frames], known[self.frames])

    def land(self, reading: _Reading, every: int) -> _Landing:
        """Move `every`-th of the points of each pair by a reading's cameras and look what is there."""
        height, width = self.depth.shape[1:]
        first, second = self.pairs.unbind(1)  # [P] each
        step = max(1, int((height * width / POINTS) ** 0.5))

        def points(maps: Tensor) -> Tensor:  # [V, H, W, ...] -> [P, N, ...]
            return maps[:, step // 2 :: step, step // 2 :: step].flatten(1, 2)[:, ::every][first]

        rays = camera_rays(height, width, reading.intrinsics).float()
        rotation, shift = split_se3(relative_se3(reading.cam2world[second], reading.cam2world[first]).float())
        moved = rotate(rotation[:, None], points(rays * reading.depth[..., None])) + shift[:, None]  # [P, N, 3]
        x, y, depth = moved.unbind(-1)
        fx, fy, cx, cy = (
            reading.intrinsics[second].float()[:, a, b, None] for a, b in ((0, 0), (1, 1), (0, 2), (1, 2))
        )
        pixels = torch.stack([fx * x / depth + cx, fy * y / depth + cy], -1)  # [P, N, 2]
        maps = self.maps if reading.depth is self.depth else _maps(reading.depth, self.static, self.grey)[second]
        grid = (pixels / pixels.new_tensor([width, height]) * 2 - 1).nan_to_num(-9).clamp(-9, 9)
        found = grid_sample(maps, grid[:, None], padding_mode="zeros", align_corners=False)[:, :, 0]  # [P, 3, N]
        usable = points(self.static)
        inside = usable & (depth > 0) & (found[:, 1] > 0.999)
        return _Landing(
            pixels=pixels / width,
            depth=depth,
            depth_error=(depth * found[:, 0]).where(inside, 1.0).log().abs(),
            colour_error=(points(self.grey) - found[:, 2]).abs(),
            inside=inside,
            seen=inside.sum(1) >= LEAST_SEEN * usable.sum(1).clamp_min(1),
            usable=usable,
        )


def _maps(depth: Tensor, static: Tensor, grey: Tensor) -> Tensor:  # [V, H, W] x 3 -> [V, 3, H, W]
    """Disparity, whose value between pixel centres is exact on every plane; where it is known; colour."""
    return torch.stack([(1 / depth).where(static, 0.0), static.float(), grey], 1)


def _margin(given: _Landing, other: _Landing, pairs: Tensor) -> tuple[float, float]:
    """Share of the given reading's misfit of depth and of colour that another one takes away, over `pairs` [P] bool."""
    weight = _telling(given, other) * pairs
    margins = []
    for name, cut in (("depth_error", DEPTH_CUT), ("colour_error", COLOUR_CUT)):
        ours, theirs = (_misfit(landing, getattr(landing, name), cut) for landing in (given, other))
        both = given.inside & other.inside
        wrong = both & (getattr(given, name) >= cut) & (getattr(other, name) >= cut)  # it moves, or is hidden
        common = wrong.sum(1) / both.sum(1).clamp_min(1)
        larger = (torch.maximum(ours, theirs) - common).clamp_min(1e-6)
        margins.append(float((weight * (ours - theirs)).sum() / (weight * larger).sum().clamp_min(1e-9)))
    return margins[0], margins[1]


def _misfit(landing: _Landing, error: Tensor, cut: float) -> Tensor:  # [P, N] -> [P] in [0, 1]
    mean = (error / cut).clamp_max(1).where(landing.inside, 0.0).sum(1) / landing.inside.sum(1).clamp_min(1)
    return mean.where(landing.seen, 1.0)  # throws its points off the image: no fit


def _telling(given: _Landing, other: _Landing) -> Tensor:  # [P]
    """How far apart two readings land in each pair: image widths, and half the relative depth."""
    apart = (other.pixels - given.pixels).norm(dim=-1).nan_to_num(FURTHEST).clamp_max(FURTHEST)
    deeper = (other.depth / given.depth).abs().clamp(0.5, 2).log().abs().nan_to_num(FURTHEST) / 2
    total = (apart + deeper.clamp_max(FURTHEST)).where(given.usable, 0.0).sum(1)
    return total / given.usable.sum(1).clamp_min(1)


def _pairs(num_frames: int) -> list[tuple[int, int]]:
    """Pairs of neighbours, of a quarter and of half a clip, and the ends; forward and backward in turn."""
    last, pairs = num_frames - 1, []
    for gap in sorted({1, max(1, num_frames // 4), max(1, num_frames // 2), last} - {0}):
        if gap <= last:
            starts = sorted({round(part * (last - gap) / 3) for part in range(4)})
            pairs += [(start, start + gap) for start in starts]
    return [pair if number % 2 == 0 else pair[::-1] for number, pair in enumerate(pairs)]


def _blurred(grey: Tensor, size: int) -> Tensor:  # [V, H, W]
    half = size // 2
    return avg_pool2d(pad(grey[:, None], (half, half, half, half), mode="replicate"), size, 1)[:, 0]


def _locally_normalised(grey: Tensor) -> Tensor:  # [V, H, W], 0 .. 255
    """Grey less its neighbourhood's mean, in its standard deviations; flat places stay near 0."""
    smooth = _blurred(grey, 5 if grey.shape[2] > 160 else 3)  # a point is seldom seen at the same place in its pixel
    size = 2 * (grey.shape[2] // 24) + 1
    mean = _blurred(smooth, size)
    spread = (_blurred(smooth.square(), size) - mean.square()).clamp_min(0).sqrt()
    return (smooth - mean) / (spread + 2)  # 2 of 255: noise is no texture
