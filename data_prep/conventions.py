"""Tests of whether a clip's files would fit better if they were read by another convention.

A source that is read by the wrong convention still gives finite numbers. So every clip is read again in each way that
files are commonly mistaken, and the readings are compared on several pairs of frames, near and far apart:

1. Points of frame i are lifted, moved by the cameras and projected into frame j.
2. Their depth there is compared with frame j's depth, their colour (locally normalised, so that exposure does not
   matter) with frame j's colour. Errors are cut: what moves or is hidden is wrong under every reading.
3. A pair is weighted by how far apart the two readings project its points: where the camera hardly moves, readings
   cannot be distinguished.

A margin is the share of the misfit that another reading removes; a negative margin is the share that it adds. Another
reading is believed where it removes a third of the misfit of depth or of colour and adds nothing to the other.
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

# of the misfit of depth or of colour, to believe another reading or to confirm the given one
CLEAR_MARGIN = 1 / 3
SLACK = 0.03  # of the other misfit, which a right reading may add by chance
DEPTH_CUT = 0.1  # error of log depth; larger ones count no more
COLOUR_CUT = 1.5  # the same for colour, in local standard deviations
POINTS = 1200  # of each frame of a pair, about
FACTOR_STRIDE = 4  # many factors on depth are tried; every fourth point is enough for them
THIN_WIDTH = 320  # pixels; larger maps are thinned out to about that
MIN_SEEN = 0.25  # share of a frame's points that must fall into the other one
MAX_SEPARATION = 0.1  # image widths (and relative depth); a larger separation adds no weight to a pair
# Factors on depth, five per decade. Among them are millimetres for metres (1000), raw codes of TUM
# and Bonn (5000) and of sensors with steps of 0.1 mm (10000), and their inverses. A factor below 2
# could as well be an error of the focal length.
FACTORS = [f for f in torch.logspace(-4, 4, 41).tolist() if abs(math.log(f)) > math.log(2)]

# Other readings, and what is reported of a clip that one of them fits.
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
    """The comparison of the readings of one clip."""

    static_error: float  # of the given depth, median over pairs of medians; nan = no shared view
    margins: dict[str, tuple[float, float]]  # reading -> margin of depth, of colour; {} = no shared view
    depth_scale: float  # factor on depth that fits the cameras; 1 = none; nan = undetermined


def believed_reading(margins: dict[str, tuple[float, float]]) -> str | None:
    """Return the clearest of the readings that are believed; None = the given one stays."""
    believed = [name for name, margin in margins.items() if verdict(margin) > 0]
    return max(believed, key=lambda name: sum(margins[name]), default=None)


def verdict(margin: tuple[float, float]) -> int:
    """Return 1 if the other reading is believed, -1 if the given one is confirmed, else 0."""
    if max(margin) >= CLEAR_MARGIN and min(margin) >= -SLACK:
        return 1
    return -1 if min(margin) <= -CLEAR_MARGIN and max(margin) <= SLACK else 0


def consistency_of(clip: Clip) -> float | None:
    """Measure how well depth and cameras of a clip's frames agree: 1 = exactly, 0.9 = static depth is 10 % off.

    It is exp(-static_error) of `ReadingMargins`, to four digits; None where frames share no view.
    """
    pairs = _frame_pairs(clip.num_frames)
    if not pairs or not bool(clip.valid.any()):
        return None
    views = _Views.of(clip, pairs)
    error = _static_error(views.reproject(views.given(), 1))
    return None if math.isnan(error) else round(math.exp(-error), 4)


def _static_error(given: _Reprojection) -> float:
    """Return the median over pairs of the medians of depth's error, of log depth; nan = no shared view."""
    static = given.depth_error.where(given.inside, torch.nan).nanmedian(1).values
    return float(static.where(given.seen, torch.nan).nanmedian())


def compare_readings(clip: Clip) -> ReadingMargins:
    """Compare the given reading of a clip with every other; it needs a valid pixel."""
    pairs = _frame_pairs(clip.num_frames)
    if not pairs:
        return ReadingMargins(math.nan, {}, math.nan)
    views = _Views.of(clip, pairs)
    given = views.reproject(views.given(), 1)
    if not bool(given.usable.any()):
        return ReadingMargins(math.nan, {}, math.nan)
    margins = {
        name: _margin(given, views.reproject(reading, 1), reading.usable(views.pairs))
        for name, reading in views.other_readings(clip.num_frames)
    }
    every = views.reproject(views.given(), FACTOR_STRIDE)
    scaled = {
        factor: _margin(
            every, views.reproject(views.scaled(factor), FACTOR_STRIDE), torch.ones(len(pairs), dtype=torch.bool)
        )
        for factor in FACTORS
    }
    clearest = max(FACTORS, key=lambda factor: (verdict(scaled[factor]), sum(scaled[factor])))
    margins[f"depth x{clearest:.3g}"] = scaled[clearest]
    if believed_reading(margins) == f"depth x{clearest:.3g}":
        scale = clearest
    else:
        scale = 1.0 if max(verdict(margin) for margin in scaled.values()) < 0 else math.nan
    return ReadingMargins(_static_error(given), margins, scale)


@dataclass(frozen=True)
class _Reading:
    """Depth and cameras of the views, by some convention."""

    depth: Tensor  # [V, H, W]
    intrinsics: Tensor  # [V, 3, 3]
    cam2world: Tensor  # [V, 4, 4] float64
    known: Tensor  # [V] bool, there is a camera

    def usable(self, pairs: Tensor) -> Tensor:  # [P, 2] -> [P] bool
        return self.known[pairs].all(1)


@dataclass(frozen=True)
class _Reprojection:
    """The points of each pair's first frame in its second one, and how they fit what is there."""

    pixels: Tensor  # [P, N, 2], image widths
    depth: Tensor  # [P, N]
    depth_error: Tensor  # [P, N], of log depth
    colour_error: Tensor  # [P, N], local standard deviations
    inside: Tensor  # [P, N] bool, falls on a known static surface
    seen: Tensor  # [P] bool, enough points do
    usable: Tensor  # [P, N] bool, can be lifted


@dataclass(frozen=True)
class _Views:
    """The frames of the pairs, subsampled."""

    pairs: Tensor  # [P, 2], indices of views
    frames: Tensor  # [V], their frame numbers
    depth: Tensor  # [V, H, W] float32
    static: Tensor  # [V, H, W] bool, known and not moving
    grey: Tensor  # [V, H, W], locally normalised
    intrinsics: Tensor  # [V, 3, 3] float64, pixels of the subsampled maps
    cam2world: Tensor  # [T, 4, 4] float64, of all frames
    maps: Tensor  # [P, 3, H, W], of each pair's second frame: see _maps

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
        """Read depth times a factor, by bringing cameras nearer together: it means the same and keeps depth maps."""
        rotation, centre = split_se3(self.cam2world)
        return self._reading(self.depth, self.intrinsics, se3_matrix(rotation, (centre - centre[:1]) / factor))

    def other_readings(self, num_frames: int) -> Iterator[tuple[str, _Reading]]:
        """Yield each of READINGS with what the files would mean by it."""
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

    def reproject(self, reading: _Reading, every: int) -> _Reprojection:
        """Project every `every`-th point of each pair into its second frame and compare it."""
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
        return _Reprojection(
            pixels=pixels / width,
            depth=depth,
            depth_error=(depth * found[:, 0]).where(inside, 1.0).log().abs(),
            colour_error=(points(self.grey) - found[:, 2]).abs(),
            inside=inside,
            seen=inside.sum(1) >= MIN_SEEN * usable.sum(1).clamp_min(1),
            usable=usable,
        )


def _maps(depth: Tensor, static: Tensor, grey: Tensor) -> Tensor:  # [V, H, W] x 3 -> [V, 3, H, W]
    """Stack disparity, where known, and colour; interpolated disparity, unlike depth, is exact on every plane."""
    return torch.stack([(1 / depth).where(static, 0.0), static.float(), grey], 1)


def _margin(given: _Reprojection, other: _Reprojection, pairs: Tensor) -> tuple[float, float]:
    """Return the margins of depth and of colour of another reading, over `pairs` [P] bool."""
    weight = _separation(given, other) * pairs
    margins = []
    for name, cut in (("depth_error", DEPTH_CUT), ("colour_error", COLOUR_CUT)):
        ours, theirs = (_misfit(reprojection, getattr(reprojection, name), cut) for reprojection in (given, other))
        both = given.inside & other.inside
        # what moves or is hidden is wrong by any reading
        wrong = both & (getattr(given, name) >= cut) & (getattr(other, name) >= cut)
        common = wrong.sum(1) / both.sum(1).clamp_min(1)
        larger = (torch.maximum(ours, theirs) - common).clamp_min(1e-6)
        margins.append(float((weight * (ours - theirs)).sum() / (weight * larger).sum().clamp_min(1e-9)))
    return margins[0], margins[1]


def _misfit(reprojection: _Reprojection, error: Tensor, cut: float) -> Tensor:  # [P, N] -> [P] in [0, 1]
    mean = (error / cut).clamp_max(1).where(reprojection.inside, 0.0).sum(1) / reprojection.inside.sum(1).clamp_min(1)
    # a reading that projects its points off the image does not fit at all
    return mean.where(reprojection.seen, 1.0)


def _separation(given: _Reprojection, other: _Reprojection) -> Tensor:  # [P]
    """Measure how far apart two readings project each pair's points: image widths plus half the relative depth."""
    apart = (other.pixels - given.pixels).norm(dim=-1).nan_to_num(MAX_SEPARATION).clamp_max(MAX_SEPARATION)
    deeper = (other.depth / given.depth).abs().clamp(0.5, 2).log().abs().nan_to_num(MAX_SEPARATION) / 2
    total = (apart + deeper.clamp_max(MAX_SEPARATION)).where(given.usable, 0.0).sum(1)
    return total / given.usable.sum(1).clamp_min(1)


def _frame_pairs(num_frames: int) -> list[tuple[int, int]]:
    """List pairs, forward and backward in turn: neighbours, a quarter and half a clip apart, and the ends."""
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
    """Subtract the local mean and divide by the local standard deviation. Flat places stay near 0."""
    smooth = _blurred(grey, 5 if grey.shape[2] > 160 else 3)  # a point rarely falls on the same place within a pixel
    size = 2 * (grey.shape[2] // 24) + 1
    mean = _blurred(smooth, size)
    spread = (_blurred(smooth.square(), size) - mean.square()).clamp_min(0).sqrt()
    return (smooth - mean) / (spread + 2)  # + 2 of 255, so that noise does not count as texture
