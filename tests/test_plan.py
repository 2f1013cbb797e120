"""Laws of the planner's door: fast, without torch, from a base or from what is known of it; and of the pre-flight's."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from one4d_pl.cluster import readiness
from one4d_pl.cluster.readiness import refuse_too_large
from one4d_pl.commands.plan import main, plan, plan_text
from one4d_pl.config import ConfigError, load_config
from one4d_pl.costs.memory import step_memory
from one4d_pl.models.base_files import ENCODER_PARAMETERS, ORIGINAL_MARK, encoder_sizes

REPO = Path(__file__).parents[1]
DLC = str(REPO / "configs/dlc.yaml")
PAPER = [DLC, str(REPO / "configs/scale/wan_14b.yaml"), str(REPO / "configs/data/one4d_mix.yaml")]
NODES = [*PAPER, str(REPO / "configs/scale/nodes_8x8.yaml")]


def test_the_plan_of_eight_nodes_says_all_that_it_promises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = plan(load_config(NODES, []), 64, "H200", 0.5)
    text = plan_text(run)
    parts = ["weights", "optimizer", "gradients", "checkpoints", "activations", "allowance"]
    said = ["685.0 LoRA / 250.7 control / 935.7", "18018 tokens", "legal: 64, 128, 192, 256", "fits H200"]
    for words in said + parts:
        assert words in text, words
    assert (run.global_batch, run.steps, run.accumulation, run.note) == (64, 2750, 1, "")
    flops = run.flops("full")
    assert run.seconds("full") == pytest.approx(flops.hardware / (0.5 * 989e12))
    ways = text[text.index("every way") :].splitlines()[3:]
    assert len(ways) == 21 and [line[0] for line in ways].count("*") == 1


def test_a_batch_that_the_gpus_cannot_make_is_planned_with_the_next_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = plan(load_config(PAPER, []), 64, "H100", 0.4)
    assert (run.global_batch, run.steps) == (64, 2750) and "32 cannot be made by 64 GPUs" in run.note
    exact = plan(load_config(PAPER, []), 8, "H100", 0.4)
    assert (exact.global_batch, exact.accumulation, exact.steps, exact.note) == (32, 4, 5500, "")


def test_the_base_that_is_there_is_planned_not_the_known_one(tiny_base, tmp_path):
    config = load_config([DLC], [f"base.path={tiny_base.path}"])
    run = plan(config, 1, "H100", 0.5)
    assert (run.shape.num_layers, run.shape.width) == (5, 24) and run.base == tiny_base.path
    assert (run.shape.image_dim is not None) == tiny_base.image_tokens
    encoders = tiny_base.encoders()
    counts, base_dim = encoder_sizes(Path(tiny_base.path))
    assert counts["vae"] == sum(p.numel() for p in encoders.vae.parameters()) and base_dim == 4
    assert counts["text_encoder"] == sum(p.numel() for p in encoders.text_encoder.parameters())
    folder = tmp_path / "Wan2.1-Fun-V1.1-14B-InP"  # in Wan's own layout, of another size than its name says
    folder.mkdir()
    (folder / ORIGINAL_MARK).touch()
    settings = {"model_type": "i2v", "dim": 256, "num_heads": 2, "num_layers": 3, "ffn_dim": 512, "freq_dim": 64}
    (folder / "config.json").write_text(json.dumps(settings | {"in_dim": 36, "out_dim": 16}))
    run = plan(load_config(PAPER, [f"base.path={folder}"]), 8, "H100", 0.5)
    assert (run.shape.num_layers, run.shape.image_dim) == (3, 1280)
    assert encoder_sizes(folder)[0] == ENCODER_PARAMETERS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base.path=weights/Unknown"], "weights/Unknown"),
        (["--gpus", "0"], "--gpus"),
        (["--hfu", "0"], "--hfu"),
        (["train.nothing=1"], "unknown key train.nothing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", DLC, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_it_takes_less_than_a_second_and_no_torch(tmp_path):
    code = (
        "import sys; from one4d_pl.commands.plan import main; "
        f"main([*sum([['--config', path] for path in {NODES!r}], []), '--gpus', '64', '--gpu', 'H200']); "
        "print(sorted({'torch', 'numpy', 'diffusers', 'lightning'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(REPO)}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("[]\n"), done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_pre_flight_refuses_what_cannot_fit(run_config, monkeypatch):
    config = run_config()
    refuse_too_large(config, "GPU", 80 * 2**30)
    with pytest.raises(ConfigError, match=r"a step needs \d\.\d GiB of a GPU, tiny GPU has 0\.5") as caught:
        refuse_too_large(config, "tiny GPU", 2**29)
    assert "\n" not in str(caught.value) and "one4d plan" in str(caught.value)
    properties = SimpleNamespace(name="tiny GPU", total_memory=2**29)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    readiness._check_memory(config)  # nothing on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="tiny GPU"):
        readiness._check_memory(config)


def test_the_plan_and_the_pre_flight_give_one_verdict(run_config):
    """On a GPU just large enough for what the planner counts, and on one that is a byte too small."""
    run = plan(run_config(), 1, "H100", 0.5)
    total = step_memory(run.shape, run.batch, run.layout).total
    refuse_too_large(run_config(), "GPU", math.ceil(total))
    with pytest.raises(ConfigError, match=f"a step needs {total / 2**30:.1f} GiB"):
        refuse_too_large(run_config(), "GPU", math.floor(total) - 1)


def test_the_8x8_preset_fits_80_gb(tmp_path, monkeypatch):
    """Raw shards or encoded ones: the encoders visit before the step."""
    monkeypatch.chdir(tmp_path)
    for gpu in ("H100", "A100-80GB", "H200"):
        assert f"fits {gpu}" in plan_text(plan(load_config(NODES, []), 64, gpu, 0.5))
    assert "DOES NOT FIT A100-40GB" in plan_text(plan(load_config(NODES, []), 64, "A100-40GB", 0.5))
