"""`make bench-gpu` runs end to end at a toy size on a CPU; its figures are nobody's law."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import bench_gpu

REPO = Path(__file__).parents[2]
# what a bare machine lacks: everything that setup.cfg names but torch, diffusers and what diffusers itself needs
ABSENT = (
    "lightning", "pytorch_lightning", "deepspeed", "webdataset", "open3d", "omegaconf", "peft", "accelerate",
    "transformers", "torchmetrics", "tensorboard", "av", "ftfy", "scipy",
)  # fmt: skip


def test_it_needs_torch_diffusers_and_this_package_alone(tmp_path):
    code = (
        "import sys\n"
        f"for name in {ABSENT}: sys.modules[name] = None  # as if it were not installed\n"
        "from experiments.bench_gpu import main\n"
        f"sys.exit(main(['--tiny', '--steps', '1', '--warmup', '1', '--checkpointing', 'full', 'selective', 'none', "
        f"'--attention', 'native', '_native_math', '--out', {str(tmp_path / 'bench.json')!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "| tiny, full, native |" in run.stdout and "s/sample" in run.stdout and "median" in run.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["cases"]) == 6 and len(found["ceiling"]) == 4
    for case in found["cases"].values():
        assert case["seconds"] > 0 and case["planned_gib"] > 0
        assert case["loss"] == pytest.approx(4, abs=1)  # of two branches, noise and latents of variance 1


def test_what_does_not_fit_is_one_line(monkeypatch, capsys):
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB")

    monkeypatch.setattr(bench_gpu, "measure", full)
    assert bench_gpu.main(["--tiny"]) == 1
    assert "| tiny, full, native | out of memory: " in capsys.readouterr().out


def test_what_is_not_installed_is_one_line(capsys):
    assert bench_gpu.main(["--tiny", "--attention", "_flash_3"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "base.attention: _flash_3" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_would_work(capsys):
    assert bench_gpu.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_a_gpu_is_called_by_the_name_its_driver_gives(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU at {device}")
    assert bench_gpu.device_name(torch.device("cuda", 0)) == "the GPU at cuda:0"
