"""The shipped demo adapters: pointmaps follow the frames through the control links, and the frames stay as good.

Bounds are loose on purpose, eight clips are few; `one4d demo` prints the numbers of sixty-four.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from one4d_pl.commands import demo
from one4d_pl.config import DEMO_ADAPTERS, load_config
from one4d_pl.data.datamodule import VAL_SEED_OFFSET
from one4d_pl.evaluation.fit_quality import FitQuality, measure_fit
from one4d_pl.evaluation.toy_clips import render_samples
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.precision import uses_bfloat16

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def quality() -> FitQuality:
    config = load_config([str(CONFIG)], [])
    pipeline, base = One4DPipeline.open(config, DEMO_ADAPTERS), One4DPipeline.open(config, None)
    first = config.data.toy.seed + VAL_SEED_OFFSET
    clips = render_samples(config, range(first, first + 8), "held-out clips")
    training = render_samples(config, range(config.data.toy.seed, config.data.toy.seed + 32), "training clips")
    mean = torch.stack([clip.pointmap for clip in training]).mean(0)
    bfloat16 = uses_bfloat16(config, pipeline.device)
    return measure_fit(pipeline, base, clips, mean, demo._median_path(training), seed=0, bfloat16=bfloat16)


def test_pointmaps_follow_the_frames_through_the_links(quality):
    errors = {name: row["rel_error"] for name, row in quality.pointmaps.items()}
    assert errors["ceiling"] < errors["video"] < 0.7 * errors["constant"]
    assert errors["video_no_links"] > 1.3 * errors["video"]
    assert errors["video_other_clip"] > 1.05 * errors["video"]


def test_frames_cost_no_quality(quality):
    frames = quality.frames_db
    assert frames["video"]["given"] > frames["vae_round_trip"]["given"] - 3
    for task in ("sparse", "image"):
        assert frames[task]["hidden"] > frames[f"{task}_base_alone"]["hidden"] - 0.5


def test_a_bad_command_line_is_one_line(capsys, tmp_path):
    for arguments, word in (
        (["--clips", "1"], "--clips"),
        (["--adapters", str(tmp_path / "none")], "need an adapter"),
        (["data.toy=null"], "data.toy"),
        (["dlc.rank=8"], "rank"),
    ):
        assert demo.main(["--config", str(CONFIG), "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and word in error
    assert not (tmp_path / "out").exists()


def test_the_demo_leaves_what_it_promises(tmp_path, capsys):
    assert demo.main(["--config", str(CONFIG), "--clips", "2", "--out", str(tmp_path), "sampler.steps=2"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    for task in ("text", "image", "sparse", "video"):
        assert {f"{task}_0.png", f"{task}_0.mp4", f"{task}_0.ply", f"{task}_0_turntable.mp4"} <= names
    assert "metrics.json" in names and "captions.txt" in names
    assert "Look at" in capsys.readouterr().out
