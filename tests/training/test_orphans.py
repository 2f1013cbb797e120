"""Nothing of ours outlives the process that asked for it, and a pipe that reads its output ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from one4d_pl.config import Config
from tests.cluster.test_restarts import STEPS, logged_steps, session_members

PATIENCE_S = 10.0  # after the death of the first process
LONG = (*STEPS, "train.max_steps=100000", "data.num_workers=2")


class Piped:
    """`command | cat`, each in a session of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        assert self.process.stdout is not None
        self.cat = subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=subprocess.DEVNULL)
        self.process.stdout.close()

    def wait_until(self, true: Callable[[], bool], seconds: float = 250) -> None:
        began = time.monotonic()
        while not true():
            assert self.process.poll() is None and time.monotonic() - began < seconds, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def members(self) -> list[int]:
        return session_members(self.process.pid)

    def assert_all_gone(self) -> None:
        """Within PATIENCE_S nobody of its session is left, and `cat` has read to the end."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, [Path(f"/proc/{pid}/cmdline").read_text() for pid in self.members()]
        self.cat.wait(timeout=max(1.0, deadline - time.monotonic()))

    def close(self) -> None:
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        self.cat.kill()
        self.cat.wait(timeout=30)


@pytest.fixture
def pipe(fit_environment, tmp_path):
    """Starts `command | cat`; whatever is left of it is killed in the end."""
    started: list[Piped] = []

    def start(command: list[str]) -> Piped:
        started.append(Piped(command, fit_environment, tmp_path / f"stderr{len(started)}.txt"))
        return started[-1]

    yield start
    for piped in started:
        piped.close()


def kill_once(piped: Piped, moment: Callable[[], bool]) -> None:
    piped.wait_until(moment)
    piped.process.kill()
    piped.process.wait(timeout=30)
    piped.assert_all_gone()


def test_after_a_sigkill_no_loader_worker_lives_and_the_pipe_ends(run_config, fit_command, pipe):
    """The second kill comes while workers are starting, and in a folder whose last run was killed."""
    config = run_config(*LONG)
    piped = pipe(fit_command(*LONG))
    piped.wait_until(lambda: logged_steps(config) >= 1)
    assert len(piped.members()) >= 5  # fit, resource tracker, fork server, two workers
    kill_once(piped, lambda: True)
    piped = pipe(fit_command(*LONG))
    kill_once(piped, lambda: len(piped.members()) >= 4)


def test_after_an_exception_in_a_validation_the_pipe_ends(run_config, fit_command, pipe):
    """The score cannot be written: fit fails with the workers of training and validation alive."""
    overrides = ("train.max_steps=4", "val.every=1", "data.num_workers=2")
    config = run_config(*overrides)
    (Path(config.run_dir) / "checkpoints" / "validation.json").mkdir(parents=True)
    piped = pipe(fit_command(*overrides))
    assert piped.process.wait(timeout=250) == 1, piped.log.read_text()[-3000:]
    piped.assert_all_gone()
    assert "validation.json" in piped.log.read_text() and "leaked" not in piped.log.read_text()


@pytest.mark.slow
def test_twenty_kills_leave_nobody(run_config, fit_command, pipe):
    config, chance = run_config(*LONG), random.Random()
    for number in range(20):
        piped = pipe(fit_command(*LONG, f"run_dir={config.run_dir}{number}"))
        instant, steps = time.monotonic() + chance.uniform(0.5, 15), chance.randint(1, 4)
        now = run_config(*LONG, f"run_dir={config.run_dir}{number}")

        def moment(
            now: Config = now, instant: float = instant, steps: int = steps, early: bool = number % 2 == 0
        ) -> bool:
            return time.monotonic() > instant if early else logged_steps(now) >= steps

        kill_once(piped, moment)


@pytest.mark.slow
def test_a_killed_first_rank_takes_the_others_and_their_workers_along(run_config, fit_command, pipe):
    ddp = (*LONG, "train.strategy=ddp", "train.devices=2")
    config = run_config(*ddp)
    piped = pipe(fit_command(*ddp))
    piped.wait_until(lambda: logged_steps(config) >= 1)
    assert len(piped.members()) >= 10
    kill_once(piped, lambda: True)


POOL = """
import sys
from concurrent.futures import ProcessPoolExecutor
import multiprocessing, time
from one4d_pl.data.worker import become_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1]), initializer=become_worker)
    list(pool.map(abs, range(8)))  # then the workers wait for more
    print("ready", file=sys.stderr, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_workers_of_a_pool_end_with_their_owner(pipe, tmp_path, method, number):
    """As evaluate and data_prep keep them."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    piped = pipe([sys.executable, str(script), method])
    piped.wait_until(lambda: "ready" in piped.log.read_text(), 60)
    assert len(piped.members()) >= 4
    piped.process.send_signal(number)
    piped.process.wait(timeout=30)
    piped.assert_all_gone()


CHILD = """
import os, signal, subprocess, sys, time
from one4d_pl.cluster import signals
if sys.argv[1] == "parent":
    child = subprocess.Popen([sys.executable, __file__, *sys.argv[2:], str(os.getpid())])
    time.sleep(600)
if sys.argv[1] == "late":
    time.sleep(1.0)  # the parent is gone by then
if sys.argv[1] == "watch":
    sys.platform, signals.PARENT_POLL_S = "darwin", 0.1
signals.end_with_parent(int(sys.argv[2]), signal.SIGKILL)
print("ready", file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["kernel", "watch", "late"])
def test_a_child_ends_with_its_parent_also_where_the_kernel_does_not_tell(pipe, tmp_path, way):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    piped = pipe([sys.executable, str(script), "parent", way])
    if way == "late":
        piped.wait_until(lambda: len(piped.members()) == 2, 60)
    else:
        piped.wait_until(lambda: "ready" in piped.log.read_text(), 60)
    kill_once(piped, lambda: True)
