"""SIGKILL a 2-rank ZeRO-2 run again and again; what survives must be the undisturbed run, bit for bit.

    make chaos          (KILLS=200; prints a table)

Half of the kills come at a random instant of the run, the other half a few random milliseconds after a checkpoint
began to be written. A staging folder found after the death is the marker that a save was under way.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from one4d_pl.config import Config, to_yaml
from one4d_pl.training.checkpoint_files import checkpoint_folder, newest_checkpoint, read_step
from tests.conftest import build_tiny_base, free_port, small_run_config, write_toy_shards

RANKS = 2
STEPS = 12
OVERRIDES = (
    f"train.max_steps={STEPS}", "train.save_every=1", "val.every=1000", f"val.clips={RANKS}",
    "train.strategy=deepspeed", "train.zero_stage=2", f"train.devices={RANKS}",
)  # fmt: skip
RUN_TIMEOUT_S = 240.0


class Nursery:
    """A process that has imported everything and forks a run's ranks, so that a kill costs no import."""

    PROGRAM = """
import os, sys
import torch
torch.set_num_threads(1)
import deepspeed, tensorboard
import one4d_pl.callbacks.losses, one4d_pl.training.checkpoint, one4d_pl.training.strategy
from one4d_pl.config import load_config
from one4d_pl.fit import fit
print("ready", flush=True)
for line in sys.stdin:
    port, ranks, path = line.split(maxsplit=2)
    children = []
    for rank in range(int(ranks)):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=ranks,
                              LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                              TORCHELASTIC_RUN_ID="chaos")
            fit(load_config([path.strip()], []))
            os._exit(0)
        children.append(child)
    print(*children, flush=True)
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM], env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
        )  # fmt: skip
        assert self._line(120) == "ready", log.read_text()[-3000:]

    def run(self, config_yaml: Path, dies: Callable[[], bool]) -> bool:
        """True if the run came to its end, False if it was killed because `dies` said so; fails on any other end."""
        print(free_port(), RANKS, config_yaml, file=self.process.stdin)
        children = [int(child) for child in (self._line(30) or "").split()]
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while (status := self._line(0.002)) is None:
            assert time.monotonic() < deadline, "the run hangs"
            if dies():
                for child in children:
                    os.kill(child, signal.SIGKILL)
                status = self._line(30)
                break
        assert status is not None
        codes = {int(code) for code in status.split()}
        assert codes <= {0, -signal.SIGKILL}, codes  # one rank may have come to its end before the kill
        return codes == {0}

    def _line(self, seconds: float) -> str | None:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline().strip() if ready else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)


@dataclass
class Outcome:
    """What the kills met."""

    runs: int = 0  # finished after their kills, each equal to the undisturbed one
    kills: int = 0
    in_save_window: int = 0
    before_first_save: int = 0
    steps_at_death: set[int] = field(default_factory=set)

    def table(self) -> str:
        return (
            "| kills | inside a save | before the first save | steps at death | finished runs, all bitwise equal |\n"
            "|---|---|---|---|---|\n"
            f"| {self.kills} | {self.in_save_window} | {self.before_first_save} | "
            f"{min(self.steps_at_death)} to {max(self.steps_at_death)} | {self.runs} |"
        )


def final_hashes(config: Config) -> dict[str, str]:
    """sha256 of every file of the last checkpoint: adapter, links, optimiser moments."""
    folder = checkpoint_folder(config.run_dir, config.train.max_steps)
    return json.loads((folder / "trainer.json").read_text())["sha256"]


def chaos(kills: int, seed: int, make_config: Callable[..., Config], folder: Path) -> Outcome:
    """Kill `kills` times; AssertionError where a survivor differs from the undisturbed run."""

    def prepare(name: str) -> tuple[Config, Path]:
        config, path = make_config(f"run_dir={folder}/{name}", *OVERRIDES), folder / f"{name}.yaml"
        path.write_text(to_yaml(config))
        return config, path

    log, outcome, chance = folder / "nursery.log", Outcome(), random.Random(seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    nursery = Nursery(environment, log)
    bar = tqdm(total=kills, desc="kills", unit="kill", disable=kills < 50)
    try:
        undisturbed, path = prepare("undisturbed")
        began = time.monotonic()
        assert nursery.run(path, lambda: False), log.read_text()[-3000:]
        duration, expected = time.monotonic() - began, final_hashes(undisturbed)
        config, path = prepare("run0")
        while True:
            ended = nursery.run(path, _moment_of_death(config, chance, duration, outcome.kills < kills))
            if ended:
                assert final_hashes(config) == expected, f"{config.run_dir} differs from the undisturbed run"
                outcome.runs += 1
                if outcome.kills >= kills:
                    return outcome
                config, path = prepare(f"run{outcome.runs}")
                continue
            outcome.kills += 1
            bar.update()
            newest = newest_checkpoint(config.run_dir)
            outcome.steps_at_death.add(read_step(newest) if newest else 0)
            outcome.before_first_save += newest is None
            outcome.in_save_window += bool(_staging_folders(config))
    finally:
        nursery.close()
        bar.close()


def _moment_of_death(config: Config, chance: random.Random, duration: float, deadly: bool) -> Callable[[], bool]:
    """When to kill a run: at a random instant, or just after its n-th checkpoint began to be written."""
    if not deadly:
        return lambda: False
    if chance.random() < 0.5:
        instant = time.monotonic() + chance.uniform(0.05, 0.7) * duration
        return lambda: time.monotonic() > instant
    left, seen, delay = chance.randint(1, 3), set(_staging_folders(config)), chance.uniform(0, 0.01)

    def in_window() -> bool:
        nonlocal left
        new = _staging_folders(config) - seen
        seen.update(new)
        left -= len(new)
        if left > 0 or not new:
            return False
        time.sleep(delay)
        return True

    return in_window


def _staging_folders(config: Config) -> set[str]:
    """The markers of a save under way."""
    return {f.name for f in (Path(config.run_dir) / "checkpoints").glob(".step-*.tmp")}


def main() -> None:
    """`make chaos`: build a tiny base and world, kill KILLS times, print the table."""
    kills = int(os.environ.get("KILLS", "200"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, toy = build_tiny_base(folder / "wan", image_tokens=False), write_toy_shards(folder / "toy")
        outcome = chaos(kills, 0, small_run_config(folder, base, toy), folder)
    print(outcome.table())


if __name__ == "__main__":
    main()
