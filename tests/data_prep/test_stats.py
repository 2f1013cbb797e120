"""Laws of the statistics: they are the clips' own numbers; and of the array job's script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.stats import main, measure_latents, measure_set, spread
from one4d_pl.config import DataConfig
from one4d_pl.data.datamodule import video_sample_maker
from one4d_pl.data.encoded import cache_folder, encode_set, encoding_recipe
from one4d_pl.data.shards import ShardSet, write_shards
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Encoded, Sample

REPO = Path(__file__).parents[2]


class ChannelEncoder:
    """Latents whose statistics are known: frames have mean c in channel c, pointmaps -c, both std 2."""

    def encode_sample(self, sample: Sample) -> Encoded:
        signs = torch.tensor([2.0, -2.0]).repeat(8).view(1, 1, 1, 4, 4)
        mean = torch.arange(16.0).view(1, 16, 1, 1, 1) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
        return Encoded((mean + signs).expand(2, 16, 3, 4, 4), torch.ones(1, 4), None)

    def encode_prompts(self, prompts: list[str]) -> list[torch.Tensor]:
        return [torch.zeros(1, 4) for _ in prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "toy"
    raw = write_shards([render_clip(seed, 9, 32, 48) for seed in range(4)], path, samples_per_shard=2)
    config = DataConfig(num_frames=9, height=32, width=48)
    recipe = encoding_recipe("wan", 16, config)
    make = video_sample_maker(raw, config)
    assert encode_set(raw, cache_folder(str(path), recipe), recipe, 0, ChannelEncoder, make)
    return path


def test_the_numbers_are_those_of_the_clips(folder):
    stats = measure_set(str(folder), 10)
    clips = [ShardSet.open(folder).read(n) for n in range(4)]
    assert (stats.clips, stats.measured, stats.sizes) == (4, 4, ["9x32x48"])
    assert stats.hours == pytest.approx(4 * 9 / 12 / 3600) and stats.licence == "CC0-1.0"
    assert stats.valid_share == pytest.approx(sum(float(c.valid.float().mean()) for c in clips) / 4)
    assert stats.caption_words == sum(len(c.caption.split()) for c in clips) / 4 and stats.uncaptioned == 0
    assert 0 < stats.motion < 0.2 and 0 < stats.depth_near < stats.depth_far


def test_latents_are_measured_per_channel(folder):
    latents = measure_set(str(folder), 10).latents
    with torch.device("meta"):  # Lightning sets up models where the GPU is the default device
        assert measure_latents(str(folder), 10) == latents
    assert latents is not None and latents.clips == 4
    assert latents.rgb_mean == pytest.approx(list(range(16))) and latents.xyz_mean == pytest.approx(
        [-c for c in range(16)], abs=1e-9
    )
    assert latents.rgb_std == pytest.approx([2.0] * 16) and latents.xyz_std == pytest.approx([2.0] * 16)


@pytest.mark.parametrize(("length", "count", "expected"), [(5, 10, [0, 1, 2, 3, 4]), (11, 3, [0, 5, 10]), (7, 1, [0])])
def test_the_measured_clips_are_spread_evenly(length, count, expected):
    assert spread(length, count) == expected


def test_the_report_has_a_row_per_folder_and_domain_and_a_picture(folder, tmp_path, capsys):
    assert main([str(folder), str(folder), "--out", str(tmp_path), "--clips", "2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["folder", "source"] and sum(str(folder) in line for line in table[:3]) == 2
    assert "8" in table[3].split() and table[3].startswith("all")
    assert len(json.loads((tmp_path / "stats.json").read_text())) == 2
    assert Image.open(tmp_path / "stats.png").size[1] > 100
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def run_prep(cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "VENV": sys.prefix, **variables}
    command = ["bash", str(REPO / "slurm/prep.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_array_jobs_tasks_write_one_set(tmp_path):
    toy = ["--source", "toy", "--count", "3", "--num-frames", "9", "--height", "16", "--width", "32", "--out", "out"]
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "4"}
    first = run_prep(tmp_path, "write_shards", *toy, **array, SLURM_ARRAY_TASK_ID="5")
    assert first.returncode == 0 and "task 1 of 2 is done" in first.stdout, first.stderr
    second = run_prep(tmp_path, "write_shards", *toy, **array, SLURM_ARRAY_TASK_ID="4")
    assert second.returncode == 0 and "3 clips in 1 shards" in second.stdout, second.stderr
    assert len(ShardSet.open(tmp_path / "out")) == 3


def test_the_script_refuses_what_it_does_not_know_and_stops_at_its_limit(tmp_path):
    assert run_prep(tmp_path).returncode == 2 and run_prep(tmp_path, "rm").returncode == 2
    toy = ["--source", "toy", "--count", "300", "--num-frames", "81", "--out", "out"]
    stopped = run_prep(tmp_path, "write_shards", *toy, PREP_LIMIT="1s")
    assert stopped.returncode == 124 and "go on" in stopped.stderr
