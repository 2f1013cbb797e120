"""A loss or gradient that is not finite costs its step alone: weights, moments, counters stay, on every rank alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from one4d_pl.cluster.restarts import STARTS
from one4d_pl.config import Config, to_yaml
from one4d_pl.fit import fit, main
from one4d_pl.training.checkpoint_files import checkpoint_folder, newest_checkpoint, read_step
from one4d_pl.training.module import One4DModule
from one4d_pl.training.step_guard import MOST_IN_A_ROW
from one4d_pl.types import Batch
from tests.conftest import small_run_config
from tests.training.chaos import final_hashes
from tests.training.run_cases import at, to_nan
from tests.training.test_resume import curve
from tests.training.test_zero import FILES, ZERO, launch

EVERY_STEP = ("train.save_every=1", "train.keep_last=9", "val.every=100")
BATCH = 4  # of small_run_config: step n (from 1) takes positions 4 (n - 1) to 4 n - 1


def state(config: Config, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, moments included."""
    folder = checkpoint_folder(config.run_dir, step)
    return {f"{f}:{k}": t for f in (*FILES, "optimizer.safetensors") for k, t in load_file(folder / f).items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def skipped(config: Config, step: int) -> tuple[int, int]:
    """Total, and in a row, as a checkpoint notes them."""
    noted = json.loads((checkpoint_folder(config.run_dir, step) / "trainer.json").read_text())["skipped_steps"]
    return noted["total"], noted["in_a_row"]


def to_inf(noise: Tensor, rows: list[int]) -> None:
    noise[rows, 0, 0, 0, 0] = torch.inf


def poison_loss(monkeypatch: pytest.MonkeyPatch, positions: set[int]) -> None:
    """A loss is infinite, its gradient is not: a square overflows long before its derivative."""
    losses = One4DModule.losses

    def infinite(self: One4DModule, batch: Batch, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        rgb, xyz = losses(self, batch, sigma, noise)
        hit = torch.tensor([position in positions for position in batch.position.tolist()])
        return rgb + torch.where(hit, torch.inf, 0.0), xyz

    monkeypatch.setattr(One4DModule, "losses", infinite)


def poison_gradient(monkeypatch: pytest.MonkeyPatch, positions: set[int]) -> None:
    """The losses are finite, a gradient is not."""
    step = One4DModule.training_step

    def training_step(self: One4DModule, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        outputs = step(self, batch, batch_idx)
        if positions & set(batch.position.tolist()):
            outputs["loss"].register_hook(lambda gradient: gradient * torch.inf)
        return outputs

    monkeypatch.setattr(One4DModule, "training_step", training_step)


@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "gradient"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does(run_config, monkeypatch, caplog, kind, clip):
    """The third step's second micro batch of two: weights and moments after it are those before, bit for bit."""
    bad = 2 * BATCH + 3
    if kind in ("gradient", "overflow"):
        (poison_gradient if kind == "gradient" else poison_loss)(monkeypatch, {bad})
    else:
        monkeypatch.setattr(One4DModule, "draw_noise", at({bad}, {"nan": to_nan, "inf": to_inf}[kind]))
    config = run_config(*EVERY_STEP, "train.max_steps=4", f"optim.grad_clip={clip}", "val.clips=1")
    assert fit(config) == 0
    states = [state(config, step) for step in (1, 2, 3, 4)]
    assert equal(states[1], states[2])
    assert not equal(states[0], states[1]) and not equal(states[2], states[3])
    assert all(bool(tensor.isfinite().all()) for tensor in states[3].values())
    assert [skipped(config, step) for step in (2, 3, 4)] == [(0, 0), (1, 1), (1, 0)]
    assert curve(Path(config.run_dir), "train/skipped_steps") == [0, 0, 1, 1]
    (line,) = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert line.startswith("step 3 ") and (f"(position {bad})" in line) == (kind != "gradient")
    # the step's mean is that of its other samples
    assert all(loss == loss and loss < float("inf") for loss in curve(Path(config.run_dir), "train/loss/rgb"))


@pytest.mark.parametrize("first", [0, 2 * BATCH], ids=["the very first step", "the third step"])
def test_a_poisoned_run_that_is_stopped_and_resumed_is_bitwise_the_undisturbed_one(
    run_config, monkeypatch, tmp_path, first
):
    """AdamW's counters count the steps it made: its bias correction would tell else."""
    monkeypatch.setattr(One4DModule, "draw_noise", at({first}, to_nan))
    undisturbed = run_config(f"run_dir={tmp_path}/a")
    fit(undisturbed)
    for max_steps in (1, 2, 3, 4, 6):  # before, at and after the skipped step
        fit(run_config(f"run_dir={tmp_path}/b", f"train.max_steps={max_steps}"))
    resumed = run_config(f"run_dir={tmp_path}/b")
    assert final_hashes(undisturbed) == final_hashes(resumed)
    assert skipped(undisturbed, 6) == skipped(resumed, 6) == (1, 0)
    monkeypatch.undo()
    other = run_config(f"run_dir={tmp_path}/c")
    fit(other)
    assert final_hashes(other) != final_hashes(undisturbed)


def test_many_in_a_row_end_the_run_in_one_line_that_names_the_samples(fit_command, run_config, monkeypatch, capsys):
    """And a later start does not crawl on five steps at a time: the row goes on over starts."""
    first = 2 * BATCH
    bad = set(range(first, first + MOST_IN_A_ROW * BATCH, BATCH))  # one sample of each step
    monkeypatch.setattr(One4DModule, "draw_noise", at(bad, to_nan))
    overrides = (*EVERY_STEP, "train.max_steps=20")
    config = run_config(*overrides)
    for start in (1, 2):
        assert main(fit_command(*overrides)[3:]) == 1
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
        assert f"{MOST_IN_A_ROW} steps in a row, up to {2 + MOST_IN_A_ROW}," in line
        # the second start made the last of them alone
        assert all((f"(position {p})" in line) == (p in bad and (start == 1 or p == max(bad))) for p in range(40))
        newest = newest_checkpoint(config.run_dir)
        assert read_step(newest) == 1 + MOST_IN_A_ROW and equal(state(config, 2), state(config, 1 + MOST_IN_A_ROW))
    starts = json.loads((Path(config.run_dir) / STARTS).read_text())
    assert "in a row" in starts["last_end"]


def test_a_row_that_is_broken_ends_no_run(run_config, monkeypatch):
    bad = {BATCH * step for step in range(12) if (step + 1) % MOST_IN_A_ROW}
    monkeypatch.setattr(One4DModule, "draw_noise", at(bad, to_nan))
    config = run_config("train.max_steps=12", "train.save_every=100", "val.every=100")
    assert fit(config) == 0
    assert skipped(config, 12) == (len(bad), 2)


# --- with real engines

STEPS = 4
POISONED = "poison:0,11"  # the first sample of step 1 (rank 0), the last of step 3 (rank 1)
STRATEGIES = {
    "ddp": ("train.strategy=ddp",),
    "zero1": (*ZERO, "train.zero_stage=1"),
    "zero2": (*ZERO, "train.zero_stage=2", "optim.grad_clip=0"),
    "zero2-offload": (*ZERO, "train.zero_stage=2", "train.offload=true"),
    "zero3": (*ZERO, "train.zero_stage=3"),
}
RESUMED = ("zero2", "zero3")  # stopped after step 1, which was skipped


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_base_plain, toy_root) -> Callable[..., Config]:
    """Poisoned runs of every strategy, two micro batches on each of two ranks."""
    folder = tmp_path_factory.mktemp("guard")
    make = small_run_config(folder, tiny_base_plain, toy_root)
    words = [POISONED]

    def config(name: str, *overrides: str) -> Config:
        return make(f"run_dir={folder}/{name}", *EVERY_STEP, "train.micro_batch_size=1", "optim.lr=1e-3", *overrides)

    for name, overrides in STRATEGIES.items():
        for max_steps in (1, STEPS) if name in RESUMED else (STEPS,):
            steps = (f"train.max_steps={max_steps}", "train.devices=2", "val.clips=2")
            path = folder / f"{name}-{max_steps}.yaml"
            path.write_text(to_yaml(config(name, *overrides, *steps)))
            words.append(str(path))
    launch(2, folder, words)
    return config


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_skips_the_same_steps_as_one_process(two_ranks, monkeypatch, name):
    clip = "optim.grad_clip=0" if "optim.grad_clip=0" in STRATEGIES[name] else "optim.grad_clip=1"
    reference = two_ranks(f"one-{clip}", clip, f"train.max_steps={STEPS}")
    if newest_checkpoint(reference.run_dir) is None:
        monkeypatch.setattr(One4DModule, "draw_noise", at({0, 11}, to_nan))
        fit(reference)
    run = two_ranks(name)
    assert [skipped(run, step) for step in range(1, STEPS + 1)] == [(1, 1), (1, 0), (2, 1), (2, 0)]
    assert equal(state(run, 2), state(run, 3)) and not equal(state(run, 3), state(run, 4))
    expected = state(reference, STEPS)
    for key, tensor in state(run, STEPS).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=5e-5, msg=key)
    for step in (1, STEPS):
        assert all(bool(tensor.isfinite().all()) for tensor in state(run, step).values())
