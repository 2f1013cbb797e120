"""The floors of the house: imports point down only, lazy ones inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGES = ("one4d_pl", "data_prep", "experiments")

# Rooms on one floor do not import each other. data_prep may use any room of the package, none uses it; experiments too.
FLOORS = (
    "errors interrupts progress",
    "files",
    "config types",
    "geometry toy",
    "data models diffusion metrics postopt costs",
    "scene",
    "inference",
    "training evaluation",
    "cluster callbacks",
    "rehearsal",
    "commands",
    "fit data_prep",
    "experiments",
)
SHELF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()} | {"one4d_pl": -1}
ROOMLESS = {"utils", "util", "common", "misc", "helpers"}


def room_of(dotted: str) -> str | None:
    """The room of a dotted name, "one4d_pl" for the bare package, None for what is not ours."""
    package, *inner = dotted.split(".")
    if package not in PACKAGES:
        return None
    return inner[0] if package == "one4d_pl" and inner and not inner[0].startswith("__") else package


def imported_names(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a module that lives in `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*stem, alias.name])) for alias in node.names)


def violations(repo: Path) -> list[str]:
    """One line per import that does not go down, and one per file whose room has no floor."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (repo / package).rglob("*.py")):
        module = list(path.relative_to(repo).with_suffix("").parts)
        importer = room_of(".".join(module))
        if importer not in SHELF:
            found.append(f"{path.relative_to(repo)}: no floor for {importer}; give it one in FLOORS")
            continue
        for lineno, name in imported_names(ast.parse(path.read_text(encoding="utf-8")), module[:-1]):
            imported = room_of(name)
            if imported is None or imported == importer:
                continue
            where = f"{path.relative_to(repo)}:{lineno}: {importer} (floor {SHELF[importer]}) imports {imported}"
            if imported not in SHELF:
                found.append(f"{where}, which has no floor; give it one in FLOORS")
            elif SHELF[imported] >= SHELF[importer]:
                found.append(f"{where} (floor {SHELF[imported]})")
    return found


def test_imports_only_go_down_the_floors() -> None:
    assert not violations(REPO), "\n".join(violations(REPO))


def test_there_is_no_room_for_odds_and_ends() -> None:
    modules = [path for package in PACKAGES for path in (REPO / package).rglob("*.py")]
    assert REPO / "one4d_pl" / "types.py" in modules  # the walk sees the real tree
    assert not [path for path in modules if ROOMLESS & set(path.relative_to(REPO).with_suffix("").parts)]


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("one4d_pl/geometry/se3.py", "from one4d_pl.types import Clip", None),
        ("one4d_pl/geometry/se3.py", "from .camera import project\nimport torch", None),
        ("one4d_pl/training/module.py", "from one4d_pl import config, geometry", None),
        ("data_prep/stats.py", "from one4d_pl.evaluation.benchmarks import read_tum", None),
        ("one4d_pl/geometry/se3.py", "import one4d_pl.models.wan", "geometry (floor 3) imports models (floor 4)"),
        (
            "one4d_pl/data/sample_order.py",
            "from one4d_pl.metrics import depth",
            "data (floor 4) imports metrics (floor 4)",
        ),
        ("one4d_pl/types.py", "from one4d_pl import config", "types (floor 2) imports config (floor 2)"),
        (
            "one4d_pl/models/wan.py",
            "def load():\n    from ..training import optim",
            "models (floor 4) imports training",
        ),
        ("one4d_pl/data/sub/deep.py", "from ...fit import main", "data (floor 4) imports fit (floor 11)"),
        ("one4d_pl/__init__.py", "from .config import load_config", "one4d_pl (floor -1) imports config (floor 2)"),
        ("one4d_pl/fit.py", "import data_prep.stats", "fit (floor 11) imports data_prep (floor 11)"),
        ("data_prep/stats.py", "from one4d_pl import fit", "data_prep (floor 11) imports fit (floor 11)"),
        ("one4d_pl/utils.py", "", "no floor for utils"),
        ("one4d_pl/fit.py", "from one4d_pl.helpers import x", "imports helpers, which has no floor"),
    ],
)
def test_the_checker_sees_what_it_should(tmp_path: Path, file: str, source: str, complaint: str | None) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    found = violations(tmp_path)
    assert len(found) == (complaint is not None), found
    assert complaint is None or complaint in found[0]
