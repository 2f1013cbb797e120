"""A toy scene at any time: things that move, and a camera path, as pure functions of seconds.

World: OpenCV axes, ground at y = 0, up is -y. A yaw of 0 looks along +z, a positive yaw turns to the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from one4d_pl.toy.render import FIRST_SOLID, Floats, Room, Shape, Solid, Texture, Views, bounding_radius

NOUNS: dict[str, Shape] = {
    "box": "box",
    "ball": "ellipsoid",
    "egg": "ellipsoid",
    "blob": "ellipsoid",
    "post": "capsule",
}
_SWEEP = math.pi / 3  # a sweep is the phase from -60 to +60 degrees, where the sine never rests
_WOBBLE = math.radians(0.4)  # the tremor of a hand-held camera


@dataclass(frozen=True)
class CameraPath:
    """A camera that sweeps back and forth along a line or an arc."""

    kind: str  # a key of DIRECTIONS, or "circles to the left" / "circles to the right"
    start: Floats  # [3]
    yaw: float  # rad
    pitch: float  # rad, positive looks down
    focal: float  # in units of the picture's longer side
    zoom: float  # focal factor at the end of the sweep; 1 = constant
    span: float  # length of one sweep
    pivot: float  # distance of the centre of an arc
    rate: float  # rad/s
    wobble: Floats  # [3, 2] rate (rad/s) and phase of yaw, pitch, roll


DIRECTIONS = {  # (right, down, forward) in the camera's horizontal frame
    "moves forward": (0.0, 0.0, 1.0),
    "moves backward": (0.0, 0.0, -1.0),
    "moves to the left": (-1.0, 0.0, 0.0),
    "moves to the right": (1.0, 0.0, 0.0),
    "rises": (0.0, -1.0, 0.0),
    "sinks": (0.0, 1.0, 0.0),
}


@dataclass(frozen=True)
class Thing:
    """One object; a figure is made of six solids, everything else of one."""

    noun: str  # a key of NOUNS, or "figure"
    motion: str  # the caption's verb; "stands still" does not move
    colour: str
    texture: Texture
    accent: Texture  # a figure's limbs and head
    size: Floats  # [3] half extents
    anchor: Floats  # [3] ground point on which it rests or around which it moves
    heading: float  # rad, direction of its motion
    amplitude: float  # of its motion, world units
    rate: float  # rad/s, the motion repeats after 2 pi / rate
    phase: float

    @property
    def moving(self) -> bool:
        return self.motion != "stands still"


@dataclass(frozen=True)
class Scene:
    """Everything that a seed decides."""

    room: Room
    things: Sequence[Thing]
    path: CameraPath
    ground_name: str
    wall_name: str


def rotation_about(axis: Floats, angle: Floats) -> Floats:  # [3], [T] -> [T, 3, 3]
    """Return rotation matrices about a unit axis (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, cosine = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return np.eye(3) + sine * cross + (1 - cosine) * (cross @ cross)


def yaw_rotation(yaw: Floats) -> Floats:  # [T] -> [T, 3, 3]
    """Return the rotation that takes +z to the horizontal direction of this yaw."""
    return rotation_about(np.array([0.0, 1.0, 0.0]), yaw)


def views_at(path: CameraPath, times: Floats, height: int, width: int) -> Views:
    """Return the cameras at `times` [T] s. Values are rounded to float32, so that a clip can store them exactly."""
    # the share of its span that the camera has covered: 0 at time 0, then back and forth between -0.08 and 1.08
    done = (np.sin(path.rate * times - _SWEEP) / math.sin(_SWEEP) + 1) / 2
    if path.kind in DIRECTIONS:
        yaw = np.full_like(done, path.yaw)
        position = path.start + path.span * done[:, None] * (yaw_rotation(yaw[:1])[0] @ DIRECTIONS[path.kind])
    else:
        side = 1.0 if path.kind == "circles to the left" else -1.0
        yaw = path.yaw + side * path.span / path.pivot * done
        centre = path.start + path.pivot * yaw_rotation(np.array([path.yaw]))[0, :, 2]
        position = centre - path.pivot * yaw_rotation(yaw)[:, :, 2]
    shake = _WOBBLE * np.sin(times[:, None] * path.wobble[:, 0] + path.wobble[:, 1])  # [T, 3]
    look_down = rotation_about(np.array([-1.0, 0.0, 0.0]), path.pitch + shake[:, 1])
    roll = rotation_about(np.array([0.0, 0.0, 1.0]), shake[:, 2])
    cam2world = np.tile(np.eye(4), (len(times), 1, 1))
    cam2world[:, :3, :3] = yaw_rotation(yaw + shake[:, 0]) @ look_down @ roll
    cam2world[:, :3, 3] = position
    intrinsics = np.tile(np.eye(3), (len(times), 1, 1))
    # whatever the size, the longer side has the scene's field of view
    focal = path.focal * max(height, width) * path.zoom**done
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width / 2, height / 2
    return Views(intrinsics.astype(np.float32).astype(np.float64), cam2world.astype(np.float32).astype(np.float64))


def solids_at(thing: Thing, times: Floats) -> list[Solid]:
    """Return the thing's solids at `times` [T] s."""
    if thing.noun == "figure":
        return _figure_at(thing, times)
    num_frames, angle = len(times), thing.rate * times + thing.phase
    size = np.tile(thing.size, (num_frames, 1))
    facing = yaw_rotation(np.array([thing.heading]))[0]
    rotation = np.tile(facing, (num_frames, 1, 1))
    centre = np.tile(thing.anchor, (num_frames, 1))
    if thing.motion == "pulsates":  # breathes at about constant volume
        swell = np.exp(0.3 * np.sin(angle))
        size = size * np.stack([swell**-0.5, swell, swell**-0.5], axis=-1)
    centre_height = size[:, 1] + (size[:, 0] if NOUNS[thing.noun] == "capsule" else 0)
    centre[:, 1] -= centre_height
    if thing.motion in ("slides back and forth", "rolls back and forth"):
        shift = thing.amplitude * np.sin(angle)
        centre += shift[:, None] * facing[:, 2]
        if thing.motion == "rolls back and forth":  # without slipping
            rotation = rotation_about(np.cross([0.0, -1.0, 0.0], facing[:, 2]), shift / thing.size[0]) @ rotation
    elif thing.motion == "bounces":
        centre[:, 1] -= thing.amplitude * np.abs(np.sin(angle))
    elif thing.motion == "moves in a circle":
        centre[:, 0] += thing.amplitude * np.cos(angle)
        centre[:, 2] += thing.amplitude * np.sin(angle)
        rotation = yaw_rotation(-angle)
    elif thing.motion == "spins":
        rotation = yaw_rotation(thing.heading + angle)
    elif thing.motion == "tumbles in the air":
        centre[:, 1] += centre_height - np.linalg.norm(thing.size) - thing.amplitude * (1 + 0.3 * np.sin(angle))
        rotation = rotation_about(np.array([0.48, 0.6, 0.64]), angle) @ rotation
    return [Solid(NOUNS[thing.noun], centre, rotation, size, thing.texture, thing.moving)]


def _figure_at(thing: Thing, times: Floats) -> list[Solid]:
    """Return a walking figure of height 2 * size[1]: torso, head and four limbs.

    The limbs swing about hips and shoulders.
    """
    tall, num_frames = 2 * thing.size[1], len(times)
    angle = thing.rate * times + thing.phase
    stride = math.radians(32) * np.sin(2 * angle)
    facing = np.tile(yaw_rotation(np.array([thing.heading])), (num_frames, 1, 1))
    sideways, down, ahead = facing[0].T
    leg, thick = 0.44 * tall, 0.062 * tall
    hip = np.tile(thing.anchor, (num_frames, 1)) + thing.amplitude * np.sin(angle)[:, None] * ahead
    hip = hip - (thick + (leg - thick) * np.cos(stride))[:, None] * down  # the feet stay on the ground

    def limb(joint: Floats, length: float, radius: float, swing: Floats, shadow: bool) -> Solid:
        rotation = facing @ rotation_about(np.array([1.0, 0.0, 0.0]), swing)
        half = (length - radius) / 2  # from the joint to the centre of the far cap
        size = np.tile([radius, half, radius], (num_frames, 1))
        return Solid("capsule", joint + half * rotation[:, :, 1], rotation, size, thing.accent, True, shadow)

    def ellipsoid(above_hip: float, half: tuple[float, float, float], texture: Texture) -> Solid:
        size = np.tile(np.array(half) * tall, (num_frames, 1))
        return Solid("ellipsoid", hip - above_hip * tall * down, facing, size, texture, True, False)

    parts = [ellipsoid(0.17, (0.13, 0.22, 0.1), thing.texture), ellipsoid(0.47, (0.085, 0.1, 0.085), thing.accent)]
    for side in (-1.0, 1.0):
        parts.append(limb(hip + side * 0.075 * tall * sideways, leg, thick, side * stride, True))
        shoulder = hip - 0.32 * tall * down + side * 0.15 * tall * sideways
        parts.append(limb(shoulder, 0.36 * tall, 0.045 * tall, -1.3 * side * stride, False))
    return parts


def bounding_sphere(thing: Thing) -> tuple[Floats, float]:
    """Return a sphere (centre [3], radius) that holds the thing at all times."""
    period = np.linspace(0, 2 * math.pi / thing.rate, 24)
    solids = solids_at(thing, period)
    centres = np.concatenate([s.centre for s in solids])
    middle = (centres.min(0) + centres.max(0)) / 2
    radii = np.concatenate([bounding_radius(s) for s in solids])
    return middle, float((np.linalg.norm(centres - middle, axis=-1) + radii).max())


def moving_codes(solids: Sequence[Solid]) -> NDArray[np.bool_]:  # [codes]
    """Tell for each code that a trace can return whether it moves in the world."""
    return np.array([False] * FIRST_SOLID + [solid.moving for solid in solids])
