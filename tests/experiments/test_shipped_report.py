"""The report in docs/nano: printed by the command from the results beside it, told in words by docs/nano.md."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from experiments.nano.__main__ import main
from experiments.nano.experiments import EXPERIMENTS

REPO = Path(__file__).parents[2]
SHIPPED = REPO / "docs" / "nano"


def test_the_shipped_report_is_what_its_results_say(tmp_path, capsys):
    out = tmp_path / "nano"
    shutil.copytree(SHIPPED, out, ignore=shutil.ignore_patterns("report.md", "figures"))
    assert main(["--report-only", "--out", str(out)]) == 0
    assert (out / "report.md").read_text() == (SHIPPED / "report.md").read_text()
    assert "Left out" not in capsys.readouterr().out
    drawn, shipped = ({path.name for path in (folder / "figures").iterdir()} for folder in (out, SHIPPED))
    assert drawn == shipped and "coupling.png" in drawn <= {f"{experiment.name}.png" for experiment in EXPERIMENTS}


def test_a_result_of_another_config_is_left_out_and_counted_and_a_younger_knob_is_none(tmp_path, capsys):
    out = tmp_path / "nano"
    shutil.copytree(SHIPPED / "dlc-0", out / "dlc-0")
    path = out / "dlc-0" / "result.json"
    stored = json.loads(path.read_text())
    del stored["recipe"]["dlc.coupling"]  # as if it had been added later
    for recipe, said in ((stored["recipe"], False), (stored["recipe"] | {"optim.lr": 1.0}, True)):
        path.write_text(json.dumps(stored | {"recipe": recipe}))
        assert main(["--report-only", "--out", str(out)]) == 0
        report = capsys.readouterr().out
        assert ("Left out: 1 runs" in report) == said and ("| `dlc` |" in report) != said
    assert main(["--run", "dlc:0", "--out", str(out)]) == 2
    assert "a run of another config (optim.lr)" in capsys.readouterr().err


def test_the_page_about_it_names_its_parts_and_rows():
    report, page = (SHIPPED / "report.md").read_text(), (REPO / "docs" / "nano.md").read_text()
    parts = set(re.findall(r"nano/report\.md#(\w+)", page))
    assert (
        parts == {experiment.name for experiment in EXPERIMENTS} == set(re.findall(r"^## (\w+)$", report, re.MULTILINE))
    )
    named = re.findall(r"`(\w+)`", page.split("What came out")[1])
    assert named and not [name for name in named if f"| `{name}` |" not in report]
