"""Where the cameras come from pointmaps well, where badly, and what is flagged then: one row per case.

    python -m tests.postopt.camera_cases                      # 81 frames of 88x156, a minute
    python -m tests.postopt.camera_cases --beside ../old      # beside the recovery of another checkout, case by case

Every row is a toy scene, recovered with the default options. Errors against the truth, nothing aligned: of the camera
centres (rms, in median distances), the rotations (mean, radians), both focal lengths (mean, relative) and the principal
point (largest, longer sides). Stated is what each of them keeps: 15 noises / √(pixels per frame), and 1e-5 where there
is no noise. Seconds are of CPU, on one thread. Exit status 1 if a case misses its stated error or its flags, or takes
more than twice the other's time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from one4d_pl.postopt.recover import recover_scene
from tests.postopt.worlds import Picture, World, accuracy, build_world, disturb

STATED, EXACT = 15.0, 1e-5
SLOWEST = 2.0  # times the other checkout's


@dataclass(frozen=True)
class Case:
    """A scene, what is done to its points, and what is to be said of it."""

    path: str = "hand-held"
    noise: float = 0.0  # deviation per axis, median distances
    outliers: float = 0.0  # share of points
    holes: bool = False  # a third of the pixels here and there, and a large block
    portrait: bool = False
    frames: int | None = None  # None = as many as asked
    seed: int = 0
    picture: Picture = field(default_factory=Picture)
    flags: tuple[str, ...] = ()


ZOOMS, SQUEEZED, OFF = "focal length changes", "pixels not square", "principal point off the centre"
CASES = {
    "exact": Case(),
    "noise 2 %": Case(noise=0.02),
    "holes": Case(noise=0.01, holes=True),
    "outliers 30 %": Case(noise=0.01, outliers=0.3),
    "portrait": Case(noise=0.01, portrait=True),
    **{f"static, scene {seed}": Case("static", 0.02, seed=seed, flags=("static camera",)) for seed in range(5)},
    "pure rotation": Case("turning", 0.02, flags=("pure rotation",)),
    "two frames": Case("orbit", 0.01, frames=2),
    **{
        f"{name}{words}": Case(noise=noise, picture=picture, flags=flags)
        for name, picture, flags in (
            ("zoom 1.5", Picture(zoom=1.5), (ZOOMS,)),
            ("fy = 2 fx", Picture(stretch=2), (SQUEEZED,)),
            ("cropped 15 %", Picture(crop=0.15), (OFF,)),
        )
        for noise, words in ((0.0, ""), (0.01, ", noise 1 %"), (0.05, ", noise 5 %"))
    },
    "zoom, cropped": Case(noise=0.01, picture=Picture(zoom=1.5, crop=0.15), flags=(ZOOMS, OFF)),
}


@dataclass(frozen=True)
class Input:
    """What a case gives to the recovery, and the truth."""

    world: World
    pointmap: Tensor  # [T, H, W, 3] float32
    valid: Tensor  # [T, H, W]


@dataclass(frozen=True)
class Row:
    """What a recovery made of a case."""

    seconds: float
    errors: dict[str, float]  # path, rotation, focal, point
    stated: float
    flags: tuple[str, ...]

    @property
    def worst(self) -> float:
        return max(self.errors.values())


def build(case: Case, frames: int, height: int, width: int) -> Input:
    """Build the scene of a case and disturb its points."""
    size = (width, height) if case.portrait else (height, width)
    world = build_world(case.path, case.frames or frames, *size, case.seed, case.picture)
    valid = world.valid.clone()
    if case.holes:
        valid &= torch.rand(valid.shape, generator=torch.Generator().manual_seed(3)) > 1 / 3
        valid[:, size[0] // 4 : 2 * size[0] // 3, size[1] // 5 : size[1] // 2] = False
    return Input(world, disturb(world, case.noise, case.outliers), valid)


def measure(case: Case, given: Input) -> Row:
    """Recover a case with default options."""
    started = time.process_time()
    scene = recover_scene(given.pointmap, given.valid)
    seconds = time.process_time() - started
    return judge(case, given, seconds, scene.intrinsics, scene.cam2world, scene.report.flags)


def judge(
    case: Case, given: Input, seconds: float, intrinsics: Tensor, cam2world: Tensor, flags: tuple[str, ...]
) -> Row:
    """Measure the errors of cameras against the truth."""
    world = given.world
    found = accuracy(world, intrinsics[:, 0, 0], cam2world, world.depth)
    off = intrinsics.double() - world.intrinsics
    focal = max(float((off[:, i, i] / world.intrinsics[:, i, i]).abs().mean()) for i in (0, 1))
    point = float(off[:, :2, 2].abs().amax()) / max(given.pointmap.shape[1:3])
    errors = {"path": found.centre, "rotation": found.rotation, "focal": focal, "point": point}
    pixels = float(given.valid.flatten(1).sum(1).double().mean())
    return Row(seconds, errors, STATED * case.noise / pixels**0.5 + EXACT, flags)


# Runs in another checkout: per line of input, the name of a file of arrays, one line of json.
OTHER = """
import json, sys, time
import numpy as np, torch
from one4d_pl.postopt.recover import recover_scene
torch.set_num_threads(1)
for line in sys.stdin:
    with np.load(line.strip()) as arrays:
        pointmap, valid = (torch.from_numpy(arrays[name]) for name in ("pointmap", "valid"))
    started = time.process_time()
    scene = recover_scene(pointmap, valid)
    seconds = time.process_time() - started
    print(json.dumps([seconds, scene.intrinsics.tolist(), scene.cam2world.tolist(), scene.report.flags]), flush=True)
"""


def other_checkout(folder: Path) -> Callable[[Case, Input], Row]:
    """Return the recovery of another checkout, which a process of its own runs; it ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    read, write = process.stdout, process.stdin

    def measure_other(case: Case, given: Input) -> Row:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "case.npz"
            np.savez(path, pointmap=given.pointmap.numpy(), valid=given.valid.numpy())
            write.write(f"{path}\n")
            write.flush()
            seconds, intrinsics, cam2world, flags = json.loads(read.readline())
        return judge(case, given, seconds, torch.tensor(intrinsics), torch.tensor(cam2world).double(), tuple(flags))

    return measure_other


def columns(row: Row) -> str:
    """Format what a recovery adds to a line of the table."""
    errors = " | ".join(f"{error:.0e}" for error in row.errors.values())
    return f"{errors} | {'; '.join(row.flags) or '-'} | {row.seconds:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=88)
    parser.add_argument("--width", type=int, default=156)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="folder of another version of the package")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recoveries = [measure] + ([] if arguments.beside is None else [other_checkout(arguments.beside)])
    warm = build(CASES["noise 2 %"], 5, 22, 39)
    for recover in recoveries:
        recover(CASES["noise 2 %"], warm)
    heads = ["path", "rotation", "focal", "point", "said", "seconds"]
    heads = ["case", "stated", *heads, *([f"other's {head}" for head in heads] if arguments.beside else [])]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    failed = []
    for name, case in CASES.items():
        given = build(case, arguments.frames, arguments.height, arguments.width)
        row, *others = (recover(case, given) for recover in recoveries)
        print(f"| {name} | {row.stated:.0e} | {' '.join(columns(one) for one in (row, *others))}", flush=True)
        slow = any(row.seconds > SLOWEST * other.seconds for other in others)
        if row.worst > row.stated or row.flags != case.flags or slow:
            failed.append(name)
    print(f"\n{len(CASES)} cases; not as stated: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
