"""A run that hangs ends by itself, says where, and with its own exit code; one that moves is left alone."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import pytest

from one4d_pl.cluster.watchdog import HUNG, HangWatchdog, rank_log, rank_log_file
from one4d_pl.fit import fit, main

HANGS = """
import sys, threading, time
from one4d_pl.config import load_config
from one4d_pl.fit import main
from one4d_pl.training.module import One4DModule

def wait_for_a_rank_that_never_comes(module):
    if module.global_step == 2:
        threading.Event().wait()

def hang(step):
    def training_step(module, batch, batch_idx):
        wait_for_a_rank_that_never_comes(module)
        return step(module, batch, batch_idx)
    return training_step

One4DModule.training_step = hang(One4DModule.training_step)
sys.exit(main(sys.argv[1:]))
"""


def test_a_hung_run_writes_its_stacks_and_ends_with_its_own_exit_code(fit_command, fit_environment, tmp_path):
    arguments = fit_command("train.hang_minutes=0.2")[3:]
    result = subprocess.run(
        [sys.executable, "-c", HANGS, *arguments], env=fit_environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == HUNG, result.stderr[-3000:]
    file = rank_log_file(str(tmp_path / "run"), 0)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "rank 0" in line and "train.hang_minutes" in line and str(file) in line
    text = file.read_text()
    assert "wait_for_a_rank_that_never_comes" in text and "hang-watchdog" not in text.split("error")[0]
    assert "step 2/6" in text and "step 3/6" not in text


def test_signs_of_life_keep_it_quiet_and_a_stop_ends_it(tmp_path, monkeypatch, capsys):
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)
    watchdog = HangWatchdog(str(tmp_path), 3, timeout_s=0.4)
    watchdog.start()
    for _ in range(20):
        time.sleep(0.05)
        watchdog.beat()
    watchdog.stop()
    watchdog.join(5)
    assert not exits and not rank_log_file(str(tmp_path), 3).exists() and capsys.readouterr().err == ""


def test_a_late_sign_of_life_is_believed(tmp_path, monkeypatch):
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)
    watchdog = HangWatchdog(str(tmp_path), 3, timeout_s=2.0)
    watchdog.start()
    file = rank_log_file(str(tmp_path), 3)
    while not file.exists():
        time.sleep(0.01)
    watchdog.beat()
    time.sleep(0.55)  # the linger is over
    watchdog.stop()
    watchdog.join(5)
    assert not exits


def test_a_run_without_steps_for_long_but_with_validation_is_no_hang(run_config, monkeypatch):
    """Each pass of the validation counts: four clips at two noise levels take longer than the limit together."""
    exits: list[int] = []
    monkeypatch.setattr("one4d_pl.cluster.watchdog.os._exit", exits.append)
    from one4d_pl.training.module import One4DModule

    losses = One4DModule.losses

    def slow(module: One4DModule, *arguments: object) -> object:
        time.sleep(0.25)
        return losses(module, *arguments)

    monkeypatch.setattr(One4DModule, "losses", slow)
    fit(run_config("train.hang_minutes=0.02", "train.max_steps=1", "val.clips=4", "val.every=1"))
    assert not exits


def test_every_rank_logs_to_its_file_and_only_the_first_speaks(tmp_path, capsys):
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    try:
        for rank in (0, 1):
            root.handlers.clear()
            with rank_log(str(tmp_path), rank):
                logging.getLogger("one4d_pl").info("rank %d informs", rank)
                logging.getLogger("one4d_pl").warning("rank %d warns", rank)
    finally:
        root.handlers[:] = kept
        root.setLevel(level)
    for rank in (0, 1):
        text = rank_log_file(str(tmp_path), rank).read_text()
        assert f"rank {rank} informs" in text and f"rank {rank} warns" in text and "pid" in text.splitlines()[0]
    said = capsys.readouterr().err
    assert "rank 0 informs" in said and "rank 0 warns" in said
    assert "rank 1 informs" not in said and "rank 1 warns" in said


@pytest.mark.parametrize("minutes", ["-1", "nan", "inf"])
def test_hang_minutes_must_be_a_time(minutes, fit_command, capsys):
    assert main(fit_command(f"train.hang_minutes={minutes}")[3:]) == 2
    assert "train.hang_minutes" in capsys.readouterr().err
