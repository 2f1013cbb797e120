"""The wheel: built from a copy of the sources, unpacked, and used in a folder far from any checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import one4d_pl
from tests.conftest import REPO

MOST_BYTES = 40_000_000
SOURCES = ("one4d_pl", "data_prep", "configs", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"  # as pip does


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (REPO / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(REPO / name, copy / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(REPO / name, copy / name)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what an installation would put into site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the unpacked wheel; -P, since the working folder is not to be imported from."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)


def test_the_wheel_is_small_and_holds_all_but_the_tests(wheel: Path) -> None:
    assert wheel.name == f"one4d_pl-{one4d_pl.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size <= MOST_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    checkout = [path for room in ("one4d_pl", "data_prep") for path in (REPO / room).rglob("*") if path.is_file()]
    checkout += [path for path in (REPO / "configs").rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(REPO)) for path in checkout if "__pycache__" not in path.parts}
    wanted = {f"one4d_pl/{name}" if name.startswith("configs/") else name for name in wanted}
    assert not sorted(wanted - names)
    assert {name.partition("/")[0].split("-")[0] for name in names} == {"one4d_pl", "data_prep"}


def test_the_citation_has_the_version_of_the_package() -> None:
    (cited,) = re.findall(r"^version: (.*)$", (REPO / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == one4d_pl.__version__


def test_an_installed_one4d_finds_its_configs_from_any_folder(installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-c", "import one4d_pl; print(one4d_pl.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(installed)
    done = python(installed, tmp_path, "-m", "one4d_pl", "fit", "--config", "configs/demo.yaml", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "init_from: embedded" in done.stdout


@pytest.mark.slow
def test_an_installed_one4d_shows_the_quick_demo_in_any_folder(installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-m", "one4d_pl", "demo", "--quick")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "demo" / "animation.webp").stat().st_size > 10_000
    assert not (tmp_path / "demo" / "metrics.json").exists()
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {f"{task}_0{end}" for task in ("video", "image", "text") for end in (".png", ".mp4", ".ply")} <= made
