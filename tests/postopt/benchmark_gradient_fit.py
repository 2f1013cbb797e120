"""Closed form + Gauss-Newton against a gradient fit of depth and cameras, the way 4DNeX does it (protocol.md, 3-4).

    python -m tests.postopt.benchmark_gradient_fit [--frames 81] [--height 88] [--width 156] [--cases static:0:0,...]

prints, per case (path : noise : outliers), both accuracies, the seconds of one gradient fit and the ratio of times. The
gradient fit has a sane start (Weiszfeld focal of frame 0, cameras at rest there, depth = z), 1500 Adam steps with a
cosine schedule on the mean squared error, and the best of three learning rates *judged by the truth*.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from one4d_pl.data.toy_draw import build_scene
from one4d_pl.data.toy_render import Solid, Views, render
from one4d_pl.data.toy_scene import solids_at, views_at
from one4d_pl.geometry.camera import pixel_grid
from one4d_pl.geometry.pointmap import depth_to_pointmap
from one4d_pl.geometry.se3 import geodesic_angle, rebase_to_first, se3_matrix, so3_exp
from one4d_pl.postopt.recover import recover_scene

PATHS = ("static", "orbit", "forward", "hand-held")
NOISES = (0.0, 0.01, 0.05)  # deviation per axis, in median distances of the clip
OUTLIERS = (0.0, 0.3)  # share of valid pixels anywhere in the scene's box, not flagged
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
STEPS = 1500


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


def build_world(path: str, num_frames: int, height: int, width: int, seed: int = 0) -> World:
    """A toy scene with its moving things, seen along one of PATHS."""
    scene = build_scene(seed, "synthetic")
    times = np.arange(num_frames) / 12
    solids = [solid for thing in scene.things for solid in solids_at(thing, times)]
    start = views_at(scene.path, times[:1], height, width)
    _, first, _ = render(scene.room, [_at_start(s) for s in solids], start, height, width)
    distance = float(np.median(first[np.isfinite(first)]))
    motion = camera_path(path, num_frames, distance)  # cam2cam0
    cam2world = torch.from_numpy(start.cam2world) @ motion
    intrinsics = np.repeat(start.intrinsics, num_frames, axis=0)
    _, depth_array, _ = render(scene.room, solids, Views(intrinsics, cam2world.numpy()), height, width)
    depth, matrices = torch.from_numpy(depth_array), torch.from_numpy(intrinsics)
    valid = depth.isfinite()
    pointmap = depth_to_pointmap(torch.where(valid, depth, 1), matrices, cam2world)
    pointmap = torch.where(valid[..., None], pointmap, 0)
    return World(pointmap, valid, depth, matrices, rebase_to_first(cam2world), float(depth[valid].median()))


def camera_path(path: str, num_frames: int, distance: float) -> Tensor:  # [T, 4, 4] cam2cam0, float64
    """Rest; 30 degrees around the middle of the scene; ahead by a third of its distance; a hand's sway and tremble."""
    share = torch.linspace(0, 1, num_frames, dtype=torch.float64)
    turn, centre = torch.zeros(num_frames, 3, dtype=torch.float64), torch.zeros(num_frames, 3, dtype=torch.float64)
    if path == "orbit":
        turn[:, 1] = math.radians(30) * share
        pivot = torch.tensor([0, 0, distance], dtype=torch.float64)
        centre = pivot - so3_exp(turn) @ pivot
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
    """The pointmap with Gaussian noise, and with flying points anywhere in the box of the scene's inner 98 %."""
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
    """Errors of focal [T] (pixels), cameras [T, 4, 4] and depth [T, H, W]."""
    offset = cam2world[:, :3, 3].double() - world.cam2world[:, :3, 3]
    true_focal = world.intrinsics[:, 0, 0]
    relative = (depth.double() - world.depth).abs() / world.depth
    return Accuracy(
        float(offset.square().sum(-1).mean().sqrt()) / world.distance,
        float(geodesic_angle(cam2world[:, :3, :3].double(), world.cam2world[:, :3, :3]).mean()),
        float((focal.double() / true_focal - 1).abs().mean()),
        float(relative[world.valid].mean()),
    )


def weiszfeld_focal(points: Tensor, valid: Tensor) -> float:  # [H, W, 3], [H, W] -> pixels
    """Focal length of a camera-frame pointmap by ten reweighted steps (DUSt3R's start)."""
    height, width = valid.shape
    u, v = pixel_grid(height, width, points)
    pixels = torch.stack([u - width / 2, v - height / 2], -1)
    used = valid & (points[..., 2] > 1e-6)
    pixels, slopes = pixels[used], points[used][:, :2] / points[used][:, 2:]
    weights = torch.ones(len(pixels), dtype=points.dtype)
    focal = 0.0
    for _ in range(10):
        focal = float((weights * (pixels * slopes).sum(-1)).sum() / (weights * slopes.square().sum(-1)).sum())
        weights = 1 / torch.linalg.vector_norm(pixels - focal * slopes, dim=-1).clamp_min(1e-8)
    return min(max(focal, 0.2 * width), 10 * width)


def gradient_fit(
    pointmap: Tensor,  # [T, H, W, 3] float32
    valid: Tensor,  # [T, H, W]
    learning_rate: float,
    steps: int = STEPS,
) -> tuple[Tensor, Tensor, Tensor]:  # focal [T], cam2world [T, 4, 4], depth [T, H, W]
    """Adam on log depth, rotation vectors, centres and the logarithm of one focal length; masked mean squared error."""
    num_frames, height, width = valid.shape
    unit = pointmap[valid].abs().median()
    target = pointmap / unit
    u, v = pixel_grid(height, width, target)
    u, v = u - width / 2, v - height / 2
    log_depth = target[..., 2].clamp_min(0.05).log().requires_grad_()
    log_focal = torch.tensor(math.log(weiszfeld_focal(target[0], valid[0]))).requires_grad_()
    turn, centre = (torch.zeros(num_frames, 3).requires_grad_() for _ in range(2))
    optimizer = torch.optim.Adam([log_depth, log_focal, turn, centre], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = (valid / valid.sum())[..., None].float()
    for _ in range(steps):
        focal = log_focal.exp()
        rays = torch.stack([u / focal, v / focal, torch.ones_like(u)], -1)
        directions = (rays.flatten(0, 1) @ so3_exp(turn).mT).view(num_frames, height, width, 3)
        points = log_depth.exp()[..., None] * directions + centre[:, None, None]
        loss = (weights * (points - target).square()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    cam2world = se3_matrix(so3_exp(turn.detach()), centre.detach() * unit)
    return log_focal.detach().exp().expand(num_frames), cam2world, log_depth.detach().exp() * unit


@dataclass(frozen=True)
class Comparison:
    """Both methods on one pointmap."""

    ours: Accuracy
    gradient: Accuracy  # of the best learning rate
    our_seconds: float
    gradient_seconds: float  # of one fit

    @property
    def speed_up(self) -> float:
        return self.gradient_seconds / self.our_seconds


def compare(world: World, noise: float, outliers: float, steps: int = STEPS) -> Comparison:
    """Run both; the gradient fit's learning rate is chosen by its true centre error."""
    pointmap = disturb(world, noise, outliers)
    started = time.perf_counter()
    scene = recover_scene(pointmap, world.valid)
    our_seconds = time.perf_counter() - started
    ours = accuracy(world, scene.intrinsics[:, 0, 0], scene.cam2world, scene.depth)
    started = time.perf_counter()
    fits = [accuracy(world, *gradient_fit(pointmap, world.valid, rate, steps)) for rate in LEARNING_RATES]
    gradient_seconds = (time.perf_counter() - started) / len(LEARNING_RATES)
    return Comparison(ours, min(fits, key=lambda fit: fit.centre), our_seconds, gradient_seconds)


def _at_start(solid: Solid) -> Solid:
    return replace(solid, centre=solid.centre[:1], rotation=solid.rotation[:1], size=solid.size[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=88)
    parser.add_argument("--width", type=int, default=156)
    parser.add_argument("--cases", default=",".join(f"{p}:{n}:{o}" for p in PATHS for n in NOISES for o in OUTLIERS))
    arguments = parser.parse_args()
    for case in arguments.cases.split(","):
        path, noise, outliers = case.split(":")
        world = build_world(path, arguments.frames, arguments.height, arguments.width)
        result = compare(world, float(noise), float(outliers))
        print(f"{path}, noise {noise}, outliers {outliers}: {result.speed_up:.0f} times faster", flush=True)
        print(f"  ours     {result.ours} in {result.our_seconds:.2f} s")
        print(f"  gradient {result.gradient} in {result.gradient_seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
