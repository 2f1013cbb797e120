"""Which GPUs the ranks of the very slurm/train_8node.sh and eval.sh get: a light probe stands in for their Python."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tests.slurm_lab.lab import Lab

REPO = Path(__file__).parents[2]
# CUDA numbers what CUDA_VISIBLE_DEVICES lists, and Lightning takes number SLURM_LOCALID
PROBE = """#!/bin/bash
case "$*" in *--print-config*) exec {python} "$@" ;; esac
IFS=, read -ra seen <<<"${{CUDA_VISIBLE_DEVICES:-}}"
own=${{seen[${{SLURM_LOCALID:-0}}]:-none}}
echo "$SLURMD_NODENAME ${{#seen[@]}} $own" >"{folder}/$SLURM_JOB_ID-$2-${{SLURM_PROCID:-0}}"
"""


@dataclass(frozen=True)
class Seen:
    """What one rank found."""

    node: str
    visible: int  # GPUs
    taken: str  # number of its own; none


def train_ranks(lab: Lab, folder: Path, *sbatch: str) -> list[Seen]:
    """Of every rank of training, eight on each of the lab's nodes."""
    ranks = 8 * lab.nodes
    job = lab.submit(
        f"--nodes={lab.nodes}", "--time=5", f"--output={folder}/train.out", *sbatch, "slurm/train_8node.sh", cwd=REPO,
        CONFIGS="configs/dlc.yaml", RUN_DIR=str(folder / "run"), VENV=str(_probe(folder)),
        OVERRIDES=f"train.strategy=ddp train.micro_batch_size=1 train.global_batch_size={ranks}",
    )  # fmt: skip
    assert lab.wait(job, 120) == "COMPLETED", (folder / "train.out").read_text()
    return _seen(folder, job, "one4d_pl.fit")


def evaluation(lab: Lab, folder: Path) -> list[Seen]:
    """Of the one process of an evaluation."""
    job = lab.submit(
        "--time=5", f"--output={folder}/eval.out", "slurm/eval.sh", "--bench", "toy", cwd=REPO,
        VENV=str(_probe(folder)),
    )  # fmt: skip
    assert lab.wait(job, 60) == "COMPLETED", (folder / "eval.out").read_text()
    return _seen(folder, job, "one4d_pl")


def _probe(folder: Path) -> Path:
    """An environment whose Python is the probe."""
    python = folder / "venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PROBE.format(python=sys.executable, folder=folder))
    python.chmod(0o755)
    return folder / "venv"


def _seen(folder: Path, job: int, module: str) -> list[Seen]:
    words = [path.read_text().split() for path in folder.glob(f"{job}-{module}-*")]
    return [Seen(node, int(visible), taken) for node, visible, taken in words]
