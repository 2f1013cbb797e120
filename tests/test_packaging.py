"""What installs the package says the same everywhere: versions, extras, exact pins, both container files."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import one4d_pl
from one4d_pl.training.loggers import ContinuedCSV, _ContinuedWriter
from one4d_pl.training.module import One4DModule
from one4d_pl.training.zero import ZeroPrecision, ZeroStrategy
from tests.conftest import REPO
from tests.test_wheel import SOURCES

PAGE = (REPO / "docs/install.md").read_text()
# one dotted name a line, below a comment
INTERNALS = re.findall(r"^((?:lightning|deepspeed|peft)\.[\w.]+)$", PAGE, re.MULTILINE)
PINNED = ("lightning", "deepspeed", "peft")  # whose internals were used at some time
# torch's own, in files that use those packages too; torch is a range, and the tests run with the newest
OF_TORCH = {"_C", "_current_graph_task_id", "_execution_engine", "_get_default_store", "_foreach_lerp_"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPO / "setup.cfg")
    return parser


def requirements(section: str, key: str) -> list[Requirement]:
    lines = setup_cfg()[section][key].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


# --- versions and extras


def test_the_newest_release_in_the_changelog_is_this_version() -> None:
    titles = re.findall(r"^## \[(.+)\](?: - (\d{4}-\d\d-\d\d))?$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == ("Unreleased", "")
    released = re.findall(r"^date-released: (.*)$", (REPO / "CITATION.cff").read_text(), re.MULTILINE)
    assert titles[1] == (one4d_pl.__version__, *released)


def test_every_requirement_has_a_tested_version_within_its_range() -> None:
    extras = setup_cfg()["options.extras_require"]
    wanted = [*requirements("options", "install_requires")]
    wanted += [r for extra in extras for r in requirements("options.extras_require", extra) if r.name != "one4d_pl"]
    lines = (REPO / "constraints.txt").read_text().splitlines()
    tested = {r.name: r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    for requirement in wanted:
        if str(requirement.specifier).startswith("=="):
            continue
        (specifier,) = tested[requirement.name].specifier
        assert requirement.specifier.contains(specifier.version), f"constraints.txt: {requirement}"


def test_every_extra_is_described() -> None:
    table = PAGE.partition("## Extras")[2].partition("## ")[0]
    extras = set(setup_cfg()["options.extras_require"])
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == extras


def test_every_pip_finds_the_extras() -> None:
    # the wheel names them with a hyphen; pip below 23.3 looks for what was typed, warns, and installs nothing of it
    assert not [extra for extra in setup_cfg()["options.extras_require"] if "_" in extra]
    asked = re.findall(r"(?:one4d_pl|'\.)\[([\w,-]+)\]", "".join(path.read_text() for path in installers()))
    assert len(asked) > 5 and not [extras for extras in asked if "_" in extras]


def installers() -> list[Path]:
    """Return what names extras: container files, Makefile, pages, and messages of the code."""
    files = [REPO / name for name in ("Dockerfile", "apptainer.def", "Makefile", "setup.cfg")]
    return [*files, *(REPO / "docs").glob("*.md"), *(REPO / "one4d_pl").rglob("*.py")]


# --- exact versions


def test_only_libraries_whose_internals_are_used_are_exact() -> None:
    exact = {r.name for r in requirements("options", "install_requires") if str(r.specifier).startswith("==")}
    assert exact == {name.partition(".")[0] for name in INTERNALS}


@pytest.mark.parametrize("name", INTERNALS)
def test_an_internal_exists_and_is_used(name: str) -> None:
    *path, last = name.split(".")
    owner: ModuleType | type | None = None
    for i, part in enumerate(path):
        try:
            owner = importlib.import_module(".".join(path[: i + 1]))
        except ModuleNotFoundError:
            owner = getattr(owner, part)
    assert owner is not None
    # what __init__ or another method sets stands in the source alone
    assert hasattr(owner, last) or re.search(rf"[.\s]{last}\b", inspect.getsource(owner)), name
    assert any(last in path.read_text() for path in (REPO / "one4d_pl/training").glob("*.py"))


def test_no_other_internal_is_used() -> None:
    allowed = {name.rpartition(".")[2] for name in INTERNALS} | OF_TORCH
    trees = {path: ast.parse(path.read_text()) for path in (REPO / "one4d_pl").rglob("*.py")}
    allowed |= {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for path, tree in trees.items():
        if imported(tree).isdisjoint(PINNED):
            continue
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
                names = [node.attr.removeprefix("_PartitionedParameterCoordinator")]
            for name in names:
                assert not re.match("_[^_]", name) or name in allowed, f"{path.relative_to(REPO)}: {name}"


@pytest.mark.parametrize("ours", [ZeroStrategy, ZeroPrecision, ContinuedCSV, _ContinuedWriter, One4DModule])
def test_no_other_internal_is_overridden(ours: type) -> None:
    listed = {name.rpartition(".")[2] for name in INTERNALS}
    theirs = {name for base in ours.__mro__[1:] if base.__module__.startswith("lightning") for name in vars(base)}
    overridden = {name for name in theirs & vars(ours).keys() if re.match("_[^_]", name)}
    assert overridden - {"_abc_impl"} <= listed  # Python's own, in every abstract class


def imported(tree: ast.Module) -> set[str]:
    """Return the packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


# --- containers


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, comments left out, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (REPO / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [re.sub(r"\s+", " ", line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def definition() -> dict[str, list[str]]:
    """Return the lines of each section of apptainer.def, continued lines joined; the header is section ''."""
    text = re.sub(r"^\s*#.*\n", "", (REPO / "apptainer.def").read_text(), flags=re.MULTILINE)
    sections: dict[str, list[str]] = {"": []}
    lines = sections[""]
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("%"):
            lines = sections[line[1:]] = []
        elif line.strip():
            lines.append(re.sub(r"\s+", " ", line.strip()))
    return sections


def test_both_container_files_take_the_same_steps() -> None:
    runs = [rest for word, rest in dockerfile() if word == "RUN" and not rest.startswith("useradd")]
    sections = definition()
    shell = [line for line in sections["post"] if line.startswith(("apt-get", "python3", "pip"))]
    assert shell == runs and len(runs) == 3
    assert sections["arguments"] == [rest for word, rest in dockerfile() if word == "ARG"]
    (path,) = [rest for word, rest in dockerfile() if word == "ENV" and rest.startswith("PATH=")]
    assert [line.replace('"', "") for line in sections["environment"]] == [f"export {path}"]
    assert sections["runscript"] == ['exec one4d "$@"'] and ("ENTRYPOINT", '["one4d"]') in dockerfile()


def test_containers_get_what_the_wheel_is_made_of() -> None:
    let_through = [line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(let_through) == sorted([*SOURCES, "constraints.txt"])
    assert definition()["files"] == [f"{name} /src/{name}" for name in let_through]


def test_the_image_is_of_a_named_version_small_and_not_roots() -> None:
    instructions = dockerfile()
    (base,) = [rest.partition("=")[2] for word, rest in instructions if word == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04", base)
    users = [rest for word, rest in instructions if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    for step in (rest for word, rest in instructions if word == "RUN"):
        assert "sudo" not in step
        assert "apt-get install" not in step or "rm -rf /var/lib/apt/lists/*" in step
        assert "pip install" not in step or "--no-cache-dir -c constraints.txt" in step


def test_the_steps_are_shell(tmp_path: Path) -> None:
    script = tmp_path / "steps"
    script.write_text("\n".join([*definition()["post"], *(rest for word, rest in dockerfile() if word == "RUN")]))
    checked = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, timeout=20)
    assert checked.returncode == 0, checked.stderr
