"""The very slurm/train_8node.sh on a real SLURM of eight nodes; the full proof is `make slurm-test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm_lab.lab import Lab, what_is_missing
from tests.slurm_lab.tiny_run import prepare
from tests.slurm_lab.trials import Trials

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing()),
]


def test_eight_nodes_under_zero_3_survive_a_signal_and_a_killed_rank_with_the_same_losses(tmp_path: Path) -> None:
    lab_yaml = prepare(tmp_path)
    with Lab(tmp_path / "slurm") as lab:
        trials = Trials(lab, tmp_path, lab_yaml, "zero3", steps=20)
        for row in (trials.refused(), trials.undisturbed(), trials.signalled_and_killed(steps=20)):
            assert not row.remarks, str(row)
        assert not lab.processes()
