"""Drawing toy scenes: a seed becomes a room or courtyard, things in it, and a camera path.

What a clip must look like (depth range, sky, moving share, focal length, path length) is drawn first. Then scenes are
drawn until a coarse preview meets it, so that the spread of difficulty is decided here and not left to chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from one4d_pl.toy.levels import GROUND_COLOURS, LEVELS, PATTERNS, THING_COLOURS, WALL_COLOURS, Level
from one4d_pl.toy.render import FIRST_SOLID, SKY, Floats, Room, Texture, pixel_rays, trace
from one4d_pl.toy.things import (
    DIRECTIONS,
    CameraPath,
    Scene,
    Thing,
    bounding_sphere,
    moving_codes,
    solids_at,
    views_at,
    yaw_rotation,
)
from one4d_pl.types import DOMAINS

# one camera sweep; the targets hold for clips of this length (17 frames at 12 fps)
SWEEP_SECONDS = 4 / 3
_PREVIEW_TIMES = np.array([0.0, 0.5, 1.0]) * SWEEP_SECONDS
_PREVIEW_SIZE = (16, 24)
_ATTEMPTS = 16
_UNPAINTED = Texture(np.zeros((2, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros(0))
_CLEARANCE = 0.6  # nothing comes nearer to the camera than this


@dataclass(frozen=True)
class Targets:
    """The targets that a clip must meet, drawn before its scene."""

    sky: bool
    depth_ratio: float  # p98 / p2 of finite depth
    focal: float  # in units of the longer side
    zoom: float
    lively: bool  # at least 13 % of the pixels move
    path_ratio: float  # camera path / median depth


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


def _draw_targets(rng: np.random.Generator, level: Level) -> Targets:
    return Targets(
        sky=bool(rng.random() < 1 / 3),
        depth_ratio=_log_uniform(rng, *level.depth_ratios),
        focal=_log_uniform(rng, *level.focals),
        zoom=float(rng.choice(level.zooms)),
        lively=bool(rng.random() < 0.75),
        path_ratio=_log_uniform(rng, 0.08, 0.5),
    )


def _draw_texture(
    rng: np.random.Generator, colour: tuple[float, ...], pattern: str, unit: float, far: float, level: Level
) -> Texture:
    """Draw a pattern of main wavelength `unit` over mottling of wavelengths up to `far`."""
    shade = rng.uniform(0.5, 0.66)
    shade += (1 - level.contrast) * (1 - shade)
    colours = np.stack([np.array(colour) * shade, np.clip(np.array(colour) * 1.08, 0, 1)]) ** 2
    count = 4 + round(1.5 * math.log2(max(far / unit, 1)))
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    length = np.exp(np.linspace(math.log(0.6 * unit), math.log(max(far, 1.5 * unit)), count)) * rng.uniform(
        0.85, 1.15, count
    )
    waves, amplitudes = 2 * math.pi * direction / length[:, None], np.full(count, 0.8 / level.crispness)
    if pattern != "plain":
        amplitudes *= 0.35
        turned = rng.uniform(0, math.pi)
        first = np.array([math.cos(turned), 0.25, math.sin(turned)]) * 2 * math.pi / unit
        second = np.array([-math.sin(turned), 0.25, math.cos(turned)]) * 2 * math.pi / unit
        # sin a sin b = (cos(a - b) - cos(a + b)) / 2: two waves make soft checks
        main = first[None] if pattern == "striped" else np.stack([first - second, first + second]) / math.sqrt(2)
        waves = np.concatenate([main, waves])
        amplitudes = np.concatenate(
            [np.full(len(main), level.crispness * (1.5 if pattern == "striped" else 1.1)), amplitudes]
        )
    return Texture(colours, waves, rng.uniform(0, 2 * math.pi, len(waves)), amplitudes)


def _draw_path(rng: np.random.Generator, targets: Targets, near: float, median: float) -> CameraPath:
    """Draw a path along which the picture's bottom row sees the ground at depth `near`."""
    half_view = _half_view(targets.focal)
    pitch = half_view * (rng.uniform(0.0, 0.4) if targets.sky else rng.uniform(0.1, 0.75))
    height = max(0.25, near * math.sin(pitch + half_view) / math.cos(half_view))
    kinds = [*DIRECTIONS, "circles to the left", "circles to the right"]
    kind = str(rng.choice(kinds, p=[0.2, 0.12, 0.17, 0.17, 0.06, 0.06, 0.11, 0.11]))
    span = targets.path_ratio * median
    return CameraPath(
        kind=kind,
        start=np.array([rng.uniform(-3, 3), -height - (span if kind == "sinks" else 0.0), rng.uniform(-3, 3)]),
        yaw=math.radians(rng.uniform(-35, 35)),
        pitch=pitch,
        focal=targets.focal,
        zoom=targets.zoom,
        span=span,
        pivot=max(median, 1.5 * span),
        rate=2 * math.pi / 3 / SWEEP_SECONDS,
        wobble=np.stack([rng.uniform(3, 7, 3), rng.uniform(0, 2 * math.pi, 3)], axis=-1),
    )


def _draw_room(
    rng: np.random.Generator, level: Level, targets: Targets, path: CameraPath, near: float, far: float
) -> tuple[Room, str, str]:
    """Draw a box around the camera path whose far wall is about `far` away.

    Returns it with the names of its floor and walls.
    """
    camera_at = views_at(path, np.linspace(0, 2 * math.pi / path.rate, 32), *_PREVIEW_SIZE).cam2world[:, :3, 3]
    margin = max(0.8, 0.1 * far)
    lower = np.minimum(path.start - far * rng.uniform([0.5, 0.0, 0.2], [1.0, 0.0, 0.4]), camera_at.min(0) - margin)
    upper = np.maximum(path.start + far * rng.uniform([0.5, 0.0, 0.8], [1.0, 0.0, 1.0]), camera_at.max(0) + margin)
    half_view = _half_view(path.focal)
    if targets.sky:  # the wall ends within the view
        wall = max(0.3, far * math.tan(rng.uniform(0.1, 0.5) * (half_view - path.pitch)))
    else:
        wall = max(margin, far * math.tan(half_view) * rng.uniform(0.5, 1.3))
    lower[1], upper[1] = camera_at[:, 1].min() - wall, 0.0
    ground, walls = str(rng.choice(list(GROUND_COLOURS))), str(rng.choice(list(WALL_COLOURS)))
    patterns = rng.choice(PATTERNS, 2)
    light = np.array([rng.uniform(-0.7, 0.7), -1.0, rng.uniform(-0.9, 0.3)])
    blue = np.array([rng.uniform(0.25, 0.45), rng.uniform(0.5, 0.62), rng.uniform(0.8, 0.95)])
    clouds = np.clip(blue + rng.uniform(0.1, 0.35), 0, 0.97)
    room = Room(
        lower=lower,
        upper=upper,
        open_sky=targets.sky,
        ground=_draw_texture(rng, GROUND_COLOURS[ground], patterns[0], 0.8 * near, far, level),
        walls=_draw_texture(rng, WALL_COLOURS[walls], patterns[1], 0.12 * far, far, level),
        ceiling=_draw_texture(rng, (0.92, 0.91, 0.88), "plain", 0.3 * far, far, level),
        sky=replace(
            _draw_texture(rng, (1.0, 1.0, 1.0), "plain", 0.35, 1.2, level), colours=np.stack([blue, clouds]) ** 2
        ),
        light=light / np.linalg.norm(light),
        air=level.air / far,
        gloss=level.gloss,
    )
    return room, f"{patterns[0]} {ground} floor", f"{patterns[1]} {walls} walls"


def _draw_thing(
    rng: np.random.Generator, noun: str, motion: str, colour: str, half_width: float, anchor: Floats
) -> Thing:
    """Draw a thing on the ground at `anchor` [3], about 2 * half_width wide, not yet painted."""
    size = (
        half_width
        * {
            "box": rng.uniform(0.6, 1.2, 3),
            "ball": np.ones(3),
            "egg": np.array([0.75, 1.0, 0.75]),
            "blob": np.array([1.0, 0.85, 1.0]),
            "post": np.array([0.4, 0.8, 0.4]),
            "figure": np.array([0.6, 1.7, 0.6]),
        }[noun]
    )
    return Thing(
        noun,
        motion,
        colour,
        texture=_UNPAINTED,
        accent=_UNPAINTED,
        size=size,
        anchor=anchor,
        heading=rng.uniform(-math.pi, math.pi),
        amplitude=half_width * rng.uniform(0.7, 1.6),
        rate=rng.uniform(2.2, 4.5),
        phase=rng.uniform(0, 2 * math.pi),
    )


def _paint(rng: np.random.Generator, thing: Thing, level: Level) -> Thing:
    """Give the thing textures in proportion to its width.

    A figure's limbs and head have a colour between its own and skin.
    """
    colour, width = THING_COLOURS[thing.colour], float(thing.size[0])
    accent = tuple(0.45 * c + 0.55 * skin for c, skin in zip(colour, (0.85, 0.68, 0.52), strict=True))
    return replace(
        thing,
        texture=_draw_texture(rng, colour, str(rng.choice(PATTERNS)), width, width, level),
        accent=_draw_texture(rng, accent, "plain", width, width, level),
    )


def _draw_things(
    rng: np.random.Generator, level: Level, targets: Targets, room: Room, path: CameraPath, near: float, far: float
) -> list[Thing]:
    """Draw unpainted things ahead of the camera. They touch neither each other, nor the room, nor the camera's path."""
    count, movers = rng.integers(*level.things[targets.lively]), rng.integers(*level.movers[targets.lively])
    colours = rng.permutation(list(THING_COLOURS))
    times = np.linspace(0, 2 * math.pi / path.rate, 32)
    camera_at = views_at(path, times, *_PREVIEW_SIZE).cam2world[:, :3, 3]
    middle = views_at(path, _PREVIEW_TIMES[1:2], *_PREVIEW_SIZE).cam2world[0]
    heading = yaw_rotation(np.array([math.atan2(middle[0, 2], middle[2, 2])]))[0]
    things: list[Thing] = []
    occupied: list[tuple[Floats, float]] = []
    for number in range(count):
        noun = str(rng.choice(level.first_nouns if number == 0 else level.nouns))
        motion = str(rng.choice(level.motions[noun])) if number < movers or noun == "figure" else "stands still"
        for _ in range(30):
            ahead = _log_uniform(rng, 1.25 * near, max(0.8 * far, 2 * near))
            if number < movers:  # nearer: a mover must cover enough pixels
                ahead = min(ahead, _log_uniform(rng, 1.25 * near, max(0.8 * far, 2 * near)))
            half_field = ahead * 0.5 / targets.focal
            share = rng.uniform(*(level.mover_shares if targets.lively and number < movers else level.other_shares))
            offset = np.array([rng.uniform(-0.85, 0.85) * half_field, 0.0, ahead])
            anchor = (middle[:3, 3] + heading @ offset) * [1.0, 0.0, 1.0]
            thing = _draw_thing(rng, noun, motion, str(colours[number]), share * half_field, anchor)
            centre, radius = bounding_sphere(thing)
            if (
                np.linalg.norm(camera_at - centre, axis=-1).min() > radius + _CLEARANCE
                and all(np.linalg.norm(centre - other) > radius + extent for other, extent in occupied)
                and (centre - radius > room.lower)[[0, 2]].all()
                and (centre + radius < room.upper)[[0, 2]].all()
                and (room.open_sky or centre[1] - radius > room.lower[1])
            ):
                things.append(thing)
                occupied.append((centre, radius))
                break
    return things


def _draw_scene(rng: np.random.Generator, level: Level, targets: Targets, gain: float, median: float) -> Scene:
    """Draw a scene whose far wall is `gain` times as far as the targets ask for.

    `median` is the median depth to expect, as a multiple of the nearest ground's depth.
    """
    near = _log_uniform(rng, 0.6, max(0.7, min(2.5, 30 / targets.depth_ratio)))
    path = _draw_path(rng, targets, near, near * median)
    near = -path.start[1] * math.cos(_half_view(path.focal)) / math.sin(path.pitch + _half_view(path.focal))
    far = near * max(targets.depth_ratio * gain, 1.8)
    room, ground_name, wall_name = _draw_room(rng, level, targets, path, near, far)
    return Scene(room, _draw_things(rng, level, targets, room, path, near, far), path, ground_name, wall_name)


def _half_view(focal: float) -> float:
    """Return half the vertical field of view (rad) of the preview's picture."""
    return math.atan(0.5 * _PREVIEW_SIZE[0] / _PREVIEW_SIZE[1] / focal)


def _preview(scene: Scene) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
    """Trace the scene coarsely at three times: depth, code and whether it moves, [3, P] each."""
    views = views_at(scene.path, _PREVIEW_TIMES, *_PREVIEW_SIZE)
    v, u = (axis.reshape(1, -1) + 0.5 for axis in np.mgrid[: _PREVIEW_SIZE[0], : _PREVIEW_SIZE[1]])
    solids = [solid for thing in scene.things for solid in solids_at(thing, _PREVIEW_TIMES)]
    depth, code = trace(scene.room, solids, views, pixel_rays(views, u, v))
    return depth, code, moving_codes(solids)[code]


def build_scene(seed: int, domain: str, level_name: str = "hard") -> Scene:
    """Build the scene of a seed; every level and domain has its own scenes.

    ValueError for an unknown level or domain, or a negative seed.
    """
    if level_name not in LEVELS:
        raise ValueError(f"toy world: unknown level {level_name!r}, use one of {tuple(LEVELS)}")
    if domain not in DOMAINS:
        raise ValueError(f"toy world: unknown domain {domain!r}, use one of {DOMAINS}")
    if seed < 0:
        raise ValueError(f"toy world: seed {seed} is negative, use 0 or more")
    key, level = [seed, DOMAINS.index(domain)], LEVELS[level_name]
    rng = np.random.default_rng([*key, 0])
    targets = _draw_targets(rng, level)
    gain, median = 1.0, math.sqrt(targets.depth_ratio)
    best: tuple[float, Scene] | None = None
    for attempt in range(1, _ATTEMPTS + 1):
        scene = _draw_scene(np.random.default_rng([*key, attempt]), level, targets, gain, median)
        depth, code, moving = _preview(scene)
        finite = depth[np.isfinite(depth)]
        low, middle, high = np.quantile(finite, [0.02, 0.5, 0.98])
        sky = (code == SKY).mean(-1)
        largest = max(np.bincount(frame).max() / len(frame) for frame in code)
        misses = [  # each is 0 when the target is met and about 1 when it is clearly missed
            max(0.0, abs(math.log(high / low / targets.depth_ratio)) - 0.12) * 4,
            max(0.0, abs(math.log(scene.path.span / middle / targets.path_ratio)) - 0.3) * 2,
            max(0.0, 0.13 - float(moving.mean())) * 15 if targets.lively else 0.0,
            max(0.0, largest - 0.65) * 8,
            max(0.0, 0.35 - float(finite.min())) * 20,
            float(targets.sky and (sky.min() < 0.04 or sky.max() > 0.5)),
            float(len(np.unique(code[code >= FIRST_SOLID])) < level.min_solids),
        ]
        if best is None or sum(misses) < best[0]:
            best = sum(misses), scene
        if best[0] == 0:
            break
        gain = float(np.clip(gain * (targets.depth_ratio * low / high) ** 0.7, 0.1, 6))
        median *= middle * targets.path_ratio / scene.path.span
    assert best is not None
    return replace(best[1], things=[_paint(rng, thing, level) for thing in best[1].things])
