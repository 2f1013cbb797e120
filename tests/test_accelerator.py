"""No door falls from GPU to CPU in silence: a scale made for GPUs is refused in one line where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep import encode_latents
from one4d_pl import fit
from one4d_pl.commands import evaluate, generate, preflight
from one4d_pl.config import load_config, to_yaml
from one4d_pl.inference.pipeline import One4DPipeline
from tests.conftest import REPO

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

DOORS: dict[str, Callable[[str, Path], int]] = {
    "fit": lambda config, out: fit.main(["--config", config]),
    "preflight": lambda config, out: preflight.main(["--config", config]),
    "evaluate": lambda config, out: evaluate.main(["--config", config, "--out", str(out)]),
    "encode_latents": lambda config, out: encode_latents.main(["--config", config]),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_scale_made_for_gpus_does_not_start_on_a_cpu(door, run_config, tmp_path, capsys):
    config = run_config("train.accelerator=gpu", "scale=large")
    path = tmp_path / "large.yaml"
    path.write_text(to_yaml(config))
    before = torch.get_rng_state()
    assert DOORS[door](str(path), tmp_path / "out") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "train.accelerator" in line]
    assert len(said) == 1 and "large is made for GPUs" in said[0] and "train.accelerator=auto" in said[0]
    assert not (tmp_path / "out").exists() and not list(Path(config.run_dir).glob("config.yaml"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_scales_say_what_they_are_made_for():
    for scale, accelerator in (("tiny", "auto"), ("wan_1_3b", "gpu"), ("wan_14b", "gpu"), ("nodes_8x8", "gpu")):
        files = [str(REPO / f"configs/{name}.yaml") for name in ("dlc", f"scale/{scale}")]
        assert load_config(files, []).train.accelerator == accelerator


def test_a_large_base_is_not_sampled_on_a_cpu_unless_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate, "LARGEST_ON_CPU", 1e6)
    command = ["--prompt", "a ball", "--steps", "1", "--guidance", "1", "--out", str(tmp_path / "scene")]
    assert generate.main(command) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: --device: ") and "--device cpu" in said[0]
    opened = []
    monkeypatch.setattr(One4DPipeline, "from_pretrained", lambda *arguments: opened.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate.main([*command, "--device", "cpu"])
    assert len(opened) == 1
