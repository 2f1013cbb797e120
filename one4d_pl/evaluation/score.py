"""Score stored predictions: one sequence in memory at a time, several processes if asked.

Depth maps are resampled to the image's pixels, aligned once per sequence over all its frames, and scored on all frames.
Where the prediction says which frames the model was shown, those and the others are also scored apart. A prediction
must have as many frames as the sequence: cameras are paired in their order.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.data.rgbd_folder import unrounded
from one4d_pl.data.worker import become_worker
from one4d_pl.errors import UserError
from one4d_pl.evaluation.benchmarks import EvalSequence
from one4d_pl.evaluation.protocols import Protocol
from one4d_pl.geometry.se3 import geodesic_angle, matrix_product, matrix_to_wxyz, wxyz_to_matrix
from one4d_pl.interrupts import before_workers, uninterrupted
from one4d_pl.metrics.camera import ERROR_NAMES as CAMERA_ERRORS
from one4d_pl.metrics.camera import camera_errors
from one4d_pl.metrics.depth import ERROR_NAMES as DEPTH_ERRORS
from one4d_pl.metrics.depth import ScaleShift, align_depth, depth_errors
from one4d_pl.scene.framing import nearest_to_image, to_image
from one4d_pl.scene.predictions import Prediction, find_prediction, read_prediction

SUSPECT_SHARE = 1e-3  # of the scored pixels
RANKED_PIXELS = 100_000  # of a sequence, about
DISPARITY_CORRELATION = -0.3
SUSPECT_TURN = 1.0  # degrees, mean error of turns since frame 0 from which the other order is tried
OTHER_UNIT = 100  # times the true depth, or 1 / 100 of it
PARTS = ("all", "observed", "hidden")  # frames that depth is scored on


@dataclass(frozen=True)
class DepthScore:
    """Errors of one sequence's depth on some of its frames."""

    num_valid: int  # scored pixels
    errors: dict[str, float]  # by metrics.depth.ERROR_NAMES


@dataclass(frozen=True)
class SequenceScore:
    """Everything measured of one sequence."""

    name: str
    num_frames: int
    depth: dict[str, DepthScore]  # by part; empty where depth is not scored
    fit: tuple[float, float] | None  # scale and shift of the depth alignment
    cameras: dict[str, float] | None  # by metrics.camera.ERROR_NAMES
    degenerate: bool  # evo would refuse to align the cameras
    notes: tuple[str, ...]  # what is suspect, in words


@dataclass(frozen=True)
class BenchmarkScore:
    """All sequences under one protocol, and their means."""

    benchmark: str
    protocol: Protocol
    sequences: tuple[SequenceScore, ...]

    def depth_mean(self, part: str) -> dict[str, float] | None:
        """Return the mean of each depth error, weighted by scored pixels; None without any."""
        scores = [s.depth[part] for s in self.sequences if part in s.depth and s.depth[part].num_valid]
        weight = sum(score.num_valid for score in scores)
        if not weight:
            return None
        return {n: sum(s.errors[n] * s.num_valid for s in scores) / weight for n in DEPTH_ERRORS}

    def camera_mean(self, with_degenerate: bool) -> dict[str, float] | None:
        """Return the mean of each camera error over all sequences, or over those evo can align."""
        scores = [s.cameras for s in self.sequences if s.cameras is not None and (with_degenerate or not s.degenerate)]
        return {name: sum(s[name] for s in scores) / len(scores) for name in CAMERA_ERRORS} if scores else None

    @property
    def degenerate(self) -> list[str]:
        """List the sequences that the published protocols would drop."""
        return [s.name for s in self.sequences if s.cameras is not None and s.degenerate]


def score_benchmark(
    benchmark: str,
    sequences: list[EvalSequence],
    folder: Path,  # of the predictions
    protocol: Protocol,
    processes: int = 1,
    progress: Callable[[Iterable[SequenceScore]], Iterable[SequenceScore]] = iter,
) -> BenchmarkScore:
    """Score every sequence; UserError names the first whose prediction is missing or broken."""
    absent = [s.name for s in sequences if find_prediction(folder, s.name) is None]
    if absent:
        raise UserError(
            f"{folder}: no prediction of {', '.join(absent)}; need a folder <sequence>/ with cameras.json or "
            "frame_%04d.npy and pred_traj.txt, or <sequence>.npz (all layouts: one4d_pl/scene/predictions.py)"
        )
    work = partial(_score_stored, benchmark, folder, protocol)
    return BenchmarkScore(benchmark, protocol, tuple(progress(_run(work, sequences, processes))))


def score_sequence(benchmark: str, sequence: EvalSequence, prediction: Prediction, protocol: Protocol) -> SequenceScore:
    """Compare a prediction with its sequence's ground truth; UserError if they cannot be paired."""
    if prediction.num_frames != sequence.num_frames:
        raise UserError(
            f"{sequence.name}: {prediction.num_frames} predicted frames, the sequence has {sequence.num_frames}"
        )
    notes = list(prediction.flags)
    depth: dict[str, DepthScore] = {}
    fit, cameras, degenerate = None, None, False
    if "depth" in sequence.scores:
        if prediction.depth is None:
            notes.append("no depth predicted")
        else:
            depth, fit, warnings = _score_depth(benchmark, sequence, prediction, protocol)
            notes += warnings
    if "cameras" in sequence.scores:
        if prediction.cam2world is None:
            notes.append("no cameras predicted")
        else:
            target = sequence.read_cameras()[1]
            errors = camera_errors(prediction.cam2world, target, torch.ones(len(target), dtype=torch.bool))
            cameras = {name: float(getattr(errors, name)) for name in CAMERA_ERRORS}
            notes += rotation_warnings(prediction.cam2world, target)
            degenerate = bool(errors.degenerate)
    return SequenceScore(sequence.name, sequence.num_frames, depth, fit, cameras, degenerate, tuple(notes))


def _score_depth(
    benchmark: str, sequence: EvalSequence, prediction: Prediction, protocol: Protocol
) -> tuple[dict[str, DepthScore], tuple[float, float], list[str]]:
    """Return the scores by part, the alignment's scale and shift, and warnings."""
    target = sequence.read_depth()  # [T, H, W]
    scored = target.isfinite() & (target > 0) & (target < protocol.max_depth.get(benchmark, math.inf))
    height, width = target.shape[1:]
    assert prediction.depth is not None
    preds = to_image(prediction.depth, height, width, prediction.placement)
    fit_valid = None
    if protocol.use_fit_valid and prediction.valid is not None:
        # The published protocols resize the 0/1 mask and fit where it is above 0.8.
        fit_valid = (to_image(prediction.valid.float(), height, width, prediction.placement) > 0.8)[scored]
        if not bool(fit_valid.any()):
            fit_valid = None
    counts = scored.sum((1, 2)).tolist()  # pixels of each frame
    # Check the depth by nearest pixel: bicubic values overshoot below 0 beside edges.
    notes = depth_warnings(
        nearest_to_image(prediction.depth, height, width, prediction.placement)[scored], target[scored]
    )
    preds, target = preds[scored], target[scored]  # [N]: frame after frame
    del scored
    everywhere = torch.ones(1, dtype=torch.bool).expand(len(target))
    truth = unrounded(target) if benchmark in protocol.float64_truth else target
    fit = align_depth(preds, truth, everywhere if fit_valid is None else fit_valid, protocol.alignment)
    notes += fit_warnings(protocol, fit, preds, target)
    preds = torch.where(preds.isfinite(), fit.apply(preds.double()), 0)  # float64: as exact as the alignment
    if (clip := protocol.post_clip.get(benchmark)) is not None:
        preds.clamp_(max=clip)
    observed = None if prediction.given is None else set(prediction.given)
    partly = observed is not None and 0 < len(observed) < sequence.num_frames
    scores = {}
    for part in PARTS if partly else PARTS[:1]:
        frames = [part == "all" or (t in (observed or ())) == (part == "observed") for t in range(sequence.num_frames)]
        scores[part] = _score_frames(preds, target, counts, frames)
    return scores, (float(fit.scale), float(fit.shift)), notes


def depth_warnings(
    preds: Tensor,  # [N], before alignment
    target: Tensor,  # [N], true depth
) -> list[str]:
    """Warn of predictions that are no depth: not a number, zero, negative, or disparity.

    The first three are named from 0.1 % of the pixels on. Disparity (1 / depth) is large where depth is small: a rank
    correlation below -0.3 between the positive values and the truth shows it, whatever their scale and shift.
    """
    known = preds.isfinite()
    shares = {
        "no number": float((~known).double().mean()),
        "zero": float((preds == 0).double().mean()),
        "negative": float((known & (preds < 0)).double().mean()),
    }
    suspect = {name: share for name, share in shares.items() if share >= SUSPECT_SHARE}
    notes = [f"predicted depth is {name} at {100 * s:.3g} % of the scored pixels" for name, s in suspect.items()]
    usable = (known & (preds > 0)).nonzero()[:, 0]
    usable = usable[:: max(1, len(usable) // RANKED_PIXELS)]
    if len(usable) > 1 and _rank_correlation(preds[usable], target[usable]) < DISPARITY_CORRELATION:
        notes.append("predicted depth falls where the true one rises; if it is disparity, give 1 / disparity")
    return notes


def rotation_warnings(preds: Tensor, target: Tensor) -> list[str]:  # [T, 4, 4] x 2, camera to world
    """Warn if rotations agree better with the truth with their quaternions in the other order."""
    w, x, y, z = matrix_to_wxyz(preds[:, :3, :3].double()).unbind(-1)
    other = wxyz_to_matrix(torch.stack([z, w, x, y], dim=-1))  # if a file's x y z w was read as w x y z
    rotations = (target[:, :3, :3].double(), preds[:, :3, :3].double(), other)
    true, given, swapped = (matrix_product(rotation[:1].mT, rotation) for rotation in rotations)
    errors = [math.degrees(float(geodesic_angle(turns, true).mean())) for turns in (given, swapped)]
    if errors[0] < SUSPECT_TURN or errors[1] > 0.5 * errors[0]:
        return []
    return [f"turns are off by {errors[0]:.1f} degrees; read as x y z w, the quaternions are off by {errors[1]:.1f}"]


def fit_warnings(
    protocol: Protocol,
    fit: ScaleShift,
    preds: Tensor,  # [N], before alignment
    target: Tensor,  # [N], true depth
) -> list[str]:
    """Warn of a scale that is held at its limit, and of a unit that the protocol is not made for.

    Where the unit matters, a prediction 100 times as large as the truth, or as small, is taken to be in another one.
    """
    notes = []
    if float(fit.scale) == protocol.lowest_scale:
        notes.append(f"the fitted scale is held at {protocol.lowest_scale:g}, the lowest that {protocol.name} allows")
    known = preds[preds.isfinite()]
    if protocol.needs_metres and len(known):
        times = abs(float(known.median()) / float(target.median()))
        if times >= OTHER_UNIT or 0 < times <= 1 / OTHER_UNIT:
            notes.append(
                f"predicted depth is {times:.3g} times the true one, and {protocol.name}'s fit depends on the unit: "
                "give metres (millimetres?)"
            )
    return notes


def _rank_correlation(first: Tensor, second: Tensor) -> float:  # [N] each -> -1 .. 1, Spearman's; 0 = one is constant
    ranks = []
    for values in (first, second):
        _, group, counts = values.unique(return_inverse=True, return_counts=True)
        middle = counts.cumsum(0) - (counts - 1) / 2  # equal values share their mean rank
        ranks.append(middle[group].double() - (len(values) + 1) / 2)
    norms = ranks[0].norm() * ranks[1].norm()
    return float(ranks[0] @ ranks[1] / norms) if norms > 0 else 0.0


def _score_frames(preds: Tensor, target: Tensor, counts: list[int], frames: list[bool]) -> DepthScore:
    """Measure errors over the pixels of some frames; tensors hold one frame after the other."""
    if not all(frames):
        chosen = torch.repeat_interleave(torch.tensor(frames), torch.tensor(counts))
        preds, target = preds[chosen], target[chosen]
    errors = depth_errors(preds, target, torch.ones(len(target), dtype=torch.bool))
    return DepthScore(int(errors.num_valid), {name: float(getattr(errors, name)) for name in DEPTH_ERRORS})


def _score_stored(benchmark: str, folder: Path, protocol: Protocol, sequence: EvalSequence) -> SequenceScore:
    path = find_prediction(folder, sequence.name)
    assert path is not None
    return score_sequence(benchmark, sequence, read_prediction(path), protocol)


def _run(
    work: Callable[[EvalSequence], SequenceScore], sequences: list[EvalSequence], processes: int
) -> Iterator[SequenceScore]:
    """Yield scores in the sequences' order, from workers that are started afresh.

    Forked copies of a process with OpenMP or CUDA threads can hang.
    """
    if processes <= 1 or len(sequences) <= 1:
        yield from map(work, sequences)
        return
    before_workers()
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(processes, context, initializer=become_worker) as pool:
        with uninterrupted():  # map starts the processes
            scores = pool.map(work, sequences)
        yield from scores
