"""Laws of scoring: the truth gets full marks, its scaled copy too where the protocol aligns, another video does not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from one4d_pl.errors import UserError
from one4d_pl.evaluation.benchmarks import EvalSequence, open_benchmark
from one4d_pl.evaluation.protocols import PROTOCOLS, Protocol
from one4d_pl.evaluation.score import BenchmarkScore, rotation_warnings, score_benchmark, score_sequence
from one4d_pl.evaluation.tables import Row, markdown, sequences_csv, write_report
from one4d_pl.geometry.pointmap import depth_to_pointmap
from one4d_pl.geometry.se3 import matrix_to_wxyz, rebase_to_first, so3_exp, wxyz_to_matrix
from one4d_pl.metrics.camera import path_length
from one4d_pl.postopt.recover import RecoverOptions, recover_scene
from one4d_pl.scene.predictions import Prediction, read_prediction, read_wxyz_trajectory, write_prediction
from tests.evaluation.depth_sequence import DepthSequence

PROTOCOL = PROTOCOLS["one4d"]


@pytest.fixture(scope="module")
def sequences() -> list[EvalSequence]:
    return open_benchmark("toy", None, ("toy_3000000", "toy_3000001"))


def true_prediction(sequence: EvalSequence) -> Prediction:
    intrinsics, cam2world = sequence.read_cameras()
    depth = sequence.read_depth()
    return Prediction(depth.where(depth.isfinite(), 1e3), cam2world, intrinsics)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_the_truth_as_prediction_gets_full_marks(tmp_path, sequences, protocol):
    write_prediction(tmp_path / sequences[0].name, true_prediction(sequences[0]), {})
    score = score_sequence("toy", sequences[0], read_prediction(tmp_path / sequences[0].name), protocol)
    errors = score.depth["all"].errors
    bound = 1e-3 if "geo4d" in protocol.alignment else 1e-12  # Adam at 1e-2 circles around its minimum
    assert errors["abs_rel"] <= bound and errors["delta_1"] == errors["delta_3"] == 1
    assert score.cameras["ate"] <= 1e-12 and score.cameras["rpe_rot"] <= 1e-5
    assert score.depth["all"].num_valid == int(sequences[0].read_depth().isfinite().sum())


@pytest.mark.parametrize("name", ["one4d", "scale_only"])
def test_a_scaled_copy_does_too_and_a_shifted_one_where_the_shift_is_free(sequences, name):
    true = true_prediction(sequences[0])
    turned = true.cam2world.clone()
    turned[:, :3, 3] = turned[:, :3, 3] / 7 + 3
    shifted = replace(true, depth=(true.depth + 0.5) / 7, cam2world=turned)
    score = score_sequence("toy", sequences[0], shifted, PROTOCOLS[name])
    assert score.cameras["ate"] < 1e-9
    if name == "one4d":
        assert score.depth["all"].errors["abs_rel"] < 1e-6 and score.fit == pytest.approx((7, -0.5), abs=1e-5)
    else:
        assert score.depth["all"].errors["abs_rel"] > 1e-3
        scaled = score_sequence("toy", sequences[0], replace(true, depth=true.depth / 7), PROTOCOLS[name])
        assert scaled.depth["all"].errors["abs_rel"] < 1e-6


def test_pointmaps_and_post_optimisation_cost_no_more_than_1e_4(sequences):
    for sequence in sequences:
        intrinsics, cam2world = sequence.read_cameras()
        points = depth_to_pointmap(sequence.read_depth().double(), intrinsics, rebase_to_first(cam2world))
        scene = recover_scene(0.3 * points + 0.2, points.isfinite().all(-1), RecoverOptions(shared_focal=False))
        prediction = Prediction(scene.depth, scene.cam2world, scene.intrinsics, scene.depth.isfinite())
        score = score_sequence("toy", sequence, prediction, PROTOCOL)
        assert score.depth["all"].errors["abs_rel"] < 1e-4 and score.depth["all"].errors["delta_1"] == 1
        assert score.cameras["ate"] < 1e-4 * max(1, score.cameras["path_length_target"])


def test_another_sequence_s_prediction_scores_badly(sequences):
    score = score_sequence("toy", sequences[0], true_prediction(sequences[1]), PROTOCOL)
    assert score.depth["all"].errors["abs_rel"] > 0.15 and score.depth["all"].errors["delta_1"] < 0.8
    assert score.cameras["rpe_rot"] > 0.1


def test_frames_that_were_shown_and_frames_that_were_not_are_measured_apart(sequences):
    true = true_prediction(sequences[0])
    wrong = true.depth.clone()
    wrong[4] *= 2
    score = score_sequence("toy", sequences[0], replace(true, depth=wrong, given=(0, 1, 2, 3, 5, 6, 7, 8)), PROTOCOL)
    assert score.depth["observed"].errors["abs_rel"] < 1e-6
    assert score.depth["hidden"].errors["abs_rel"] == pytest.approx(1, abs=1e-5)
    assert score.depth["observed"].num_valid + score.depth["hidden"].num_valid == score.depth["all"].num_valid
    everything = score_sequence("toy", sequences[0], replace(true, given=tuple(range(9))), PROTOCOL)
    assert list(everything.depth) == ["all"]


# depths 1 .. 4 with a pixel at 100 m and a hole
METRES = DepthSequence.of(torch.tensor([[[1.0, 2, 3], [4, 100, 0]], [[1.0, 2, 3], [4, 69, math.nan]]]))


def test_limits_and_cuts_follow_the_protocol_and_the_benchmark():
    depth = METRES.read_depth().nan_to_num(5.0)
    depth[1, 1, 1] = 200.0
    unaligned = {name: Protocol(name, "none", False, p.post_clip) for name, p in PROTOCOLS.items()}
    for name, benchmark, expected in (
        ("monst3r", "sintel", 1 / 69 / 9),  # cut at 70, the pixel at 100 m is not scored
        ("monst3r", "bonn", 131 / 69 / 9),  # not cut
        ("geo4d", "bonn", 1 / 69 / 9),
        ("scale_only", "sintel", 1 / 69 / 9),
        ("geo4d", "toy", 131 / 69 / 10),  # no limit: 100 m is scored too
    ):
        score = score_sequence(benchmark, METRES, Prediction(depth, None), unaligned[name])
        assert score.depth["all"].errors["abs_rel"] == pytest.approx(expected, rel=1e-6), (name, benchmark)


def test_the_alignment_uses_the_prediction_s_own_valid_pixels_where_the_protocol_says_so():
    depth = METRES.read_depth().nan_to_num(5.0)
    wrong = depth.clone()
    wrong[:, 0] = torch.tensor([3.0, 1.0, 2.0])  # nonsense that says so itself
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[:, 0] = False
    scores = {}
    for name in ("one4d", "scale_only"):
        protocol = Protocol(name, "scale_shift", PROTOCOLS[name].use_fit_valid, max_depth={"sintel": 70})
        scores[name] = score_sequence("sintel", METRES, Prediction(wrong, None, valid=valid), protocol)
    assert scores["one4d"].fit == pytest.approx((1, 0), abs=1e-9) and scores["one4d"].depth["all"].num_valid == 9
    assert scores["scale_only"].fit != pytest.approx((1, 0), abs=1e-3)


def test_means_weigh_depth_by_pixels_and_cameras_not_and_degenerate_paths_are_listed(tmp_path, sequences):
    for sequence, scale in zip(sequences, (1.0, 2.0)):
        true = true_prediction(sequence)
        standing = true.cam2world if scale == 1 else true.cam2world[:1].expand(9, 4, 4)
        write_prediction(tmp_path / sequence.name, Prediction(true.depth * scale, standing), {})
    unaligned = Protocol("none", "none", False)
    score = score_benchmark("toy", sequences, tmp_path, unaligned, processes=2)
    few = replace(score.sequences[1], depth={"all": replace(score.sequences[1].depth["all"], num_valid=3)})
    pixels = score.sequences[0].depth["all"].num_valid
    mean = replace(score, sequences=(score.sequences[0], few)).depth_mean("all")
    assert mean["abs_rel"] == pytest.approx(3 / (pixels + 3), rel=1e-9)
    assert score.degenerate == [sequences[1].name]
    own, whole = score.camera_mean(False), score.camera_mean(True)
    assert own["ate"] < 1e-12 < whole["ate"]
    alone = [score_benchmark("toy", [s], tmp_path, unaligned).sequences[0] for s in sequences]
    assert tuple(alone) == score.sequences  # processes change nothing


def test_a_camera_that_stands_or_trembles_is_named_in_the_table(sequences):
    moving = next(s for s in open_benchmark("toy", None) if float(camera_path(s)) > 0.1)
    true = moving.read_cameras()[1]
    tremble = 1e-4 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    standing, trembling = true[:1].repeat(9, 1, 1), true[:1].repeat(9, 1, 1)
    trembling[:, :3, 3] += 0.3 * tremble
    cases = (true, []), (standing, ["degenerate camera paths"]), (trembling, ["no better than standing"])
    for cam2world, said in cases:
        score = score_sequence("toy", moving, replace(true_prediction(moving), cam2world=cam2world), PROTOCOL)
        text = markdown([Row("model", BenchmarkScore("toy", PROTOCOL, (score,)), {})], 16, None)
        assert [flag for flag in ("degenerate camera paths", "no better than standing") if flag in text] == said
        assert score.cameras["ate_standing"] > 0.01


def camera_path(sequence: EvalSequence) -> Tensor:
    return path_length(sequence.read_cameras()[1])


def test_foreign_folders_and_archives_say_the_same_as_ours(tmp_path, sequences):
    true = true_prediction(sequences[0])
    monst3r = tmp_path / "monst3r"
    monst3r.mkdir()
    rows = torch.cat([true.cam2world[:, :3, 3], matrix_to_wxyz(true.cam2world[:, :3, :3])], dim=1)
    np.savetxt(monst3r / "pred_traj.txt", torch.cat([torch.arange(9.0)[:, None], rows], dim=1).numpy())
    for t, depth in enumerate(true.depth):
        np.save(monst3r / f"frame_{t:04d}.npy", depth.numpy())
    np.savez(tmp_path / "archive.npz", depth=true.depth.numpy(), cam2world=true.cam2world.numpy())
    write_prediction(tmp_path / "ours", true, {})
    scores = [
        score_sequence("toy", sequences[0], read_prediction(tmp_path / name), PROTOCOL)
        for name in ("ours", "monst3r", "archive.npz")
    ]
    for score in scores[1:]:
        assert score.depth == scores[0].depth
        assert score.cameras["ate"] < 1e-9


def test_a_trajectory_line_has_the_scalar_part_first(tmp_path):
    # a quarter about z: cos 45, 0, 0, sin 45
    (tmp_path / "pred_traj.txt").write_text("0.0 1 2 3 0.7071067811865476 0 0 0.7071067811865476\n")
    expected = [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    torch.testing.assert_close(read_wxyz_trajectory(tmp_path / "pred_traj.txt")[0], torch.tensor(expected).double())


def test_what_cannot_be_scored_is_named_in_one_line(tmp_path, sequences):
    def message() -> str:
        with pytest.raises(UserError) as caught:
            score_benchmark("toy", sequences[:1], tmp_path, PROTOCOL)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    name = sequences[0].name
    assert f"no prediction of {name}" in message()
    folder = tmp_path / name
    folder.mkdir()
    assert "holds none of cameras.json" in message()
    (folder / "pred_traj.txt").write_text("0 1 2 3\n")
    assert "line 1: 4 columns" in message()
    (folder / "pred_traj.txt").unlink()
    np.save(folder / "frame_0000.npy", np.ones((2, 2)))
    assert "1 predicted frames, the sequence has 9" in message()
    np.save(folder / "frame_0001.npy", np.ones((2, 3)))
    assert "differ in size" in message()
    np.save(folder / "frame_0001.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "allow_pickle" in message()
    np.savez(folder / "prediction.npz", depth=np.ones((9, 2, 2)), cam2world=np.full((9, 4, 4), np.nan))
    assert "a camera is not finite" in message()
    (folder / "cameras.json").write_text('{"format": "other"}')
    assert "not of the format" in message()


def test_the_report_names_protocol_subset_and_degenerate_paths(tmp_path, sequences):
    for sequence in sequences:
        write_prediction(tmp_path / "p" / sequence.name, replace(true_prediction(sequence), given=(0, 8)), {})
    score = score_benchmark("toy", sequences, tmp_path / "p", PROTOCOL)
    text = write_report(tmp_path / "out", [Row("model", score, {"steps": 20})], total=16)
    assert "2 of its 16 sequences" in text and "one4d: depth alignment scale_shift" in text
    assert "| model | observed | " in text and "| model | hidden | " in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "sequences.csv", "table.md"]
    lines = sequences_csv([Row("model", score, {})]).splitlines()
    assert len(lines) == 1 + 2 * 3 and len({line.count(",") for line in lines}) == 1
    sintel_score = replace(score, benchmark="sintel")
    sintel = markdown([Row("0.5", sintel_score, {})], 2, "sparsity")
    assert "| 0.5, published | all | 0.314 | 70.3 |" in sintel
    assert "| One4D, published | | 0.213 | 0.057 | 0.818" in sintel
    assert "| One4D, published | all | 0.273 | 70.4 |" in markdown([Row("model", sintel_score, {})], 2, None)


def notes_of(sequence: EvalSequence, depth: Tensor) -> str:
    prediction = replace(true_prediction(sequence), depth=depth)
    return "; ".join(score_sequence("toy", sequence, prediction, PROTOCOL).notes)


def test_depth_that_is_no_depth_is_said_beside_its_score(sequences):
    depth = true_prediction(sequences[0]).depth
    assert notes_of(sequences[0], depth) == notes_of(sequences[0], 1000 * depth + 1) == ""
    holes = depth.clone()
    holes[:, :6] = 0
    unknown = depth.clone()
    unknown[0] = math.nan
    for wrong, words in (
        (torch.zeros_like(depth), "zero at 100 %"),
        (-depth, "negative at 100 %"),
        (holes, "zero at "),
        (unknown, "no number at 11"),
        (1 / depth, "if it is disparity"),
        (500 / depth + 3, "if it is disparity"),
        (255 - 250 * depth / depth.max(), "if it is disparity"),
    ):
        assert words in notes_of(sequences[0], wrong), words
    assert notes_of(sequences[0], depth[:, ::2, ::2]) == ""  # though resizing swings below 0 beside the sky
    assert "disparity" not in notes_of(sequences[0], -depth) + notes_of(sequences[0], torch.ones_like(depth))


def test_the_table_says_it_in_one_line(tmp_path, sequences):
    for sequence in sequences:
        write_prediction(tmp_path / sequence.name, Prediction(torch.zeros(9, 48, 64), None), {})
    score = score_benchmark("toy", sequences, tmp_path, PROTOCOL)
    lines = [line for line in markdown([Row("theirs", score, {})], 16, None).splitlines() if "predicted depth" in line]
    assert len(lines) == 1 and all(sequence.name in lines[0] for sequence in sequences)


def test_quaternions_with_the_scalar_last_are_told(tmp_path):
    lines = {"wrong": "0 0 0 0  0 0 0 1\n1 1 0 0  0 0 0.1 0.99\n", "right": "0 0 0 0  1 0 0 0\n1 1 0 0  0.99 0 0 0.1\n"}
    for name, text in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pred_traj.txt").write_text(text)
    assert "x y z w" in " ".join(read_prediction(tmp_path / "wrong").flags)
    assert read_prediction(tmp_path / "right").flags == ()


def test_turns_that_fit_the_truth_in_the_other_order_are_told(sequences):
    target = sequences[0].read_cameras()[1]
    turned = so3_exp(torch.linspace(0, 0.5, len(target)).double()[:, None] * torch.tensor([0.3, 0.6, -0.2]).double())
    target[:, :3, :3] = target[:, :3, :3] @ turned
    assert rotation_warnings(target, target) == []
    misread = target.clone()
    misread[:, :3, :3] = wxyz_to_matrix(matrix_to_wxyz(target[:, :3, :3]).roll(-1, dims=-1))  # w x y z -> x y z w
    assert "x y z w" in rotation_warnings(misread, target)[0]
