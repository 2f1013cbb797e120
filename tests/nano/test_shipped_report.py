"""The report in one4d_pl/assets/nano: printed by the command from the results beside it, quoted by the README."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from one4d_pl.nano.__main__ import main
from one4d_pl.nano.experiments import EXPERIMENTS

REPO = Path(__file__).parents[2]
SHIPPED = REPO / "one4d_pl" / "assets" / "nano"


def test_the_shipped_report_is_what_its_results_say(tmp_path, capsys):
    out = tmp_path / "nano"
    shutil.copytree(SHIPPED, out, ignore=shutil.ignore_patterns("report.md", "figures"))
    assert main(["--report-only", "--out", str(out)]) == 0
    assert (out / "report.md").read_text() == (SHIPPED / "report.md").read_text()
    assert "under another config" not in capsys.readouterr().out
    for experiment in EXPERIMENTS:
        assert (out / "figures" / f"{experiment.name}.png").is_file() and (
            SHIPPED / "figures" / f"{experiment.name}.png"
        ).is_file()


def test_a_result_of_another_config_is_counted(tmp_path, capsys):
    source, out = next(SHIPPED.glob("*/result.json")), tmp_path / "nano"
    (out / source.parent.name).mkdir(parents=True)
    stored = json.loads(source.read_text())
    (out / source.parent.name / "result.json").write_text(json.dumps(stored | {"recipe": "another"}))
    assert main(["--report-only", "--out", str(out)]) == 0
    assert "1 of them were run under another config" in capsys.readouterr().out


def test_the_readme_quotes_rows_of_the_report():
    report = (SHIPPED / "report.md").read_text().splitlines()
    section = (REPO / "README.md").read_text().split("## Nano-One4D")[1].split("\n## ")[0].splitlines()
    rows = [line for line in section if line.startswith("| ") and not line.startswith(("| claim |", "| run |"))]
    assert len(rows) > 20 and not [row for row in rows if row not in report]
