"""Laws of the labelers' folders: look-alike in, shards out, and the geometry is the one that was filmed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.check_shards import check_clip
from data_prep.sources import registry
from data_prep.sources.labels import TOOLS
from data_prep.write_shards import main as write_main
from one4d_pl.data.shards import ShardSet
from one4d_pl.types import Clip
from tests.data_prep.label_layouts import WRITERS, write_da3, write_mapanything
from tests.data_prep.raw_layouts import FPS, Shot, film
from tests.data_prep.test_sources import check, only, worst_reprojection

HALF = 2**-11  # relative rounding of half floats


@pytest.fixture(scope="module")
def shot() -> Shot:
    """A shot with sky; one lens, since MegaSaM has one for all frames."""
    return film()


def read(tool: str, root: Path, shot: Shot) -> Clip:
    return only(tool, WRITERS[tool](root, shot))


@pytest.mark.parametrize("tool", TOOLS)
def test_a_labelled_shot_comes_back_as_it_was_filmed(tmp_path, shot, tool):
    clip = read(tool, tmp_path, shot)
    coarse = tool in ("vipe", "megasam")
    error = np.where(np.isinf(shot.depth), 0, shot.depth) * (HALF if coarse else 1e-5) + 1e-6
    error = 1e-4 if tool == "pi3" else error  # float32 points of one world
    check(clip, shot, depth_error=error, lossy=tool == "vipe", sky=False)
    assert clip.fps == FPS and clip.domain == "real" and clip.licence == TOOLS[tool].LICENCE
    assert clip.caption == ("" if tool == "vipe" else "toys")
    if tool == "monst3r":
        np.testing.assert_array_equal(clip.moving, shot.moving)


def test_a_zoom_is_seen_where_there_is_no_lens(tmp_path):
    shot = film(seed=4)
    assert shot.intrinsics[-1, 0, 0] > 1.1 * shot.intrinsics[0, 0, 0]
    assert worst_reprojection(read("pi3", tmp_path, shot), shot) <= 0.01


@pytest.mark.parametrize("tool", TOOLS)
def test_look_alike_in_shards_out(tmp_path, shot, tool):
    root = WRITERS[tool](tmp_path / "raw", shot)
    words = ["--source", tool, "--root", str(root), "--out", str(tmp_path / "shards"), "--num-frames", "9"]
    assert write_main([*words, "--height", "48", "--width", "64"]) == 0
    shards = ShardSet.open(tmp_path / "shards")
    clip = shards.read(0)
    assert len(shards) == 1 and shards.manifest.source == tool and shards.manifest.licence == TOOLS[tool].LICENCE
    assert worst_reprojection(clip, shot) <= 0.01
    assert shards.entries[0].consistency > 0.99  # what fit's data.min_consistency looks at


@pytest.mark.parametrize("write", [write_da3, write_mapanything])
def test_a_wrong_convention_is_flagged(tmp_path, write):
    """What `check_shards` says of sound labels, and of the same with their cameras the other way round."""
    tool = write.__name__.removeprefix("write_")
    shot = film(seed=0)
    sound, wrong = (only(tool, write(tmp_path / str(w), shot, wrong=w)) for w in (False, True))
    assert check_clip(sound, None).flags() == []
    assert any("world" in flag for flag in check_clip(wrong, None).flags())


def test_pixel_centres_are_counted_from_a_half(tmp_path, shot):
    """Without the half pixel the law above would not hold: cameras that turn see it."""
    clip = read("da3", tmp_path, shot)
    intrinsics = clip.intrinsics.clone()
    intrinsics[:, :2, 2] -= 0.5
    assert worst_reprojection(dataclasses.replace(clip, intrinsics=intrinsics), shot) > 0.1


def test_a_clip_json_says_rate_licence_and_caption(tmp_path, shot):
    root = write_da3(tmp_path, shot)
    said = {"fps": 30, "licence": "CC-BY-4.0 AND Apache-2.0", "caption": "a walk", "domain": "synthetic"}
    (root / "walk/clip.json").write_text(json.dumps(said))
    clip = only("da3", root)
    assert (clip.fps, clip.licence, clip.caption, clip.domain) == (30, said["licence"], "a walk", "synthetic")


def test_less_trusted_pixels_become_invalid(tmp_path, shot):
    clip = only("cut3r", WRITERS["cut3r"](tmp_path, shot), min_confidence=1.5)
    assert clip.valid.any()
    assert list(registry.iter_clips("cut3r", tmp_path, 9, min_confidence=2.5)) == []


def test_what_cannot_be_read_is_said_in_one_line(tmp_path, shot, caplog):
    def said(tool: str, root: Path) -> str:
        caplog.clear()
        assert list(registry.iter_clips(tool, root, 9)) == []
        (line,) = (record.getMessage() for record in caplog.records)
        return line

    root = write_da3(tmp_path / "a", shot)
    (root / "walk/clip.json").unlink()
    assert "Depth Anything 3 (Lin et al., 2025) keeps no frame rate; say it in" in said("da3", root)
    root = write_mapanything(tmp_path / "b", shot)  # MapAnything's file, read as Pi3's
    assert "no 'points' in it, need points, conf, camera_poses, images" in said("pi3", root)
    root = WRITERS["vipe"](tmp_path / "c", shot)
    (root / "vipe_results/intrinsics/walk_camera.txt").write_text("0: MEI\n")
    assert "not a pinhole camera" in said("vipe", root)


def test_clips_of_one_video_are_one_scene():
    for tool, units in {
        "da3": ("walk-f000000", "walk-f000081"),
        "vipe": ("walk-f000000/vipe_results/walk-f000000", "walk-f000081/vipe_results/walk-f000081"),
    }.items():
        scenes = {registry.scene_of(tool, unit) for unit in units}
        assert len(scenes) == 1 and registry.scene_of(tool, "walk-2") not in scenes


def test_several_clips_share_a_folder(tmp_path, shot):
    for name in ("a", "b"):
        WRITERS["vipe"](tmp_path / name, shot, name)
        for path in list((tmp_path / name / "vipe_results").rglob("*.*")):
            place = tmp_path / "both" / path.relative_to(tmp_path / name / "vipe_results")
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    assert registry.list_units("vipe", tmp_path / "both") == ["a", "b"]
    assert [clip.key for clip in registry.iter_clips("vipe", tmp_path / "both", 9)] == ["a-00000", "b-00000"]
