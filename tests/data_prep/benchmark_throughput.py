"""`make bench`: what the writer adds to the work that cannot be avoided, on the same files in one run.

The limit reads, decodes, resizes and encodes every clip and throws the bytes away; the writer does the same work and
checks, stages, assembles, hashes and syncs besides. Both run in one process and alternate, so that a busy machine slows
both; the ratio is that of the median times. Then the same with several processes, whose start both sides pay.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data_prep.captions import CaptionOptions
from data_prep.parallel import run_parallel
from data_prep.units import UnitTask, iter_unit
from data_prep.write_shards import main as write_shards
from one4d_pl.data.clip_codec import encode_clip
from one4d_pl.data.decode import resize_clip
from one4d_pl.data.staging import Plan
from one4d_pl.toy.world import render_clip
from tests.data_prep.raw_layouts import write_trajectory

NUM_FRAMES, HEIGHT, WIDTH = 17, 352, 624
GOAL = 0.8


def write_dataset(root: Path, trajectories: int) -> None:
    """Toy scenes in TartanAir's layout and size: png frames, npy depth."""
    for number in range(trajectories):
        clip = render_clip(number, NUM_FRAMES, 480, 640)
        rows = [[n, 0, 0, 0, 0, 0, 1] for n in range(NUM_FRAMES)]
        folder = root / f"scene{number}" / "Easy" / "P000"
        write_trajectory(folder, clip.frames, clip.depth.nan_to_num(posinf=10000.0), rows)


def decode_and_encode(task: UnitTask) -> int:
    """The unavoidable work on one unit; returns the bytes."""
    clips = (resize_clip(clip, HEIGHT, WIDTH) for clip in iter_unit(task))
    return sum(len(content) for clip in clips for content in encode_clip(clip).values())


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def measure(root: Path, out: Path, trajectories: int, jobs: int, repeats: int) -> float:
    """The ratio of the median times, limit over writer; prints both."""
    units = [f"scene{number}/Easy/P000" for number in range(trajectories)]
    plan = Plan(units, 32, None, "raw", "all", {})
    tasks = [
        UnitTask(
            number=number, unit=unit, source="tartanair", root=str(root), out=out, plan=plan, num_frames=NUM_FRAMES,
            stride=1, height=HEIGHT, width=WIDTH, geometry=None, min_confidence=0.0, exclusions=frozenset(),
            captions=CaptionOptions(),
        )
        for number, unit in enumerate(units)
    ]  # fmt: skip
    arguments = ["--source", "tartanair", "--root", str(root), "--out", str(out), "--num-frames", str(NUM_FRAMES)]

    def write() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if write_shards([*arguments, "--jobs", str(jobs)]) != 0:
            raise SystemExit("the writer failed")

    limits, writers = [], []
    for _ in range(repeats):
        limits.append(seconds(lambda: list(run_parallel(decode_and_encode, tasks, jobs))))
        writers.append(seconds(write))
    limit, writer = statistics.median(limits), statistics.median(writers)
    print(
        f"{jobs} process{'es' if jobs > 1 else ''}: decode + encode alone {trajectories / limit:.2f} clips/s, "
        f"write_shards {trajectories / writer:.2f} clips/s, ratio {limit / writer:.2f} (goal >= {GOAL}; medians of "
        f"{repeats} alternating runs, {trajectories} clips of {NUM_FRAMES} frames 640x480 -> {WIDTH}x{HEIGHT})"
    )
    return limit / writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "raw"
        write_dataset(root, args.trajectories)
        for jobs in args.jobs:
            measure(root, Path(folder) / "out", args.trajectories, jobs, args.repeats)


if __name__ == "__main__":
    sys.exit(main())
