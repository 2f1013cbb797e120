"""Laws of what a run asks of its machine: one line where it is not there, and no need of what the run does not use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from one4d_pl.commands import preflight
from one4d_pl.config import to_yaml
from one4d_pl.fit import fit
from one4d_pl.models import cuda_driver as driver_module
from one4d_pl.models.cuda_driver import driver_mismatch
from tests.conftest import REPO

HEADER = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: {} |"
NEWER_HEADER = "| NVIDIA-SMI 595.45    KMD Version: 595.45    CUDA UMD Version: {} |"
TRAININGS_S = 120


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A made-up nvidia-smi, first on PATH, and a torch for CUDA 13.0 that sees no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = tmp_path / "driver"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(script: str) -> None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvidia-smi").chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("header", "torch_cuda", "words"),
    [
        (HEADER.format("12.4"), "13.0", ["CUDA 12.4", "CUDA 13.0", "newer driver", "TORCH_INDEX", "cu126"]),
        (NEWER_HEADER.format("13.2"), "14.0", ["CUDA 13.2", "CUDA 14.0", "TORCH_INDEX", "cu130"]),
        (HEADER.format("11.8"), "12.6", ["CUDA 11.8", "CUDA 12.6", "newer driver", "no torch"]),
    ],
)
def test_an_older_driver_is_named_with_torch_and_the_index_that_fits(header, torch_cuda, words, driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    driver(f"echo '{header}'")
    line = driver_mismatch()
    assert line is not None and len(line.splitlines()) == 1
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    "script",
    [
        f"echo '{HEADER.format('13.0')}'",
        f"echo '{HEADER.format('N/A')}'",
        "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
        r"printf '\377\376'",
    ],
    ids=["new enough", "no version", "no driver", "no text"],
)
def test_where_the_driver_is_not_the_cause_nothing_is_said(script, driver):
    driver(script)
    assert driver_mismatch() is None


def test_without_nvidia_smi_nothing_is_said(driver, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_mismatch() is None
    (tmp_path / "nvidia-smi").touch(mode=0o644)  # PermissionError
    assert driver_mismatch() is None


def test_a_hanging_nvidia_smi_is_left(driver, monkeypatch):
    monkeypatch.setattr(driver_module, "NVIDIA_SMI_PATIENCE_S", 0.5)
    driver("exec sleep 60")
    began = time.monotonic()
    assert driver_mismatch() is None
    assert time.monotonic() - began < 20


def test_the_driver_is_not_asked_where_a_gpu_is_seen_or_hidden_on_purpose(driver, monkeypatch):
    driver(f"echo '{HEADER.format('12.4')}'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert driver_mismatch() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)  # a build without CUDA
    assert driver_mismatch() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert driver_mismatch() is None


def test_the_preflight_and_fit_both_name_an_old_driver(driver, run_config, fit_command, capsys, caplog):
    driver(f"echo '{HEADER.format('12.4')}'")
    overrides = ("train.max_steps=1", "val.every=1", "val.clips=1")
    assert preflight.main(fit_command(*overrides)[3:]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and told.startswith("error: ") and "cu126" in told
    assert fit(run_config(*overrides)) == 0  # on the CPU
    assert [record.levelname for record in caplog.records if "cu126" in record.getMessage()] == ["WARNING"]


def test_without_deepspeed_its_strategy_is_one_line_and_all_else_trains(tmp_path, run_config, fit_environment):
    """An environment as on macOS: everything installed but DeepSpeed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for installed in folder.iterdir():
            if not installed.name.startswith("deepspeed") and not (packages / installed.name).exists():
                (packages / installed.name).symlink_to(installed)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(run_config("train.save_every=1", "val.every=2", "val.clips=1")))
    script = """
import sys
from one4d_pl import fit
from one4d_pl.commands import preflight
config, zero = ["--config", sys.argv[1]], "train.strategy=deepspeed"
refused = [main([*config, zero]) for main in (fit.main, preflight.main)]
print(refused, [fit.main([*config, f"train.max_steps={steps}"]) for steps in (1, 2)])  # and resumed
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(resolved)],  # -S: no other packages
        capture_output=True, text=True, timeout=TRAININGS_S,
        env={**fit_environment, "PYTHONPATH": f"{REPO}{os.pathsep}{packages}"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["[2, 2] [0, 0]"], done.stderr[-3000:]
    refusals = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(refusals) == 2 and all("train.strategy" in line and "ddp" in line for line in refusals)


def test_zero_on_a_cpu_trains_where_numactl_may_not_be_run(tmp_path, fit_command, fit_environment):
    """As with a folder on PATH that the user may not read: starting numactl is a PermissionError, even for root."""
    (tmp_path / "numactl").touch(mode=0o644)
    zero = ("train.strategy=deepspeed", "train.zero_stage=3", "train.max_steps=1", "val.every=1", "val.clips=1")
    done = subprocess.run(
        fit_command(*zero), capture_output=True, text=True, timeout=TRAININGS_S,
        env={**fit_environment, "PATH": str(tmp_path), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
