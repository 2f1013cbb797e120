"""`make gpu-proof` runs end to end at a toy size on a CPU; what it proves is proved on a GPU alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from experiments import gpu_proof


def test_it_runs_every_part_and_leaves_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu_proof.main(["--tiny", "--out", str(tmp_path / "proof")]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "proof" / "report.json").read_text())
    parts = {part["name"]: part for part in report["parts"]}
    assert list(parts) == ["tests", "training", "zero3", "scene", "speed"]
    assert {part["verdict"] for part in parts.values()} == {"passed"}
    assert parts["training"]["found"]["steps"] == 4 and parts["zero3"]["found"]["steps"] == 2
    assert "pointmap.npz" in parts["scene"]["found"]["files"]
    assert parts["speed"]["found"]["json"]["cases"]
    text = (tmp_path / "proof" / "report.md").read_text()
    assert "| speed | a true step of the 14B and of the 1.3B | passed |" in text and "| case | s/sample |" in text


def test_what_fails_or_lasts_too_long_is_said(tmp_path):
    def part(code: str, limit: float) -> gpu_proof.Outcome:
        command = [sys.executable, "-c", code]
        return gpu_proof.run(gpu_proof.Part("part", "it works", command, limit, lambda text: {}), tmp_path)

    assert part("", 60).verdict == "passed"
    failed = part("print('the reason'); raise SystemExit(3)", 60)
    assert failed.verdict == "failed with exit code 3; see part.log" and failed.found == {"last lines": ["the reason"]}
    assert part("import time; time.sleep(60)", 0.5).verdict.startswith("not done after")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_would_work(capsys):
    assert gpu_proof.main([]) == 2
    assert "--tiny" in capsys.readouterr().err
