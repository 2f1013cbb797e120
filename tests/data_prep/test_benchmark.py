"""`make bench` runs: one clip, once; its figures are nobody's law."""

from __future__ import annotations

from pathlib import Path

from tests.data_prep.benchmark_throughput import measure, write_dataset


def test_the_throughput_benchmark_runs(tmp_path: Path, capsys):
    write_dataset(tmp_path / "raw", trajectories=1)
    assert measure(tmp_path / "raw", tmp_path / "out", trajectories=1, jobs=1, repeats=1) > 0
    assert "decode + encode alone" in capsys.readouterr().out
