"""Ctrl-C: exit code 130, no traceback, no child, nothing half-written; in short here, at length in interrupts.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from one4d_pl.interrupts import INTERRUPTED
from tests.commands.interrupts import CASES, REPO, START, Inputs, environment, interrupt, trials

# Each at a moment of another kind: imports, opening a base, workers that start or work, files that are written.
MOMENTS = [
    ("generate", 0.3, True), ("generate over a scene", 4.0, True), ("view", 2.0, False), ("view --html", 2.5, True),
    ("export a scene", 2.0, True), ("evaluate", 5.0, True), ("cameras", 1.5, True), ("preflight", 1.0, True),
    ("demo", 2.5, True), ("nano", 3.0, False), ("stats", 0.2, True), ("check_shards", 1.5, True),
    ("write_shards", 3.5, False), ("fit", 2.0, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs.make(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(("name", "after", "group"), MOMENTS, ids=[name for name, *_ in MOMENTS])
def test_an_interrupted_command_leaves_no_word_no_child_and_no_half_file(inputs, tmp_path, name, after, group):
    outcome = interrupt(name, inputs, tmp_path / "out", after, group)
    assert not outcome.faults, outcome.faults
    assert outcome.took < 60  # it waits for nothing; a busy machine is slow


@pytest.mark.slow
def test_two_hundred_interrupts_at_random_moments():
    found = trials(200, seed=0)
    assert not [outcome for outcome in found if outcome.faults]
    assert sum(outcome.code == INTERRUPTED for outcome in found) > 100
    assert {outcome.name for outcome in found} == set(CASES)


def start(program: str, tmp_path: Path) -> subprocess.Popen[str]:
    """A process that watches for interrupts and then does what `program` says; it has said "ready" by now."""
    lines = "import sys, time\nfrom pathlib import Path\nfrom one4d_pl import interrupts\ninterrupts.watch()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", START, sys.executable, "-c", lines + program, str(tmp_path)],
        cwd=REPO, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


SWALLOWED = """
print("ready", flush=True)
while True:
    try:
        time.sleep(0.01)
    except BaseException:  # what other people's code does
        pass
"""
IN_A_FINALIZER = """
class Slow:
    def __del__(self):
        for _ in range(1000):
            time.sleep(0.001)
print("ready", flush=True)
while True:
    Slow()
"""
IN_C = """
import ctypes
print("ready", flush=True)
ctypes.CDLL(None).sleep(100)  # without Python's lock
"""
WRITING = """
from one4d_pl.files import whole_file, whole_folder
print("ready", flush=True)
while True:
    with whole_file(Path(sys.argv[1]) / "file") as staging:
        staging.write_text("whole")
    with whole_folder(Path(sys.argv[1]) / f"folder-{time.monotonic_ns()}") as staging:
        for number in range(50):
            (staging / str(number)).write_text("whole")
"""
AT_THE_END = """
import atexit
atexit.register(time.sleep, 100)
print("ready", flush=True)
"""


@pytest.mark.parametrize("program", [SWALLOWED, IN_A_FINALIZER, IN_C, WRITING, AT_THE_END])
def test_an_interrupt_ends_a_process_wherever_it_is(tmp_path, program):
    process = start(program, tmp_path)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (INTERRUPTED, "\ninterrupted\n")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    assert all(len(list(folder.iterdir())) == 50 for folder in tmp_path.glob("folder-*"))


def test_a_second_interrupt_does_not_wait_for_what_is_undone(tmp_path):
    program = (
        'with interrupts.at_interrupt(lambda: time.sleep(100)):\n    print("ready", flush=True)\n    time.sleep(100)\n'
    )
    process = start(program, tmp_path)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == INTERRUPTED


def test_a_section_is_finished_and_a_background_job_is_deaf(tmp_path):
    section = """
with interrupts.uninterrupted():
    print("ready", flush=True)
    time.sleep(0.6)
    Path(sys.argv[1], "finished").touch()
Path(sys.argv[1], "too much").touch()
"""
    process = start(section, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from one4d_pl import interrupts; "
    deaf += "interrupts.watch(); signal.raise_signal(signal.SIGINT); print('done')"
    done = subprocess.run([sys.executable, "-c", deaf], cwd=REPO, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "done\n")
