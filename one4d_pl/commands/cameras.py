"""one4d cameras POINTMAPS --out DIR: intrinsics, one camera per frame and depth from a pointmap video.

POINTMAPS is a .npy of shape [T, H, W, 3], or a .npz with the array `pointmap` and, if you like, `valid` [T, H, W]
(bool, or weights >= 0), or a scene folder of `generate`. Points may be in any frame and unit; what is not finite
counts as no point.

Told nothing, it takes one focal length, square pixels and a principal point at the image centre; where the points
clearly contradict one of these, it is solved for, and the report says so. What is given is kept, and a contradiction
is named.

DIR gets
  cameras.json   intrinsics (pixels, centres at +0.5) and cam2world (OpenCV axes) per frame, in the pointmap's frame
  depth.npy      float32 [T, H, W], z in each frame's own camera; 0 = behind it, nan = no point
  valid.npy      bool [T, H, W], pixels with a point that was used
  report.json    residuals, how far to trust the focal length, what is unusual or degenerate
DIR can be scored as it is: one4d evaluate --predictions (with DIR named after its sequence). A pixel
without a point is scored as depth 0, as any answer that is missing; the report says how many there are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.commands.command import Command
from one4d_pl.config import ConfigError
from one4d_pl.errors import reading
from one4d_pl.files import check_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from one4d_pl.postopt.recover import RecoveredScene


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pointmaps", type=Path, metavar="POINTMAPS", help=".npy, .npz or a scene folder, see above")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write, made if need be")
    add("--focal", type=float, help="known focal length fx, pixels; default: solved for")
    add("--aspect", type=_solve_or_ratio, metavar="RATIO", help="known fy / fx, or solve; default: 1, if that fits")
    add(
        "--principal-point",
        type=_solve_or_point,
        metavar="X,Y",
        help="known, in pixels from the corner of the picture, or solve; default: the image centre, if that fits",
    )
    add(
        "--per-frame-focal",
        action=argparse.BooleanOptionalAction,
        help="the camera zooms, or does not; default: one focal length for all frames, if that fits",
    )
    add("--alpha2", type=float, default=0.01, help="weight of the trajectory's smoothness (Eq. 12); 0 = off")


def _solve_or_ratio(text: str) -> float | str:
    try:
        return text if text == "solve" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, need a number or solve") from None


def _solve_or_point(text: str) -> tuple[float, float] | str:
    if text == "solve":
        return text
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, need two numbers X,Y or solve") from None
    return x, y


def run(args: argparse.Namespace) -> None:
    """Recover cameras and write them; ConfigError names what is wrong with the input."""
    source = args.pointmaps / "pointmap.npz" if args.pointmaps.is_dir() else args.pointmaps
    if not source.is_file():
        raise ConfigError(f"{source}: no such file, need a .npy or .npz of pointmaps [T, H, W, 3], or a scene folder")

    check_folder(args.out, "--out")
    from one4d_pl.postopt.recover import RecoverOptions, recover_scene
    from one4d_pl.scene.predictions import Prediction, report_dict, write_prediction

    pointmap, valid = read_pointmaps(source)
    start = time.perf_counter()
    try:
        options = RecoverOptions(
            alpha2=args.alpha2,
            shared_focal=None if args.per_frame_focal is None else not args.per_frame_focal,
            focal=args.focal,
            aspect=args.aspect,
            principal_point=args.principal_point,
        )
        scene = recover_scene(pointmap, valid, options)
    except ValueError as error:
        raise ConfigError(f"{args.pointmaps}: {error}") from None
    seconds = time.perf_counter() - start
    report = report_dict(scene.report)
    write_prediction(args.out, Prediction.of(scene), report)
    write_json(args.out / "report.json", report)
    print(summary(scene, seconds))
    print(f"written: {args.out}")


def read_pointmaps(path: Path) -> tuple[Tensor, Tensor | None]:  # [T, H, W, 3] float, [T, H, W] or None
    """Read the arrays of a .npy or .npz; ConfigError names a file that holds something else."""
    import numpy as np
    import torch

    with reading(path):
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            points, valid = arrays, None
        else:
            with arrays:
                if "pointmap" not in arrays:
                    raise ValueError(f"no array `pointmap`, it has {', '.join(arrays.files) or 'none'}")
                points, valid = arrays["pointmap"], arrays.get("valid")
        if points.dtype.kind != "f" or points.ndim != 4 or points.shape[-1] != 3 or 0 in points.shape:
            raise ValueError(f"{points.dtype} {list(points.shape)}, need floating point [T, H, W, 3]")
        if valid is not None and (valid.shape != points.shape[:3] or valid.dtype.kind not in "bfiu"):
            raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}, need [T, H, W] = {list(points.shape[:3])}")
    weights = None if valid is None else torch.from_numpy(valid if valid.dtype == bool else valid.astype(np.float32))
    if weights is not None and weights.dtype != torch.bool and not bool((weights >= 0).all()):
        raise ConfigError(f"{path}: valid holds weights that are negative or nan")
    return torch.from_numpy(points.astype(np.float64 if points.dtype == np.float64 else np.float32)), weights


def summary(scene: RecoveredScene, seconds: float) -> str:
    """Summarise a recovery in a few lines of text."""
    report = scene.report
    focal = scene.intrinsics[:, 0, 0]
    aspect, (x, y) = float(scene.intrinsics[0, 1, 1] / focal[0]), scene.intrinsics[0, :2, 2].tolist()
    residual = report.residual[report.residual.isfinite()]
    depth = scene.depth[scene.depth > 0]
    lines = [
        f"{len(focal)} frames in {seconds:.1f} s, {int(report.solved.sum())} solved",
        f"focal {float(focal.min()):.2f} .. {float(focal.max()):.2f} pixels, fy / fx {aspect:.4f}, "
        f"principal point {x:.2f}, {y:.2f}",
        "median depth " + (f"{float(depth.median()):.4g}" if len(depth) else "none"),
        "mean residual " + (f"{float(residual.mean()):.3g} (unit of the pointmap)" if len(residual) else "none"),
        "unusual or degenerate: " + ("; ".join(report.flags) or "nothing"),
    ]
    return "\n".join(lines)


main = Command("one4d cameras", __doc__, _add_arguments, run)
