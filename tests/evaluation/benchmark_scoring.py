"""How long scoring takes: as many frames as Sintel's training set, synthetic depth and cameras, one process.

    python -m tests.evaluation.benchmark_scoring [--sequences 23] [--protocols one4d,geo4d]

prints seconds (CPU of one thread, and wall) per protocol and the peak memory, which one sequence bounds.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.evaluation.benchmarks import SINTEL_CAMERAS, SINTEL_FRAMES, EvalSequence, sequence_names
from one4d_pl.evaluation.protocols import PROTOCOLS
from one4d_pl.evaluation.score import score_benchmark
from one4d_pl.geometry.se3 import se3_matrix, so3_exp
from one4d_pl.scene.predictions import Prediction, write_prediction

HEIGHT, WIDTH = 436, 1024
PREDICTED = (218, 512)  # half of each side


@dataclass(frozen=True)
class SyntheticSequence(EvalSequence):
    """A hilly depth with far pixels that are not scored, drawn from the seed whenever asked."""

    seed: int

    def read_frames(self) -> Tensor:
        raise NotImplementedError("scoring looks at no image")

    def read_depth(self) -> Tensor:
        depth = hills(self.num_frames, HEIGHT, WIDTH, self.seed)
        return torch.where(depth > 60, 1e5, depth)  # sky, as Sintel has it

    def read_cameras(self) -> tuple[Tensor, Tensor]:
        return torch.eye(3, dtype=torch.float64).expand(self.num_frames, 3, 3), walk(self.num_frames, self.seed)


def hills(frames: int, height: int, width: int, seed: int) -> Tensor:  # [T, H, W] float32, 1 .. 90
    """The same smooth depth at any size."""
    knots = torch.rand(1, 1, frames, 6, 12, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(knots, (frames, height, width), mode="trilinear", align_corners=False)
    return 90 ** smooth[0, 0]


def walk(frames: int, seed: int) -> Tensor:  # [T, 4, 4] float64
    steps = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(1)
    return se3_matrix(so3_exp(0.02 * steps[0]), 0.1 * steps[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=23)
    parser.add_argument("--protocols", default="one4d,scale_only", help=f"of {', '.join(PROTOCOLS)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sequences: list[EvalSequence] = []
    for seed, name in enumerate(sequence_names("sintel")[: arguments.sequences]):
        scored = ("depth", "cameras") if name in SINTEL_CAMERAS else ("depth",)
        sequences.append(SyntheticSequence(name, SINTEL_FRAMES.get(name, 50), scored, seed))
    with tempfile.TemporaryDirectory() as folder:
        for seed, sequence in enumerate(sequences):
            generator = torch.Generator().manual_seed(seed)
            depth = hills(sequence.num_frames, *PREDICTED, seed)
            depth = (depth / 7 + 0.5) * torch.exp(0.1 * torch.randn(depth.shape, generator=generator))
            cameras = walk(sequence.num_frames, seed) @ walk(sequence.num_frames, seed + 1000)
            write_prediction(Path(folder) / sequence.name, Prediction(depth, cameras), {})
        for name in arguments.protocols.split(","):
            cpu, wall = time.process_time(), time.perf_counter()
            score = score_benchmark("sintel", sequences, Path(folder), PROTOCOLS[name])
            mean = score.depth_mean("all")
            print(
                f"{name}: {sum(s.num_frames for s in sequences)} frames of {len(sequences)} sequences in "
                f"{time.process_time() - cpu:.0f} s of CPU, {time.perf_counter() - wall:.0f} s of wall clock; "
                f"AbsRel {mean['abs_rel']:.3f}; peak memory "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
