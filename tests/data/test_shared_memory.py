"""Clips in flight must fit the shared memory: said before anything hangs, by the pre-flight and by fit."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from one4d_pl import fit
from one4d_pl.commands import preflight
from one4d_pl.config import ConfigError, load_config, to_yaml
from one4d_pl.data import shared_memory
from one4d_pl.data.shared_memory import BYTES_PER_PIXEL, PREFETCH, needed_bytes, refuse_small_shared_memory
from one4d_pl.training.strategy import training_data
from tests.conftest import REPO

NODES = ["dlc", "scale/wan_14b", "data/one4d_mix", "scale/nodes_8x8"]


def small(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shared_memory, "shutil", SimpleNamespace(disk_usage=lambda place: SimpleNamespace(free=free)))


def test_what_is_counted_of_a_clip_is_what_the_workers_send(run_config):
    config = run_config("train.micro_batch_size=2", "data.cache_latents=false")
    datamodule = training_data(config)
    batch = next(iter(datamodule.train_dataloader()))
    sent = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
    pixels = 2 * config.data.num_frames * config.data.height * config.data.width
    assert sent == pytest.approx(pixels * BYTES_PER_PIXEL, rel=0.05)


def test_eight_processes_with_eight_workers_need_60_gb_and_not_a_containers_64_mb(monkeypatch):
    config = load_config([str(REPO / f"configs/{name}.yaml") for name in NODES], [])
    monkeypatch.setattr(shared_memory, "trains_on_encoded", lambda config: False)
    clip = 81 * 352 * 624 * BYTES_PER_PIXEL
    assert needed_bytes(config) == 8 * clip * (8 * PREFETCH + 1) and 60e9 < needed_bytes(config) < 65e9
    small(monkeypatch, 64 * 2**20)
    with pytest.raises(ConfigError, match=r"data\.num_workers: 8 workers of 8 .*63 GB .* 0\.067 GB .*--shm-size=64g"):
        refuse_small_shared_memory(config)
    small(monkeypatch, 65 * 10**9)
    refuse_small_shared_memory(config)
    monkeypatch.setattr(shared_memory, "trains_on_encoded", lambda config: True)  # then a validation's alone
    assert needed_bytes(config) == 8 * clip


@pytest.mark.parametrize("door", [fit.main, preflight.main])
def test_too_little_is_one_line_and_exit_code_2_before_training(door, run_config, tmp_path, capsys, monkeypatch):
    small(monkeypatch, 2**16)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(run_config("data.num_workers=1")))
    assert door(["--config", str(path)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1 and "data.num_workers" in said[0] and "--shm-size" in said[0]
    refuse_small_shared_memory(run_config("data.num_workers=0"))  # nothing is sent


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root and unshare")
def test_a_small_mount_is_seen_as_it_is(fit_command, fit_environment):
    mount = 'mount --make-rprivate / && mount -t tmpfs -o size=64k none /dev/shm || exit 77; exec "$@"'
    command = ["unshare", "-m", "bash", "-c", mount, "fit", *fit_command("data.num_workers=1")]
    done = subprocess.run(command, env=fit_environment, capture_output=True, text=True, timeout=100)
    if done.returncode == 77:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 2, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("error: data.num_workers: ")]
