"""`one4d`: one word for every command, from any folder, and quick to say what there is."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from one4d_pl.__main__ import COMMANDS
from one4d_pl.commands.command import Command
from tests.conftest import REPO


def one4d(*arguments: str, folder: Path = REPO) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "one4d_pl", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_help_names_every_command() -> None:
    done = one4d("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("arguments", [(), ("generat",)])
def test_no_such_command(arguments: tuple[str, ...]) -> None:
    done = one4d(*arguments)
    assert done.returncode == 2
    assert "generate" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_called_as_it_is_started(name: str) -> None:
    module = "one4d_pl.fit" if name == "fit" else f"one4d_pl.commands.{name.replace('-', '_')}"
    command = importlib.import_module(module).main
    assert isinstance(command, Command)
    assert command.name == ("python -m one4d_pl.fit" if name == "fit" else f"one4d {name}")


def test_help_needs_no_heavy_library(tmp_path: Path) -> None:
    watch = "import sys; from one4d_pl.__main__ import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    for name in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-c", watch, name, "--help"], cwd=REPO, capture_output=True, text=True, timeout=120
        )
        loaded = {"torch", "numpy", "lightning", "diffusers", "omegaconf"} & set(done.stderr.split())
        assert (done.returncode, loaded) == (0, set()), name


def test_configs_are_found_from_any_folder(tmp_path: Path) -> None:
    done = one4d("fit", "--config", "configs/demo.yaml", "--print-config", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "init_from: embedded" in done.stdout
    done = one4d("fit", "--config", "configs/none.yaml", "--print-config", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: configs/none.yaml: no such config file\n")


def test_a_config_of_the_users_own_comes_first(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dlc.yaml").write_text(f"include: [{REPO}/configs/dlc.yaml]\nscale: mine\n")
    done = one4d("fit", "--config", "configs/dlc.yaml", "--print-config", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "scale: mine" in done.stdout
