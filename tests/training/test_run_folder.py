"""A run folder loses nothing: what was saved stays, what is not ours is left alone, two runs do not mix."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from one4d_pl.cluster.restarts import STARTS
from one4d_pl.commands import export
from one4d_pl.config import Config, ConfigError
from one4d_pl.fit import fit, main
from one4d_pl.training import run_lock
from one4d_pl.training.checkpoint_files import (
    checkpoint_folder,
    discard,
    discard_leftovers,
    find_fault,
    newest_checkpoint,
    read_scores,
    read_step,
    step_folders,
    superfluous,
    write_score,
)
from one4d_pl.training.run_lock import LOCK, sole_run
from tests.conftest import REPO
from tests.training.chaos import final_hashes


def make_checkpoint(run_dir: Path, step: int, name: str | None = None) -> Path:
    """What `find_fault` looks at of a checkpoint."""
    folder = checkpoint_folder(str(run_dir), step)
    folder = folder if name is None else folder.with_name(name)
    (folder / "rgb").mkdir(parents=True)
    files = {"links.safetensors": b"l" * 9, "rgb/adapter_model.safetensors": str(step).encode()}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    (folder / "trainer.json").write_text(json.dumps({"step": step, "config": {}, "sha256": hashes}))
    return folder


def names(run_dir: str | Path) -> list[str]:
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


# --- a fresh start in a used folder


@pytest.mark.parametrize("damage", [None, "cut", "renamed"])
def test_a_fresh_start_in_a_used_folder_is_refused_and_nothing_is_lost(tmp_path, damage):
    newest = [make_checkpoint(tmp_path, step) for step in (4, 6)][-1]
    if damage == "cut":
        (newest / "trainer.json").write_text("{")
    elif damage == "renamed":
        newest.rename(newest.with_name("step-00000100"))
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=r"run_dir: .* holds checkpoints up to step 6.*train\.resume=false"):
        fit(Config(run_dir=str(tmp_path), train=Config().train.__class__(resume=False)))
    assert names(tmp_path) == before


def test_a_fresh_start_in_an_unused_folder_is_none_of_that(run_config, tmp_path):
    config = run_config("train.max_steps=2", "train.resume=false")
    (Path(config.run_dir) / "checkpoints" / "step-00000009_good").mkdir(parents=True)
    assert fit(config) == 0
    assert read_step(newest_checkpoint(config.run_dir)) == 2


@pytest.mark.parametrize(
    ("there", "saved", "keep", "gone"),
    [
        ((4, 6, 2), 2, (2, 0), []),  # later ones are what resume passed over
        ((4, 6, 2, 3), 3, (1, 0), [2]),
        ((100, 102, 4), 4, (1, 1), []),
        ((100, 102, 104), 104, (2, 0), [100]),
        ((100, 102, 104), 104, (1, 1), [102]),  # 100 is the best
    ],
)
def test_what_was_just_saved_is_never_the_one_to_go(tmp_path, there, saved, keep, gone):
    for step in there:
        make_checkpoint(tmp_path, step)
    for step, loss in ((100, 0.1), (102, 0.2), (104, 0.3)):
        write_score(str(tmp_path), step, loss)
    found = [read_step(folder) for folder in superfluous(str(tmp_path), *keep, saved)]
    assert found == gone and saved not in found


def test_a_score_that_is_not_finite_is_no_best(tmp_path):
    for step, loss in ((2, 0.5), (4, float("nan")), (6, float("-inf"))):
        make_checkpoint(tmp_path, step)
        write_score(str(tmp_path), step, loss)
    assert read_scores(str(tmp_path)) == {"2": 0.5}
    assert [read_step(f) for f in superfluous(str(tmp_path), 1, 1, 6)] == [4]
    (tmp_path / "checkpoints" / "validation.json").write_text('["no scores"]')
    assert read_scores(str(tmp_path)) == {}


# --- foreign files and folders


FOREIGN: dict[str, Callable[[Path], object]] = {
    "finder": lambda folder: (folder / ".DS_Store").write_bytes(b"x"),
    "upload": lambda folder: (folder / ".cache" / "huggingface").mkdir(parents=True),
    "editor": lambda folder: (folder / "rgb" / ".card.json.swp").write_bytes(b"x"),
    "nfs": lambda folder: (folder / ".nfs000000000012").write_bytes(b"x"),
    "dangling": lambda folder: (folder / "latest").symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_a_checkpoint_does_not_list_are_no_damage(tmp_path, kind, caplog):
    folder = make_checkpoint(tmp_path, 4)
    FOREIGN[kind](folder)
    assert newest_checkpoint(str(tmp_path)) == folder and not caplog.records


NOT_OURS = ("step-00000004_good", "step-4", "step-00000004.bak", "step-000000004", "old", "step-00000004 (copy)")


@pytest.mark.parametrize("name", NOT_OURS)
def test_folders_of_other_names_are_neither_read_nor_deleted(tmp_path, name):
    sound = make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4).rename(sound.with_name(name))
    (sound.parent / "step-00000008").write_text("a file is no checkpoint")
    (sound.parent / ".step-00000004.tmp.zip").write_text("nor a leftover of ours")
    assert step_folders(str(tmp_path)) == [sound]
    assert superfluous(str(tmp_path), 1, 0, 2) == []
    discard_leftovers(sound.parent)
    assert {name, ".step-00000004.tmp.zip", "step-00000008"} <= set(names(tmp_path))


def test_training_goes_on_beside_backups_and_foreign_files(run_config):
    """The whole way, with a copy of a checkpoint and a stray file in the newest; keep_last still holds."""
    fit(run_config("train.max_steps=4"))
    config = run_config("train.max_steps=8", "train.keep_last=1", "train.keep_best=0")
    newest = checkpoint_folder(config.run_dir, 4)
    shutil.copytree(newest, newest.with_name("step-00000004_good"))
    backup = final_hashes(run_config("train.max_steps=4"))
    (newest / ".DS_Store").write_bytes(b"x")
    assert fit(config) == 0
    assert set(names(config.run_dir)) - {"validation.json"} == {"step-00000004_good", "step-00000008"}
    assert json.loads((newest.with_name("step-00000004_good") / "trainer.json").read_text())["sha256"] == backup


# --- damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: (folder / "links.safetensors").write_bytes(b"m" * 9),
    "a missing file": lambda folder: (folder / "rgb" / "adapter_model.safetensors").unlink(),
    "a cut list": lambda folder: (folder / "trainer.json").write_text('{"step": 6'),
    "a list of nothing": lambda folder: (folder / "trainer.json").write_text('{"step": 6, "config": {}, "sha256": {}}'),
    "no list": lambda folder: (folder / "trainer.json").unlink(),
    "a list that is none": lambda folder: (folder / "trainer.json").write_text("[]"),
    "a folder in a file's place": lambda folder: [
        (folder / "links.safetensors").unlink(),
        (folder / "links.safetensors").mkdir(),
    ],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_end_in_one_line(tmp_path, kind, caplog):
    older, newest = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 6)
    DAMAGE[kind](newest)
    assert newest_checkpoint(str(tmp_path)) == older and "step-00000006 is damaged" in caplog.text
    DAMAGE[kind](older)
    with pytest.raises(ConfigError, match=r"run_dir: every checkpoint in .*step-00000006.*step-00000004") as caught:
        newest_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_checkpoints_that_cannot_be_reached_are_no_reason_to_start_at_0(tmp_path):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step-00000006").symlink_to("/nowhere/step-00000006")  # on a disk not mounted
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoints").symlink_to("/nowhere/checkpoints")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoints").write_text("a file")
    for name, words in (("a", "every checkpoint"), ("b", "cannot be read"), ("c", "cannot be read")):
        with pytest.raises(ConfigError, match=f"run_dir: .*{words}"):
            newest_checkpoint(str(tmp_path / name))
    assert newest_checkpoint(str(tmp_path / "d")) is None


def test_a_start_over_damaged_checkpoints_ends_with_code_2_and_leaves_them(fit_command, tmp_path, capsys):
    for step in (100, 102):
        (make_checkpoint(tmp_path / "run", step) / "links.safetensors").write_bytes(b"other")
    assert main(fit_command("train.max_steps=200")[3:]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "step-00000102" in line and "links.safetensors is not the file that was written" in line
    assert names(tmp_path / "run") == ["step-00000100", "step-00000102"]
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "x")]) == 2


def test_a_checkpoint_counts_by_the_step_it_holds_whatever_it_is_called_now(run_config):
    """Two old checkpoints renamed to later steps: training goes on from what they hold, and never again from there."""
    fit(run_config("train.max_steps=4"))
    config = run_config("train.max_steps=6", "train.keep_last=1", "train.keep_best=0")
    for step, later in ((2, 100), (4, 102)):
        folder = checkpoint_folder(config.run_dir, step)
        folder.rename(folder.with_name(f"step-{later:08d}"))
    assert read_step(newest_checkpoint(config.run_dir)) == 4
    fit(config)
    assert newest_checkpoint(config.run_dir) == checkpoint_folder(config.run_dir, 6)


def test_ranks_that_see_different_checkpoints_do_not_train_together(fit_command, run_config, monkeypatch, capsys):
    """Each would take another step's data and wait in another collective than the rest."""
    fit(run_config("train.max_steps=2"))
    monkeypatch.setattr("one4d_pl.training.checkpoint.gather", lambda mine: [mine, 0])
    assert main(fit_command("train.max_steps=4")[3:]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "rank 0 goes on from step 2, rank 1 from step 0" in line


# --- what cannot be deleted


def test_what_cannot_be_deleted_is_a_warning_and_tried_again(tmp_path, caplog, monkeypatch):
    """EBUSY of a reader on another node (NFS), for a checkpoint and for what a killed process left."""
    checkpoints = tmp_path / "checkpoints"

    def busy(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr("shutil.rmtree", busy)
    discard(make_checkpoint(tmp_path, 2))
    assert "Device or resource busy" in caplog.text and "after the next save" in caplog.text
    make_checkpoint(tmp_path, 4, ".step-00000004.tmp")
    make_checkpoint(tmp_path, 6)
    discard_leftovers(checkpoints)
    assert names(tmp_path) == [".step-00000004.tmp", "step-00000002", "step-00000006"] and len(caplog.records) == 2
    monkeypatch.undo()
    discard_leftovers(checkpoints)
    (old,) = superfluous(str(tmp_path), 1, 0, 6)
    discard(old)
    assert names(tmp_path) == ["step-00000006"]

    monkeypatch.setattr(Path, "rename", busy)
    caplog.clear()
    discard(checkpoints / "step-00000006")
    assert find_fault(checkpoints / "step-00000006") is None and "cannot be moved aside" in caplog.text


def test_a_checkpoint_that_was_moved_elsewhere_loses_its_link_alone(tmp_path):
    target = make_checkpoint(tmp_path / "elsewhere", 4)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000004").symlink_to(target)
    discard(tmp_path / "checkpoints" / "step-00000004")
    assert names(tmp_path) == [] and find_fault(target) is None


def immutable(path: Path, on: bool) -> bool:
    """chattr +i, as root on a file system that knows it."""
    return (
        shutil.which("chattr") is not None
        and not subprocess.run(["chattr", "+i" if on else "-i", str(path)], capture_output=True, timeout=10).returncode
    )


@pytest.mark.parametrize("inner", ["links.safetensors", "rgb", "."])
def test_training_goes_on_though_an_old_checkpoint_cannot_be_deleted(run_config, inner, caplog):
    fit(run_config("train.max_steps=2"))
    config = run_config("train.keep_last=1", "train.keep_best=0")
    kept = checkpoint_folder(config.run_dir, 2) / inner
    if not immutable(kept, True):
        pytest.skip("no chattr +i here")
    try:
        assert fit(config) == 0
        assert read_step(newest_checkpoint(config.run_dir)) == 6 and "Operation not permitted" in caplog.text
        assert kept.exists()  # where it was, for whoever mends it
    finally:
        immutable(kept, False)
    assert fit(run_config("train.max_steps=8", "train.keep_last=1", "train.keep_best=0")) == 0
    assert names(config.run_dir) == ["step-00000008", "validation.json"]


def test_a_damaged_checkpoint_that_cannot_be_deleted_is_replaced(run_config, caplog):
    config = run_config("train.save_every=3")
    fit(config)
    expected, newest = final_hashes(config), checkpoint_folder(config.run_dir, 6)
    (newest / "links.safetensors").write_bytes(b"")
    if not immutable(newest / "links.safetensors", True):
        pytest.skip("no chattr +i here")
    try:
        assert fit(config) == 0
        assert find_fault(newest) is None and final_hashes(config) == expected
        assert "Operation not permitted" in caplog.text
    finally:
        for left in newest.parent.glob(".step-*/links.safetensors"):
            immutable(left, False)


def test_a_save_that_fails_leaves_no_rest_and_the_old_checkpoints(run_config, monkeypatch):
    """A disk that is full: the partial one gives its room back, what was saved before is whole."""
    fit(run_config("train.max_steps=2"))
    config = run_config()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("one4d_pl.training.checkpoint.settle", full)
    with pytest.raises(OSError, match="No space left"):
        fit(config)
    monkeypatch.undo()
    assert [n for n in names(config.run_dir) if n != "validation.json"] == ["step-00000002"]
    assert fit(config) == 0 and read_step(newest_checkpoint(config.run_dir)) == 6


# --- two runs in one folder

HOLDER = """
import sys, time
from one4d_pl.training.run_lock import sole_run
with sole_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(timeout=30)


def test_a_second_run_in_the_folder_ends_in_one_line_that_names_the_first(
    holder, fit_command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.5)
    starts = tmp_path / "run" / STARTS
    starts.write_text('{"starts": 1, "last_end": ""}')
    for overrides in ((), ("train.seed=1",), ("train.resume=false",)):
        assert main(fit_command("train.max_steps=2", *overrides)[3:]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: run_dir: process {holder.pid} of {socket.gethostname()} is training in ")
    assert json.loads(starts.read_text())["starts"] == 1  # the first one's count is not ours to change


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], ids=["KILL", "TERM", "STOP"])
def test_the_lock_lives_exactly_as_long_as_its_process(holder, tmp_path, monkeypatch, number):
    """So a requeue after a SIGKILL starts at once; a process that only sleeps may wake and write."""
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.5)
    os.kill(holder.pid, number)
    if number == signal.SIGSTOP:
        with pytest.raises(ConfigError, match=f"process {holder.pid} "), sole_run(str(tmp_path / "run")):
            pass
        return
    holder.wait(timeout=30)
    for _ in range(2):  # and it is given back at the end
        with sole_run(str(tmp_path / "run")):
            assert (tmp_path / "run" / LOCK).read_text() == f"process {os.getpid()} of {socket.gethostname()}"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog, code):
    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_run(str(tmp_path)), caplog.at_level(logging.WARNING):
        assert "no file locks" in caplog.text and str(tmp_path) in caplog.text


def test_another_nodes_lock_is_waited_for_and_a_folder_that_cannot_be_is_one_line(
    holder, tmp_path, monkeypatch, caplog
):
    """A file server frees what a lost node held after a while: a requeue must not end there for good."""
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.1)
    (tmp_path / "run" / LOCK).write_text("process 7 of node0042")
    holder.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    monkeypatch.setattr(run_lock, "PATIENCE_ELSEWHERE_S", 1.0)
    with pytest.raises(ConfigError, match="process 7 of node0042 is training"), sole_run(str(tmp_path / "run")):
        pass
    assert time.monotonic() - began > 1 and "waiting" in caplog.text
    monkeypatch.setattr(run_lock, "PATIENCE_ELSEWHERE_S", 60.0)
    holder.kill()
    with sole_run(str(tmp_path / "run")):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_dir: cannot write to"), sole_run(str(tmp_path / "file" / "run")):
        pass
