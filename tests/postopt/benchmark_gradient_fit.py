"""Closed form + Gauss-Newton against a gradient fit of depth and cameras, the way 4DNeX does it.

    python -m tests.postopt.benchmark_gradient_fit --out fits.jsonl [--cases orbit:0.01:0,...] [--every-rate]

compares both, case by case (path : noise : outliers), and prints a table. The gradient fit has a sane start (Weiszfeld
focal of frame 0, cameras at rest there, depth = z), 1500 Adam steps with a cosine schedule on the mean squared error,
and the best of three learning rates *judged by the truth*: for each path and share of outliers at 1 % noise and a
quarter of the picture's sides, as three fits of every whole picture take hours; --every-rate does that. Finished cases
are kept in --out, and a second call goes on from there. Times are CPU seconds on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.geometry.camera import pixel_grid
from one4d_pl.geometry.se3 import se3_matrix, so3_exp
from one4d_pl.postopt.recover import recover_scene
from tests.postopt.worlds import PATHS, Accuracy, World, accuracy, build_world, disturb

NOISES = (0.0, 0.01, 0.05)  # deviation per axis, in median distances of the clip
OUTLIERS = (0.0, 0.3)  # share of valid pixels anywhere in the scene's box, not flagged
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
STEPS = 1500
LOOK_EVERY = 100  # steps: how often the gradient fit's accuracy is looked at, to tell when it is as good as ours
RATED = ("centre", "rotation", "abs_rel")  # means over many; the focal error is a single draw, which chance decides
ROUNDING = 1e-6  # smaller errors are float32's
EQUAL = 1.02  # two estimates from the same noise that differ by less are equally accurate


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


@dataclass(frozen=True)
class Moment:
    """A gradient fit on its way."""

    step: int
    seconds: float  # of CPU, without looking at the accuracy
    accuracy: Accuracy


def gradient_fit(
    pointmap: Tensor,  # [T, H, W, 3] float32
    valid: Tensor,  # [T, H, W]
    learning_rate: float,
    steps: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:  # every LOOK_EVERY: step, focal [T], cam2world, depth [T, H, W]
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
    for step in range(1, steps + 1):
        focal = log_focal.exp()
        rays = torch.stack([u / focal, v / focal, torch.ones_like(u)], -1)
        directions = (rays.flatten(0, 1) @ so3_exp(turn).mT).view(num_frames, height, width, 3)
        points = log_depth.exp()[..., None] * directions + centre[:, None, None]
        loss = (weights * (points - target).square()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % LOOK_EVERY == 0 or step == steps:
            cam2world = se3_matrix(so3_exp(turn.detach()), centre.detach() * unit)
            yield step, focal.detach().expand(num_frames), cam2world, log_depth.detach().exp() * unit


def watch_gradient_fit(world: World, pointmap: Tensor, learning_rate: float, steps: int) -> list[Moment]:
    """A gradient fit with its accuracy and CPU time along the way."""
    moments, seconds, started = [], 0.0, time.process_time()
    for step, focal, cam2world, depth in gradient_fit(pointmap, world.valid, learning_rate, steps):
        seconds += time.process_time() - started
        moments.append(Moment(step, seconds, accuracy(world, focal, cam2world, depth)))
        started = time.process_time()
    return moments


@dataclass(frozen=True)
class Comparison:
    """Both methods on one pointmap."""

    ours: Accuracy
    our_seconds: float
    gradient: list[Moment]  # of the best learning rate
    learning_rate: float

    @property
    def equal(self) -> Moment:
        """When the gradient fit was, for the first time, as good as ours in every respect; at its end, if never."""
        return next((moment for moment in self.gradient if self.ratio(moment) <= EQUAL), self.gradient[-1])

    def ratio(self, moment: Moment) -> float:
        """Largest ratio of the gradient fit's errors to ours."""
        return _largest_ratio(moment.accuracy, self.ours)

    @property
    def worst(self) -> float:
        """Largest ratio of our errors to the finished gradient fit's."""
        return _largest_ratio(self.ours, self.gradient[-1].accuracy)

    @property
    def speed_up(self) -> float:
        """Over the whole gradient fit: who runs it does not know when it is good enough."""
        return self.gradient[-1].seconds / self.our_seconds

    @property
    def speed_up_to_equal(self) -> float:
        """Over the part of the gradient fit that is as good as ours."""
        return self.equal.seconds / self.our_seconds


def _largest_ratio(errors: Accuracy, others: Accuracy) -> float:
    return max(getattr(errors, name) / max(getattr(others, name), ROUNDING) for name in RATED)


def our_fit(world: World, pointmap: Tensor) -> tuple[Accuracy, float]:
    """Our accuracy and CPU seconds."""
    started = time.process_time()
    scene = recover_scene(pointmap, world.valid)
    seconds = time.process_time() - started
    return accuracy(world, scene.intrinsics[:, 0, 0], scene.cam2world, scene.depth), seconds


def compare(
    world: World, noise: float, outliers: float, rates: tuple[float, ...] = LEARNING_RATES, steps: int = STEPS
) -> Comparison:
    """Run both; of several learning rates the gradient fit's is chosen by its true centre error."""
    pointmap = disturb(world, noise, outliers)
    ours, our_seconds = our_fit(world, pointmap)
    fits = {rate: watch_gradient_fit(world, pointmap, rate, steps) for rate in rates}
    rate = min(fits, key=lambda rate: fits[rate][-1].accuracy.centre)
    return Comparison(ours, our_seconds, fits[rate], rate)


@cache
def choose_rate(path: str, outliers: float, frames: int, height: int, width: int) -> float:
    """The learning rate for a path and a share of outliers: at the middle noise and a quarter of the sides."""
    return compare(build_world(path, frames, height // 4, width // 4), NOISES[1], outliers).learning_rate


def run_case(case: str, frames: int, height: int, width: int, every_rate: bool) -> Comparison:
    """One case, with one learning rate or all of them."""
    path, *numbers = case.split(":")
    noise, outliers = map(float, numbers)
    rates = LEARNING_RATES if every_rate else (choose_rate(path, outliers, frames, height, width),)
    return compare(build_world(path, frames, height, width), noise, outliers, rates)


def read_results(path: Path) -> dict[str, Comparison]:
    """Finished cases of a json-lines file; of a case that stands there twice the last."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        moments = [Moment(m["step"], m["seconds"], Accuracy(**m["accuracy"])) for m in record["gradient"]]
        ours = Accuracy(**record["ours"])
        results[record["case"]] = Comparison(ours, record["our_seconds"], moments, record["learning_rate"])
    return results


def table(results: dict[str, Comparison]) -> str:
    """One row per case, then the worst and the median."""
    rows = []
    for case, result in results.items():
        last = result.gradient[-1]
        reached = f"step {result.equal.step}" if result.ratio(result.equal) <= EQUAL else "never"
        rows += [f"{case:22s} {result.our_seconds:6.2f} {result.ours}", f"{'':22s} {last.seconds:6.1f} {last.accuracy}"]
        rows += [
            f"{'':22s} rate {result.learning_rate:g}; {result.speed_up:.0f} times faster, as good as ours: {reached} "
            f"({result.speed_up_to_equal:.0f} times); worst error ratio ours / theirs {result.worst:.3f}"
        ]
    names = ("speed_up", "speed_up_to_equal", "worst")
    whole, equal, ratios = ([getattr(result, name) for result in results.values()] for name in names)
    rows += [
        f"{len(results)} cases: speed-up, whole fit: worst {min(whole):.0f}, median {statistics.median(whole):.0f}; "
        f"to equal accuracy: worst {min(equal):.0f}, median {statistics.median(equal):.0f}; "
        f"error ratio worst {max(ratios):.3f}, median {statistics.median(ratios):.3f}"
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="json lines, one per finished case and size")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=88)
    parser.add_argument("--width", type=int, default=156)
    grid = [f"{path}:{noise:g}:{share:g}" for path in PATHS for share in OUTLIERS for noise in NOISES]
    parser.add_argument("--cases", default=",".join(grid))
    parser.add_argument("--every-rate", action="store_true", help="all learning rates on the whole picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = (arguments.frames, arguments.height, arguments.width)
    warm = build_world("orbit", 5, 22, 39)
    our_fit(warm, warm.pointmap.float())
    done = read_results(arguments.out)
    results = {}
    for case in arguments.cases.split(","):
        if case in done:
            results[case] = done[case]
            continue
        results[case] = run_case(case, *size, arguments.every_rate)
        with arguments.out.open("a") as file:
            file.write(json.dumps({"case": case, **asdict(results[case])}) + "\n")
        print(table({case: results[case]}).rpartition("\n")[0], flush=True)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
