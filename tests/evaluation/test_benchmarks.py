"""Laws of the benchmark readers on folders in the original layouts."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.config import ToyConfig
from one4d_pl.data.datamodule import REAL_SEED_OFFSET, VAL_SEED_OFFSET
from one4d_pl.errors import UserError
from one4d_pl.evaluation import benchmarks
from one4d_pl.evaluation.benchmarks import open_benchmark, sequence_names

TAG = struct.pack("<f", 202021.25)
REAL_TUM = Path(__file__).resolve().parents[3] / "shared/data/tum/rgbd_dataset_freiburg3_sitting_xyz"


def make_sintel(root: Path, sequence: str, count: int) -> None:
    """Frames of 6x4 whose number is their value; the camera of frame n stands at x = -n."""
    for kind in ("final", "depth", "camdata_left"):
        (root / "training" / kind / sequence).mkdir(parents=True)
    for n in range(1, count + 1):
        stem = f"frame_{n:04d}"
        Image.new("RGB", (6, 4), (n, n, n)).save(root / "training/final" / sequence / f"{stem}.png")
        depth = struct.pack("<2i24f", 6, 4, *[float(n)] * 24)
        (root / "training/depth" / sequence / f"{stem}.dpt").write_bytes(TAG + depth)
        world2cam = [1.0, 0, 0, n, 0, 1, 0, 0, 0, 0, 1, 0]
        camera = struct.pack("<21d", 5, 0, 2.5, 0, 5, 1.5, 0, 0, 1, *world2cam)
        (root / "training/camdata_left" / sequence / f"{stem}.cam").write_bytes(TAG + camera)


def make_folder(root: Path, name: str, images: list[float], depths: list[float], truth: list[float]) -> Path:
    """A TUM/Bonn folder; the truth's row k stands at x = k."""
    for kind, times in (("rgb", images), ("depth", depths)):
        (root / name / kind).mkdir(parents=True)
        for k, t in enumerate(times):
            picture = (
                Image.new("RGB", (4, 2), (k % 256,) * 3)
                if kind == "rgb"
                else Image.fromarray(np.full((2, 4), 5000 + k, np.uint16))
            )
            picture.save(root / name / kind / f"{t:.5f}.png")
    rows = [f"{t:.5f} {k} 0 0 0 0 0 1" for k, t in enumerate(truth)]
    (root / name / "groundtruth.txt").write_text("\n".join(rows))
    return root / name


def test_the_published_counts():
    assert len(benchmarks.SINTEL_CAMERAS) == 14 and len(sequence_names("sintel")) == 23
    frames = {name: benchmarks.SINTEL_FRAMES.get(name, 50) for name in sequence_names("sintel")}
    assert sum(frames.values()) == 1064 and sum(frames[name] for name in benchmarks.SINTEL_CAMERAS) == 643
    assert len(sequence_names("bonn")) == 5 and len(sequence_names("tum")) == 8


def test_sintel_pairs_frames_depth_and_cameras_and_scores_cameras_of_its_14_alone(tmp_path):
    make_sintel(tmp_path, "ambush_6", 20)
    make_sintel(tmp_path, "ambush_2", 21)
    depth_only, both = open_benchmark("sintel", tmp_path, ("ambush_6", "ambush_2"))
    assert (depth_only.name, depth_only.scores) == ("ambush_2", ("depth",))
    assert (both.name, both.scores) == ("ambush_6", ("depth", "cameras"))
    numbers = torch.arange(1.0, 21)
    assert torch.equal(both.read_frames()[:, 0, 0, 0].float(), numbers)
    assert torch.equal(both.read_depth()[:, 3, 5], numbers)
    intrinsics, cam2world = both.read_cameras()
    assert torch.equal(cam2world[:, 0, 3], -numbers.double()) and intrinsics[0, 0, 2] == 3


def test_bonn_takes_30_to_140_of_each_by_rank_and_never_scores_cameras(tmp_path):
    images, depths = [200 + 0.03 * k for k in range(150)], [99.9 + 100 + 0.03 * k for k in range(160)]
    make_folder(tmp_path, "rgbd_bonn_crowd2", images, depths, [t + 0.004 for t in images])
    (sequence,) = open_benchmark("bonn", tmp_path, ("crowd2",))
    assert (sequence.num_frames, sequence.scores) == (110, ("depth",))
    assert sequence.read_frames()[:, 0, 0, 0].tolist() == list(range(30, 140))
    depth = sequence.read_depth()[:, 0, 0]  # rank 30 of the depth maps is 0.1 s earlier: rank pairs, not time
    torch.testing.assert_close(depth, 1 + torch.arange(30, 140) / 5000)
    centres = sequence.read_cameras()[1][:, :3, 3]  # paired by time: row k of the truth, along -x by the camera rule
    torch.testing.assert_close(centres[:, 0] - 0.0113, -torch.arange(30.0, 140).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "count"), [("tum", 90), ("tum_30", 30)])
def test_tum_takes_every_third_matched_image(tmp_path, name, count):
    images = [100 + 0.03 * k for k in range(300)]
    truth = [t + 0.001 for k, t in enumerate(images) if k != 4]  # image 4 has no camera: the third match is image 7
    folder = make_folder(tmp_path, "rgbd_dataset_freiburg3_walking_rpy", images, images[:2], truth)
    (sequence,) = open_benchmark(name, tmp_path, ("walking_rpy",))
    assert (sequence.num_frames, sequence.scores) == (count, ("cameras",))
    expected = [0, 3, *range(7, 300, 3)][:count]
    assert sequence.read_frames()[:, 0, 0, 0].tolist() == [k % 256 for k in expected]
    centres = sequence.read_cameras()[1][:, 0, 3]  # row k of the truth stands at x = k; image 4 has none
    assert centres.tolist() == [k - (k > 4) for k in expected]
    assert sequence.read_depth()[0].isfinite().all() and sequence.read_depth()[1].isnan().all()
    (folder / "rgb" / f"{images[7]:.5f}.png").unlink()
    with pytest.raises(UserError, match="tum: "):
        (folder / "rgb.txt").write_text("".join(f"{t} rgb/{t:.5f}.png\n" for t in images))
        open_benchmark(name, tmp_path, ("walking_rpy",))


def test_toy_is_a_fixed_split_that_training_never_sees():
    sequences = open_benchmark("toy", None)
    assert [s.name for s in sequences] == [f"toy_{seed}" for seed in range(3_000_000, 3_000_016)]
    config = ToyConfig()
    ranges = [
        range(config.seed, config.seed + config.train_synthetic),
        range(config.seed + VAL_SEED_OFFSET, config.seed + VAL_SEED_OFFSET + config.val),
        range(config.seed + REAL_SEED_OFFSET, config.seed + REAL_SEED_OFFSET + config.train_real),
    ]
    assert all(benchmarks.TOY_SEEDS.start >= r.stop for r in ranges)
    first, again = sequences[0].read_depth(), open_benchmark("toy", None)[0].read_depth()
    assert torch.equal(first, again) and first.shape == (9, 48, 64) and sequences[0].caption()


def test_missing_data_say_what_to_get_and_where(tmp_path):
    make_sintel(tmp_path, "ambush_6", 19)
    make_folder(tmp_path, "rgbd_bonn_crowd2", [1.0], [1.0], [1.0])
    for name, root, message in (
        ("sintel", None, r"no folder at None; get MPI Sintel.*--root"),
        ("sintel", tmp_path / "absent", r"no folder at .*absent"),
        ("sintel", tmp_path, r"need 50; get MPI Sintel"),
        ("bonn", tmp_path, r"no rgbd_bonn_balloon2/groundtruth.txt under"),
        ("tum", tmp_path, r"no rgbd_dataset_freiburg3_sitting_static"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_benchmark(name, root)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"19 .png files in .*ambush_6, need 20"):
        open_benchmark("sintel", tmp_path, ("ambush_6",))
    with pytest.raises(UserError, match=r"gives 0 images and 0 depth maps at \[30:140\]"):
        open_benchmark("bonn", tmp_path, ("crowd2",))
    with pytest.raises(UserError, match="no sequence alley_9"):
        open_benchmark("sintel", tmp_path, ("alley_9",))
    with pytest.raises(UserError, match="need one of toy, sintel"):
        open_benchmark("kitti", tmp_path)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_TUM.is_dir(), reason="no TUM files in shared/data")
def test_the_real_text_files_of_a_tum_sequence_give_its_90_frames(tmp_path):
    folder = tmp_path / REAL_TUM.name
    (folder / "rgb").mkdir(parents=True)
    for name in ("rgb.txt", "depth.txt", "groundtruth.txt"):
        (folder / name).write_bytes((REAL_TUM / name).read_bytes())
    with pytest.raises(UserError, match=r"tum: .*no .*rgb/1341845820\.\d+\.png, need 90 images"):
        open_benchmark("tum", tmp_path, ("sitting_xyz",))
    for line in (folder / "rgb.txt").read_text().splitlines()[3:]:
        (folder / line.split()[1]).touch()
    (long,), (short,) = (open_benchmark(name, tmp_path, ("sitting_xyz",)) for name in ("tum", "tum_30"))
    times = torch.tensor([image.timestamp for image in long.images], dtype=torch.float64)
    assert 8.5 < float(times[-1] - times[0]) < 10  # every third of 30 images a second
    assert float(times.diff().min()) > 0.05 and float(times.diff().median()) == pytest.approx(0.1, abs=0.01)
    assert short.images == long.images[:30]
