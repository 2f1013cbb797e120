"""The average of the trainables: what it is, where it is used, and that training does not notice it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from one4d_pl.commands import export
from one4d_pl.config import ConfigError, OptimConfig
from one4d_pl.fit import fit
from one4d_pl.training.checkpoint_files import checkpoint_folder
from tests.conftest import small_run_config
from tests.training.chaos import final_hashes
from tests.training.test_resume import curve_points

STEPS = 6
LINK = "links.0.xyz_to_rgb.weight"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, tiny_base_plain, toy_root):
    return small_run_config(tmp_path_factory.mktemp("config"), tiny_base_plain, toy_root)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, small_run):
    config = small_run(f"run_dir={tmp_path_factory.mktemp('averaged')}", "optim.ema_decay=0.3", "val.every=3",
                       "train.save_every=1", "train.keep_last=100")  # fmt: skip
    fit(config)
    return config


def weights(config, step: int) -> torch.Tensor:
    return load_file(checkpoint_folder(config.run_dir, step) / "weights.safetensors")[LINK]


def adapter(folder) -> torch.Tensor:
    return load_file(folder / "links.safetensors")[LINK.removeprefix("links.")]


def test_a_checkpoint_holds_the_average_of_the_weights_so_far(averaged):
    expected = torch.zeros_like(weights(averaged, 1))  # links start at zero
    for step in range(1, STEPS + 1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights(averaged, step)
        found = adapter(checkpoint_folder(averaged.run_dir, step))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
        assert not torch.equal(found, weights(averaged, step))


def test_training_goes_on_as_if_there_were_no_average(averaged, small_run, tmp_path):
    plain = small_run(f"run_dir={tmp_path}")
    fit(plain)
    assert torch.equal(adapter(checkpoint_folder(plain.run_dir, STEPS)), weights(averaged, STEPS))
    assert not (checkpoint_folder(plain.run_dir, STEPS) / "weights.safetensors").exists()


def test_a_resumed_average_is_bitwise_the_undisturbed_one(averaged, small_run, tmp_path):
    common = (f"run_dir={tmp_path}", "optim.ema_decay=0.3", "val.every=3")
    fit(small_run(*common, "train.max_steps=3"))
    resumed = small_run(*common)
    fit(resumed)
    assert final_hashes(resumed) == final_hashes(averaged)
    with pytest.raises(ConfigError, match=r"optim\.ema_decay"):
        fit(small_run(*common, "optim.ema_decay=0.2", "train.max_steps=8"))


def test_what_is_validated_and_exported_is_the_average(averaged, small_run, tmp_path):
    """A run that starts from the adapter of a checkpoint begins with the loss that the checkpoint was validated at."""
    folder = checkpoint_folder(averaged.run_dir, STEPS)
    started = small_run(f"run_dir={tmp_path}/started", f"train.init_from={folder}", "train.max_steps=1")
    fit(started)
    for modality in ("rgb", "xyz"):
        tag = f"val/loss/{modality}"
        last = curve_points(Path(averaged.run_dir), tag)[STEPS]
        assert curve_points(Path(started.run_dir), tag)[0] == pytest.approx(last, rel=1e-6)
    assert export.main([str(folder), "--out", str(tmp_path / "exported")]) == 0
    assert torch.equal(adapter(tmp_path / "exported"), adapter(folder))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_or_everything_is_refused(decay):
    with pytest.raises(ConfigError, match=r"optim\.ema_decay.*0 = off"):
        OptimConfig(ema_decay=decay)
