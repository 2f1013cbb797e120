"""Laws of the checks: sound clips pass, and each kind of damage is told by its own name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.check_shards import ClipCheck, check_clip, main
from data_prep.geometry_checks import check_geometry
from data_prep.write_shards import main as write_main
from one4d_pl.config import EMBEDDED_BASE, base_folder
from one4d_pl.data.shards import ShardSet, write_shards
from one4d_pl.models.encoder_files import open_vae
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Clip

CHEAP = ["--vae-clips", "0"]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [render_clip(seed, 9, 32, 48) for seed in range(30, 36)]


def flags(clip: Clip) -> str:
    return "; ".join(check_clip(clip, None).flags())


def test_sound_clips_are_not_flagged(clips):
    for clip in [*clips, *(render_clip(seed, 9, 32, 48, "real") for seed in range(4))]:
        check = check_clip(clip, None)
        assert check.flags() == [] and check.round_trip < 1e-4, check
    assert max(check_geometry(clip).static_error for clip in clips) < 1e-3  # exact cameras and depth


@pytest.mark.parametrize("factor", [1e4, 5000.0, 1000.0, 100.0, 39.4, 10.0, 0.04, 0.01, 1e-3, 1e-4])
def test_a_wrong_depth_constant_shows(clips, factor):
    told = [check_geometry(dataclasses.replace(clip, depth=clip.depth * factor)).depth_scale for clip in clips]
    told = [value for value in told if not math.isnan(value)]  # a camera that hardly moves cannot tell
    assert len(told) >= len(clips) // 2
    assert all(0.7 < value * factor < 1.5 for value in told), told
    true = [check_geometry(clip).depth_scale for clip in clips]
    assert all(math.isnan(value) or value == 1 for value in true)


def test_other_damage_is_told_by_name(clips):
    clip = clips[0]
    shaken = clip.cam2world.clone()
    shaken[4, :3, 3] += 5 * clip.depth[clip.valid].median()
    assert "camera jumps" in flags(dataclasses.replace(clip, cam2world=shaken))
    swapped = dataclasses.replace(clip, cam2world=torch.linalg.inv(clips[1].cam2world.double()).float())
    wrong = [dataclasses.replace(c, cam2world=torch.linalg.inv(c.cam2world.double()).float()) for c in clips]
    assert check_geometry(swapped).static_error > 3 * check_geometry(clip).static_error
    assert max(check_geometry(c).static_error for c in wrong) > 0.02  # world-to-camera read as camera-to-world
    few = dataclasses.replace(clip, valid=clip.valid & (torch.rand(clip.valid.shape) < 0.05))
    assert "valid: " in flags(few)


@pytest.mark.parametrize(("factor", "told"), [(100, "x0.01"), (1000, "x0.001"), (1e-3, "x1000")])
def test_a_whole_set_of_wrong_depth_is_said_and_listed_for_exclusion(clips, factor, told, tmp_path, capsys):
    scaled = [dataclasses.replace(clip, depth=clip.depth * factor) for clip in clips[:3]]
    write_shards([*scaled[:2], clips[3]], tmp_path / "set", samples_per_shard=2)
    assert main([str(tmp_path / "set"), *CHEAP]) == 0
    assert f"a constant of the source is wrong by about {told}" in capsys.readouterr().out
    listed = (tmp_path / "set/check/exclude.txt").read_text().splitlines()
    assert [line.split("  # ")[0] for line in listed] == [clip.key for clip in scaled[:2]]
    report = json.loads((tmp_path / "set/check/report.json").read_text())
    assert report["clips"] == 3 and set(report["flagged"]) == {clip.key for clip in scaled[:2]}
    assert Image.open(tmp_path / "set/check/clips.png").size[0] > 100
    # the list is taken by the writer
    toy = ["--source", "toy", "--seed", "30", "--count", "4", "--num-frames", "9", "--height", "16", "--width", "32"]
    exclude = ["--exclude", str(tmp_path / "set/check/exclude.txt"), "--out", str(tmp_path / "again")]
    assert write_main([*toy, *exclude]) == 0
    assert [e.key for e in ShardSet.open(tmp_path / "again").entries] == [clips[2].key, clips[3].key]


def test_a_clip_is_not_left_out_for_a_vae_that_few_clips_are_tried_with(clips, tmp_path):
    write_shards(clips[:2], tmp_path / "set", samples_per_shard=2)
    assert main([str(tmp_path / "set"), *CHEAP]) == 0
    (part,) = (tmp_path / "set/check/parts").iterdir()
    tree = json.loads(part.read_text())
    tree["clips"][1]["vae_error"] = 0.5
    part.write_text(json.dumps(tree))
    assert main([str(tmp_path / "set"), *CHEAP]) == 0
    assert list(json.loads((tmp_path / "set/check/report.json").read_text())["flagged"]) == [clips[1].key]
    assert (tmp_path / "set/check/exclude.txt").read_text() == ""


def test_damaged_shards_are_told_and_tasks_share_the_work(clips, tmp_path, capsys):
    folder = tmp_path / "set"
    shards = write_shards(clips[:4], folder, samples_per_shard=2)
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[shards.manifest.shards[1].samples[0].size // 2] ^= 255
    path.write_bytes(content)
    assert main([str(folder), *CHEAP, "--rank", "1", "--world", "2"]) == 0
    assert "the others are not" in capsys.readouterr().out and not (folder / "check/report.json").exists()
    assert main([str(folder), *CHEAP, "--rank", "0", "--world", "2"]) == 1
    report = json.loads((folder / "check/report.json").read_text())
    assert report["damaged_shards"] == ["shard-000001.tar"]
    assert "checksum" in str(report["flagged"][clips[2].key])


def test_pointmaps_go_through_the_shipped_vae(clips):
    vae = open_vae(base_folder(EMBEDDED_BASE))
    assert check_clip(clips[0], vae).vae_error < 0.1
    assert math.isnan(check_clip(clips[0], None).vae_error)


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_unreadable_clips_are_flagged_and_nan_is_no_flag():
    assert ClipCheck("a", "cut short").flags() == ["cannot be read: cut short"]
    assert ClipCheck("a", "").flags() == []


def test_the_report_names_no_file_outside_its_folder(clips, tmp_path: Path):
    write_shards(clips[:1], tmp_path / "set", samples_per_shard=1)
    assert main([str(tmp_path / "set"), *CHEAP, "--report", str(tmp_path / "report")]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"set", "report"}
    assert not (tmp_path / "set/check").exists()


def test_a_base_without_a_vae_is_refused_in_one_line_and_nothing_is_downloaded(clips, tmp_path, capsys):
    write_shards(clips[:1], tmp_path / "set", samples_per_shard=1)
    assert main([str(tmp_path / "set"), "--base", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere: no VAE there; --base takes a folder" in error and error.count("\n") == 1


def test_another_question_is_not_answered_by_an_older_check(clips, tmp_path):
    write_shards(clips[:1], tmp_path / "set", samples_per_shard=1)
    for asked, known in (("0", False), ("1", True)):  # without the VAE, then through the shipped one
        assert main([str(tmp_path / "set"), "--vae-clips", asked]) == 0
        (check,) = json.loads((tmp_path / "set/check/report.json").read_text())["checks"]
        assert (check["vae_error"] is not None) == known
