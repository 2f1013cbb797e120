"""Laws of linked data: what a link leads to is read like what lies there, once, and no circle of links is endless."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.sources import registry
from data_prep.units import benchmark_of
from tests.data_prep import raw_layouts as raw
from tests.data_prep.raw_layouts import film

WRITERS: dict[str, Callable[..., Path]] = {
    "bedlam": raw.write_bedlam,
    "generic": raw.write_generic_folder,
    "omniworld": raw.write_omniworld,
    "pointodyssey": raw.write_pointodyssey,
    "rgbd": raw.write_rgbd,
}


@pytest.fixture(scope="module")
def shot() -> raw.Shot:
    return film(height=32, width=48)


@pytest.mark.parametrize("source", WRITERS)
def test_scenes_behind_links_are_found_once(tmp_path, shot, source):
    elsewhere, root = tmp_path / "disk2", tmp_path / "raw"
    WRITERS[source](elsewhere / "more", shot)
    WRITERS[source](root / "here", shot)
    (inside,) = registry.list_units(source, root / "here")
    (root / "linked").symlink_to(elsewhere / "more")
    (root / "linked_again").symlink_to(elsewhere / "more")
    (root / "circle").symlink_to(root)
    (root / "here" / "back").symlink_to(root / "linked", target_is_directory=True)
    (root / "a_copy").symlink_to(root / "here")  # sorts before it: what is really there keeps its name
    (root / "nowhere").symlink_to(tmp_path / "gone")
    units = registry.list_units(source, root)
    assert len(units) == 2 and f"here/{inside}" in units
    clips = [clip for unit in units for clip in registry.iter_clips(source, root, 9, 1, units=[unit])]
    assert len({clip.key for clip in clips}) == 2


def test_a_root_of_links_alone_and_linked_units_are_read(tmp_path, shot):
    raw.write_pointodyssey(tmp_path / "disk2", shot)
    (unit,) = registry.list_units("pointodyssey", tmp_path / "disk2")
    root = tmp_path / "raw"
    root.mkdir()
    (root / "scene").symlink_to(tmp_path / "disk2" / unit)
    assert registry.list_units("pointodyssey", root) == ["scene"]
    (tmp_path / "link_to_root").symlink_to(root)
    assert len(list(registry.iter_clips("pointodyssey", tmp_path / "link_to_root", 9))) == 1


def test_linked_archives_are_one(tmp_path, shot):
    raw.write_generic_npz(tmp_path, shot)
    (tmp_path / "a link.npz").symlink_to(tmp_path / "scene one.npz")
    (tmp_path / "lost.npz").symlink_to(tmp_path / "gone.npz")
    assert registry.list_units("generic", tmp_path) == ["scene one.npz"]


def test_linked_videos_are_one(tmp_path, shot):
    raw.write_spatialvid(tmp_path, shot)
    (unit,) = registry.list_units("spatialvid", tmp_path)
    (tmp_path / "videos" / "group_0000").symlink_to(tmp_path / "videos" / "group_0001")
    group = unit.split("/")[0]
    (tmp_path / "videos" / group / "00000000.mp4").symlink_to(tmp_path / "videos" / f"{unit}.mp4")
    assert registry.list_units("spatialvid", tmp_path) == [unit]


def test_linked_files_of_a_unit_are_its_files(tmp_path, shot):
    root = raw.write_generic_folder(tmp_path / "raw", shot)
    scene = root / "scene_one"
    for path in [scene / "depth.npy", scene / "frames", scene / "clip.json"]:
        shutil.move(path, tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert len(list(registry.iter_clips("generic", root, 9))) == 1


def test_a_link_hides_no_benchmark_and_no_camera(tmp_path, shot):
    raw.write_rgbd(tmp_path / "disk2", shot, "rgbd_dataset_freiburg3_walking_xyz")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "seq1").symlink_to(tmp_path / "disk2" / "rgbd_dataset_freiburg3_walking_xyz")
    assert benchmark_of(str(tmp_path / "raw"), "seq1") == "tum-dynamics"
    assert len(list(registry.iter_clips("rgbd", tmp_path / "raw", 9, 1))) == 1
    (tmp_path / "disk2" / "rgbd_dataset_freiburg3_walking_xyz").rename(tmp_path / "disk2" / "seq17")
    (tmp_path / "raw" / "seq1").unlink()
    (tmp_path / "raw" / "freiburg3_a").symlink_to(tmp_path / "disk2" / "seq17")
    assert len(list(registry.iter_clips("rgbd", tmp_path / "raw", 9, 1))) == 1


def test_a_close_up_behind_a_link_stands_up_all_the_same(tmp_path, shot):
    name = "20221019_1_250_highbmihand_closeup_suburb_b"
    raw.write_bedlam(tmp_path / "disk2", shot, scene=name)
    (upright,) = registry.iter_clips("bedlam", tmp_path / "disk2", 9)
    (tmp_path / "disk2" / name).rename(tmp_path / "disk2" / "batch7")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).symlink_to(tmp_path / "disk2" / "batch7")
    (linked,) = registry.iter_clips("bedlam", tmp_path / "raw", 9)
    assert linked.frames.shape == upright.frames.shape and linked.frames.shape[1] > linked.frames.shape[2]
