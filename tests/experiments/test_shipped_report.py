"""The report in docs/nano: printed by the command from the results beside it; what has not run is said to be so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments.nano.__main__ import main
from experiments.nano.experiments import CLAIMS, EXPERIMENTS, RUNS
from experiments.nano.work import Plan, recipe_of

REPO = Path(__file__).parents[2]
SHIPPED = REPO / "docs" / "nano"


def report(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--report-only", "--out", str(out)]) == 0
    return capsys.readouterr().out


def store(out: Path, name: str, seed: int, error: float) -> Path:
    """Store a result with made-up numbers, as a finished run leaves it."""
    plan, run = Plan(out), RUNS[name]
    result = {
        "numbers": {"video.rel_error": error, "image.fd_vae": 1.0, "val.xyz": 0.2, "val.rgb": 0.3},
        "curves": {"rgb": [(0, 0.9), (600, 0.3)], "xyz": [(0, 0.8), (600, 0.2)]},
        "minutes": 1.0,
        "machine": "made up",
        "recipe": recipe_of(plan, run, seed),
    }
    path = plan.folder(run, seed) / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return path


def test_the_shipped_report_is_what_its_results_say(tmp_path, capsys):
    out = tmp_path / "nano"
    shutil.copytree(SHIPPED, out, ignore=shutil.ignore_patterns("report.md", "figures"))
    assert "Left out" not in report(out, capsys)
    assert (out / "report.md").read_text() == (SHIPPED / "report.md").read_text()
    drawn, shipped = ({path.name for path in folder.glob("figures/*")} for folder in (out, SHIPPED))
    assert drawn == shipped


def test_without_results_every_claim_is_not_run(tmp_path, capsys):
    said = report(tmp_path, capsys)
    assert said.count("| not run |") == len(CLAIMS) and "0 of 33 runs" in said
    assert not (tmp_path / "figures").exists() and "figures/" not in said


def test_a_claim_is_decided_by_what_has_run(tmp_path, capsys):
    for seed in range(3):
        store(tmp_path, "dlc", seed, 0.1 + 0.001 * seed)
        store(tmp_path, "width", seed, 0.2 + 0.003 * seed)
    lines = report(tmp_path, capsys).splitlines()
    told = [next(line for line in lines if line.startswith(f"| {number} |")) for number in range(1, 11)]
    assert "**holds**" in told[0] and all("| not run |" in line for line in told[1:3] + told[4:])
    assert "**cannot tell**" in told[3]  # no difference
    assert "![losses](figures/losses.png)" in lines
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"errors.png", "losses.png"}


def test_a_result_of_another_config_is_left_out_and_counted_and_a_younger_knob_is_none(tmp_path, capsys):
    path = store(tmp_path, "dlc", 0, 0.1)
    stored = json.loads(path.read_text())
    del stored["recipe"]["dlc.coupling"]  # as if it had been added later
    for recipe, said in ((stored["recipe"], False), (stored["recipe"] | {"optim.lr": 1.0}, True)):
        path.write_text(json.dumps(stored | {"recipe": recipe}))
        printed = report(tmp_path, capsys)
        assert ("Left out: 1 runs" in printed) == said and ("| `dlc` |" in printed) != said
    assert main(["--run", "dlc:0", "--out", str(tmp_path)]) == 2
    assert "a run of another config (optim.lr)" in capsys.readouterr().err


def test_the_page_about_it_names_its_parts():
    text, page = (SHIPPED / "report.md").read_text(), (REPO / "docs" / "nano.md").read_text()
    named, parts = (set(re.findall(pattern, where, re.MULTILINE)) for pattern, where in
                    ((r"nano/report\.md#(\w+)", page), (r"^## (\w+)$", text)))  # fmt: skip
    assert named | {"Claims"} == parts == {"Claims", *(experiment.name for experiment in EXPERIMENTS)}
