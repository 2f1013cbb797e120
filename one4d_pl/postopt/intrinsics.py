"""Pixels with their points, and the focal length from them alone: one vote per frame, or a prior.

In this package pixels are measured from the principal point in units of the picture's longer side, y divided by the
aspect fy / fx. One number, the focal length in longer sides, then gives the ray (x / focal, y / focal, 1). Aspect and
principal point are the `Lens` of the samples. Everything is float64: the normal matrices have conditions up to 1e12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PRIOR_FIELD_OF_VIEW = math.radians(60)  # of the longer side; DUSt3R's default too
FOCAL_BOUNDS = (0.1, 60.0)  # longer sides: fields of view of 157 and 1 degrees
_FLAT = 0.1  # thickness in widths: thinner points may be a plane with noise


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
        """Return the samples of some frames."""
        return replace(self, points=self.points[frames], weights=self.weights[frames])

    def pixels(self, chosen: Tensor | slice) -> Samples:  # chosen: [N] bool
        """Return the samples at some positions."""
        return Samples(self.points[:, chosen], self.weights[:, chosen], self.x[chosen], self.y[chosen], self.lens)

    def normalised(self, centre: Tensor, unit: Tensor) -> Samples:  # [3], scalar
        """Return the samples with their points measured from `centre` in units of `unit`."""
        return replace(self, points=torch.where(self.weights[..., None] > 0, (self.points - centre) / unit, 0))

    def through(self, lens: Lens) -> Samples:
        """Return the same pixels, measured through another lens."""
        x = self.x + (self.lens.x - lens.x)
        y = (self.y * self.lens.aspect + (self.lens.y - lens.y)) / lens.aspect
        return replace(self, x=x, y=y, lens=lens)


def prior_focal(height: int, width: int, aspect: float) -> float:
    """Return the fx, in longer sides, with which the longer side spans the prior field of view."""
    # The longer side of a tall picture is seen with fy = fx · aspect.
    ratio = 1.0 if width >= height else 1 / aspect
    return ratio / (2 * math.tan(PRIOR_FIELD_OF_VIEW / 2))


def intrinsics_matrix(
    focal: Tensor,  # [...], longer sides
    height: int,
    width: int,
    lens: Lens,
) -> Tensor:  # [..., 3, 3], pixels, dtype of focal
    """Build the matrix of intrinsics in pixels."""
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
    """Sample every n-th pixel of every n-th row, n the smallest that keeps at most `count`."""
    height, width = pointmap.shape[1:3]
    step = 1
    while -(-height // step) * -(-width // step) > count:
        step += 1
    rows = torch.arange((height - 1) % step // 2, height, step, device=pointmap.device)
    columns = torch.arange((width - 1) % step // 2, width, step, device=pointmap.device)
    points = pointmap[:, rows[:, None], columns].flatten(1, 2).double()
    known = _finite(points)
    if weights is not None:
        known = known * weights[:, rows[:, None], columns].flatten(1, 2).double()
    x, y = _positions(rows, columns, height, width)
    return Samples(torch.where(known[..., None] > 0, points, 0), known, x, y)


def sample_medians(
    pointmap: Tensor,  # [T, H, W, 3]
    weights: Tensor | None,  # [T, H, W] bool or >= 0
    count: int,  # about so many pixels per frame
) -> Samples:
    """Sample an even grid of pixels, each with the median of the 3x3 points around it.

    The median is taken per coordinate. On a smooth surface it is the pixel's own point, and up to
    four flying points of nine do not move it far: a start that outliers cannot spoil. Pictures of
    less than three rows or columns are sampled whole.
    """
    height, width = pointmap.shape[1:3]
    if min(height, width) < 3:
        return sample_grid(pointmap, weights, height * width)
    num_rows = min(height - 2, max(1, round(math.sqrt(count * height / width))))
    num_columns = min(width - 2, max(1, round(count / num_rows)))
    rows = _spaced_indices(height, num_rows, pointmap.device)
    columns = _spaced_indices(width, num_columns, pointmap.device)
    around = torch.arange(-1, 2, device=pointmap.device)
    block_rows = (rows[:, None] + around)[:, None, :, None]  # [h, 1, 3, 1]
    block_columns = (columns[:, None] + around)[None, :, None, :]  # [1, w, 1, 3]
    points = pointmap[:, block_rows, block_columns].flatten(3, 4).flatten(1, 2).double()  # [T, N, 9, 3]
    known = _finite(points)  # [T, N, 9]
    if weights is not None:
        known = known * weights[:, block_rows, block_columns].flatten(3, 4).flatten(1, 2).double()
    median = torch.where(known[..., None] > 0, points, torch.nan).nanmedian(2).values
    cell_weights = known.mean(-1)
    x, y = _positions(rows, columns, height, width)
    return Samples(torch.where(cell_weights[..., None] > 0, median, 0), cell_weights, x, y)


def camera_votes(samples: Samples) -> tuple[Tensor, Tensor]:  # [T], longer sides; [T, 3]: aspect, principal point
    """Estimate focal length and lens of each frame by itself, from its camera matrix.

    The matrix is that of the normalised DLT (Hartley & Zisserman 7.1). The focal length is that of square pixels,
    √(fx fy); aspect and principal point are relative to the samples' lens. A frame has no vote (nan) where its
    camera matrix is not unique (planar or too few points) or where it sees its points mirrored (negative determinant).
    """
    points = _normalised_points(samples)
    eigenvalues, eigenvectors = _direct_linear_transform(points, samples)
    camera = eigenvectors[..., 0].unflatten(-1, (3, 4))  # [T, 3, 4], up to its sign
    unique = eigenvalues[:, 1] > 1e-9 * eigenvalues[:, -1]
    # The sign follows from cheirality: the mean point, now the origin, lies in front.
    camera = camera * camera[:, 2, 3].sign()[:, None, None]
    first, second, third = camera[..., :3].unbind(-2)
    upright = torch.linalg.det(camera[..., :3]) > 0
    # m1 = fx r1 + cx r3 and m3 = r3: their cross product does not depend on the principal point.
    fx, fy = (torch.linalg.vector_norm(torch.linalg.cross(row, third), dim=-1) for row in (first, second))
    square = third.square().sum(-1)
    x, y = ((row * third).sum(-1) / square for row in (first, second))
    focal = _within_bounds(torch.where(unique & upright, (fx * fy).sqrt() / square, torch.nan))
    lens = torch.stack([fy / fx, x, y], dim=-1)
    return focal, torch.where(focal.isfinite()[:, None], lens, torch.nan)


def plane_votes(samples: Samples) -> Tensor:  # [T], longer sides; nan = no vote
    """Estimate the focal length of each frame of nearly planar points, from their homography.

    Two axes of the plane, orthogonal and equally long in space, give two conditions (Zhang 2000). With the first two
    entries of each row of the homography as one complex number they become one: (row1² + row2²) / f² + row3² = 0. A
    plane seen straight on makes both terms vanish: it has no vote, or an arbitrary one.
    """
    points = _normalised_points(samples)
    spread, axes = principal_axes(points, samples.weights)
    eigenvectors = _direct_linear_transform(points @ axes[..., :2], samples)[1]
    homography = eigenvectors[..., 0].unflatten(-1, (3, 3))  # [T, 3, 3], up to its sign
    x, y, z = torch.complex(homography[..., 0], homography[..., 1]).square().unbind(-1)
    across = x + y
    focal = across.abs() / (-(across.conj() * z).real).sqrt()  # least squares; a negative square is nan
    return _within_bounds(torch.where(spread[:, 2] < _FLAT * spread[:, 1], focal, torch.nan))


def principal_axes(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # [T, N, 3], [T, N] -> [T, 3], [T, 3, 3]
    """Return the deviations of each frame's points along their principal axes, and these axes.

    The axes are columns. The widest comes first, so a plane's normal is the last.
    """
    weights = (weights / weights.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
    centred = points - (weights * points).sum(1, keepdim=True)
    squares, axes = torch.linalg.eigh(centred.mT @ (weights * centred))
    return squares.flip(-1).clamp_min(0).sqrt(), axes.flip(-1)


def focal_candidates(votes: Tensor, prior: float) -> Tensor:  # [..., T] -> [F], longer sides
    """List focal lengths to try: the median vote of each kind and a ladder around the prior."""
    ladder = prior * torch.tensor([0.4, 0.65, 1.0, 1.6, 2.5, 4.5, 9.0], dtype=votes.dtype, device=votes.device)
    medians = votes.nanmedian(-1).values.flatten()
    return torch.cat([medians[medians.isfinite()], ladder])


def _normalised_points(samples: Samples) -> Tensor:  # [T, N, 3]
    """Move every frame's points to zero mean and scale them to unit size."""
    weights = (samples.weights / samples.weights.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
    mean = (weights * samples.points).sum(1, keepdim=True)
    centred = torch.where(weights > 0, samples.points - mean, 0)
    size = (weights * centred.square()).sum((1, 2), keepdim=True).sqrt()
    return centred / size.clamp_min(1e-300)


def _direct_linear_transform(points: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Decompose the DLT's normal matrix [T, 3 (D+1), 3 (D+1)] for points [T, N, D].

    Returns eigenvalues, ascending, and eigenvectors. The equations are p1·X - x p3·X = 0 and
    p2·X - y p3·X = 0; their normal matrix is made of four moments.
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


def _within_bounds(focal: Tensor) -> Tensor:  # nan outside
    return torch.where((focal > FOCAL_BOUNDS[0]) & (focal < FOCAL_BOUNDS[1]), focal, torch.nan)


def _finite(points: Tensor) -> Tensor:  # [..., 3] -> [...] float64, 1 = finite
    return points.isfinite().all(-1).double()


def _spaced_indices(size: int, count: int, device: torch.device) -> Tensor:  # -> [count] int64, 1 .. size - 2
    return (1 + (torch.arange(count, device=device) + 0.5) * (size - 2) / count).long()


def _positions(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return x and y of the pixel centres, [h·w] each, from the image centre in longer sides."""
    side = max(height, width)
    y, x = torch.meshgrid(
        (rows.double() + 0.5 - height / 2) / side, (columns.double() + 0.5 - width / 2) / side, indexing="ij"
    )
    return x.flatten(), y.flatten()
