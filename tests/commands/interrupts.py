"""Ctrl-C at random moments of every command: `python -m tests.commands.interrupts [TRIALS] [SEED]`, on any machine.

A trial starts a command as a user does, in a process group of its own, waits until it has begun (SIGINT blocked), then
a random part of the command's usual time, and sends SIGINT to the group, as a terminal does, or to the process alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import write_shards
from one4d_pl.commands import generate

REPO = Path(__file__).parents[2]
# a shell's background job, as this may be, makes what it starts deaf to SIGINT
START = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu", "TERM": "dumb"}
TINY_TOY = "data.toy={root: %s, train_synthetic: 6, train_real: 0, val: 2, seed: 0}"
SOURCES = ("data.sources=[{path: %s/train_synthetic}]", "data.val_sources=[{path: %s/val}]")
FEW_STEPS = (
    "train.max_steps=4", "train.save_every=2", "train.global_batch_size=2", "train.micro_batch_size=2", "val.every=2",
    "val.clips=2", "eval.every=0", "eval.video_every=0", "optim.cooldown_steps=0",
)  # fmt: skip
CRIES = ("Traceback", "Exception ignored", "KeyboardInterrupt", "Error:", "leaked", "Fatal")


@dataclass(frozen=True)
class Inputs:
    """What the commands work on, made once."""

    folder: Path

    @property
    def scene(self) -> Path:
        return self.folder / "scene"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @staticmethod
    def make(folder: Path) -> Inputs:
        """A generated scene and a few shards."""
        inputs = Inputs(folder)
        toy = ("--source", "toy", "--height", "48", "--width", "64", "--num-frames", "9", "--count", "6")
        assert generate.main(["--prompt", "a ball", "--steps", "1", "--out", str(inputs.scene)]) == 0
        assert write_shards.main([*toy, "--samples-per-shard", "2", "--out", str(inputs.shards)]) == 0
        return inputs


@dataclass(frozen=True)
class Case:
    """A command, and the seconds from its beginning in which it is interrupted."""

    program: str  # after `python -m`
    arguments: Callable[[Inputs, Path], tuple[str, ...]]  # of the inputs and the folder for what it writes
    seconds: float


def _toy(out: Path) -> tuple[str, ...]:
    return (TINY_TOY % (out / "toy"), *(source % (out / "toy") for source in SOURCES))


CASES = {
    "fit": Case("one4d_pl.fit", lambda i, o: ("--config", "configs/dlc.yaml", f"run_dir={o}/run", "data.num_workers=1",
                                              *_toy(o), *FEW_STEPS), 40),
    "generate": Case("one4d_pl generate", lambda i, o: ("--prompt", "a", "--steps", "3", "--out", f"{o}/scene"), 10),
    "generate over a scene": Case("one4d_pl generate", lambda i, o: (
        "--prompt", "a", "--steps", "1", "--out", f"{o}/old"), 8),
    "view": Case("one4d_pl view", lambda i, o: (str(i.scene), "--port", "0"), 8),
    "view --html": Case("one4d_pl view", lambda i, o: (str(i.scene), "--html", f"{o}/scene.html"), 4),
    "export a scene": Case("one4d_pl export", lambda i, o: (str(i.scene), "--out", f"{o}/files"), 3.5),
    "export adapters": Case("one4d_pl export", lambda i, o: (
        "one4d_pl/assets/demo_adapters", "--out", f"{o}/adapter", "--lora-for", "diffusers", "wan"), 4),
    "evaluate": Case("one4d_pl evaluate", lambda i, o: (
        "--sequences", "toy_3000000,toy_3000001", "--rows", "ceiling", "--processes", "2", "--out", f"{o}/eval"), 30),
    "cameras": Case("one4d_pl cameras", lambda i, o: (str(i.scene), "--out", f"{o}/cameras"), 3),
    "plan": Case("one4d_pl plan", lambda i, o: ("--config", "configs/dlc.yaml"), 0.8),
    "preflight": Case("one4d_pl preflight", lambda i, o: (
        "--config", "configs/dlc.yaml", f"run_dir={o}/run", *_toy(o)), 5),
    "fetch_weights": Case("one4d_pl fetch-weights", lambda i, o: ("--check", "one4d_pl/assets/tiny_wan"), 0.2),
    "demo": Case("one4d_pl demo", lambda i, o: ("--clips", "2", "--out", f"{o}/demo", "sampler.steps=2"), 30),
    "bench_gpu": Case("experiments.bench_gpu", lambda i, o: ("--tiny", "--out", f"{o}/bench.json"), 4),
    "nano": Case("experiments.nano", lambda i, o: ("--only", "coupling", "--jobs", "2", "--clips", "2", "--seeds", "1",
                                                "--out", f"{o}/nano", *_toy(o), *FEW_STEPS, "train.compile=false"), 60),
    "build_vae": Case("experiments.tiny_wan.build_vae", lambda i, o: ("--out", f"{o}/vae", "--minutes", "0.2"), 30),
    "build_base": Case("experiments.tiny_wan.build_base", lambda i, o: (
        "--config", "configs/tiny_base.yaml", f"run_dir={o}/base", f"base.path={o}/start", *_toy(o), *FEW_STEPS), 12),
    "stats": Case("data_prep.stats", lambda i, o: (str(i.shards), "--out", f"{o}/stats"), 0.9),
    "check_shards": Case("data_prep.check_shards", lambda i, o: (
        str(i.shards), "--jobs", "2", "--report", f"{o}/report"), 16),
    "write_shards": Case("data_prep.write_shards", lambda i, o: (
        "--source", "toy", "--height", "48", "--width", "64", "--num-frames", "9", "--count", "40", "--jobs", "2",
        "--samples-per-shard", "4", "--out", f"{o}/shards"), 11),
    "encode_latents": Case("data_prep.encode_latents", lambda i, o: (
        "--config", "configs/dlc.yaml", "--raw", str(i.shards), "--out", f"{o}/encoded"), 9),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; `faults` is empty where it was as it should be."""

    name: str
    after: float  # seconds from its beginning to the signal
    code: int
    took: float  # seconds from the signal to the end
    faults: tuple[str, ...]


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


def interrupt(name: str, inputs: Inputs, out: Path, wait: float, group: bool, presses: int = 1) -> Outcome:
    """One trial; `out` is the folder of this trial alone."""
    case = CASES[name]
    out.mkdir(parents=True)
    if "over" in name:
        shutil.copytree(inputs.scene, out / "old")
    command = [sys.executable, "-c", START, sys.executable, "-m", *case.program.split(), *case.arguments(inputs, out)]
    with (out / "stdout").open("w+") as stdout, (out / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            command, cwd=REPO, env=environment(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            _await_beginning(process, case.program)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            ended = process.poll() is not None
            began = time.monotonic()
            for _ in range(0 if ended else presses):
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
                time.sleep(0.01)
            code = process.wait(120)
            took = time.monotonic() - began
        finally:
            survivors = _survivors(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stderr.seek(0)
        text = stderr.read()
    faults = [f"says {cry!r}:\n{text[-3000:]}" for cry in CRIES if cry in text]
    if code not in ((0,) if ended else (0, 130)):
        faults.append(f"exit code {code}:\n{text[-3000:]}")
    if survivors:
        faults.append(f"outlived by {survivors}")
    faults += [fault for path in sorted(out.rglob("*")) if path.is_file() and (fault := _damage(path))]
    if "over" in name and not (out / "old" / "scene.json").is_file():
        faults.append("the scene that was there is gone")
    return Outcome(name, wait, code, took, tuple(faults))


def _await_beginning(process: subprocess.Popen[bytes], program: str) -> None:
    """Until it blocks SIGINT, which is before its arguments are read."""
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            words = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
            if words[1:3] != ["-m", program.split()[0]]:  # still on its way there
                continue
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            blocked = int(next(line for line in status if line.startswith("SigBlk")).split()[1], 16)
            if blocked >> (signal.SIGINT - 1) & 1:
                return
        time.sleep(0.005)


def _survivors(group: int) -> list[str]:
    """What of a process group is alive five seconds later."""
    patience = time.monotonic() + 5
    while True:
        alive = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] != "Z":
                    alive.append((folder / "cmdline").read_text().replace("\0", " ")[:200])
        if not alive or time.monotonic() > patience:
            return alive
        time.sleep(0.1)


def _damage(path: Path) -> str | None:
    """What is wrong with a file that a command left: the rest of an unfinished one, or one that cannot be read."""
    if path.name.endswith(".tmp") or ".tmp/" in str(path):
        return f"{path} is left"
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix in (".npy", ".npz"):
            np.load(path)
    except (ValueError, OSError) as error:
        return f"{path} is half-written: {error}"
    return None


def trials(count: int, seed: int) -> list[Outcome]:
    """All commands in turn, at random moments; says each outcome."""
    rng, outcomes = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs.make(Path(folder) / "inputs")
        for number in range(count):
            name = list(CASES)[number % len(CASES)]
            wait, out = rng.uniform(0, CASES[name].seconds), Path(folder) / f"trial-{number}"
            outcomes.append(interrupt(name, inputs, out, wait, rng.random() < 0.7, rng.choice((1, 1, 1, 2))))
            shutil.rmtree(out)
            said = outcomes[-1]
            print(f"{number} {name}: {said.code} at {wait:.2f} s, took {said.took:.2f} s", *said.faults, flush=True)
    return outcomes


if __name__ == "__main__":
    found = trials(int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    faulty, late = [o for o in found if o.faults], max(o.took for o in found)
    interrupted = sum(o.code == 130 for o in found)
    print(f"{len(found)} trials, {interrupted} interrupted, {len(faulty)} faulty, the slowest end {late:.2f} s")
    sys.exit(bool(faulty))
