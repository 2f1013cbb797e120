"""Runs that are asked to stop: saved at a step boundary, continued at the very next step, nobody left behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from one4d_pl.cluster.restarts import MARKER, STARTS, begin_start, forget_starts, note_end, write_marker
from one4d_pl.cluster.signals import INTERRUPTED, PREEMPTED, STOP, Stop
from one4d_pl.cluster.watchdog import rank_log_file
from one4d_pl.config import Config, ConfigError
from one4d_pl.data.ranged_reads import StoreError
from one4d_pl.errors import UserError
from one4d_pl.fit import fit, main
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.training.checkpoint import write_checkpoint
from one4d_pl.training.checkpoint_files import checkpoint_folder, newest_checkpoint, read_step
from one4d_pl.types import Encoded, Sample

STEPS = ("train.max_steps=16", "train.save_every=100", "val.every=100", "val.clips=2", "train.micro_batch_size=1")
DDP = (*STEPS, "train.strategy=ddp", "train.devices=2")


def losses(config: Config) -> dict[int, tuple[float, float]]:
    """Step -> (rgb, xyz) over all starts of a run; a step that two starts have logged must agree."""
    found: dict[int, tuple[float, float]] = {}
    for file in sorted((Path(config.run_dir) / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        if "train/loss/rgb" not in events.Tags()["scalars"]:
            continue  # stopped before its first step
        pairs = zip(events.Scalars("train/loss/rgb"), events.Scalars("train/loss/xyz"), strict=True)
        for rgb, xyz in pairs:
            assert rgb.step not in found, f"step {rgb.step} was made twice"
            found[rgb.step] = (rgb.value, xyz.value)
    return found


def logged_steps(config: Config) -> int:
    """The last step that rank 0 has logged, over all starts."""
    file = rank_log_file(config.run_dir, 0)
    said = re.findall(r"step (\d+)/", file.read_text()) if file.is_file() else []
    return int(said[-1]) if said else 0


class Run:
    """`fit` as a process of its own, and the ranks it starts."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(command, env=environment, stderr=log.open("w"), start_new_session=True)

    def ranks(self) -> list[int]:
        """Process ids of rank 0 and those it has started that are ranks too."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *(int(pid) for pid in children if "one4d_pl.fit" in _command_of(int(pid)))]

    def wait_until(self, true: object, seconds: float = 250) -> None:
        assert callable(true)
        began = time.monotonic()
        while not true():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() - began < seconds, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def end(self, seconds: float = 250) -> int:
        """The exit code, once every process of the run is gone (they share its session)."""
        code = self.process.wait(timeout=seconds)
        began = time.monotonic()
        while members := session_members(self.process.pid):
            assert time.monotonic() - began < 10, [_command_of(pid) for pid in members]
            time.sleep(0.05)
        return code


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def session_members(session: int) -> list[int]:
    """Living processes of a session, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def start(fit_command, fit_environment, tmp_path):
    """Starts `fit` with overrides; whatever is left of it is killed in the end."""
    runs: list[Run] = []

    def make(*overrides: str) -> Run:
        runs.append(Run(fit_command(*overrides), fit_environment, tmp_path / f"stderr{len(runs)}.txt"))
        return runs[-1]

    yield make
    for run in runs:
        for pid in session_members(run.process.pid):
            os.kill(pid, signal.SIGKILL)


def marker(config: Config) -> dict[str, object] | None:
    path = Path(config.run_dir) / MARKER
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.fixture
def undisturbed(run_config, tmp_path) -> dict[int, tuple[float, float]]:
    config = run_config(*STEPS, f"run_dir={tmp_path}/undisturbed")
    fit(config)
    return losses(config)


def test_a_signal_while_importing_is_remembered_and_obeyed_by_both_ranks(run_config, start):
    config = run_config(*DDP)
    run = start(*DDP)
    time.sleep(random.uniform(0.3, 4.0))  # python is up; torch and the second rank are not
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.end() == PREEMPTED, run.log.read_text()[-3000:]
    assert marker(config)["step"] == 0 and marker(config)["signal"] == "SIGUSR1"
    assert json.loads((Path(config.run_dir) / STARTS).read_text())["starts"] == 1


def test_a_signal_to_one_rank_stops_both_and_the_next_start_makes_the_very_next_step(run_config, start, undisturbed):
    config, chance = run_config(*DDP), random.Random()
    run, last = start(*DDP), chance.randint(1, 8)
    run.wait_until(lambda: logged_steps(config) >= last)
    os.kill(chance.choice(run.ranks()), chance.choice([signal.SIGUSR1, signal.SIGTERM]))
    assert run.end() == PREEMPTED, run.log.read_text()[-3000:]
    stopped_after = marker(config)["step"]
    assert last <= stopped_after < 16 and read_step(newest_checkpoint(config.run_dir)) == stopped_after
    assert not (Path(config.run_dir) / STARTS).exists()

    run = start(*DDP)
    assert run.end() == 0, run.log.read_text()[-3000:]
    assert marker(config) is None  # the start removed it
    made = losses(config)
    assert sorted(made) == list(range(1, 17)) and sorted(undisturbed) == sorted(made)
    for step, values in undisturbed.items():
        assert made[step] == pytest.approx(values, abs=1e-6), step


@pytest.mark.slow
def test_a_rank_that_is_signalled_in_its_first_moment_survives(run_config, start):
    config = run_config(*DDP)
    run = start(*DDP)
    run.wait_until(lambda: len(run.ranks()) == 2)
    os.kill(run.ranks()[1], signal.SIGTERM)  # its interpreter is hardly up
    assert run.end() == PREEMPTED, run.log.read_text()[-3000:]
    assert marker(config)["signal"] == "SIGTERM"


@pytest.mark.slow
def test_under_zero_a_signal_saves_and_the_next_start_makes_the_very_next_step(run_config, start, undisturbed):
    zero = (*DDP, "train.strategy=deepspeed", "train.zero_stage=3")
    config = run_config(*zero)
    run = start(*zero)
    run.wait_until(lambda: logged_steps(config) >= 2)
    os.kill(run.ranks()[1], signal.SIGUSR1)
    assert run.end() == PREEMPTED, run.log.read_text()[-3000:]
    run = start(*zero)
    assert run.end() == 0, run.log.read_text()[-3000:]
    made = losses(config)
    assert sorted(made) == sorted(undisturbed)
    for step, values in undisturbed.items():
        assert made[step] == pytest.approx(values, abs=1e-6), step


def test_a_signal_to_every_process_of_the_job_spares_the_loader_workers(run_config, start):
    long = (*STEPS, "train.max_steps=100000", "data.num_workers=1")
    config = run_config(*long)
    run = start(*long)
    run.wait_until(lambda: logged_steps(config) >= 2)
    assert len(session_members(run.process.pid)) > 2
    for pid in session_members(run.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert run.end() == PREEMPTED, run.log.read_text()[-3000:]
    assert read_step(newest_checkpoint(config.run_dir)) == marker(config)["step"] >= 2


@pytest.mark.slow
def test_killing_the_first_rank_ends_the_others(start):
    run = start(*DDP, "train.max_steps=100000")
    run.wait_until(lambda: len(run.ranks()) == 2)
    time.sleep(1.0)
    assert len(run.ranks()) == 2
    run.process.kill()
    assert run.end() == -signal.SIGKILL  # nobody is left in its session


@pytest.mark.slow
def test_from_the_keyboard_the_run_saves_and_leaves_no_marker(run_config, start):
    long = (*STEPS, "train.max_steps=100000")
    config = run_config(*long)
    run = start(*long)
    run.wait_until(lambda: logged_steps(config) >= 1)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == INTERRUPTED, run.log.read_text()[-3000:]
    assert newest_checkpoint(config.run_dir) is not None and marker(config) is None
    run = start(*long)
    time.sleep(1.0)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end(20) == INTERRUPTED, run.log.read_text()[-3000:]
    assert marker(config) is None and not (Path(config.run_dir) / STARTS).exists()


def own_shards(toy_root: Path, folder: Path) -> list[str]:
    """Overrides for a copy of eight training clips that nobody has encoded yet."""
    shutil.copytree(toy_root / "train_synthetic", folder / "raw", ignore=shutil.ignore_patterns("encoded*", ".*"))
    return [f"data.sources=[{{path: {folder / 'raw'}, weight: 1.0}}]"]


def encoded_clips(folder: Path) -> set[str]:
    """Records of finished clips of an encoding that is not whole yet."""
    return {
        str(path) for path in (folder / "raw").rglob("*.json") if ".staging" in path.parts and "plan" not in path.name
    }


def test_a_stop_is_obeyed_between_two_clips_that_are_encoded_and_none_is_lost(
    run_config, toy_root, tmp_path, monkeypatch
):
    config, stop = run_config(*own_shards(toy_root, tmp_path), "train.max_steps=1"), Stop()
    encoded: list[str] = []
    encode = FrozenSampleEncoder.encode_sample

    def encode_sample(encoder: FrozenSampleEncoder, sample: Sample) -> Encoded:
        encoded.append(sample.key)
        if len(encoded) == 3:
            stop.number = signal.SIGTERM
        return encode(encoder, sample)

    monkeypatch.setattr(FrozenSampleEncoder, "encode_sample", encode_sample)
    assert fit(config, stop) == PREEMPTED
    assert len(encoded) == 3 and marker(config)["step"] == 0 and marker(config)["signal"] == "SIGTERM"
    assert fit(config) == 0
    assert len(encoded) == len(set(encoded)) >= 8  # the second start has encoded the others alone


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_the_encoding_of_both(run_config, start, toy_root, tmp_path):
    slow = (*DDP, *own_shards(toy_root, tmp_path))
    config = run_config(*slow)
    run = start(*slow)
    run.wait_until(lambda: len(encoded_clips(tmp_path)) >= 1)
    os.kill(run.ranks()[1], signal.SIGTERM)
    assert run.end() == PREEMPTED, run.log.read_text()[-3000:]
    assert marker(config)["step"] == 0 and 1 <= len(encoded_clips(tmp_path)) < 8


def test_a_stop_is_obeyed_before_training_without_a_checkpoint_and_after_validation(run_config, monkeypatch):
    stop, config = Stop(), run_config("val.every=2", "train.save_every=100")
    stop.number = signal.SIGTERM
    assert fit(config, stop) == PREEMPTED
    assert newest_checkpoint(config.run_dir) is None and marker(config)["step"] == 0

    from one4d_pl.training.module import One4DModule

    stop, validate = Stop(), One4DModule.validation_step

    def validation_step(module: One4DModule, batch: object, batch_idx: int) -> None:
        if module.global_step:  # not the one before the first step
            stop.number = signal.SIGUSR1
        validate(module, batch, batch_idx)

    there: list[bool] = []

    def write_slowly(*arguments: object) -> None:
        time.sleep(0.5)
        write_checkpoint(*arguments)

    def write_marker_after(run_dir: str, step: int, number: int) -> None:
        there.append(checkpoint_folder(run_dir, step).is_dir())
        write_marker(run_dir, step, number)

    monkeypatch.setattr(One4DModule, "validation_step", validation_step)
    monkeypatch.setattr("one4d_pl.training.checkpoint.write_checkpoint", write_slowly)
    monkeypatch.setattr("one4d_pl.cluster.survival.write_marker", write_marker_after)
    assert fit(config, stop) == PREEMPTED
    assert there == [True]  # the marker promises a checkpoint
    assert read_step(newest_checkpoint(config.run_dir)) == marker(config)["step"] == 2


def test_starts_without_a_new_checkpoint_are_bounded(run_config, tmp_path, capsys, fit_command):
    run_dir = str(tmp_path / "run")
    for _ in range(3):
        begin_start(run_dir, 2)
        note_end(run_dir, "RuntimeError: the disk is full")
    with pytest.raises(ConfigError, match=r"started 3 times.*the disk is full.*train\.max_restarts"):
        begin_start(run_dir, 2)
    begin_start(run_dir, 0)  # no limit
    arguments = fit_command("train.max_restarts=2", "train.max_steps=2")[3:]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "restarts.json" in line
    forget_starts(run_dir)
    assert main(arguments) == 0
    assert not (Path(run_dir) / STARTS).exists()


def test_a_failure_counts_as_a_start_and_a_mistake_does_not(run_config, fit_command, monkeypatch, tmp_path):
    arguments = fit_command("train.max_steps=2")[3:]
    starts = tmp_path / "run" / STARTS
    monkeypatch.setattr(STOP, "training", False)  # as it is put back
    for error, training, code, counted in (
        (RuntimeError("broken"), True, 1, 1),
        (RuntimeError("again"), False, 1, 2),
        (StoreError("the store does not answer"), True, 1, 3),  # it may at the next start
        (UserError("a damaged file"), False, 2, 0),
        (UserError("a full disk"), True, 1, 1),
        (ConfigError("x"), True, 2, 0),
    ):

        def fail(config: Config, stop: Stop, error: Exception = error, training: bool = training) -> int:
            stop.training = training
            raise error

        monkeypatch.setattr("one4d_pl.fit.fit", fail)
        assert main(arguments) == code
        assert (json.loads(starts.read_text())["starts"] if starts.exists() else 0) == counted
    assert "again" in (tmp_path / "run" / "logs" / "rank-0000.log").read_text()
