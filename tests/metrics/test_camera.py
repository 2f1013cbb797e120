"""Laws of the camera metrics: evo agrees, a similarity changes nothing, a camera that does not move is told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from one4d_pl.geometry.se3 import se3_matrix, so3_exp, xyzw_to_matrix
from one4d_pl.metrics.camera import CameraError, CameraErrors, absolute_error, camera_errors, relative_pose_auc

TRAJECTORIES = Path(__file__).parents[3] / "shared/data/trajectories"
needs_files = pytest.mark.skipif(not TRAJECTORIES.is_dir(), reason="no ../shared/data/trajectories")


def random_walk(frames: int, seed: int, noise: float = 1.0) -> Tensor:  # [T, 4, 4] cam2world float64
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(frames, 6, dtype=torch.float64, generator=generator)
    return se3_matrix(so3_exp(noise * draw[:, :3].cumsum(0) / 5), noise * draw[:, 3:].cumsum(0))


def disturbed(cam2world: Tensor, seed: int, size: float) -> Tensor:
    """The trajectory with noise, in another frame and unit."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(len(cam2world) + 1, 6, dtype=torch.float64, generator=generator)
    noisy = cam2world @ se3_matrix(so3_exp(size * draw[1:, :3]), size * draw[1:, 3:])
    moved = se3_matrix(so3_exp(draw[0, :3]), draw[0, 3:]) @ noisy
    moved[:, :3, 3] *= 0.1 + 5 * torch.rand(1, dtype=torch.float64, generator=generator)
    return moved


def score(preds: Tensor, target: Tensor) -> CameraErrors:
    return camera_errors(preds, target, torch.ones(len(preds), dtype=torch.bool))


def from_evo(preds: Tensor, target: Tensor) -> tuple[float, float, float]:
    """ATE, RPE-T, RPE-R as evo computes them, with the settings that MonST3R publishes."""
    metrics = pytest.importorskip("evo.core.metrics", reason="evo (dev extra) is not installed")
    from evo import main_ape, main_rpe
    from evo.core.trajectory import PosePath3D

    def paths() -> tuple[PosePath3D, PosePath3D]:  # fresh ones: align() changes its estimate
        return PosePath3D(poses_se3=list(target.numpy())), PosePath3D(poses_se3=list(preds.numpy()))

    part = metrics.PoseRelation
    ate = main_ape.ape(*paths(), part.translation_part, align=True, correct_scale=True)
    steps = {"delta": 1, "delta_unit": metrics.Unit.frames, "all_pairs": True, "align": True, "correct_scale": True}
    rpe_trans = main_rpe.rpe(*paths(), part.translation_part, **steps)
    rpe_rot = main_rpe.rpe(*paths(), part.rotation_angle_deg, **steps)
    return tuple(result.stats["rmse"] for result in (ate, rpe_trans, rpe_rot))


def kitti(name: str) -> Tensor:  # [T, 4, 4] cam2world
    rows = torch.from_numpy(np.loadtxt(TRAJECTORIES / name)).unflatten(1, (3, 4))
    left, _, right_t = torch.linalg.svd(rows[..., :3])  # seven digits are no rotation yet: take the nearest one
    return se3_matrix(left @ right_t, rows[..., 3])


def tum(name: str) -> tuple[np.ndarray, Tensor]:  # timestamps in seconds, [T, 4, 4] cam2world
    rows = np.loadtxt(TRAJECTORIES / name)
    return rows[:, 0], se3_matrix(xyzw_to_matrix(torch.from_numpy(rows[:, 4:8])), torch.from_numpy(rows[:, 1:4]))


def associated(preds_name: str, target_name: str) -> tuple[Tensor, Tensor]:
    """Rows of both files nearest in time, within 0.01 s."""
    (preds_time, preds), (target_time, target) = tum(preds_name), tum(target_name)
    nearest = np.abs(preds_time[:, None] - target_time[None]).argmin(1)
    kept = np.abs(preds_time - target_time[nearest]) < 0.01
    return preds[kept], target[nearest[kept]]


def test_errors_equal_those_of_evo_on_200_random_trajectories():
    for seed in range(200):
        target = random_walk(3 + seed % 12, seed)
        preds = disturbed(target, seed, (1e-6, 0.01, 0.3, 3.0)[seed % 4])
        actual = score(preds, target)
        expected = from_evo(preds, target)
        assert (actual.ate, actual.rpe_trans, actual.rpe_rot) == pytest.approx(expected, abs=1e-9), seed
        assert not actual.degenerate


@pytest.mark.realdata
@needs_files
def test_errors_equal_those_of_evo_on_real_trajectories():
    for preds, target in (
        associated("freiburg1_xyz-rgbdslam.txt", "freiburg1_xyz-groundtruth.txt"),
        associated("freiburg1_xyz-rgbdslam_drift.txt", "freiburg1_xyz-groundtruth.txt"),
        associated("freiburg1_xyz-ORB_kf_mono.txt", "freiburg1_xyz-groundtruth.txt"),
        (kitti("KITTI_00_ORB.txt")[:400], kitti("KITTI_00_gt.txt")[:400]),
    ):
        actual = score(preds, target)
        assert len(preds) > 30
        assert (actual.ate, actual.rpe_trans, actual.rpe_rot) == pytest.approx(from_evo(preds, target), abs=1e-9)


@pytest.mark.realdata
@needs_files
def test_ate_equals_the_stored_result_of_the_evo_command():
    printed = (TRAJECTORIES / "evo_cli_results.txt").read_text().split("KITTI_00_ORB.txt -as\n")[1].splitlines()[0]
    stored = float(printed.split("rmse")[1])
    assert stored == 0.937709
    preds, target = (kitti(name)[:, :3, 3] for name in ("KITTI_00_ORB.txt", "KITTI_00_gt.txt"))
    assert float(absolute_error(preds, target)[0]) == pytest.approx(stored, abs=5e-7)


@pytest.mark.parametrize("seed", range(5))
def test_a_similarity_of_the_truth_has_no_error(seed):
    target = random_walk(20, seed)
    errors = score(disturbed(target, seed, 0.0), target)
    assert max(errors.ate, errors.rpe_trans, errors.rpe_rot) < 1e-9
    assert errors.auc_30 > 1 - 1e-6 and not errors.degenerate
    assert float(errors.path_length) == pytest.approx(float(errors.path_length_target))
    assert float(errors.total_rotation) == pytest.approx(float(errors.total_rotation_target))


def test_another_trajectory_scores_badly():
    target, other = random_walk(30, 0), random_walk(30, 1)
    errors = score(other, target)
    assert errors.ate > 0.3 * (target[:, :3, 3] - target[:, :3, 3].mean(0)).square().sum(-1).mean().sqrt()
    assert errors.rpe_rot > 5 and errors.auc_30 < 0.2


def straight(frames: int) -> Tensor:
    cameras = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    cameras[:, 2, 3] = torch.arange(frames, dtype=torch.float64)
    return cameras


def test_a_standing_camera_is_flagged_and_gets_the_spread_of_the_truth():
    target = random_walk(12, 0)
    standing = target[:1].repeat(12, 1, 1)
    errors = score(standing, target)
    spread = (target[:, :3, 3] - target[:, :3, 3].mean(0)).square().sum(-1).mean().sqrt()
    assert errors.degenerate
    assert float(errors.ate) == pytest.approx(float(spread)) == float(errors.ate_standing)
    assert (errors.path_length, errors.total_rotation, errors.auc_30) == (0, 0, 0)
    assert errors.path_length_target > 1 and errors.total_rotation_target > 1


def test_a_camera_that_should_stand_is_flagged_and_its_motion_stays_visible():
    preds = random_walk(12, 0)
    errors = score(preds, preds[:1].repeat(12, 1, 1))
    assert errors.degenerate and errors.path_length_target == 0 and errors.total_rotation_target == 0
    assert errors.total_rotation > 1 and errors.rpe_rot > 1
    assert all(bool(torch.isfinite(getattr(errors, name))) for name in CameraErrors.__dataclass_fields__)


def test_a_straight_path_is_flagged_and_scored_with_the_best_similarity():
    target = straight(10)
    along, turned = straight(10), so3_exp(torch.tensor([0.3, 1.0, 0.2], dtype=torch.float64))
    along[:, :3, 3] = 0.25 * torch.matmul(along[:, :3, 3], turned.T)
    errors = score(along, target)
    assert errors.degenerate and errors.ate < 1e-6 and errors.path_length == pytest.approx(9)
    bent = random_walk(10, 3)
    errors, nearly = score(target, bent), score(disturbed_slightly(target), bent)
    assert errors.degenerate and not nearly.degenerate
    assert float(errors.ate) == pytest.approx(float(nearly.ate), rel=1e-3)


def disturbed_slightly(cam2world: Tensor) -> Tensor:
    moved = cam2world.clone()
    moved[:, :2, 3] += 1e-5 * torch.randn(len(moved), 2, dtype=moved.dtype, generator=torch.Generator().manual_seed(0))
    return moved


def test_evo_refuses_the_degenerate_trajectories_and_only_those():
    geometry = pytest.importorskip("evo.core.geometry", reason="evo (dev extra) is not installed")
    target = random_walk(12, 0)
    tiny = target.clone()
    tiny[:, :3, 3] *= 1e-17  # evo's limit is absolute
    for preds in (target[:1].repeat(12, 1, 1), straight(12), tiny):
        assert score(preds, target).degenerate
        with pytest.raises(geometry.GeometryException):
            from_evo(preds, target)


def test_frames_that_are_not_valid_are_left_out():
    target, valid = random_walk(10, 0), torch.ones(10, dtype=torch.bool)
    preds = disturbed(target, 1, 0.1)
    kept = score(preds[[0, 1, 3, 4, 5, 6, 7, 8]], target[[0, 1, 3, 4, 5, 6, 7, 8]])
    valid[[2, 9]] = False
    preds[[2, 9]] = math.nan
    assert camera_errors(preds, target, valid) == kept
    with pytest.raises(ValueError, match="not finite"):
        score(preds, target)
    with pytest.raises(ValueError, match="1 valid cameras"):
        camera_errors(preds, target, torch.arange(10) == 0)


@pytest.mark.parametrize(("degrees", "expected"), [(0.0, 1.0), (12.0, 0.6), (45.0, 0.0)])
def test_auc_of_two_cameras_is_one_minus_error_over_limit(degrees, expected):
    target = straight(2)
    turn = so3_exp(torch.tensor([0.0, math.radians(degrees), 0.0], dtype=torch.float64))
    rotated, sideways = target.clone(), target.clone()
    rotated[1, :3, :3] = turn  # the rotation is wrong
    sideways[1, :3, 3] = 7 * turn @ target[1, :3, 3]  # the direction is wrong, whatever the length
    for preds in (rotated, sideways):
        assert float(relative_pose_auc(preds, target, 30.0)) == pytest.approx(expected, abs=1e-12)


def test_means_are_unweighted_over_all_sequences_and_again_without_degenerate_ones():
    metric, scores = CameraError(), []
    for seed, frames in enumerate((5, 9, 30)):
        target = random_walk(frames, seed)
        preds = target[:1].repeat(frames, 1, 1) if seed == 1 else disturbed(target, seed, 0.1)
        metric.update(preds, target, torch.ones(frames, dtype=torch.bool))
        scores.append(score(preds, target))
    metric.update(target, target, torch.zeros(30, dtype=torch.bool))
    result = metric.compute()
    for name in ("ate", "rpe_trans", "rpe_rot", "auc_30", "path_length", "total_rotation_target"):
        values = [float(getattr(s, name)) for s in scores]
        assert float(result[name]) == pytest.approx(np.mean(values))
        assert float(result[f"{name}_regular"]) == pytest.approx(np.mean(values[::2]))
    assert (result["sequences"], result["degenerate"], result["unscored"]) == (3, 1, 1)
