"""python -m experiments.same_results START [END]: does a change that should change nothing change a number?

Runs both commits in worktrees of their own, one after the other: a seeded training of 20 steps, a generated scene, an
evaluation table. Prints each result of both and exits with 1 where any differs in one bit. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from one4d_pl.commands.command import Command
from one4d_pl.config import ConfigError

REPO = Path(__file__).parents[1]
LIMIT_S = 1800
TRAINING = (
    "fit", "--config", "configs/dlc.yaml", "train.max_steps=20", "train.save_every=20", "train.log_every=1",
    "train.precision=32-true", "val.every=20", "eval.every=0", "data.toy.train_synthetic=24", "data.toy.train_real=8",
    "data.toy.val=8",
)  # fmt: skip
SCENE = ("generate", "--prompt", "a red ball rolls on a striped floor", "--steps", "3")
TABLE = ("evaluate", "--bench", "toy", "--sequences", "toy_3000000,toy_3000001", "--no-pictures", "sampler.steps=2")
STEP_LINE = re.compile(r"step (\d+)/\d+ \| rgb ([\d.]+) \| xyz ([\d.]+)")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("start", help="a commit")
    parser.add_argument("end", nargs="?", default="HEAD", help="another; default: %(default)s")


def _run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = [results(commit, Path(folder) / name) for name, commit in (("start", args.start), ("end", args.end))]
    differing = [key for key in found[0] | found[1] if found[0].get(key) != found[1].get(key)]
    for key in found[0] | found[1]:
        print(f"{'DIFFERS' if key in differing else 'same':8} {key:28} {found[0].get(key)}  {found[1].get(key)}")
    return 1 if differing else 0


def results(commit: str, folder: Path) -> dict[str, str]:
    """Run a commit's three commands below `folder`; return losses and digests of files by name."""
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        log = one4d(folder, *TRAINING, f"run_dir={folder}/out/run")
        found = {f"loss of step {step}": f"{rgb} {xyz}" for step, rgb, xyz in STEP_LINE.findall(log)}
        checkpoint = folder / "out" / "run" / "checkpoints" / "step-00000020"
        for path in sorted(checkpoint.rglob("*.safetensors")):
            found[f"adapter: {path.relative_to(checkpoint).with_suffix('')}"] = digest(path)
        one4d(folder, *SCENE, "--out", f"{folder}/out/scene")
        with np.load(folder / "out" / "scene" / "pointmap.npz") as arrays:
            found |= {f"scene: {key}": hashed(arrays[key].tobytes()) for key in sorted(arrays)}
        found["scene: cameras"] = digest(folder / "out" / "scene" / "cameras.json")
        one4d(folder, *TABLE, "--out", f"{folder}/out/table")
        table = (folder / "out" / "table" / "results.json").read_text()
        found["table"] = hashed(table.replace(str(folder), "").encode())  # without the adapters' folder
        return found
    finally:
        git("worktree", "remove", "--force", str(folder))


def one4d(folder: Path, command: str, *arguments: str) -> str:
    """Run a command of the worktree and return its log.

    In commits without the command `one4d`, each command is a module of its own.
    """
    has_one4d = command != "fit" and (folder / "one4d_pl" / "__main__.py").is_file()
    module = ("one4d_pl", command) if has_one4d else (f"one4d_pl.{command}",)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", *module, *arguments], cwd=folder, env=environment, timeout=LIMIT_S, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command} of {folder.name} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise ConfigError(f"git {arguments[0]}: {done.stderr.strip()}")


def hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def digest(path: Path) -> str:
    return hashed(path.read_bytes())


main = Command("python -m experiments.same_results", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
