"""Laws of the conventions: nine frames tell each wrong one by name, and sound clips raise no alarm."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from data_prep.check_shards import check_clip, main
from data_prep.conventions import READINGS, believed_reading, compare_readings, consistency_of, verdict
from one4d_pl.data.shards import write_shards
from one4d_pl.geometry.se3 import se3_matrix, so3_exp
from one4d_pl.toy import world as toy_world
from one4d_pl.toy.render import Views
from one4d_pl.toy.things import CameraPath
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Clip
from tests.data_prep.mistakes import MISTAKES, part, with_the_cameras_of_neighbours

SCENES = (("hard", 0), ("hard", 2), ("clear", 0), ("clear", 2))


@pytest.fixture(scope="module")
def longer() -> list[Clip]:
    """Eleven frames: nine and a neighbour at each end."""
    return [render_clip(seed, 11, 48, 64, level=level) for level, seed in SCENES]


def believed(clip: Clip) -> str | None:
    return believed_reading(compare_readings(clip).margins)


def test_every_reading_has_a_mistake_that_it_undoes(longer):
    assert {*MISTAKES, *with_the_cameras_of_neighbours(longer[0], 1, 9)} == set(READINGS)


@pytest.mark.parametrize("reading", MISTAKES)
def test_nine_frames_tell_a_wrong_convention_by_its_name(longer, reading):
    for clip in longer:
        assert believed(MISTAKES[reading](part(clip, range(1, 10)))) == reading


def test_nine_frames_tell_the_camera_of_a_neighbour(longer):
    for clip in longer:
        for reading, mistaken in with_the_cameras_of_neighbours(clip, 1, 9).items():
            assert believed(mistaken) == reading


def test_exact_clips_are_confirmed_against_every_other_reading(longer):
    for clip in longer:
        found = compare_readings(part(clip, range(1, 10)))
        assert found.static_error < 1e-3
        # a sideways step of a clip hardly shows that rays were lengths, and the picture not at all
        assert {name for name in READINGS if verdict(found.margins[name]) >= 0} <= {"ray length"}
        assert all(found.margins[name][0] < -0.3 for name in READINGS)


def test_good_hand_held_clips_raise_no_alarm(monkeypatch):
    """A hand turns more than it travels, and depth is 1 % noisy."""
    views_at = toy_world.views_at
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shake = torch.from_numpy(rng.standard_normal((9, 6)).cumsum(0))
        motion = se3_matrix(so3_exp(0.01 * shake[:, :3]), 0.02 * shake[:, 3:])

        def held(path: CameraPath, times: np.ndarray, height: int, width: int, motion=motion) -> Views:
            still = views_at(path, np.zeros(9), height, width)
            cameras = (torch.from_numpy(still.cam2world) @ motion).numpy()
            return Views(still.intrinsics[: len(times)], cameras[: len(times)])

        monkeypatch.setattr(toy_world, "views_at", held)
        clip = render_clip(seed, 9, 48, 64)
        monkeypatch.undo()
        noise = torch.randn(clip.depth.shape, generator=torch.Generator().manual_seed(seed))
        noisy = dataclasses.replace(clip, depth=clip.depth * (1 + 0.01 * noise))
        for sound in (clip, noisy):
            assert check_clip(sound, None).flags() == [], seed


def test_pseudo_geometry_raises_no_alarm():
    for level in ("hard", "clear"):
        for seed in range(3):
            assert believed(render_clip(seed, 9, 48, 64, "real", level)) is None


def test_a_camera_that_stands_still_tells_nothing(longer):
    clip = part(longer[0], range(9))
    still = dataclasses.replace(clip, **{n: getattr(clip, n)[:1].repeat_interleave(9, 0) for n in
                                ("frames", "depth", "valid", "moving", "intrinsics", "cam2world")})  # fmt: skip
    margins = compare_readings(still).margins
    assert believed_reading(margins) is None and margins["cameras early"] == (0, 0)


def test_large_maps_are_thinned_out_where_their_pixels_are():
    """Every second or third pixel of a clip has that pixel's ray: the misfit stays that of an exact clip."""
    for width in (480, 960):
        clip = render_clip(0, 5, 16, width)
        assert compare_readings(clip).static_error < 1e-3


def test_a_set_of_a_wrong_convention_is_said_and_its_clips_listed(longer, tmp_path, capsys):
    wrong = [MISTAKES["ray length"](part(clip, range(1, 10))) for clip in longer[:2]]
    write_shards(wrong, tmp_path / "set", samples_per_shard=2)
    assert main([str(tmp_path / "set"), "--vae-clips", "0"]) == 0
    said = capsys.readouterr().out
    assert "the whole set: depth looks like ray length, not z (2 of 2 clips)" in said
    assert "depth looks like ray length, not z (misfit of depth -" in said
    report = json.loads((tmp_path / "set/check/report.json").read_text())
    assert report["conventions"]["ray length"]["against"] == 2
    assert report["conventions"]["world-to-camera"]["against"] == 0
    listed = (tmp_path / "set/check/exclude.txt").read_text().splitlines()
    assert Counter(line.split("  # ")[0] for line in listed) == Counter(clip.key for clip in wrong)


def test_consistency_is_one_where_frames_agree_and_falls_with_their_errors(longer):
    for clip in longer:
        sound = part(clip, range(1, 10))
        lost = 1 - consistency_of(sound)
        assert lost < 0.001
        noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (9, 1, 1))).float()
        shaken = dataclasses.replace(sound, depth=sound.depth * noise.exp())  # every frame 10 % off by itself
        assert 0.8 < consistency_of(shaken) < 0.95
        assert 1 - consistency_of(MISTAKES["world-to-camera"](sound)) > 10 * lost  # by how much, its motion decides
    one = part(longer[0], range(1, 2))
    assert consistency_of(one) is None
    assert consistency_of(dataclasses.replace(sound, valid=torch.zeros_like(sound.valid))) is None
