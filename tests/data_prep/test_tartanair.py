"""Laws of the TartanAir source and of the converter's door."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.sources import registry
from data_prep.sources.tracks import clip_windows
from data_prep.write_shards import main
from one4d_pl.data.shards import ShardSet, write_shards
from one4d_pl.types import Clip
from tests.data_prep.raw_layouts import write_trajectory
from tests.data_prep.real_clips import median_error, moved_points

iter_clips = partial(registry.iter_clips, "tartanair", num_frames=17)
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "tartanair"
FIRST, LAST = 50, 67  # the frames of the handmade trajectory; its camera rows start at 0, as the real ones do
QUARTER_TURN = [0.0, 0.0, 0.5**0.5, 0.5**0.5]  # about NED z (down): forward becomes right


def camera_rows() -> np.ndarray:  # [LAST + 1, 7]
    """Frame n stands at NED (n, 2, 3) and looks ahead; the last one looks to the right."""
    rows = np.array([[n, 2.0, 3.0, 0.0, 0.0, 0.0, 1.0] for n in range(LAST + 1)])
    rows[LAST, 3:] = QUARTER_TURN
    return rows


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one trajectory of 18 frames; not to be changed."""
    root = tmp_path_factory.mktemp("tartanair")
    numbers = np.arange(FIRST, LAST + 1)
    colours = np.stack([numbers, 0 * numbers, 255 - numbers], 1).astype(np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (len(numbers), 480, 640, 3))
    depth = np.full((len(numbers), 480, 640), numbers[:, None, None] / 10)
    depth[:, 0, :6] = [10000.0, 1000.0, 999.0, np.inf, 0.0, np.nan]
    write_trajectory(root / "office" / "Easy" / "P001", frames, depth, camera_rows(), FIRST)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """A copy of `pristine` for one test."""
    return shutil.copytree(pristine, tmp_path / "tartanair")


def test_a_trajectory_becomes_clips_in_our_conventions(pristine):
    (clip,) = iter_clips(pristine)
    assert clip.key == "office-Easy-P001-000050" and (clip.source, clip.domain) == ("tartanair", "synthetic")
    assert clip.licence == "CC-BY-4.0" and clip.moving is None
    assert clip.frames.shape == (17, 480, 640, 3)
    assert clip.frames[:, 0, 0].tolist() == [[n, 0, 255 - n] for n in range(50, 67)]
    assert torch.equal(clip.depth[:, 5, 5], torch.arange(50, 67) / 10)
    expected = torch.tensor([[320.0, 0, 320], [0, 320, 240], [0, 0, 1]])
    assert torch.equal(clip.intrinsics, expected.expand(17, 3, 3))


def test_sky_and_holes_are_told_apart(pristine):
    clip = next(iter_clips(pristine))
    inf, nan = torch.inf, torch.nan
    expected = torch.tensor([inf, inf, 999.0, inf, nan, inf])
    torch.testing.assert_close(clip.depth[0, 0, :6], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(clip.valid, clip.depth.isfinite())


def test_camera_rows_belong_to_frame_numbers_and_ned_becomes_opencv(pristine):
    clip = next(iter_clips(pristine, stride=1))
    identity = torch.eye(3).expand(17, 3, 3)
    assert torch.equal(clip.cam2world[:, :3, :3], identity)
    forward = torch.arange(50.0, 67.0)  # NED x is OpenCV z, y is x, z is y
    assert torch.equal(clip.cam2world[:, :3, 3], torch.stack([2 + 0 * forward, 3 + 0 * forward, forward], dim=-1))


def test_a_turn_to_the_right_is_a_turn_to_the_right(root):
    (root / "office/Easy/P001/image_left/000050_left.png").unlink()
    (root / "office/Easy/P001/depth_left/000050_left_depth.npy").unlink()
    (clip,) = iter_clips(root)  # frames 51 .. 67
    last = clip.cam2world[-1, :3, :3]
    right, down, forward = last.T
    torch.testing.assert_close(forward, torch.tensor([1.0, 0, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(down, torch.tensor([0, 1.0, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(right, torch.tensor([0, 0, -1.0]), rtol=0, atol=1e-6)


def test_the_trajectory_itself_may_be_the_root(pristine):
    (clip,) = iter_clips(pristine / "office" / "Easy" / "P001")
    assert clip.key == "P001-000050"


@pytest.mark.parametrize("stride,starts", [(1, [0, 17, 40, 57]), (2, [0, 40])])
def test_windows_are_disjoint_and_never_cross_a_gap(stride, starts):
    numbers = [*range(36), *range(40, 80)]
    windows = clip_windows(numbers, 17, stride)
    assert [window.start for window in windows] == starts
    assert all(len(window) == 17 and set(window) <= set(numbers) for window in windows)
    used = [number for window in windows for number in window]
    assert len(set(used)) == len(used)


def test_too_short_a_trajectory_gives_no_clip_and_says_so(pristine, caplog):
    assert list(iter_clips(pristine, num_frames=21)) == []
    assert "no run of 21 frames" in caplog.text


TRAJECTORY = Path("office/Easy/P001")


def write_rows(path: Path, number: int, row: list[float]) -> None:
    lines = path.read_text().splitlines()
    lines[number] = " ".join(map(str, row))
    path.write_text("\n".join(lines))


BREAK = {
    "000055_left.png": lambda folder: (folder / "image_left/000055_left.png").write_bytes(b"no picture"),
    "000056_left.png": lambda folder: (folder / "image_left/000056_left.png").unlink(),
    "000057_left.png: 320x240": lambda folder: Image.new("RGB", (320, 240)).save(folder / "image_left/000057_left.png"),
    "000058_left_depth.npy": lambda folder: (folder / "depth_left/000058_left_depth.npy").write_bytes(b"no array"),
    "000059_left_depth.npy": lambda folder: (folder / "depth_left/000059_left_depth.npy").write_bytes(b""),
    "000060_left_depth.npy": lambda folder: (folder / "depth_left/000060_left_depth.npy").unlink(),
    "000061_left_depth.npy: need": lambda folder: np.save(folder / "depth_left/000061_left_depth.npy", np.ones((4, 4))),
    "000062_left_depth.npy": lambda folder: np.save(
        folder / "depth_left/000062_left_depth.npy", np.array([{"pickle": 1}], dtype=object), allow_pickle=True
    ),
    "60 rows, none for frame 60": lambda folder: np.savetxt(folder / "pose_left.txt", camera_rows()[:60]),
    "row of frame 63: the quaternion's norm": lambda folder: write_rows(
        folder / "pose_left.txt", 63, [0, 0, 0, 0, 0, 0, 2]
    ),
    "row of frame 64: need 7 finite": lambda folder: write_rows(
        folder / "pose_left.txt", 64, [0, 0, 0, 0, 0, 0, float("nan")]
    ),
    "row of frame 65: need 7 finite": lambda folder: write_rows(folder / "pose_left.txt", 65, [0, 0, 0]),
}


@pytest.mark.parametrize("reason", BREAK)
def test_a_broken_file_drops_its_clip_with_one_line_that_names_it(root, caplog, reason):
    BREAK[reason](root / TRAJECTORY)
    with caplog.at_level(logging.WARNING):
        assert list(iter_clips(root)) == []
    dropped, count = [record.getMessage() for record in caplog.records]
    assert reason in dropped and dropped.startswith("dropped a clip: ") and "\n" not in dropped
    assert "1 of 1 clips dropped" in count


# --- the door


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


def test_the_door_writes_resized_shards(pristine, tmp_path):
    arguments = ["--source", "tartanair", "--root", str(pristine), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--num-frames", "17", "--height", "48", "--width", "64"]) == 0
    shard_set = ShardSet.open(tmp_path / "out")
    assert [entry.key for entry in shard_set.entries] == ["office-Easy-P001-000050"]
    clip = shard_set.read(0)
    assert clip.depth.shape == (17, 48, 64)
    assert torch.equal(clip.intrinsics[0], torch.tensor([[32.0, 0, 32], [0, 32, 24], [0, 0, 1]]))


def test_the_door_renders_the_toy_world(tmp_path):
    arguments = ["--source", "toy", "--num-frames", "17", "--height", "32", "--width", "48"]
    arguments += ["--samples-per-shard", "2", "--seed", "5"]
    assert main([*arguments, "--count", "3", "--domain", "real", "--out", str(tmp_path / "three")]) == 0
    three = ShardSet.open(tmp_path / "three")
    assert three.samples_per_shard == [2, 1] and three.manifest.domain == "real"
    assert len({three.key(index) for index in range(3)}) == 3
    assert main([*arguments, "--limit", "1", "--domain", "real", "--out", str(tmp_path / "one")]) == 0
    one = ShardSet.open(tmp_path / "one")
    assert len(one) == 1 and torch.equal(one.read(0).frames, three.read(0).frames)


@pytest.mark.parametrize(
    "arguments,reason",
    [
        (["--source", "tartanair", "--root", "nowhere"], "nowhere: no TartanAir v1 trajectory"),
        (["--source", "tartanair"], "needs --root"),
        (["--source", "tartanair", "--root", ".", "--num-frames", "16"], "must be 4k+1"),
        (["--source", "tartanair", "--root", ".", "--limit", "0"], "--count and --limit"),
        (["--source", "toy", "--root", "."], "toy takes no --root"),
    ],
)
def test_bad_arguments_end_in_exit_code_2_and_one_line(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--out", "out"]) == 2
    assert reason in last_line(capsys.readouterr().err)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_clips_end_in_exit_code_2_and_one_line(root, tmp_path, capsys):
    (root / TRAJECTORY / "pose_left.txt").write_text("")
    out = tmp_path / "out"
    assert main(["--source", "tartanair", "--root", str(root), "--num-frames", "17", "--out", str(out)]) == 2
    assert last_line(capsys.readouterr().err).startswith(f"error: {out}: not one clip to write; 1 dropped, see")
    assert "0 rows, none for frame 50" in (out / "dropped.jsonl").read_text()
    with pytest.raises(SystemExit) as caught:
        main(["--source", "kitti", "--out", str(out)])
    assert caught.value.code == 2


# --- the real slice


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/tartanair")
def test_the_real_slice_is_static_and_survives_the_shards(tmp_path):
    (clip,) = iter_clips(REAL)
    assert clip.key == "tartanair-000050" and clip.num_frames == 17
    for i, j in ((0, 1), (7, 9), (0, 16)):
        assert median_error(clip, i, j) <= 0.005  # metres
    back = write_shards([clip], tmp_path, samples_per_shard=1).read(0)
    assert torch.equal(back.cam2world, clip.cam2world) and torch.equal(back.intrinsics, clip.intrinsics)
    assert torch.equal(back.valid, clip.valid)
    torch.testing.assert_close(back.depth, clip.depth, rtol=2e-4, atol=0, equal_nan=True)
    squared_error = (back.frames.float() - clip.frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / squared_error) >= 40  # dB


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/tartanair")
def test_the_published_principal_point_is_meant_with_pixel_centres_at_one_half():
    clip = next(iter_clips(REAL))
    errors = {}
    for shift in (-0.5, 0.0, 0.5):
        intrinsics = clip.intrinsics.clone()
        intrinsics[:, :2, 2] += shift
        errors[shift] = interpolated_error(clip, intrinsics, 0, 8)
    assert errors[0.0] < 0.8 * min(errors[-0.5], errors[0.5])


def interpolated_error(clip: Clip, intrinsics: Tensor, i: int, j: int) -> float:
    """Like `median_error`, in z alone and bilinear in frame j: fine enough to see half a pixel."""
    moved, pixels = moved_points(clip, intrinsics, i, j)
    grid = pixels / torch.tensor([clip.depth.shape[2], clip.depth.shape[1]]) * 2 - 1
    found = torch.nn.functional.grid_sample(clip.depth[j][None, None].double(), grid[None], align_corners=False)[0, 0]
    inside = (grid.abs() < 1).all(-1) & (moved[..., 2] > 0)
    return (found - moved[..., 2]).abs()[inside].median().item()
