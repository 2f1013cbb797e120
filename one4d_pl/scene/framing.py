"""Place a benchmark's images in the model's frame, and bring predictions back to their pixels.

Square pixels stay square. `no_squash` takes the multiple-of-16 size that is nearest to the image's shape and to the
model's number of tokens, covers it and crops the overhang (a few pixels). `letterbox` keeps the model's own size, fits
the whole image in and leaves black bars; the bars are cut from every prediction before anything is read from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from one4d_pl.geometry.camera import Placement, resize_crop_plan, resize_frames

Shape = Literal["no_squash", "letterbox"]

MULTIPLE = 16  # VAE x patch


@dataclass(frozen=True)
class Framing:
    """The model's frame for images of one size."""

    height: int  # of the model's frame, as width a multiple of 16
    width: int
    inner_height: int  # of the image in it; the rest are bars
    inner_width: int
    placement: Placement  # of the inner part on the image

    @property
    def bars(self) -> tuple[int, int]:
        """Return the rows above and the columns left of the image."""
        return (self.height - self.inner_height) // 2, (self.width - self.inner_width) // 2

    def place_frames(self, frames: Tensor) -> Tensor:  # [T, H, W, 3] uint8 -> [T, height, width, 3], with bars
        """Resize images and add the bars, as the model sees them."""
        resized = resize_frames(frames, self.inner_height, self.inner_width)
        return self.with_bars(resized.movedim(-1, 1), "constant").movedim(1, -1)

    def cut(self, maps: Tensor) -> Tensor:  # [..., height, width] -> [..., inner_height, inner_width]
        """Cut off the bars."""
        top, left = self.bars
        return maps[..., top : top + self.inner_height, left : left + self.inner_width]

    def with_bars(self, maps: Tensor, mode: str) -> Tensor:  # [..., inner_height, inner_width] -> [..., height, width]
        """Add the bars: black ("constant"), or the edge repeated ("replicate")."""
        top, left = self.bars
        right, bottom = self.width - self.inner_width - left, self.height - self.inner_height - top
        return functional.pad(maps, (left, right, top, bottom), mode)


def frame_images(
    from_height: int,
    from_width: int,
    height: int,  # the size the model was trained at
    width: int,
    shape: Shape,
) -> Framing:
    """Choose the model's frame for images of from_height x from_width."""
    if shape == "letterbox":
        scale = min(height / from_height, width / from_width)
        inner = min(height, max(1, round(from_height * scale))), min(width, max(1, round(from_width * scale)))
    else:
        height, width = inner = nearest_size(from_height / from_width, height * width // MULTIPLE**2)
    return Framing(height, width, *inner, resize_crop_plan(from_height, from_width, *inner))


def nearest_size(
    aspect: float,  # height / width
    tokens: int,  # 16x16 blocks
) -> tuple[int, int]:  # height, width
    """Return the multiple-of-16 size nearest in shape and tokens: the least sum of |log ratio|."""

    def cost(size: tuple[int, int]) -> float:
        rows, columns = size
        return abs(math.log(rows / columns / aspect)) + abs(math.log(rows * columns / tokens))

    sizes = (
        (r, c) for r in range(1, tokens + 1) for c in {max(1, tokens // r), tokens // r + 1, round(r / aspect)} if c
    )
    rows, columns = min(sorted(sizes), key=cost)
    return MULTIPLE * rows, MULTIPLE * columns


def to_image(
    maps: Tensor,  # [T, h, w] float, a prediction
    height: int,  # of the image
    width: int,
    placement: Placement | None,  # None = the map shows the whole image, stretched if need be
) -> Tensor:  # [T, height, width]
    """Resample maps to the image's pixels, bicubic as in the published protocols.

    Beyond the map its edge is repeated. A pixel whose nearest prediction is not finite gets nan.
    One with some neighbours that are not finite gets the mean of the others, by its own weights
    where they are positive: holes do not spread.
    """
    rows, columns = maps.shape[1:]
    if (rows, columns) == (height, width) and placement in (None, Placement(1.0, 0.0, 0.0)):
        return maps  # the same grid: resampling would only round
    y, x = _positions(rows, columns, height, width, placement)
    weights_y, weights_x = cubic_weights(y, rows), cubic_weights(x, columns)  # [height, rows], [width, columns]
    finite = maps.isfinite()
    if bool(finite.all()):
        return weights_y @ maps.float() @ weights_x.T
    maps = torch.where(finite, maps, 0).float()
    holes = (~finite).float()
    touches_hole = weights_y.abs() @ holes @ weights_x.T.abs() > 0
    positive = [w.clamp_min(0) for w in (weights_y, weights_x)]  # with negative ones the sum may vanish
    mean = (positive[0] @ maps @ positive[1].T) / (positive[0] @ (1 - holes) @ positive[1].T)  # 0 / 0 inside a hole
    result = torch.where(touches_hole, mean, weights_y @ maps @ weights_x.T)
    return torch.where(nearest_to_image(finite, height, width, placement), result, torch.nan)


def nearest_to_image(
    maps: Tensor,  # [T, h, w], a prediction
    height: int,  # of the image
    width: int,
    placement: Placement | None,
) -> Tensor:  # [T, height, width], same dtype
    """Resample as `to_image`, but by nearest pixel: no value is interpolated."""
    rows, columns = maps.shape[1:]
    y, x = _positions(rows, columns, height, width, placement)
    return maps[:, y.long().clamp(0, rows - 1)[:, None], x.long().clamp(0, columns - 1)]


def _positions(
    rows: int, columns: int, height: int, width: int, placement: Placement | None
) -> tuple[Tensor, Tensor]:  # [height], [width] float64
    """Return where the image's pixel centres lie on the map, in its pixels."""
    y = torch.arange(height, dtype=torch.float64) + 0.5
    x = torch.arange(width, dtype=torch.float64) + 0.5
    if placement is None:
        return y * rows / height, x * columns / width
    return y * placement.scale - placement.top, x * placement.scale - placement.left


def cubic_weights(positions: Tensor, size: int) -> Tensor:  # [N] float64 in pixels, centres at +0.5 -> [N, size]
    """Return the matrix of Keys' cubic interpolation (1981) with OpenCV's and torch's a = -0.75.

    Taps beyond the edge fall on it.
    """
    centre = positions - 0.5
    first = centre.floor()
    weights = torch.zeros(len(positions), size, dtype=torch.float64)
    a = -0.75
    for tap in (-1, 0, 1, 2):
        d = (centre - first - tap).abs()
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weight = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
        index = (first + tap).long().clamp(0, size - 1)
        weights.scatter_add_(1, index[:, None], weight[:, None])
    return weights.float()
