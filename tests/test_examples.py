"""Every example runs as it stands, in a short version, from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

EXAMPLES = REPO / "examples"
SMALL_RUN = (
    "train.max_steps=2", "train.global_batch_size=2", "train.micro_batch_size=2", "train.precision=32-true",
    "train.save_every=2", "val.every=2", "val.clips=2", "eval.every=0", "data.num_workers=0",
)  # fmt: skip
SMALL_TOYS = ("data.toy.train_synthetic=3", "data.toy.train_real=1", "data.toy.val=2")
# script: its arguments for a test, and files that it leaves
RUNS = {
    "01_generate.py": (["--steps", "1"], ["scenes/video/scene.json", "scenes/exported/ply", "scenes/exported/colmap"]),
    "02_train_toy.py": ([*SMALL_RUN, *SMALL_TOYS], ["runs/example/scene/scene.json", "runs/example/tensorboard"]),
    "03_own_data.py": (["--clips", "3", *SMALL_RUN], ["runs/own_data/shards/manifest.json", "runs/own_data/run"]),
    "04_evaluate_others.py": (
        ["--sequences", "toy_3000000"],
        ["runs/others/scores/table.md", "runs/others/scores/results.json"],
    ),
}


def run(script: Path, arguments: list[str], folder: Path) -> str:
    """Run a script in a folder and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "\r" not in done.stderr  # no bars where nobody looks
    return done.stdout


def test_each_example_is_short_and_run_by_a_test() -> None:
    scripts = {path.name: path for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(RUNS)
    assert all(len(path.read_text().splitlines()) < 60 for path in scripts.values())


@pytest.mark.parametrize("name", RUNS)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    arguments, files = RUNS[name]
    run(EXAMPLES / name, arguments, tmp_path)
    assert not [file for file in files if not (tmp_path / file).exists()]


def test_the_notebook_runs_and_is_stored_without_outputs(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "05_python_api.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(len(source.splitlines()) for source in code) < 60
    assert not [cell for cell in cells if cell.get("outputs")]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code))
    said = run(script, [], tmp_path)
    assert "reprojection error" in said and "AbsRel" in said
