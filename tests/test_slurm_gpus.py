"""GPUs through SLURM: every rank sees its node's and takes its own; where there are none, nothing starts in silence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.slurm_lab.gpu_probe import REPO, Seen, evaluation, train_ranks
from tests.slurm_lab.lab import Lab, what_is_missing

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """Two nodes with eight GPUs each, as SLURM sees them."""
    with Lab(tmp_path_factory.mktemp("slurm"), nodes=2) as lab:
        yield lab


def test_every_rank_sees_its_nodes_eight_gpus_and_takes_its_own(lab, tmp_path):
    seen = train_ranks(lab, tmp_path)
    assert {(rank.node, rank.taken) for rank in seen} == {(f"node{n}", str(i)) for n in (1, 2) for i in range(8)}
    assert len(seen) == 16 and {rank.visible for rank in seen} == {8}


def test_an_evaluation_gets_one_gpu(lab, tmp_path):
    assert [(rank.visible, rank.taken) for rank in evaluation(lab, tmp_path)] == [(1, "0")]


def test_asked_for_none_the_ranks_get_none(lab, tmp_path):
    """The probe tells: a job that forgets to ask is noticed here."""
    assert set(train_ranks(lab, tmp_path, "--gpus-per-node=0")) == {Seen("node1", 0, "none"), Seen("node2", 0, "none")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_scale_made_for_gpus_is_refused_in_one_line_where_there_are_none(lab, tmp_path):
    job = lab.submit(
        "--nodes=2", "--gpus-per-node=0", "--time=10", f"--output={tmp_path}/out", "slurm/train_8node.sh", cwd=REPO,
        GPUS_PER_NODE="1", CONFIGS="configs/dlc.yaml", RUN_DIR=str(tmp_path / "run"), VENV=sys.prefix,
        OVERRIDES="train.accelerator=gpu train.strategy=ddp train.micro_batch_size=8", NCCL_INTERFACE="lo",
    )  # fmt: skip
    lab.wait(job, 200)
    shown, said = lab.job(job), Path(tmp_path / "out").read_text().splitlines()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0"), said
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: node1, node2: train.accelerator: "), said
    assert "--gpus-per-node" in errors[0]
