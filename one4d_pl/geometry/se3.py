"""Rotations and rigid transforms: quaternions, so(3), inverses, products, relative cameras.

A transform is named by its direction: `a2b` takes coordinates in a to coordinates in b. Small products are written as
sums of elementwise products, not as matmul: under bf16 autocast or TF32 a matmul would silently keep 8 to 10 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(
    rotation: Tensor,  # [..., 3, 3]
    vectors: Tensor,  # [..., 3], leading dims broadcast
) -> Tensor:  # [..., 3]
    """Multiply every vector by its matrix, in the input's dtype whatever the autocast state."""
    x, y, z = vectors[..., 0:1], vectors[..., 1:2], vectors[..., 2:3]
    return x * rotation[..., 0] + y * rotation[..., 1] + z * rotation[..., 2]


def matrix_product(
    left: Tensor,  # [..., 3, 3]
    right: Tensor,  # [..., 3, 3]
) -> Tensor:  # [..., 3, 3]
    """Multiply left · right, in the input's dtype whatever the autocast state."""
    return rotate(left[..., None, :, :], right.mT).mT


def se3_matrix(
    rotation: Tensor,  # [..., 3, 3]
    translation: Tensor,  # [..., 3]
) -> Tensor:  # [..., 4, 4]
    """Join a rotation and a translation; the last row is exactly (0, 0, 0, 1)."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)  # [..., 3, 4]
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], dim=-2)


def split_se3(transform: Tensor) -> tuple[Tensor, Tensor]:  # [..., 4, 4] -> [..., 3, 3], [..., 3]
    """Return the rotation and the translation of a rigid transform."""
    return transform[..., :3, :3], transform[..., :3, 3]


def invert_se3(a2b: Tensor) -> Tensor:  # [..., 4, 4] -> [..., 4, 4]
    """Invert a rigid transform to b2a (cam2world <-> world2cam), by transposing its rotation."""
    rotation, translation = split_se3(a2b)
    return se3_matrix(rotation.mT, -rotate(rotation.mT, translation))


def relative_se3(
    reference2world: Tensor,  # [..., 4, 4]
    other2world: Tensor,  # [..., 4, 4], leading dims broadcast
) -> Tensor:  # [..., 4, 4], other2reference
    """Return other2reference = reference2world⁻¹ · other2world. Precision does not suffer far from the origin."""
    (reference_rotation, reference_centre), (rotation, centre) = split_se3(reference2world), split_se3(other2world)
    # Centres are subtracted before they are rotated: two cameras a metre apart may be 100 km from the origin.
    offset = rotate(reference_rotation.mT, centre - reference_centre)
    return se3_matrix(matrix_product(reference_rotation.mT, rotation), offset)


def rebase_to_first(cam2world: Tensor) -> Tensor:  # [..., T, 4, 4] -> [..., T, 4, 4]
    """Express the cameras in camera 0, which becomes the world (frame 0 becomes the identity)."""
    return relative_se3(cam2world[..., :1, :, :], cam2world)


def xyzw_to_matrix(quaternion: Tensor) -> Tensor:  # [..., 4] -> [..., 3, 3]
    """Convert a quaternion in (x, y, z, w) order, of any length but zero, to a rotation.

    ValueError for a zero or nan quaternion.
    """
    norm = torch.linalg.vector_norm(quaternion, dim=-1, keepdim=True)
    if not bool((norm > 0).all()):
        raise ValueError("quaternion: zero or nan length, no rotation; drop the row or mark its camera as missing")
    x, y, z, w = (quaternion / norm).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def wxyz_to_matrix(quaternion: Tensor) -> Tensor:  # [..., 4] -> [..., 3, 3]
    """Convert a quaternion in (w, x, y, z) order to a rotation; see `xyzw_to_matrix`."""
    return xyzw_to_matrix(quaternion.roll(-1, dims=-1))


def matrix_to_xyzw(rotation: Tensor) -> Tensor:  # [..., 3, 3] -> [..., 4]
    """Convert a rotation to a unit quaternion (x, y, z, w), w >= 0; accurate at every angle."""
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in rotation.unbind(-2))
    # Row i is 4·q_i·(x, y, z, w). The row of the largest component is never near zero, so its length is a safe divisor.
    rows = [
        [1 + m00 - m11 - m22, m01 + m10, m02 + m20, m21 - m12],
        [m01 + m10, 1 - m00 + m11 - m22, m12 + m21, m02 - m20],
        [m02 + m20, m12 + m21, 1 - m00 - m11 + m22, m10 - m01],
        [m21 - m12, m02 - m20, m10 - m01, 1 + m00 + m11 + m22],
    ]
    candidates = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)  # [..., 4, 4]
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*rotation.shape[:-2], 1, 4)
    quaternion = torch.nn.functional.normalize(candidates.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def matrix_to_wxyz(rotation: Tensor) -> Tensor:  # [..., 3, 3] -> [..., 4]
    """Convert a rotation to a unit quaternion (w, x, y, z), w >= 0; accurate at every angle."""
    return matrix_to_xyzw(rotation).roll(1, dims=-1)


def so3_exp(rotation_vector: Tensor) -> Tensor:  # [..., 3], radians -> [..., 3, 3]
    """Rotate about the vector by its length (Rodrigues' formula), smooth through zero."""
    squared = rotation_vector.square().sum(-1)[..., None, None]
    small = squared < torch.finfo(rotation_vector.dtype).eps
    angle = torch.where(small, 1, squared).sqrt()  # the unused branch must stay finite for the gradient
    sine = torch.where(small, 1 - squared / 6, angle.sin() / angle)
    versine = torch.where(small, 0.5 - squared / 24, 2 * ((angle / 2).sin() / angle).square())
    x, y, z = rotation_vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    identity = torch.eye(3, dtype=cross.dtype, device=cross.device)
    return identity + sine * cross + versine * matrix_product(cross, cross)


def so3_log(rotation: Tensor) -> Tensor:  # [..., 3, 3] -> [..., 3], radians
    """Return the rotation vector of length <= pi, accurate near 0 and near pi.

    At exactly pi the axis may have either sign.
    """
    quaternion = matrix_to_xyzw(rotation)
    axis, cosine = quaternion[..., :3], quaternion[..., 3:]
    squared = axis.square().sum(-1, keepdim=True)
    small = squared < torch.finfo(rotation.dtype).eps
    sine = torch.where(small, 1, squared).sqrt()  # the unused branch must stay finite for the gradient
    safe_cosine = torch.where(small, cosine, 1)
    series = 2 / safe_cosine * (1 - squared / (3 * safe_cosine.square()))
    return axis * torch.where(small, series, 2 * torch.atan2(sine, cosine) / sine)


def geodesic_angle(
    preds: Tensor,  # [..., 3, 3]
    target: Tensor,  # [..., 3, 3]
) -> Tensor:  # [...], radians in [0, pi]
    """Return the angle between two rotations. Accurate near 0 and near pi, where arccos of the trace is not."""
    quaternion = matrix_to_xyzw(matrix_product(preds.mT, target))
    return 2 * torch.atan2(torch.linalg.vector_norm(quaternion[..., :3], dim=-1), quaternion[..., 3])


def is_rotation(
    rotation: Tensor,  # [..., 3, 3]
    tolerance: float = 1e-4,  # largest |RᵀR - I|; files store five to six digits
) -> Tensor:  # [...] bool
    """Tell whether a matrix is orthonormal and right-handed; a matrix with nan is not."""
    identity = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    error = (matrix_product(rotation.mT, rotation) - identity).abs().amax((-2, -1))
    return (error <= tolerance) & (torch.linalg.det(rotation) > 0)
