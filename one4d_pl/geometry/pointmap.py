"""Pointmaps in camera-0 coordinates and their normalisation into the cube that the VAE can hold.

Each clip has one similarity, x -> (x - (0, 0, offset)) / scale: one scale for all frames and axes
(anything else would destroy camera motion or shape) and, if asked for, an offset along z.
The cube from the inside out, in max|x|:
    <= 0.80  every camera centre, so that every ray leaves the cube through its surface
    <= 0.90  geometry; what lies beyond is moved along its ray onto 0.90 and flagged not valid
    =  0.97  sky, on its ray, flagged not valid; anything above 0.935 is read as sky after decoding
The scale is the smallest that holds the clip's valid points, their extents cut at the reach
    min(1.25 x 98th percentile, far_limit x median) of their distances, max|x| from camera 0:
a compact scene keeps every point, a few flying points cannot stretch the cube, and a VAE error e
costs at most e · far_limit / 0.90 of the median distance. Only the camera path can enlarge the cube
further.

For near points that error is large relative to their distance. `bend` moves every point along its ray from camera 0 so
that distances r become r ** power. Only the VAE sees the bent cube; everything else sees the cube as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from one4d_pl.geometry.camera import camera_rays, to_camera
from one4d_pl.geometry.se3 import rebase_to_first, rotate, split_se3
from one4d_pl.types import PointmapScale

CENTRE_EXTENT = 0.80  # of camera centres: a ray that looks outwards still has 0.10 to go
GEOMETRY_EXTENT = 0.90
SKY_EXTENT = 0.97  # the Wan VAE clamps at 1, so nothing may sit there
SKY_THRESHOLD = 0.935  # half-way between geometry and sky
PERCENTILE = 0.98
HEADROOM = 1.25  # times the percentile: keeps the last 2 % of a scene without a far tail


@dataclass(frozen=True)
class NormalisedPointmap:
    """A clip's geometry as the network sees it."""

    points: Tensor  # [T, H, W, 3], camera-0 coordinates, max|x| <= 0.97, finite everywhere
    valid: Tensor  # [T, H, W] bool: a measured point at its true place
    scale: PointmapScale  # scalars


def depth_to_pointmap(
    depth: Tensor,  # [..., T, H, W], z-depth
    intrinsics: Tensor,  # [..., T, 3, 3], pixels
    cam2world: Tensor,  # [..., T, 4, 4], any world, unit of depth
) -> Tensor:  # [..., T, H, W, 3], camera-0 coordinates, unit of depth
    """Lift depth maps into camera 0: X_i(u, v) = R_iᵀ D_i K_i⁻¹ (u, v, 1)ᵀ + o_i (One4D, Eq. 11).

    A point is not finite where its depth is not.
    """
    centres, directions = _rays_from_camera_0(depth.shape[-2], depth.shape[-1], intrinsics, cam2world)
    return centres[..., None, None, :] + depth[..., None] * directions


def pointmap_to_depth(
    points: Tensor,  # [..., T, H, W, 3], camera-0 coordinates, not normalised
    cam2world: Tensor,  # [..., T, 4, 4], any world, unit of points
) -> Tensor:  # [..., T, H, W], z-depth in each frame's own camera
    """Return the depth maps of a pointmap under known cameras: `depth_to_pointmap` undone."""
    return to_camera(points, rebase_to_first(cam2world))[..., 2]


def normalise(
    points: Tensor,  # [..., T, H, W, 3], camera-0 coordinates
    scale: PointmapScale,  # [...]
) -> Tensor:  # [..., T, H, W, 3], the cube
    """Apply a clip's similarity: (x - (0, 0, offset)) / scale."""
    return (points - _offset_vector(scale)) / scale.scale[..., None, None, None, None]


def denormalise(
    points: Tensor,  # [..., T, H, W, 3], the cube
    scale: PointmapScale,  # [...]
) -> Tensor:  # [..., T, H, W, 3], camera-0 coordinates
    """Undo `normalise`; true geometry only where the normalised pointmap is valid."""
    return points * scale.scale[..., None, None, None, None] + _offset_vector(scale)


def is_sky(points: Tensor) -> Tensor:  # [..., H, W, 3], the cube -> [..., H, W] bool
    """Tell which points of the cube, decoded ones too, stand for sky: max|x| > 0.935."""
    return points.abs().amax(-1) > SKY_THRESHOLD


def bend(
    points: Tensor,  # [..., H, W, 3], the cube without an offset: camera 0 is its centre
    power: float,  # in (0, 1]; 1 = as they are
) -> Tensor:  # [..., H, W, 3], the bent cube: geometry stays within max|x| <= 0.90, sky where it is
    """Move points along their rays from camera 0: distances r become 0.90 (r / 0.90) ** power.

    Near points get more of the cube.
    """
    if power == 1:
        return points
    return torch.where(is_sky(points)[..., None], points, _raise_distances(points, power))


def unbend(
    points: Tensor,  # [..., H, W, 3], the bent cube, possibly decoded
    power: float,  # of `bend`
) -> Tensor:  # [..., H, W, 3], the cube
    """Undo `bend`. Geometry that a decoder put beyond 0.90 is moved onto 0.90: further out it would read as sky."""
    if power == 1:
        return points
    straight = _raise_distances(points, 1 / power)
    extent = straight.abs().amax(-1, keepdim=True)
    straight = straight * (GEOMETRY_EXTENT / extent.clamp_min(GEOMETRY_EXTENT))
    return torch.where(is_sky(points)[..., None], points, straight)


def _raise_distances(points: Tensor, power: float) -> Tensor:  # [..., 3] -> [..., 3]
    distance = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    # a point at camera 0 has no ray to move along; the limit keeps it finite
    return points * (distance / GEOMETRY_EXTENT).clamp_min(1e-6) ** (power - 1)


def normalise_pointmap(
    depth: Tensor,  # [T, H, W], z-depth; +inf = sky, nan = no measurement
    valid: Tensor,  # [T, H, W] bool, geometry known and trusted
    intrinsics: Tensor,  # [T, 3, 3], pixels
    cam2world: Tensor,  # [T, 4, 4], any world, unit of depth
    far_limit: float,  # farthest geometry kept, in median distances from camera 0; > 1
    z_offset: bool,  # let the cube's centre leave camera 0 along z, which nearly halves the scale
) -> NormalisedPointmap:
    """Lift a clip to camera-0 coordinates and fit it into the cube (see the module's docstring).

    Pixels that are neither valid nor sky take the depth of the nearest valid pixel of their frame.
    ValueError for a clip without a valid point, or far_limit <= 1.
    """
    if not far_limit > 1:
        raise ValueError(f"far_limit: {far_limit}, need > 1 (in median distances from camera 0)")
    valid = valid & depth.isfinite() & (depth > 0)
    if not bool(valid.any()):
        raise ValueError("pointmap: the clip has no valid point; drop it or check its depth and valid maps")
    sky = depth.isposinf()
    filled = infill_depth(depth, valid)
    centres, directions = _rays_from_camera_0(depth.shape[-2], depth.shape[-1], intrinsics, cam2world)
    points = centres[:, None, None, :] + filled[..., None] * directions  # Eq. 11, as depth_to_pointmap
    scale = _fit_scale(points[valid], centres, far_limit, z_offset)

    points = normalise(points, scale)
    origins = normalise(centres[:, None, None, :], scale)[:, 0, 0]  # [T, 3], the cube
    inside = points.abs().amax(-1) <= GEOMETRY_EXTENT
    moved = sky | ~inside
    frame = moved.nonzero()[:, 0]  # [M], the frame of each moved pixel
    extent = torch.where(sky[moved], SKY_EXTENT, GEOMETRY_EXTENT).to(points.dtype)  # [M]
    points[moved] = _leave_cube(origins[frame], directions[moved], extent)
    return NormalisedPointmap(points, valid & inside, scale)


def infill_depth(
    depth: Tensor,  # [T, H, W]
    valid: Tensor,  # [T, H, W] bool
) -> Tensor:  # [T, H, W], finite
    """Replace every depth that is not valid by that of the nearest valid pixel of its frame.

    Distance is city-block. A frame without a valid pixel takes the median of the clip's valid depths.
    """
    filled = depth.clone()
    empty = ~valid.flatten(1).any(1)  # [T]
    filled[empty] = depth[valid].median()
    for t in (~valid.flatten(1).all(1) & ~empty).nonzero()[:, 0].tolist():  # frame by frame: bounded memory
        filled[t] = depth[t].flatten()[_nearest_valid_index(valid[t])]
    return filled


def _nearest_valid_index(valid: Tensor) -> Tensor:  # [H, W] bool, any set -> [H, W] int64 into the flattened image
    """Find every pixel's nearest valid pixel by city-block distance.

    That distance splits into a pass over rows and one over columns, of two running extrema each.
    """
    height, width = valid.shape
    far = height + width  # no distance in the image is larger
    columns = torch.arange(width, device=valid.device).expand(height, width)
    rows = torch.arange(height, device=valid.device)[:, None].expand(height, width)
    # 1. In each row the nearest valid column on either side.
    left = torch.where(valid, columns, -far).cummax(1).values
    right = torch.where(valid, columns, width + far).flip(1).cummin(1).values.flip(1)
    to_left, to_right = columns - left, right - columns
    source_column = torch.where(to_left <= to_right, left, right)
    in_row = torch.minimum(to_left, to_right)
    # 2. In each column the row with the least distance along that row + distance to that row,
    #    searched from above and from below.
    above, above_row = (in_row - rows).cummin(0)
    below, below_row = (in_row + rows).flip(0).cummin(0)
    below, below_row = below.flip(0), height - 1 - below_row.flip(0)
    source_row = torch.where(above + rows <= below - rows, above_row, below_row)
    return source_row * width + source_column.gather(0, source_row)


def _rays_from_camera_0(
    height: int,
    width: int,
    intrinsics: Tensor,  # [..., T, 3, 3]
    cam2world: Tensor,  # [..., T, 4, 4]
) -> tuple[Tensor, Tensor]:  # centres [..., T, 3], directions [..., T, H, W, 3]
    """Return camera centres and pixel rays (one unit of z-depth long) in camera-0 coordinates."""
    rotation, centres = split_se3(rebase_to_first(cam2world))
    return centres, rotate(rotation[..., None, None, :, :], camera_rays(height, width, intrinsics))


def _fit_scale(
    points: Tensor,  # [N, 3], valid points, camera-0 coordinates
    centres: Tensor,  # [T, 3], camera-0 coordinates
    far_limit: float,
    z_offset: bool,
) -> PointmapScale:
    """Find the smallest cube that holds the points and the camera centres.

    Points up to the reach lie within 0.90, all camera centres within 0.80 (module's docstring).
    """
    distance = points.abs().amax(-1)  # [N]
    # By nearest rank: torch.quantile refuses more than 16 M values, which is one long clip.
    percentile = distance.kthvalue(max(1, round(PERCENTILE * len(distance)))).values
    reach = torch.minimum(HEADROOM * percentile, far_limit * distance.median())
    side = torch.minimum(points[:, :2].abs().amax(), reach)
    ahead, behind = torch.minimum(points[:, 2].amax(), reach), torch.minimum(-points[:, 2].amin(), reach)
    centre_side = centres[:, :2].abs().amax()
    centre_ahead, centre_behind = centres[:, 2].amax(), -centres[:, 2].amin()  # both >= 0: camera 0 is the origin
    needed = [side / GEOMETRY_EXTENT, centre_side / CENTRE_EXTENT]
    faces_ahead = [(ahead, GEOMETRY_EXTENT), (centre_ahead, CENTRE_EXTENT)]
    faces_behind = [(behind, GEOMETRY_EXTENT), (centre_behind, CENTRE_EXTENT)]
    if z_offset:  # only the sum of an extent ahead and one behind limits the scale: 2 x 2 pairs
        needed += [(a + b) / (room + room_b) for a, room in faces_ahead for b, room_b in faces_behind]
    else:
        needed += [extent / room for extent, room in faces_ahead + faces_behind]
    # Some slack for rounding: the farthest point must land inside 0.90, not just outside.
    scale = torch.stack(needed).amax() * (1 + 8 * torch.finfo(points.dtype).eps)
    offset = torch.zeros_like(scale)
    if z_offset:  # the middle of the offsets that this scale allows
        lowest = torch.stack([extent - room * scale for extent, room in faces_ahead]).amax()
        highest = torch.stack([room * scale - extent for extent, room in faces_behind]).amin()
        offset = (lowest + highest) / 2
    if not bool(scale.isfinite() & (scale > 0)):
        raise ValueError(f"pointmap: scale {float(scale)} from the clip's depth and cameras, need finite and positive")
    return PointmapScale(scale, offset)


def _leave_cube(
    origins: Tensor,  # [M, 3], inside the cube
    directions: Tensor,  # [M, 3], not zero
    extent: Tensor,  # [M], half-size of the cube
) -> Tensor:  # [M, 3], max|x| exactly extent
    """Return the point where each ray leaves the cube (slab method)."""
    face = directions.sign() * extent[:, None]  # [M, 3], the face that each axis runs towards
    steps = torch.where(directions == 0, torch.inf, (face - origins) / directions)
    nearest = steps.amin(-1, keepdim=True)
    hit = torch.minimum(torch.maximum(origins + nearest * directions, -extent[:, None]), extent[:, None])
    return torch.where(steps == nearest, face, hit)  # exactly on the face, whatever the rounding


def _offset_vector(scale: PointmapScale) -> Tensor:  # [...] -> [..., 1, 1, 1, 3]
    zero = torch.zeros_like(scale.offset)
    return torch.stack([zero, zero, scale.offset], dim=-1)[..., None, None, None, :]
