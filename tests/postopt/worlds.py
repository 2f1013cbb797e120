"""Toy scenes seen along known camera paths through known lenses: pointmaps whose cameras are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from one4d_pl.geometry.pointmap import depth_to_pointmap
from one4d_pl.geometry.se3 import geodesic_angle, rebase_to_first, se3_matrix, so3_exp
from one4d_pl.toy.draw import build_scene
from one4d_pl.toy.render import Solid, Views, render
from one4d_pl.toy.things import solids_at, views_at

PATHS = ("static", "orbit", "forward", "hand-held")


@dataclass(frozen=True)
class Picture:
    """How the pictures differ from what a recovery assumes where nothing is given."""

    zoom: float = 1.0  # last focal length over the first
    stretch: int = 1  # fy / fx: of so many columns one is kept
    crop: float = 0.0  # share of width and height that is cut off at the left and at the top


@dataclass(frozen=True)
class World:
    """A clip of exact geometry in camera-0 coordinates; float64."""

    pointmap: Tensor  # [T, H, W, 3], 0 where not valid
    valid: Tensor  # [T, H, W]
    depth: Tensor  # [T, H, W]
    intrinsics: Tensor  # [T, 3, 3]
    cam2world: Tensor  # [T, 4, 4], camera 0 is the identity
    distance: float  # median depth


@dataclass(frozen=True)
class Accuracy:
    """Errors against the truth, no alignment: the pointmap's frame is known."""

    centre: float  # root mean square of the camera centres' errors, in median distances
    rotation: float  # mean angle, radians
    focal: float  # mean relative error
    abs_rel: float  # of depth, valid pixels

    def __str__(self) -> str:
        return f"ATE {self.centre:.2e} rot {self.rotation:.2e} focal {self.focal:.2e} AbsRel {self.abs_rel:.5f}"


def build_world(
    path: str, num_frames: int, height: int, width: int, seed: int = 0, picture: Picture | None = None
) -> World:
    """Render a toy scene with its moving things, seen along one of PATHS or from one place ("turning")."""
    picture = picture or Picture()
    scene = build_scene(seed, "synthetic")
    times = np.arange(num_frames) / 12
    solids = [solid for thing in scene.things for solid in solids_at(thing, times)]
    start = views_at(scene.path, times[:1], height, width)
    _, first, _ = render(scene.room, [_at_start(s) for s in solids], start, height, width)
    distance = float(np.median(first[np.isfinite(first)]))
    motion = camera_path(path, num_frames, distance)  # cam2cam0
    cam2world = torch.from_numpy(start.cam2world) @ motion
    drawn = _intrinsics(float(start.intrinsics[0, 0, 0]), num_frames, height, width, picture)
    _, wide, _ = render(scene.room, solids, Views(drawn, cam2world.numpy()), height, width * picture.stretch)
    depth, matrices = torch.from_numpy(wide[:, :, :: picture.stretch].copy()), torch.from_numpy(drawn.copy())
    matrices[:, 0] /= picture.stretch  # the first of every few columns is kept: its centre stays at +0.5
    matrices[:, 0, 2] += 0.5 - 0.5 / picture.stretch
    valid = depth.isfinite()
    pointmap = depth_to_pointmap(torch.where(valid, depth, 1), matrices, cam2world)
    pointmap = torch.where(valid[..., None], pointmap, 0)
    return World(pointmap, valid, depth, matrices, rebase_to_first(cam2world), float(depth[valid].median()))


def _intrinsics(focal: float, num_frames: int, height: int, width: int, picture: Picture) -> np.ndarray:  # [T, 3, 3]
    """Return the intrinsics of the picture as drawn: square pixels, before columns are left out."""
    stretch, off = picture.stretch, picture.crop / (1 - picture.crop) / 2
    share = np.linspace(0, 1, num_frames) if num_frames > 1 else np.zeros(1)
    matrices = np.zeros((num_frames, 3, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = focal * stretch**0.5 * picture.zoom**share
    matrices[:, 0, 2] = stretch * (0.5 - off) * width - 0.5 * (stretch - 1)
    matrices[:, 1, 2], matrices[:, 2, 2] = (0.5 - off) * height, 1
    return matrices


def _at_start(solid: Solid) -> Solid:
    return replace(solid, centre=solid.centre[:1], rotation=solid.rotation[:1], size=solid.size[:1])


def camera_path(path: str, num_frames: int, distance: float) -> Tensor:  # [T, 4, 4] cam2cam0, float64
    """Return a path: rest, 30 degrees around the scene's middle, ahead by a third of its distance, a hand's sway."""
    share = torch.linspace(0, 1, num_frames, dtype=torch.float64)
    turn, centre = torch.zeros(num_frames, 3, dtype=torch.float64), torch.zeros(num_frames, 3, dtype=torch.float64)
    if path == "orbit":
        turn[:, 1] = math.radians(30) * share
        pivot = torch.tensor([0, 0, distance], dtype=torch.float64)
        centre = pivot - so3_exp(turn) @ pivot
    elif path == "turning":
        turn[:, 1] = math.radians(30) * share
    elif path == "forward":
        centre[:, 2] = distance / 3 * share
    elif path == "hand-held":
        phases = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
        times = torch.arange(num_frames, dtype=torch.float64)[:, None] / 12
        slow, fast = 2.2, 17.0  # rad/s
        sway = (slow * times + phases[0, 0]).sin() - phases[0, 0].sin()
        tremble = (fast * times + phases[0, 1]).sin() - phases[0, 1].sin()
        centre = distance * (0.05 * sway + 0.005 * tremble)
        turn = 0.06 * ((slow * times + phases[1, 0]).sin() - phases[1, 0].sin()) + 0.005 * (
            (fast * times + phases[1, 1]).sin() - phases[1, 1].sin()
        )
    elif path != "static":
        raise ValueError(f"unknown path {path!r}, use one of {PATHS}")
    return se3_matrix(so3_exp(turn), centre)


def disturb(world: World, noise: float, outliers: float, seed: int = 0) -> Tensor:  # [T, H, W, 3] float32
    """Add Gaussian noise to the pointmap, and flying points anywhere in the box of the scene's inner 98 %."""
    generator = torch.Generator().manual_seed(seed)
    points = world.pointmap + noise * world.distance * torch.randn(
        world.pointmap.shape, generator=generator, dtype=torch.float64
    )
    inner = world.pointmap[world.valid][::7].sort(0).values
    low, high = inner[len(inner) // 100], inner[-1 - len(inner) // 100]
    flying = torch.rand(world.valid.shape, generator=generator) < outliers
    anywhere = low + (high - low) * torch.rand(points.shape, generator=generator, dtype=torch.float64)
    return torch.where((flying & world.valid)[..., None], anywhere, points).float()


def accuracy(world: World, focal: Tensor, cam2world: Tensor, depth: Tensor) -> Accuracy:
    """Measure the errors of focal [T] (pixels), cameras [T, 4, 4] and depth [T, H, W]."""
    offset = cam2world[:, :3, 3].double() - world.cam2world[:, :3, 3]
    true_focal = world.intrinsics[:, 0, 0]
    relative = (depth.double() - world.depth).abs() / world.depth
    return Accuracy(
        float(offset.square().sum(-1).mean().sqrt()) / world.distance,
        float(geodesic_angle(cam2world[:, :3, :3].double(), world.cam2world[:, :3, :3]).mean()),
        float((focal.double() / true_focal - 1).abs().mean()),
        float(relative[world.valid].mean()),
    )
