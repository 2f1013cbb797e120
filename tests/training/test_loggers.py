"""train.logger: the same curves wherever they go, and one curve however often the run was started."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from one4d_pl.cluster import readiness
from one4d_pl.config import Config, ConfigError
from one4d_pl.fit import fit, main
from one4d_pl.training.checkpoint_files import checkpoint_folder
from one4d_pl.training.loggers import ID_FILE


def csv_steps(config: Config, metric: str) -> list[int]:
    """The steps of one metric's values, in the file's order."""
    with (Path(config.run_dir) / "csv" / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row[metric]]


def test_a_resumed_run_goes_on_in_the_same_csv_without_a_step_twice(run_config) -> None:
    loggers = "train.logger=[tensorboard, csv]"
    config = run_config(loggers, "train.max_steps=4")
    assert fit(config) == 0
    assert csv_steps(config, "train/loss/rgb") == [1, 2, 3, 4]
    shutil.rmtree(checkpoint_folder(config.run_dir, 4))  # as if killed before it was written
    assert fit(run_config(loggers, "train.max_steps=6")) == 0
    assert csv_steps(config, "train/loss/rgb") == [1, 2, 3, 4, 5, 6]
    assert csv_steps(config, "train/time/step_s") == [1, 2, 3, 4, 5, 6]
    assert 0 in csv_steps(config, "val/loss/xyz")
    assert len(list((Path(config.run_dir) / "tensorboard").glob("events*"))) == 2


def test_a_logger_that_is_unknown_named_twice_or_not_installed_is_one_line(
    fit_command, run_config, monkeypatch, capsys
):
    for value, complaint in (("[csv, tensorbord]", "'tensorbord' is not one of"), ("[csv, csv]", "csv twice")):
        with pytest.raises(ConfigError, match=r"train\.logger") as caught:
            run_config(f"train.logger={value}")
        assert complaint in str(caught.value)
    find_spec = readiness.find_spec
    monkeypatch.setattr(readiness, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert main(fit_command("train.logger=[tensorboard, wandb]")[3:]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: train.logger: wandb is not installed; pip install wandb")


def test_wandb_has_one_run_however_often_it_is_started(run_config, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for max_steps in (2, 4):
        config = run_config("train.logger=[wandb, tensorboard]", f"train.max_steps={max_steps}")
        assert fit(config) == 0
        ids.append((Path(config.run_dir) / ID_FILE).read_text().strip())
    assert ids[0] == ids[1]
    runs = sorted((Path(config.run_dir) / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(ids[0]) for run in runs)  # one per start, of the same id
    assert all((run / f"run-{ids[0]}.wandb").stat().st_size > 1000 for run in runs)
