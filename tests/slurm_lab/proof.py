"""python -m tests.slurm_lab.proof: everything that can befall a job, on the virtual cluster, in full; prints a table.

An hour or so on two cores. `make test-long` holds the short version (tests/test_slurm.py).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm_lab.gpu_probe import train_ranks
from tests.slurm_lab.lab import Lab, what_is_missing
from tests.slurm_lab.tiny_run import prepare
from tests.slurm_lab.trials import HEADER, STRATEGIES, Row, Trials

LONG, SHORT = 300, 20  # steps: of the run that meets three time limits, and of the others


def main(arguments: list[str]) -> int:
    """Run the trials of each strategy and print their table; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm_lab.proof", description=__doc__)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=["zero2", "zero3"])
    args = parser.parse_args(arguments)
    if why := what_is_missing():
        print(f"slurm-test: skipped: {why}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="one4d-lab-"))
    rows: list[Row] = []
    try:
        lab_yaml = prepare(folder)
        with Lab(folder / "slurm") as lab:
            rows.append(prove_gpus(lab, folder))
            for strategy in args.strategies:
                prove(Trials(lab, folder, lab_yaml, strategy, LONG), rows)
    finally:
        print(HEADER, *rows, sep="\n", flush=True)
    failed = sum(bool(row.remarks) for row in rows)
    if not failed:
        shutil.rmtree(folder)
    print(
        f"slurm-test: {len(rows) - failed} of {len(rows)} trials as they should be"
        + (f"; see {folder}" if failed else "")
    )
    return 1 if failed else 0


def prove_gpus(lab: Lab, folder: Path) -> Row:
    """Every rank of the whole job sees its node's GPUs and takes one that no other takes."""
    began, ranks = time.monotonic(), 8 * lab.nodes
    seen = train_ranks(lab, folder)
    pairs = {(rank.node, rank.taken) for rank in seen if rank.taken != "none"}
    remarks = [f"{len(pairs)} (node, GPU) pairs of {ranks}"] if (len(seen), len(pairs)) != (ranks, ranks) else []
    remarks += sorted({f"{rank.node} shows {rank.visible} GPUs" for rank in seen if rank.visible != lab.gpus})
    return Row(f"{len(pairs)} ranks, each its own GPU", "ddp", 1, time.monotonic() - began, 0.0, remarks)


def prove(trials: Trials, rows: list[Row]) -> None:
    """Every trial of one strategy; a row is there as soon as its trial has ended."""
    rows.append(trials.refused())
    rows.append(trials.undisturbed())
    rows.append(trials.rank_killed(SHORT))
    rows.append(trials.node_killed(SHORT, "node6"))
    rows.append(trials.node_killed(SHORT, "node1"))  # where the batch script runs
    rows.append(trials.scancelled(SHORT))
    rows.append(trials.time_limit(3, LONG))
    rows.extend(trials.usr1(10, SHORT))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
