"""Score another method's depth and cameras by a published protocol.

Write one folder per sequence as MonST3R, Geo4D and CUT3R do. Here a method that knows the truth but
for some noise stands for yours, on the procedural benchmark, which needs no files:
.venv/bin/python examples/04_evaluate_others.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from one4d_pl.commands.evaluate import main as evaluate
from one4d_pl.evaluation.benchmarks import open_benchmark
from one4d_pl.geometry.se3 import matrix_to_wxyz


def predict(frames: torch.Tensor, depth: torch.Tensor, noise: float) -> torch.Tensor:
    """Predict depth [T, H, W] of frames [T, H, W, 3]; a real method would not see the true depth."""
    return depth * (1 + noise * torch.randn(depth.shape, generator=torch.Generator().manual_seed(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="toy", help="sintel, bonn, tum need --root")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--protocol", default="one4d")
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--sequences", default="", metavar="A,B", help="only these")
    parser.add_argument("--out", type=Path, default=Path("runs/others"))
    args = parser.parse_args()

    for sequence in open_benchmark(args.bench, args.root, tuple(filter(None, args.sequences.split(",")))):
        folder = args.out / "predictions" / sequence.name
        folder.mkdir(parents=True, exist_ok=True)
        depth = predict(sequence.read_frames(), sequence.read_depth(), args.noise)
        for number, one in enumerate(depth):
            np.save(folder / f"frame_{number:04d}.npy", one.numpy())
        cam2world = sequence.read_cameras()[1]
        rotation = matrix_to_wxyz(cam2world[:, :3, :3])
        lines = torch.cat([torch.arange(len(depth))[:, None], cam2world[:, :3, 3], rotation], dim=1)
        np.savetxt(folder / "pred_traj.txt", lines.numpy())

    command = ["--bench", args.bench, "--predictions", str(args.out / "predictions"), "--protocol", args.protocol]
    command += ["--root", str(args.root)] if args.root else []
    command += ["--sequences", args.sequences, "--out", str(args.out / "scores")]
    raise SystemExit(evaluate(command))


if __name__ == "__main__":
    main()
