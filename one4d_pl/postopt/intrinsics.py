"""Pixels with their points, and what they say of the focal length alone: one vote per frame by DLT, a median, a prior.

Inside this room pixels are measured from the principal point in units of the longer side, y divided by the aspect
fy / fx, so that one number, the focal length in longer sides, makes the ray (x / focal, y / focal, 1). Aspect and
principal point are the `Lens` of the samples. Everything is float64: the normal matrices have conditions up to 1e12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PRIOR_FIELD_OF_VIEW = math.radians(60)  # of the longer side, where the points do not tell; DUSt3R's default too
FOCAL_BOUNDS = (0.1, 60.0)  # longer sides: fields of view of 157 and 1 degrees
_THIN = 0.1  # thickness in widths: points may be a plane, and a camera matrix from them may be noise


@dataclass(frozen=True)
class Lens:
    """What the intrinsics of all frames share besides the focal length."""

    aspect: float = 1.0  # fy / fx
    x: float = 0.0  # principal point from the image centre, longer sides
    y: float = 0.0


@dataclass(frozen=True)
class Samples:
    """Some pixels of every frame: the same positions in all of them."""

    points: Tensor  # [T, N, 3] float64, 0 where weights are 0
    weights: Tensor  # [T, N] float64, 0 = nothing known
    x: Tensor  # [N] float64, from the principal point in longer sides
    y: Tensor  # [N] float64, the same, divided by the aspect
    lens: Lens = Lens()  # whose principal point and aspect these are

    def take(self, frames: Tensor) -> Samples:  # frames: [T] bool, or indices
        """The samples of some frames."""
        return replace(self, points=self.points[frames], weights=self.weights[frames])

    def pixels(self, chosen: Tensor | slice) -> Samples:  # chosen: [N] bool
        """The samples at some positions."""
        return Samples(self.points[:, chosen], self.weights[:, chosen], self.x[chosen], self.y[chosen], self.lens)

    def normalised(self, centre: Tensor, unit: Tensor) -> Samples:  # [3], scalar
        """The points in the frame whose origin is `centre`, measured in `unit`s."""
        return replace(self, points=torch.where(self.weights[..., None] > 0, (self.points - centre) / unit, 0))

    def through(self, lens: Lens) -> Samples:
        """The same pixels, measured through another lens."""
        x = self.x + (self.lens.x - lens.x)
        y = (self.y * self.lens.aspect + (self.lens.y - lens.y)) / lens.aspect
        return replace(self, x=x, y=y, lens=lens)


def prior_focal(height: int, width: int, aspect: float) -> float:
    """Focal length fx in longer sides of a picture whose longer side spans the prior field of view."""
    ratio = (
        1.0 if width >= height else 1 / aspect
    )  # fy = fx · aspect is the one that a tall picture's side is seen with
    return ratio / (2 * math.tan(PRIOR_FIELD_OF_VIEW / 2))


def intrinsics_matrix(
    focal: Tensor,  # [...], longer sides
    height: int,
    width: int,
    lens: Lens,
) -> Tensor:  # [..., 3, 3], pixels, dtype of focal
    """Intrinsics in pixels."""
    side = max(height, width)
    matrix = torch.zeros(*focal.shape, 3, 3, dtype=focal.dtype, device=focal.device)
    matrix[..., 0, 0], matrix[..., 1, 1] = focal * side, focal * side * lens.aspect
    matrix[..., 0, 2], matrix[..., 1, 2] = width / 2 + lens.x * side, height / 2 + lens.y * side
    matrix[..., 2, 2] = 1
    return matrix


def sample_grid(
    pointmap: Tensor,  # [T, H, W, 3]
    weights: Tensor | None,  # [T, H, W] bool or >= 0
    count: int,  # most pixels per frame
) -> Samples:
    """Every n-th pixel of every n-th row, n the smallest that keeps at most `count` of them."""
    height, width = pointmap.shape[1:3]
    step = 1
    while -(-height // step) * -(-width // step) > count:
        step += 1
    rows = torch.arange((height - 1) % step // 2, height, step, device=pointmap.device)
    columns = torch.arange((width - 1) % step // 2, width, step, device=pointmap.device)
    points = pointmap[:, rows[:, None], columns].flatten(1, 2).double()
    known = _known(points)
    if weights is not None:
        known = known * weights[:, rows[:, None], columns].flatten(1, 2).double()
    x, y = _positions(rows, columns, height, width)
    return Samples(torch.where(known[..., None] > 0, points, 0), known, x, y)


def sample_medians(
    pointmap: Tensor,  # [T, H, W, 3]
    weights: Tensor | None,  # [T, H, W] bool or >= 0
    count: int,  # about so many pixels per frame
) -> Samples:
    """An even grid of pixels, each with the median of the 3x3 points around it, coordinate by coordinate.

    On a smooth surface that is the pixel's own point, and it stands up to four flying points of nine: a start that
    outliers cannot spoil. Pictures of less than three rows or columns are sampled as they are.
    """
    height, width = pointmap.shape[1:3]
    if min(height, width) < 3:
        return sample_grid(pointmap, weights, height * width)
    num_rows = min(height - 2, max(1, round(math.sqrt(count * height / width))))
    num_columns = min(width - 2, max(1, round(count / num_rows)))
    rows = _even(height, num_rows, pointmap.device)
    columns = _even(width, num_columns, pointmap.device)
    around = torch.arange(-1, 2, device=pointmap.device)
    block_rows = (rows[:, None] + around)[:, None, :, None]  # [h, 1, 3, 1]
    block_columns = (columns[:, None] + around)[None, :, None, :]  # [1, w, 1, 3]
    points = pointmap[:, block_rows, block_columns].flatten(3, 4).flatten(1, 2).double()  # [T, N, 9, 3]
    known = _known(points)  # [T, N, 9]
    if weights is not None:
        known = known * weights[:, block_rows, block_columns].flatten(3, 4).flatten(1, 2).double()
    median = torch.where(known[..., None] > 0, points, torch.nan).nanmedian(2).values
    cell_weights = known.mean(-1)
    x, y = _positions(rows, columns, height, width)
    return Samples(torch.where(cell_weights[..., None] > 0, median, 0), cell_weights, x, y)


def camera_votes(samples: Samples) -> tuple[Tensor, Tensor]:  # [T], longer sides; [T, 3]: aspect, principal point
    """Focal length and lens of each frame by itself, from its camera matrix (normalised DLT, Hartley & Zisserman 7.1).

    The focal length is that of square pixels, √(fx fy); aspect and principal point are relative to the samples' lens.
    A frame whose camera matrix is not unique (planar or far too few points) has no vote: nan. Nor has one that sees
    its points mirrored (camera matrix of negative determinant).
    """
    points = _unit_points(samples)
    eigenvalues, eigenvectors = _direct_linear_transform(points, samples)
    camera = eigenvectors[..., 0].unflatten(-1, (3, 4))  # [T, 3, 4], up to its sign
    unique = eigenvalues[:, 1] > 1e-9 * eigenvalues[:, -1]
    # Its sign by cheirality: the mean point, now the origin, lies in front.
    camera = camera * camera[:, 2, 3].sign()[:, None, None]
    first, second, third = camera[..., :3].unbind(-2)
    upright = torch.linalg.det(camera[..., :3]) > 0
    # m1 = fx r1 + cx r3 and m3 = r3: the cross product drops what noise put into the principal point.
    fx, fy = (torch.linalg.vector_norm(torch.linalg.cross(row, third), dim=-1) for row in (first, second))
    square = third.square().sum(-1)
    x, y = ((row * third).sum(-1) / square for row in (first, second))
    focal = _within_bounds(torch.where(unique & upright, (fx * fy).sqrt() / square, torch.nan))
    lens = torch.stack([fy / fx, x, y], dim=-1)
    return focal, torch.where(focal.isfinite()[:, None], lens, torch.nan)


def plane_votes(samples: Samples) -> Tensor:  # [T], longer sides; nan = no vote
    """The focal length of each frame whose points nearly lie on a plane, from the homography to its pixels.

    Two axes of the plane, orthogonal and equally long in space, give two conditions (Zhang 2000). With the two entries
    of each row of the homography as one complex number they are one: (row1² + row2²) / f² + row3² = 0. A plane seen
    straight on makes both terms vanish: it has no vote, or an arbitrary one.
    """
    points = _unit_points(samples)
    spread, axes = principal_axes(points, samples.weights)
    eigenvectors = _direct_linear_transform(points @ axes[..., :2], samples)[1]
    homography = eigenvectors[..., 0].unflatten(-1, (3, 3))  # [T, 3, 3], up to its sign
    x, y, z = torch.complex(homography[..., 0], homography[..., 1]).square().unbind(-1)
    across = x + y
    focal = across.abs() / (-(across.conj() * z).real).sqrt()  # least squares; a negative square is nan
    return _within_bounds(torch.where(spread[:, 2] < _THIN * spread[:, 1], focal, torch.nan))


def principal_axes(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # [T, N, 3], [T, N] -> [T, 3], [T, 3, 3]
    """Deviation of each frame's points from their mean along their principal axes, and these axes as columns.

    The widest comes first, so a plane's normal is the last.
    """
    weights = (weights / weights.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
    centred = points - (weights * points).sum(1, keepdim=True)
    squares, axes = torch.linalg.eigh(centred.mT @ (weights * centred))
    return squares.flip(-1).clamp_min(0).sqrt(), axes.flip(-1)


def focal_candidates(votes: Tensor, prior: float) -> Tensor:  # [..., T] -> [F], longer sides
    """Focal lengths worth trying: the frames' median vote of each kind and a coarse ladder around the prior."""
    ladder = prior * torch.tensor([0.4, 0.65, 1.0, 1.6, 2.5, 4.5, 9.0], dtype=votes.dtype, device=votes.device)
    medians = votes.nanmedian(-1).values.flatten()
    return torch.cat([medians[medians.isfinite()], ladder])


def _unit_points(samples: Samples) -> Tensor:  # [T, N, 3]
    """Every frame's points, moved to zero mean and scaled to unit size."""
    weights = (samples.weights / samples.weights.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
    mean = (weights * samples.points).sum(1, keepdim=True)
    centred = torch.where(weights > 0, samples.points - mean, 0)
    size = (weights * centred.square()).sum((1, 2), keepdim=True).sqrt()
    return centred / size.clamp_min(1e-300)


def _direct_linear_transform(points: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Points [T, N, D] -> eigenvalues and eigenvectors of the normal matrix [T, 3 (D+1), 3 (D+1)], ascending.

    Its equations are p1·X - x p3·X = 0 and p2·X - y p3·X = 0, put together from four moments.
    """
    weights = samples.weights / samples.weights.sum(-1, keepdim=True).clamp_min(1e-300)
    homogeneous = torch.nn.functional.pad(points, (0, 1), value=1.0)
    x, y = samples.x, samples.y
    moments = [
        (homogeneous * (weights * factor)[..., None]).mT @ homogeneous
        for factor in (torch.ones_like(x), x, y, x * x + y * y)
    ]
    one, by_x, by_y, by_square = moments
    zero = torch.zeros_like(one)
    rows = [[one, zero, -by_x], [zero, one, -by_y], [-by_x, -by_y, by_square]]
    return torch.linalg.eigh(torch.cat([torch.cat(row, -1) for row in rows], -2))


def _within_bounds(focal: Tensor) -> Tensor:
    return torch.where((focal > FOCAL_BOUNDS[0]) & (focal < FOCAL_BOUNDS[1]), focal, torch.nan)


def _known(points: Tensor) -> Tensor:  # [..., 3] -> [...] float64, 1 = finite
    return points.isfinite().all(-1).double()


def _even(size: int, count: int, device: torch.device) -> Tensor:  # -> [count] int64, 1 .. size - 2
    return (1 + (torch.arange(count, device=device) + 0.5) * (size - 2) / count).long()


def _positions(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixel centres [h·w] each, from the image centre in longer sides."""
    side = max(height, width)
    y, x = torch.meshgrid(
        (rows.double() + 0.5 - height / 2) / side, (columns.double() + 0.5 - width / 2) / side, indexing="ij"
    )
    return x.flatten(), y.flatten()
