"""README and docs/: every link leads somewhere, every path exists, every command parses, no table is stale."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from docs.tables import TABLES, pages, renew
from one4d_pl.__main__ import COMMANDS
from one4d_pl.commands.command import Command
from one4d_pl.config import load_config
from tests.conftest import REPO

PAGES = [*pages(), REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md"]
LINKED = [*PAGES, REPO / "docs/nano/report.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
FOLDERS = ("one4d_pl/", "data_prep/", "configs/", "slurm/", "tests/", "docs/", "examples/", "experiments/")
# programs of others
FOREIGN = {"git", "cd", "mkdir", "cp", "tail", "pip", "uv", "docker", "apptainer"}
FOREIGN |= {".venv/bin/tensorboard", ".ci/run", "pre-commit"}
HOLE = "…"


def name(path: Path) -> str:
    return str(path.relative_to(REPO))


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


# --- size, tables, links


def test_the_readme_is_read_in_five_minutes() -> None:
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1500


@every_page
def test_no_table_is_stale(page: Path) -> None:
    text = page.read_text()
    assert renew(text) == text, "make docs-tables"


def test_every_table_is_shown() -> None:
    shown = re.findall(r"<!-- table: ([\w-]+) -->", "".join(page.read_text() for page in PAGES))
    assert set(shown) == set(TABLES)


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        path = page.parent / target if target else page
        assert path.exists(), f"no {target}"
        if anchor:
            assert anchor in anchors(path), f"no #{anchor} in {target}"


def test_every_page_is_on_the_list_and_in_the_menu() -> None:
    listed, menu = (REPO / "docs/README.md").read_text(), (REPO / "mkdocs.yml").read_text()
    for page in (REPO / "docs").glob("*.md"):
        if page.name != "README.md":
            assert f"]({page.name})" in listed and f": {page.name}\n" in menu


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that a forge and MkDocs agree on."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {text.replace(" ", "-") for text in plain} & {re.sub(r"[\s-]+", "-", text) for text in plain}


# --- paths


@every_page
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    words = [
        *SPAN.findall(FENCE.sub("", text)),
        *re.findall(r"[\w./*-]+", "".join(body for _, body in FENCE.findall(text))),
    ]
    for word in words:
        if word.startswith(FOLDERS) and not re.search(r"[\s{}<>…]|\.\.\.", word):
            assert list(REPO.glob(word.rstrip("/"))), f"no {word}"


@every_page
def test_what_is_cited_is_public(page: Path) -> None:
    assert not re.search(r"\.\./shared|paper\.md|design\.md|protocol\.md", page.read_text())


# --- commands


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command in a page's shell blocks."""
    for language, body in FENCE.findall(page.read_text()):
        if language == "sh":
            for line in body.replace("\\\n", " ").splitlines():
                words: list[str] = []
                for word in [*shlex.split(line, comments=True), "&&"]:
                    if word != "&&":
                        words.append(word)
                    elif words:
                        yield words
                        words = []


@every_page
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        understand(words)


@every_page
def test_commands_in_the_text_have_these_options(page: Path) -> None:
    for span in SPAN.findall(FENCE.sub("", page.read_text())):
        if found := re.match(r"(?:\.venv/bin/)?one4d ([a-z-]+)\b(.*)", span):
            options = parser_of(command(found[1]))._option_string_actions
            assert set(re.findall(r"(?<!\S)--[\w-]+", found[2])) <= set(options), span
        elif found := re.match(r"make ([a-z].*)", span):
            understand(["make", *shlex.split(found[1].replace("...", "x"))])


def understand(words: list[str]) -> None:
    """Fail unless the words are a command of ours that parses, or one of another program."""
    variables = {}
    while "=" in words[0]:
        key, value = words.pop(0).split("=", 1)
        variables[key] = value
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if words[0] in FOREIGN:
        return
    if program == "make":
        make(rest)
    elif program == "one4d":
        parse(command(rest[0]), rest[1:])
    elif program == "python" and rest[0] == "-m":
        module(rest[1], rest[2:])
    elif program == "sbatch":
        script = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        slurm(rest[script], rest[script + 1 :], variables)
    else:
        slurm(program, rest, variables)


def make(words: list[str]) -> None:
    makefile = (REPO / "Makefile").read_text()
    for word in words:
        key, is_variable, _ = word.partition("=")
        known = rf"\b{key}\b" if is_variable else rf"^{key}:"
        assert re.search(known, makefile, re.MULTILINE), f"make {word}"


def module(dotted: str, words: list[str]) -> None:
    if dotted == "pytest":
        assert all((REPO / word).exists() for word in words if word.startswith("tests"))
    elif dotted == "one4d_pl":
        parse(command(words[0]), words[1:])
    elif isinstance(main := getattr(importlib.import_module(runnable(dotted)), "main", None), Command):
        parse(main, words)
    else:
        source = (REPO / f"{dotted.replace('.', '/')}.py").read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), dotted


def runnable(dotted: str) -> str:
    return f"{dotted}.__main__" if (REPO / dotted.replace(".", "/")).is_dir() else dotted


def slurm(script: str, words: list[str], variables: dict[str, str]) -> None:
    assert (REPO / script).is_file(), script
    source = (REPO / script).read_text()
    assert all(re.search(rf"\b{key}\b", source) for key in variables)
    if script == "slurm/prep.sh":
        module(f"data_prep.{words[0]}", words[1:])
    elif script == "slurm/eval.sh":
        parse(command("evaluate"), words)
    elif overrides := variables.get("OVERRIDES"):
        nodes = f"train.num_nodes={variables.get('NODES', '8')}"
        configs = ["dlc", "scale/wan_14b", "data/one4d_mix", "scale/nodes_8x8"]
        load_config([f"configs/{config}.yaml" for config in configs], [nodes, *overrides.split()])


def command(word: str) -> Command:
    assert word in COMMANDS, f"one4d {word}"
    found = importlib.import_module("one4d_pl.fit" if word == "fit" else f"one4d_pl.commands.{word.replace('-', '_')}")
    return found.main


def parser_of(main: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=main.name)
    main.add_arguments(parser)
    return parser


def parse(main: Command, words: list[str]) -> None:
    """Parse the words; SystemExit, which pytest shows, or ConfigError for an unknown knob where they are wrong."""
    args = parser_of(main).parse_args(words)
    if isinstance(getattr(args, "config", None), list):
        load_config(args.config, args.overrides)


@every_page
def test_python_is_as_the_code_has_it(page: Path) -> None:
    for language, body in FENCE.findall(page.read_text()):
        if language == "python":
            for node in ast.walk(ast.parse(body)):
                if isinstance(node, ast.ImportFrom):
                    assert all(hasattr(importlib.import_module(str(node.module)), alias.name) for alias in node.names)
                if isinstance(node, ast.Call):
                    from one4d_pl.inference.pipeline import One4DPipeline
                    from one4d_pl.scene.scene import Scene

                    method = node.func.attr if isinstance(node.func, ast.Attribute) else "__call__"
                    called = getattr(One4DPipeline, method)
                    assert {str(keyword.arg) for keyword in node.keywords} <= set(inspect.signature(called).parameters)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "scene":
                    assert node.attr in Scene.__dataclass_fields__, node.attr


# --- messages


@cache
def messages() -> str:
    """Return every string of the code on a line of its own, with a hole where a value is put in."""
    found = []
    for folder in ("one4d_pl", "data_prep"):
        for path in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(p.value if isinstance(p, ast.Constant) else HOLE for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    scripts = [path.read_text() for path in [*(REPO / "slurm").glob("*.sh"), REPO / "Makefile"]]
    return "\n".join([*(text.replace("\n", " ") for text in found), *scripts])


def test_messages_of_the_troubleshooting_page_are_the_codes_own() -> None:
    lines = [line for line in (REPO / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    assert len(lines) > 40
    unknown = []
    for line in lines:
        said = SPAN.findall(line)[0]
        parts = [re.escape(part) for part in re.split(rf"\s*{HOLE}\s*", said) if part]
        if not re.search(".*?".join(parts), messages()):
            unknown.append(said)
    assert not unknown
