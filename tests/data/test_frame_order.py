"""Laws of order: numbers in names decide in every reader alike, and where they leave a doubt nobody guesses."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.sources import registry
from one4d_pl.data.frame_order import by_number, numbered_files
from one4d_pl.data.rgbd_folder import list_files
from one4d_pl.errors import UserError
from one4d_pl.evaluation.benchmarks import open_benchmark
from one4d_pl.scene.media import FrameFolder
from one4d_pl.scene.predictions import read_prediction
from one4d_pl.scene.scene import open_scene, save_scene
from tests.data_prep import raw_layouts as raw
from tests.scene.toy_scene import exact_scene

ORDERED = {
    "without leading zeros": [f"{n}.png" for n in range(120)],
    "with a word": [f"frame_{n}.npy" for n in (1, 2, 9, 10, 11, 100, 1000)],
    "padded": [f"{n:06d}.png" for n in (0, 5, 999, 100_000)],
    "padded and outgrown": ["f_0998.png", "f_9999.png", "f_10000.png"],
    "numbers around it that stay": ["v2_frame8_of_12.png", "v2_frame9_of_12.png", "v2_frame10_of_12.png"],
    "number and time that agree": ["1_1341846313.92.png", "2_1341846314.01.png", "10_1341846314.1.png"],
    "seconds of unequal fractions": ["1341846313.5.png", "1341846313.592026.png", "1341846314.png"],
    "seconds behind a word": ["depth_1341846313.25.png", "depth_1341846313.5.png"],
    "points that part numbers": ["scene.1.9.png", "scene.1.10.png", "scene.1.11.png"],
    "words alone": ["first.png", "last.png", "middle.png"],
    "archives": ["x/9.exr", "x/10.exr", "x/11.EXR"],
    "words in any case": ["Frame_1.png", "frame_2.png", "FRAME_10.png"],
    "one": ["still.png"],
    "a decimal that stays": ["v1.5_frame9.png", "v1.5_frame10.png"],
}  # fmt: skip
DOUBTFUL = {
    "same number": ["frame_1.png", "frame_01.png"],
    "same number, two kinds": ["1.png", "2.png", "1.jpg"],
    "same number in two folders": ["left/1.exr", "right/1.exr"],
    "two cameras": ["left_1.png", "left_2.png", "right_1.png"],
    "numbers that disagree": ["shot1_frame7.png", "shot2_frame3.png"],
    "numbers that disagree, padded": ["0001_t0009.png", "0002_t0008.png", "0003_t0007.png"],
    "one without a number": ["cover.png", "frame_1.png", "frame_2.png"],
    "one with another number": ["frame_1.png", "frame_2.png", "frame_2_copy_1.png"],
    "decimal or two numbers": ["0.5.png", "0.25.png"],
    "one decimal in two spellings": ["t0.5.png", "t0.50.png"],
    "words that disagree with numbers": ["b1.png", "a2.png"],
}


@pytest.mark.parametrize("names", ORDERED.values(), ids=ORDERED)
def test_the_number_decides_whatever_the_order_of_listing(names):
    for seed in range(5):
        assert by_number(random.Random(seed).sample(names, len(names)), "folder") == names


@pytest.mark.parametrize("names", DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_doubt_is_one_line_that_names_two_files(names):
    for seed in range(5):
        with pytest.raises(UserError, match=r"^folder: the order of the files is in doubt: ") as caught:
            by_number(random.Random(seed).sample(names, len(names)), "folder")
        assert sum(repr(name) in str(caught.value) for name in names) == 2 and "\n" not in str(caught.value)


def test_hidden_files_are_no_frames(tmp_path):
    for name in ("10.png", "9.png", "._9.png", ".DS_Store.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in numbered_files(tmp_path, (".png",))] == ["9.png", "10.png"]


# --- every reader; the grey of a picture, the value of a map is its number


def pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    for n, name in enumerate(names):
        Image.fromarray(np.full((48, 64, 3), n, np.uint8)).save(folder / name)
    return folder


TWELVE = [f"{n}.png" for n in range(12)]


def test_a_folder_of_frames_is_a_video_in_order(tmp_path):
    assert [int(frame[0, 0, 0]) for frame in FrameFolder(pictures(tmp_path / "a", TWELVE), 16)] == list(range(12))
    with pytest.raises(UserError, match="in doubt"):
        FrameFolder(pictures(tmp_path / "b", ["frame_1.png", "frame_01.png"]), 16)


def test_a_generic_clip_pairs_frames_by_number(tmp_path, caplog):
    shot = raw.film(num_frames=13)
    root = raw.write_generic_folder(tmp_path, shot)
    frames = root / "scene_one" / "frames"
    for t in range(13):
        (frames / f"{t:04d}.png").rename(frames / f"{t}.png")
    (clip,) = registry.iter_clips("generic", root, 13)
    np.testing.assert_array_equal(clip.frames, shot.frames)
    (frames / "12.png").rename(frames / "03.png")
    assert list(registry.iter_clips("generic", root, 13)) == [] and "in doubt" in caplog.text


def test_depth_pictures_in_an_archive_pair_by_number(tmp_path, caplog):

    root = raw.write_spatialvid(tmp_path, raw.film())
    (archive,) = root.glob("depths/*/*.zip")
    (before,) = registry.iter_clips("spatialvid", root, 9)
    with zipfile.ZipFile(archive) as old:
        contents = [old.read(name) for name in old.namelist()]
    for rename, same in ((lambda n: f"{n + 4}.exr", True), (lambda n: f"{n % 8}.exr" if n else "00.exr", False)):
        with zipfile.ZipFile(archive, "w") as new:
            for n, content in enumerate(contents):
                new.writestr(rename(n), content)
        after = list(registry.iter_clips("spatialvid", root, 9))
        assert torch.equal(after[0].depth.nan_to_num(), before.depth.nan_to_num()) if same else not after
    assert "in doubt" in caplog.text


def test_predictions_come_in_order(tmp_path):
    for n in range(12):
        np.save(tmp_path / f"frame_{n}.npy", np.full((4, 4), float(n)))
    prediction = read_prediction(tmp_path)
    assert prediction.depth is not None and prediction.depth[:, 0, 0].tolist() == list(range(12))
    np.save(tmp_path / "frame_03.npy", np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"'frame_3.npy'|'frame_03.npy'"):
        read_prediction(tmp_path)


def test_a_scene_is_read_back_in_order(tmp_path):
    scene = exact_scene()
    save_scene(tmp_path, scene)
    for n, path in enumerate(sorted((tmp_path / "frames").iterdir())):
        path.rename(path.with_name(f"{n + 7}.png"))  # the digits outgrow
    assert torch.equal(open_scene(tmp_path).frames, scene.frames)
    (tmp_path / "frames" / "7.png").rename(tmp_path / "frames" / "008.png")
    with pytest.raises(UserError, match="in doubt"):
        open_scene(tmp_path)


def test_sintel_is_read_in_order(tmp_path):
    for kind, suffix in (("final", "png"), ("depth", "dpt"), ("camdata_left", "cam")):
        folder = tmp_path / "training" / kind / "ambush_6"
        folder.mkdir(parents=True)
        for n in range(1, 21):
            path = folder / f"frame_{n}.{suffix}"
            Image.new("RGB", (8, 4), (n, n, n)).save(path) if suffix == "png" else path.touch()
    (sequence,) = open_benchmark("sintel", tmp_path, ("ambush_6",))
    assert sequence.read_frames()[:, 0, 0, 0].tolist() == list(range(1, 21))
    (folder / "frame_2.cam").rename(folder / "frame_03.cam")
    with pytest.raises(UserError, match="in doubt"):
        open_benchmark("sintel", tmp_path, ("ambush_6",))


def test_time_stamps_are_numbers(tmp_path):
    names = ["9.5.png", "10.25.png", "10.5.png", "1548266469.9.png", "1548266469.93139.png", "1548266470.png"]
    for name in [*names, "._9.5.png"]:
        (tmp_path / "rgb").mkdir(exist_ok=True)
        (tmp_path / "rgb" / name).touch()
    assert [file.path.name for file in list_files(tmp_path, "rgb")] == names
    (tmp_path / "rgb" / "10.50.png").touch()
    with pytest.raises(UserError, match="named after the same time"):
        list_files(tmp_path, "rgb")
