"""The shipped demo adapters: pointmaps follow the frames through the control links, and the frames stay as good.

Bounds are loose on purpose, eight clips are few; `make eval` prints the numbers of sixty-four.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from one4d_pl.commands import demo, evaluate
from one4d_pl.config import DEMO_ADAPTERS, load_config
from one4d_pl.evaluation import toy_clips
from one4d_pl.evaluation.fit_quality import FitQuality, measure_fit
from one4d_pl.evaluation.measured import read_metrics
from one4d_pl.evaluation.toy_clips import HeldOut
from one4d_pl.inference.pipeline import One4DPipeline

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.fixture(scope="module", autouse=True)
def few_training_clips():
    """The mean pointmap of 32 clips is near enough, and rendered sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_clips, "TRAINING_CLIPS", 32)
        yield


@pytest.fixture(scope="module")
def quality() -> FitQuality:
    config = load_config([str(CONFIG)], [])
    pipeline, base = One4DPipeline.open(config, DEMO_ADAPTERS), One4DPipeline.open(config, None)
    held_out = HeldOut.render(config, 8)
    return measure_fit(pipeline, base, held_out, seed=0)


def test_pointmaps_follow_the_frames_through_the_links(quality):
    errors = {name: row["rel_error"] for name, row in quality.pointmaps.items()}
    assert errors["ceiling"] < errors["video"] < 0.6 * errors["mean_pointmap"]
    assert errors["video_no_links"] > 2 * errors["video"]
    assert errors["video_other_clip"] > 1.8 * errors["video"]


def test_frames_cost_no_quality(quality):
    frames = quality.frames_db
    assert frames["video"]["given"] > frames["vae_round_trip"]["given"] - 3
    for task in ("sparse", "image"):
        assert frames[task]["hidden"] > frames[f"{task}_base_alone"]["hidden"] - 0.5


def test_a_bad_command_line_is_one_line(capsys, tmp_path):
    for arguments, word in (
        (["--clips", "1"], "--clips"),
        (["--clips", "4", "--animate", "4"], "--animate: 4, need one of the held-out clips, 0 to 3"),
        (["--adapters", str(tmp_path / "none")], "need an adapter"),
        (["data.toy=null"], "data.toy"),
        (["dlc.rank=8"], "rank"),
    ):
        assert demo.main(["--config", str(CONFIG), "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and word in error
    assert not (tmp_path / "out").exists()


def test_the_demo_leaves_what_it_promises(tmp_path, capsys):
    arguments = ["--config", str(CONFIG), "--clips", "2", "--animate", "1", "--out", str(tmp_path), "sampler.steps=2"]
    assert demo.main(arguments) == 0
    names = {path.name for path in tmp_path.iterdir()}
    for task in ("text", "image", "sparse", "video"):
        assert {f"{task}_0.png", f"{task}_0.mp4", f"{task}_0.ply", f"{task}_0_turntable.mp4"} <= names
    assert {"animation.webp", "metrics.json", "tables.txt", "captions.txt"} <= names
    assert 50_000 < (tmp_path / "animation.webp").stat().st_size <= 2_000_000
    printed = capsys.readouterr().out
    assert "Look at" in printed and (tmp_path / "tables.txt").read_text() in printed
    assert "on 2 held-out clips" in printed and "goals met." in printed


def test_the_evaluation_judges_the_same_tasks_by_the_same_numbers(tmp_path, capsys):
    arguments = ["--bench", "tasks", "--config", str(CONFIG), "--clips", "2", "--out", str(tmp_path)]
    assert evaluate.main([*arguments, "data.toy.level=hard", "sampler.steps=2"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["clips"] == 2 and metrics["level"] == "hard"
    verdicts = {goal["verdict"] for goal in metrics["goals"]}
    assert verdicts <= {"met", "short", "not measured"} and "short" in verdicts  # trained on another level
    assert capsys.readouterr().out == (tmp_path / "tables.txt").read_text()
    measured = {f"{g['about']}: {g['what']}": g["value"] for g in metrics["goals"] if g["value"] is not None}
    assert read_metrics(tmp_path) == {"toy world hard, 2 clips": measured}
    assert evaluate.main([*arguments, "--clips", "1"]) == 2
    assert "--clips: 1, need 2 or more" in capsys.readouterr().err
