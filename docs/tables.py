"""Write the tables of README and docs/ that the code itself knows: make docs-tables.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->` in a Markdown file. This command makes each
one again from dataclasses, configs and registries, without a GPU, weights or a run. `--check` changes nothing and ends
with 1 where a table is stale; tests/test_docs.py looks too.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data_prep.sources import bedlam, generic, omniworld, pointodyssey, registry, rgbd, spatialvid, tartanair
from data_prep.sources.labels import TOOLS
from experiments.nano.experiments import CLAIMS, LABELS, RUNS
from one4d_pl.__main__ import COMMANDS
from one4d_pl.cluster.signals import PREEMPTED
from one4d_pl.cluster.watchdog import HUNG
from one4d_pl.commands.command import PIPE_CLOSED, USER_ERROR
from one4d_pl.commands.plan import fastest_fit, plan, plan_text
from one4d_pl.config import Config, ConfigError, as_dict, flatten, load_config
from one4d_pl.costs.memory import GPU_GIB, Layout
from one4d_pl.costs.sampling import best_mode, scene_seconds
from one4d_pl.evaluation.protocols import PROTOCOLS
from one4d_pl.interrupts import INTERRUPTED

REPO = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
LARGE = ["configs/dlc.yaml", "configs/scale/wan_14b.yaml", "configs/data/one4d_mix.yaml"]
SMALL = ["configs/dlc.yaml", "configs/scale/wan_1_3b.yaml", "configs/data/one4d_mix.yaml"]
NODES = [*LARGE, "configs/scale/nodes_8x8.yaml"]
# the released sizes, whatever weights lie on this machine
ABSENT = {"14B": "base.path=absent/Wan2.1-Fun-V1.1-14B-InP", "1.3B": "base.path=absent/Wan2.1-Fun-V1.1-1.3B-InP"}


def pages() -> list[Path]:
    """Return the Markdown files that may hold tables."""
    return [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def renew(text: str) -> str:
    """Return a page with every marked table made again; KeyError for a name that TABLES lacks."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- knobs


def _knobs() -> str:
    """List every section of the config with its knobs, and what the source says beside each."""
    parts = []
    for prefix, section, title in _sections(Config, ""):
        head = f"### `{prefix}`" if prefix else "### Top level"
        about = "" if prefix == "" else f"\n\n{' '.join(title.split())}"
        rows = [
            [f"`{field.name}`", _default(field), _allowed(field, hint), "yes" if free else "", note]
            for field, hint, free, note in _fields(section)
        ]
        parts.append(f"{head}{about}\n\n{_table(['knob', 'default', 'allowed', 'may change on resume', 'what'], rows)}")
    return "\n\n".join(parts)


def _sections(section: type, prefix: str) -> Iterator[tuple[str, type, str]]:
    """Yield dotted name, class and docstring of a config class and of all below it, as they are declared."""
    yield prefix, section, section.__doc__ or ""
    for name, hint in get_type_hints(section).items():
        if (kind := _dataclass_in(hint)) and name != "guidance_xyz":  # the same knobs as guidance
            yield from _sections(kind, f"{prefix}.{name}".lstrip("."))


def _fields(section: type) -> Iterator[tuple[dataclasses.Field[Any], Any, bool, str]]:
    """Yield field, type, whether a resume may change it, and note, of each knob that is no section of the top."""
    hints, notes = get_type_hints(section), _notes(section)
    for field in dataclasses.fields(section):
        if not (section is Config and _dataclass_in(hints[field.name])):
            yield field, hints[field.name], bool(field.metadata.get("may_change")), notes[field.name]


def _dataclass_in(hint: Any) -> type | None:
    """Return the config class that a field holds itself, alone or as `X | None`."""
    found = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
    return found[0] if found and not str(hint).startswith("list") else None


def _notes(section: type) -> dict[str, str]:
    """Return the comments above and beside each field, by the field's name."""
    source = inspect.getsource(section)
    comments, whole_lines = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
            if token.line.strip().startswith("#"):
                whole_lines.add(token.start[0])
    found = {}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            while first - 1 in whole_lines:
                first -= 1
            found[node.target.id] = " ".join(comments[line] for line in range(first, last + 1) if line in comments)
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else "needed"
    if dataclasses.is_dataclass(value):
        return "a section of its own"
    return f"`{_value(value)}`" if value != "???" else "needed"


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _allowed(field: dataclasses.Field[Any], hint: Any) -> str:
    bounds = field.metadata
    if bounds.get("one_of"):
        return ", ".join(f"`{choice}`" for choice in bounds["one_of"])
    if hint is bool:
        return "`true`, `false`"
    low, above, high = (bounds.get(name) for name in ("low", "above", "high"))
    if low is not None:
        return f"{low:g} to {high:g}" if high is not None else f">= {low:g}"
    return f"> {above:g}" if above is not None else ""


# --- scales, configs


def _scales() -> str:
    """Compare the shipped scales by the knobs in which they differ."""
    files = {"tiny": LARGE[:1], "1.3B": SMALL, "14B (the paper's)": LARGE, "14B on 8 x 8": NODES}
    flat = {name: flatten(as_dict(load_config(configs, []))) for name, configs in files.items()}
    left_out = re.compile(r"data\.(sources|val_sources|toy)|run_dir|scale$|base\.(negative_prompt|path|tiny)")
    keys = [key for key in flat["tiny"] if not left_out.match(key)]
    rows = [
        [f"`{key}`", *(f"`{_value(values.get(key))}`" for values in flat.values())]
        for key in keys
        if len({str(values.get(key)) for values in flat.values()}) > 1
    ]
    return _table(["knob", *files], rows)


def _configs() -> str:
    """List every shipped config with the first sentence of its comment."""
    rows = []
    for path in sorted((REPO / "configs").rglob("*.yaml")):
        lines = path.read_text().splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("# "))
        sentence = re.split(r"(?<!sec)[.;] |  +", f"{comment} ")[0]
        rows.append([f"`configs/{path.relative_to(REPO / 'configs')}`", sentence])
    return _table(["config", "what it is"], rows)


# --- data, evaluation, commands


def _sources() -> str:
    """List every source of training data with its licence tag and default stride."""
    modules = {
        module.__name__.rsplit(".", 1)[-1]: module
        for module in (bedlam, generic, omniworld, pointodyssey, rgbd, spatialvid, tartanair)
    }
    rows = []
    for name in registry.SOURCES:
        if tool := TOOLS.get(name):
            rows.append([f"`{name}`", f"clips that {tool.title} has labelled", f"labels: `{tool.LICENCE}`", "1"])
            continue
        sentence = " ".join((modules[name].__doc__ or "").split("\n\n")[0].split()).split(";")[0].rstrip(".")
        licences = getattr(modules[name], "LICENCES", None) or {"": getattr(modules[name], "LICENCE", "")}
        tags = ", ".join(f"{layout and f'{layout}: '}`{tag}`" for layout, tag in licences.items() if tag)
        rows.append(
            [
                f"`{name}`",
                sentence.replace("->", "to"),
                tags or "named in each clip",
                str(registry.DEFAULT_STRIDES[name]),
            ]
        )
    rows.append(["`toy`", "the procedural world, rendered", "`CC0-1.0`", ""])
    return _table(["source", "what is read", "licence tag", "stride"], rows)


def _protocols() -> str:
    """List every protocol with its fit and its limits."""
    rows = []
    for protocol in PROTOCOLS.values():
        cut = " ".join(f"{name} {limit:g} m" for name, limit in protocol.post_clip.items())
        scored = " ".join(f"{name} < {limit:g} m" for name, limit in protocol.max_depth.items())
        on = "the prediction's valid pixels" if protocol.use_fit_valid else "all scored pixels"
        rows.append([f"`{protocol.name}`", f"`{protocol.alignment}`", on, cut or "none", scored])
    return _table(
        ["protocol", "depth fit, per sequence", "fitted on", "aligned depth cut at", "true depth scored"], rows
    )


def _nano_claims() -> str:
    """List the claims that `make nano` decides, as they were fixed before its runs."""
    rows = [
        [str(n), c.text, c.source, f"`{c.better}` before `{c.than}`", LABELS[c.metric], c.margin, c.seeds]
        for n, c in enumerate(CLAIMS, 1)
    ]
    return _table(["", "claim", "source", "runs", "metric", "margin", "seeds"], rows)


def _nano_runs() -> str:
    """List the runs of `make nano` with what each changes."""
    rows = []
    for run in RUNS.values():
        changes = [f"`{override}`" for override in run.overrides]
        changes += [run.broken.replace("_", " ")] if run.broken else []
        changes += [f"a share of {run.given:g} of the frames is given"] if run.given and not run.broken else []
        rows.append([f"`{run.name}`", run.kind, str(run.seeds), ", ".join(changes)])
    return _table(["run", "kind", "seeds", "what it changes"], rows)


def _commands() -> str:
    """List every command of one4d."""
    return _table(["command", "what it does"], [[f"`one4d {name}`", words] for name, words in COMMANDS.items()])


def _exit_codes() -> str:
    """List every exit code."""
    rows = [
        (0, "done", "every command"),
        (1, "a failure; its line or traceback is in `logs/`", "every command"),
        (USER_ERROR, "a mistake of the user, said in one line; starting again would not help", "every command"),
        (PREEMPTED, "preempted: saved, marker left; start again", "`fit`"),
        (HUNG, "hung: see `train.hang_minutes`; every rank's stacks are in `logs/`; start again", "`fit`"),
        (INTERRUPTED, "interrupted from the keyboard", "every command"),
        (PIPE_CLOSED, "the reader of the output has closed the pipe", "every command"),
    ]
    return _table(["exit code", "meaning", "of"], [[str(code), meaning, of] for code, meaning, of in rows])


# --- costs


def _plan() -> str:
    """Print what `one4d plan` says of the 14B on 64 GPUs."""
    return f"```text\n{plan_text(plan(load_config(NODES, [ABSENT['14B']]), 64, 'H200', 0.5))}\n```"


CARDS = ("RTX 4080", "RTX 4090", "RTX 5090", "A100-40GB", "L40S", "H100", "H200")
PAPER_STEPS = 5500
HOST_GIB = 64.0  # of a desktop with one of the first three


def _gpus() -> str:
    """Plan what one GPU alone can do, by the fastest way that fits."""
    rows = []
    for gpu in CARDS:
        row = [f"{gpu}, {GPU_GIB[gpu]:g} GiB"]
        for size, configs in (("14B", LARGE), ("1.3B", SMALL)):
            run = plan(load_config(configs, ["train.devices=1", ABSENT[size]]), 1, gpu, 0.5)
            try:
                way = fastest_fit(run, HOST_GIB if gpu.startswith("RTX") else None)
                row += [_in_words(way), _span(run.seconds(way) * PAPER_STEPS)]
            except ConfigError:
                row += ["does not fit", ""]
            batch = replace(run.batch, clips=1)
            mode = best_mode(run.shape, batch, run.layout, GPU_GIB[gpu] * 2**30)
            assert mode is not None
            seconds = scene_seconds(run.shape, batch, run.layout, mode, run.sampler_steps, run.speed)
            how = " (int8, blocks visit)" if mode.offload else " (int8)" if mode.quantisation != "none" else ""
            row.append(f"{_span(seconds)}{how}")
        rows.append(row)
    steps = f"{PAPER_STEPS:,} steps"
    return _table(["one GPU", "trains the 14B", steps, "a 14B scene", "trains the 1.3B", steps, "a 1.3B scene"], rows)


def _span(seconds: float) -> str:
    """Say a time in its largest unit, to two digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{seconds:.0f} s"


def _in_words(way: Layout) -> str:
    """Say briefly how a training saves memory."""
    words = ["int8"] if way.quantised else []
    words += ["blocks visit"] if way.visiting else []
    words += [f"ZeRO-{way.zero_stage}"] if way.zero_stage else []
    words += ["AdamW on host"] if way.offload else []
    words += ["inputs on host"] if way.checkpointing == "offload" else [f"recompute {way.checkpointing}"]
    return ", ".join(words)


def _clusters() -> str:
    """Plan the memory per GPU of trainings on several GPUs, and name the GPUs that hold it."""
    ways: list[tuple[str, list[str], list[str], int]] = [
        ("14B, 8 GPUs, ddp (the paper's)", LARGE, [], 8),
        ("14B, 8 GPUs, ddp, int8", LARGE, ["base.quantisation=int8"], 8),
        ("14B, 8 GPUs, ZeRO-3", LARGE, ["train.strategy=deepspeed", "train.zero_stage=3"], 8),
        ("14B, 64 GPUs, ZeRO-2", NODES, [], 64),
    ]
    rows = []
    for name, configs, overrides, gpus in ways:
        run = plan(load_config(configs, [*overrides, ABSENT[name.split(",")[0]]]), gpus, "H100", 0.5)
        memory = run.memory(run.layout)
        holding = [gpu for gpu, size in GPU_GIB.items() if memory.fits(size * 2**30)]
        rows.append([name, f"{memory.total / 2**30:.1f} GiB", ", ".join(holding) or "none"])
    return _table(["training", "planned per GPU", "GPUs that hold it"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "knobs": _knobs,
    "scales": _scales,
    "configs": _configs,
    "sources": _sources,
    "protocols": _protocols,
    "nano-claims": _nano_claims,
    "nano-runs": _nano_runs,
    "commands": _commands,
    "exit-codes": _exit_codes,
    "plan": _plan,
    "gpus": _gpus,
    "clusters": _clusters,
}


def main(arguments: list[str]) -> int:
    """Renew the tables of all pages; return 1 where --check finds a stale one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, name the pages with stale tables")
    check = parser.parse_args(arguments).check
    stale = []
    for page in pages():
        old = page.read_text()
        if (new := renew(old)) != old:
            stale.append(page.relative_to(REPO))
            if not check:
                page.write_text(new)
    for name in stale:
        print(f"{name}: {'stale tables; make docs-tables' if check else 'tables written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
