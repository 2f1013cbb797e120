"""What MonST3R, Geo4D, CUT3R and Pi3 leave is read as it lies there, and Sintel's camera set is a set of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from one4d_pl.errors import UserError
from one4d_pl.evaluation import run
from one4d_pl.evaluation.benchmarks import SINTEL_CAMERAS, EvalSequence, open_benchmark
from one4d_pl.evaluation.protocols import PROTOCOLS
from one4d_pl.evaluation.run import Request, evaluate
from one4d_pl.evaluation.score import score_benchmark
from one4d_pl.evaluation.tables import Row, markdown
from one4d_pl.geometry.se3 import matrix_to_wxyz
from one4d_pl.scene.predictions import find_prediction, read_prediction

PROTOCOL = PROTOCOLS["one4d"]


@pytest.fixture(scope="module")
def sequence() -> EvalSequence:
    return open_benchmark("toy", None, ("toy_3000000",))[0]


def write_poses(folder: Path, cam2world: np.ndarray) -> None:
    np.save(folder / "pred_poses.npy", cam2world)


def write_three_rows(folder: Path, cam2world: np.ndarray) -> None:
    np.save(folder / "pred_poses.npy", cam2world[:, :3])


def write_trajectory(folder: Path, cam2world: np.ndarray) -> None:
    rotations = matrix_to_wxyz(torch.from_numpy(cam2world[:, :3, :3])).numpy()
    rows = np.concatenate([np.arange(len(cam2world))[:, None], cam2world[:, :3, 3], rotations], axis=1)
    np.savetxt(folder / "pred_traj.txt", rows)


def write_demo(folder: Path, cam2world: np.ndarray) -> None:
    for name in ("depth", "conf", "color", "camera"):
        (folder / name).mkdir()
    for t, pose in enumerate(cam2world):
        np.save(folder / "depth" / f"{t}.npy", np.full((4, 6), t + 1, np.float32))
        np.save(folder / "conf" / f"{t}.npy", np.ones((4, 6), np.float32))
        np.savez(folder / "camera" / f"{t}.npz", pose=pose, intrinsics=np.eye(3))


def write_archive(folder: Path, cam2world: np.ndarray) -> None:
    np.savez(folder / "prediction.npz", cam2world=cam2world[:, :3])


@pytest.mark.parametrize("write", [write_poses, write_three_rows, write_trajectory, write_demo, write_archive])
@pytest.mark.parametrize("prefix", ["", "rgbd_dataset_freiburg3_", "rgbd_bonn_"])
def test_cameras_are_found_under_every_name_and_layout(tmp_path, sequence, write, prefix):
    cam2world = sequence.read_cameras()[1]
    cam2world = torch.cat([cam2world, cam2world[:3] + 0])  # 12 frames: 10 comes behind 9
    folder = tmp_path / f"{prefix}walking_xyz"
    folder.mkdir()
    write(folder, cam2world.numpy())
    found = find_prediction(tmp_path, "walking_xyz")
    assert found == folder
    prediction = read_prediction(found)
    torch.testing.assert_close(prediction.cam2world, cam2world, rtol=0, atol=1e-6)
    if write is write_demo:
        assert prediction.depth[:, 0, 0].tolist() == list(range(1, 13))


def test_matrices_go_before_a_text_and_the_sequences_own_name_before_its_datasets(tmp_path, sequence):
    cam2world = sequence.read_cameras()[1].numpy()
    for name in ("walking_xyz", "rgbd_dataset_freiburg3_walking_xyz"):
        (tmp_path / name).mkdir()
    write_poses(tmp_path / "walking_xyz", cam2world)
    write_trajectory(tmp_path / "walking_xyz", cam2world[::-1].copy())
    found = find_prediction(tmp_path, "walking_xyz")
    assert found == tmp_path / "walking_xyz"
    np.testing.assert_array_equal(read_prediction(found).cam2world, cam2world)


def test_a_demo_folder_whose_numbers_differ_is_refused(tmp_path, sequence):
    write_demo(tmp_path, sequence.read_cameras()[1].numpy())
    (tmp_path / "camera" / "8.npz").rename(tmp_path / "camera" / "9.npz")
    with pytest.raises(UserError, match="need the same numbers in both"):
        read_prediction(tmp_path)


# --- Sintel's cameras


def as_sintel(sequence: EvalSequence, scores: tuple[str, ...], name: str) -> EvalSequence:
    return replace(sequence, name=name, scores=scores)


@pytest.fixture
def sintel(sequence, monkeypatch) -> list[EvalSequence]:
    sequences = [as_sintel(sequence, ("depth", "cameras"), name) for name in SINTEL_CAMERAS]
    sequences += [as_sintel(sequence, ("depth",), name) for name in ("alley_1", "bandage_1")]
    monkeypatch.setattr(run, "open_benchmark", lambda *_: sequences)
    return sequences


def request(tmp_path: Path, sequences: tuple[str, ...] = ()) -> Request:
    out, predictions = tmp_path / "out", tmp_path / "theirs"
    return Request("sintel", tmp_path, out, PROTOCOL, sequences, predictions, processes=1, pictures=False)


def test_a_folder_of_sintels_14_camera_sequences_is_scored_and_called_the_published_set(tmp_path, sintel):
    for one in sintel[:14]:
        (tmp_path / "theirs" / one.name).mkdir(parents=True)
        write_trajectory(tmp_path / "theirs" / one.name, one.read_cameras()[1].numpy())
    table = evaluate(request(tmp_path), None, ())
    assert "14 of its 23 sequences**: for cameras the published set" in table and "| all 14 |" in table
    assert "## Video depth" not in table


def test_any_other_part_is_refused_or_not_comparable(tmp_path, sintel):
    for one in sintel[:13]:
        (tmp_path / "theirs" / one.name).mkdir(parents=True)
        write_trajectory(tmp_path / "theirs" / one.name, one.read_cameras()[1].numpy())
    with pytest.raises(UserError, match=r"no prediction of temple_3, alley_1, bandage_1"):
        evaluate(request(tmp_path), None, ())
    score = score_benchmark("sintel", sintel[:13], tmp_path / "theirs", PROTOCOL)
    assert "13 of its 23 sequences**: not comparable" in markdown([Row("theirs", score, {})], 23, None)
