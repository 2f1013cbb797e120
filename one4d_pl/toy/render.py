"""Analytic ray caster of the toy world: exact z-depth at pixel centres and antialiased colour.

1. `pixel_rays` turns intrinsics and cam2world into world directions of unit camera z, so that the
   length along a ray *is* the z-depth.
2. `trace` intersects rays with the room and every solid in closed form (float64); the nearest wins.
3. `shade` colours hits: Lambert, soft ambient, blob shadows, textures that are sums of sine waves.
4. `render` calls them frame chunk by frame chunk and supersamples colour where surfaces meet.

World: OpenCV axes (y points down), the ground is the plane y = 0, so everything else has y < 0. Dims: T frames, P rays
per frame, N hits, W waves. Colours are linear light (display value squared) until the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Shape = Literal["box", "ellipsoid", "capsule"]

# codes: 0..5 are the room's faces (2 * axis + positive side), then the sky, then the solids
SKY = 6
FIRST_SOLID = 7
GROUND, CEILING = 3, 2
_MAX_RAYS = 400_000  # per chunk: bounds memory at any clip size
_FOOTPRINT_SIGMA = 0.45  # pixels; the Gaussian footprint closest to a box of one pixel
AIR = np.array([0.56, 0.68, 0.82], dtype=np.float32)  # the colour that distance blends in
# a rotated grid, (u, v)
_SUBPIXELS = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]])


@dataclass(frozen=True)
class Texture:
    """A solid texture: a blend of two colours by a sum of sine waves.

    The waves live in the surface's own coordinates.
    """

    colours: Floats  # [2, 3] linear light
    waves: Floats  # [W, 3] rad per unit
    phases: Floats  # [W]
    amplitudes: Floats  # [W]


@dataclass(frozen=True)
class Solid:
    """A convex primitive in every frame of the clip.

    A capsule's axis is local y, its size (radius, half length, radius).
    """

    shape: Shape
    centre: Floats  # [T, 3] world
    rotation: Floats  # [T, 3, 3] local to world
    size: Floats  # [T, 3] half extents
    texture: Texture
    moving: bool
    casts_shadow: bool = True


@dataclass(frozen=True)
class Room:
    """The inside of an axis-aligned box. With `open_sky` there is no ceiling and the walls end at lower[1]."""

    lower: Floats  # [3]; y is up negative: lower[1] is the top
    upper: Floats  # [3]; upper[1] = 0 is the ground
    open_sky: bool
    ground: Texture
    walls: Texture
    ceiling: Texture
    sky: Texture
    light: Floats  # [3] unit, towards the light
    air: float = 0.0  # optical depth per unit of z-depth; 0 = a vacuum
    gloss: float = 0.0  # of solids; 0 = matt


@dataclass(frozen=True)
class Views:
    """Cameras of the clip, in float64 but rounded to float32. Clips store float32, so what they store is exact."""

    intrinsics: Floats  # [T, 3, 3] pixels
    cam2world: Floats  # [T, 4, 4]


def pixel_rays(views: Views, u: Floats, v: Floats) -> Floats:  # u, v broadcast to [T, P] -> [T, P, 3]
    """Return world directions through image points u, v (pixels), scaled to camera z = 1."""
    focal, centre = views.intrinsics[:, 0, 0, None], views.intrinsics[:, :2, 2, None]
    x, y = np.broadcast_arrays((u - centre[:, 0]) / focal, (v - centre[:, 1]) / focal)
    camera = np.stack([x, y, np.ones_like(x)], axis=-1)
    return camera @ views.cam2world[:, :3, :3].transpose(0, 2, 1)


def trace(room: Room, solids: Sequence[Solid], views: Views, rays: Floats) -> tuple[Floats, Ints]:
    """Find the nearest hit of rays [T, P, 3]: z-depth [T, P] (+inf = sky) and code [T, P]."""
    depth, code = _trace_room(room, views.cam2world[:, :3, 3], rays)
    squared = np.einsum("tpc,tpc->tp", rays, rays)
    flat_depth, flat_code, flat_rays = depth.reshape(-1), code.reshape(-1), rays.reshape(-1, 3)
    for number, solid in enumerate(solids, start=FIRST_SOLID):
        offset = solid.centre - views.cam2world[:, :3, 3]  # [T, 3]
        along = (rays @ offset[:, :, None])[..., 0]  # [T, P]
        # rays that miss the bounding sphere are culled before the exact test
        spare = (offset**2).sum(-1) - bounding_radius(solid) ** 2
        hit = np.flatnonzero((along > 0) & (along * along > spare[:, None] * squared))
        if not len(hit):
            continue
        frame = hit // rays.shape[1]
        to_local = solid.rotation[frame]
        origin = np.einsum("ni,nij->nj", -offset[frame], to_local)
        direction = np.einsum("ni,nij->nj", flat_rays[hit], to_local)
        distance = _INTERSECT[solid.shape](origin, direction, solid.size[frame])
        nearer = distance < flat_depth[hit]
        flat_depth[hit[nearer]] = distance[nearer]
        flat_code[hit[nearer]] = number
    return depth, code


def _trace_room(room: Room, origin: Floats, rays: Floats) -> tuple[Floats, Ints]:
    """Find where rays from inside the room leave it: z-depth and code [T, P] as `trace`."""
    lower = room.lower if not room.open_sky else np.array([room.lower[0], -np.inf, room.lower[2]])
    depth = np.full(rays.shape[:2], np.inf)
    code = np.full(rays.shape[:2], SKY, dtype=np.int64)
    for axis in range(3):
        towards = rays[..., axis]
        with np.errstate(divide="ignore"):
            distance = (np.where(towards > 0, room.upper[axis], lower[axis]) - origin[:, None, axis]) / towards
        # the camera is inside: only a division by 0 can give a negative (infinite) distance
        distance = np.abs(distance)
        nearer = distance < depth
        np.copyto(depth, distance, where=nearer)
        np.copyto(code, 2 * axis + (towards > 0), where=nearer)
    if room.open_sky:
        with np.errstate(invalid="ignore"):
            above = ~(origin[:, None, 1] + depth * rays[..., 1] >= room.lower[1])
        depth[above], code[above] = np.inf, SKY
    return depth, code


def bounding_radius(solid: Solid) -> Floats:  # [T]
    """Return the radius of the sphere around the centre that holds the solid."""
    if solid.shape == "box":
        return np.linalg.norm(solid.size, axis=-1)
    return solid.size.max(-1) if solid.shape == "ellipsoid" else solid.size[:, 0] + solid.size[:, 1]


def _dot(a: Floats, b: Floats) -> Floats:  # [N, C] x 2 -> [N]
    return np.einsum("nc,nc->n", a, b)


def _hit_ellipsoid(origin: Floats, direction: Floats, size: Floats) -> Floats:  # [N, 3] x 3 -> [N], inf = miss
    origin, direction = origin / size, direction / size
    a, b = _dot(direction, direction), _dot(origin, direction)
    closest = origin - (b / a)[:, None] * direction  # b^2 - a c would lose digits by cancellation
    discriminant = (1 - _dot(closest, closest)) / a
    distance = -b / a - np.sqrt(np.maximum(discriminant, 0))
    return np.where((discriminant > 0) & (distance > 0), distance, np.inf)


def _hit_box(origin: Floats, direction: Floats, size: Floats) -> Floats:
    inverse = 1 / np.where(direction == 0, 1e-30, direction)
    middle, half = -origin * inverse, np.abs(size * inverse)
    (enter_x, enter_y, enter_z), (leave_x, leave_y, leave_z) = (middle - half).T, (middle + half).T
    enter = np.maximum(np.maximum(enter_x, enter_y), enter_z)
    leave = np.minimum(np.minimum(leave_x, leave_y), leave_z)
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def _hit_capsule(origin: Floats, direction: Floats, size: Floats) -> Floats:
    radius, half = size[:, 0], size[:, 1]
    direction_xz, origin_xz = direction[:, ::2], origin[:, ::2]  # as seen along the axis
    a, b = np.maximum(_dot(direction_xz, direction_xz), 1e-30), _dot(origin_xz, direction_xz)
    discriminant = b * b - a * (_dot(origin_xz, origin_xz) - radius**2)
    distance = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    y = origin[:, 1] + distance * direction[:, 1]
    end = origin - np.stack([0 * y, np.sign(y) * half, 0 * y], axis=-1)
    cap = _hit_ellipsoid(end, direction, radius[:, None])
    return np.where(discriminant > 0, np.where((np.abs(y) < half) & (distance > 0), distance, cap), np.inf)


_INTERSECT = {"box": _hit_box, "ellipsoid": _hit_ellipsoid, "capsule": _hit_capsule}


def _local_normals(solid: Solid, point: Floats, size: Floats) -> tuple[Floats, Ints]:
    """Return outward normals at local points [N, 3] and the face [N] (0 for all but boxes)."""
    face = np.zeros(len(point), dtype=np.int64)
    if solid.shape == "box":
        axis = np.argmax(np.abs(point / size), axis=-1)
        sign = np.sign(np.take_along_axis(point, axis[:, None], -1)[:, 0])
        normal = np.zeros_like(point)
        np.put_along_axis(normal, axis[:, None], sign[:, None], -1)
        return normal, 2 * axis + (sign > 0)
    if solid.shape == "ellipsoid":
        normal = point / size**2
    else:
        normal = point.copy()
        normal[:, 1] -= np.clip(point[:, 1], -size[:, 1], size[:, 1])
    return normal / np.sqrt(_dot(normal, normal))[:, None], face


def _blend(texture: Texture, point: Floats, step_u: Floats, step_v: Floats) -> NDArray[np.float32]:
    """Return the colour [N, 3] at texture points [N, 3].

    `step_u` and `step_v` [N, 3] are the movement per pixel: waves too short for a pixel fade.
    """
    waves = texture.waves.T.astype(np.float32)
    phase = (point @ texture.waves.T + texture.phases).astype(np.float32)
    per_pixel = (step_u.astype(np.float32) @ waves) ** 2 + (step_v.astype(np.float32) @ waves) ** 2
    # a Gaussian footprint of width sigma multiplies a sine of w radians per pixel by exp(-sigma^2 w^2 / 2)
    faded = np.exp(np.float32(-0.5 * _FOOTPRINT_SIGMA**2) * per_pixel) * np.sin(phase)
    weight = (0.5 + 0.5 * np.tanh(faded @ texture.amplitudes.astype(np.float32)))[:, None]
    low, high = texture.colours.astype(np.float32)
    return low + weight * (high - low)


def shade(
    room: Room, solids: Sequence[Solid], views: Views, rays: Floats, depth: Floats, code: Ints
) -> tuple[NDArray[np.float32], Ints]:
    """Colour traced rays: linear colour [T, P, 3] and a surface number [T, P].

    The surface number changes at every visible edge.
    """
    colour = np.empty((depth.size, 3), dtype=np.float32)
    face = np.zeros(depth.size, dtype=np.int64)
    flat_code, flat_rays, flat_depth = code.reshape(-1), rays.reshape(-1, 3), depth.reshape(-1)
    steps = views.cam2world[:, :3, :2] / views.intrinsics[:, 0, 0, None, None]  # ray change per pixel, [T, 3, (u, v)]
    for hit_code in map(int, np.flatnonzero(np.bincount(flat_code))):
        hit = np.flatnonzero(flat_code == hit_code)
        frame, ray = hit // depth.shape[1], flat_rays[hit]
        if hit_code == SKY:
            colour[hit] = _shade_sky(room, ray, steps[frame])
            continue
        point = views.cam2world[frame, :3, 3] + flat_depth[hit, None] * ray
        if hit_code < FIRST_SOLID:
            axis, side = divmod(hit_code, 2)
            normal = np.zeros_like(point)
            normal[:, axis] = 1 - 2 * side
            texture = room.ground if hit_code == GROUND else room.ceiling if hit_code == CEILING else room.walls
            to_texture, local = None, point
        else:
            solid = solids[hit_code - FIRST_SOLID]
            texture, to_local, size = solid.texture, solid.rotation[frame], solid.size[frame]
            local = np.einsum("ni,nij->nj", point - solid.centre[frame], to_local)
            normal, face[hit] = _local_normals(solid, local, size)
            normal = np.einsum("nij,nj->ni", to_local, normal)
            stretch = solid.size.mean(0) / size  # the texture stretches with the solid
            to_texture, local = to_local * stretch[:, None, :], local * stretch
        per_pixel = []
        # how far the hit moves on its tangent plane from one pixel to the next
        for step in (steps[frame, :, 0], steps[frame, :, 1]):
            slide = _dot(step, normal) / np.minimum(_dot(ray, normal), -1e-3)
            moved = flat_depth[hit, None] * (step - slide[:, None] * ray)
            per_pixel.append(moved if to_texture is None else np.einsum("ni,nij->nj", moved, to_texture))
        albedo = _blend(texture, local, per_pixel[0], per_pixel[1])
        light = 0.33 + 0.12 * -normal[:, 1] + 0.75 * np.maximum(normal @ room.light, 0)
        if hit_code == GROUND:
            light = light * _shadow_on_ground(solids, point, frame)
        elif hit_code < SKY:  # corners are darker
            light = light * (1 - 0.3 * np.exp(4 * point[:, 1] / abs(room.lower[1])))
        colour[hit] = albedo * light[:, None].astype(np.float32)
        if room.gloss and hit_code >= FIRST_SOLID:
            colour[hit] = _add_gloss(room, colour[hit], ray, normal, point, size.mean(-1))
        if room.air:
            clear = np.exp(-room.air * flat_depth[hit, None]).astype(np.float32)
            colour[hit] = AIR + clear * (colour[hit] - AIR)
    return colour.reshape(*depth.shape, 3), (flat_code * 8 + face).reshape(depth.shape)


def _add_gloss(
    room: Room, colour: NDArray[np.float32], ray: Floats, normal: Floats, point: Floats, size: Floats
) -> NDArray[np.float32]:
    """Add a soft highlight to a solid's colour [N, 3], and darken it near the ground.

    The darkening reaches about as high as the solid's size [N].
    """
    unit = ray / np.sqrt(_dot(ray, ray))[:, None]
    mirrored = unit - 2 * _dot(unit, normal)[:, None] * normal
    highlight = room.gloss * 0.35 * np.maximum(mirrored @ room.light, 0) ** 12
    shaded = 1 - room.gloss * 0.4 * np.exp(2.5 * point[:, 1] / size)
    return (colour * shaded[:, None] + highlight[:, None]).astype(np.float32)


def _shade_sky(room: Room, ray: Floats, step: Floats) -> NDArray[np.float32]:
    """Colour the sky [N, 3]: soft clouds, paler towards the horizon."""
    length = np.sqrt(_dot(ray, ray))[:, None]
    unit = ray / length
    clouds = _blend(room.sky, unit, step[..., 0] / length, step[..., 1] / length)
    haze = np.exp(-5 * np.maximum(-unit[:, 1:2], 0)).astype(np.float32)
    return clouds + haze * (np.array([0.85, 0.88, 0.9], dtype=np.float32) - clouds) * np.float32(0.8)


def _shadow_on_ground(solids: Sequence[Solid], point: Floats, frame: Ints) -> Floats:
    """Return the share of light [N] left at ground points.

    Each solid casts a soft blob below itself that fades as the solid rises.
    """
    light_left = np.ones(len(point), dtype=np.float32)
    x, z = point[:, 0].astype(np.float32), point[:, 2].astype(np.float32)
    for solid in solids:
        if not solid.casts_shadow:
            continue
        size = solid.size if solid.shape != "capsule" else solid.size + solid.size[:, :1] * [0, 1, 0]
        extent = np.sqrt(((solid.rotation * size[:, None, :]) ** 2).sum(-1))  # [T, 3] support along the world axes
        gap = np.maximum(-solid.centre[:, 1] - extent[:, 1], 0)
        strength = 0.7 / (1 + 3 * gap / (extent[:, 0] + extent[:, 2]))
        table = np.stack([solid.centre[:, 0], solid.centre[:, 2], extent[:, 0], extent[:, 2], strength], axis=-1)
        cx, cz, ex, ez, dark = table.astype(np.float32)[frame].T
        light_left *= 1 - dark * np.exp(-0.5 * (((x - cx) / ex) ** 2 + ((z - cz) / ez) ** 2))
    return light_left.astype(np.float64)


def render(
    room: Room, solids: Sequence[Solid], views: Views, height: int, width: int
) -> tuple[NDArray[np.float32], Floats, Ints]:
    """Render display colour, z-depth at pixel centres and code of what is seen.

    Shapes are [T, H, W, 3] in [0, 1], [T, H, W] and [T, H, W].
    """
    per_chunk = max(1, _MAX_RAYS // (height * width))
    parts = []
    for start in range(0, len(views.intrinsics), per_chunk):
        part = slice(start, start + per_chunk)
        shown = [replace(s, centre=s.centre[part], rotation=s.rotation[part], size=s.size[part]) for s in solids]
        cameras = Views(views.intrinsics[part], views.cam2world[part])
        parts.append(_render_chunk(room, shown, cameras, height, width))
    colour, depth, code = (np.concatenate(part) for part in zip(*parts, strict=True))
    return np.sqrt(np.clip(colour, 0, 1)), depth, code


def _render_chunk(
    room: Room, solids: Sequence[Solid], views: Views, height: int, width: int
) -> tuple[NDArray[np.float32], Floats, Ints]:
    v, u = (axis.reshape(-1) + 0.5 for axis in np.mgrid[:height, :width])
    rays = pixel_rays(views, u[None], v[None])
    depth, code = trace(room, solids, views, rays)
    colour, surface = shade(room, solids, views, rays, depth, code)
    edge = _edges(surface.reshape(-1, height, width)).reshape(depth.shape)
    count = int(edge.sum(1).max())
    if count:  # frames with fewer edge pixels are padded with others, which does no harm
        picked = np.argsort(~edge, axis=1, kind="stable")[:, :count]  # [T, E]
        sub_u = (u[picked][..., None] + _SUBPIXELS[:, 0]).reshape(len(picked), -1)
        sub_v = (v[picked][..., None] + _SUBPIXELS[:, 1]).reshape(len(picked), -1)
        sub_rays = pixel_rays(views, sub_u, sub_v)
        sub_depth, sub_code = trace(room, solids, views, sub_rays)
        fine, _ = shade(room, solids, views, sub_rays, sub_depth, sub_code)
        mean = fine.reshape(len(picked), count, len(_SUBPIXELS), 3).mean(2)
        np.put_along_axis(colour, picked[..., None], mean, axis=1)
    shape = (len(views.intrinsics), height, width)
    return colour.reshape(*shape, 3), depth.reshape(shape), code.reshape(shape)


def _edges(surface: Ints) -> NDArray[np.bool_]:  # [T, H, W] -> [T, H, W]
    """Mark pixels with another surface among their four neighbours."""
    edge = np.zeros(surface.shape, dtype=bool)
    down, right = np.diff(surface, axis=1) != 0, np.diff(surface, axis=2) != 0
    edge[:, :-1] |= down
    edge[:, 1:] |= down
    edge[:, :, :-1] |= right
    edge[:, :, 1:] |= right
    return edge
