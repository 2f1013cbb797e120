"""python -m experiments.gpu_proof --out DIR: ten minutes on a machine with one GPU that show that all of it runs there.

The tests that are marked `gpu`; a true step of the 14B and of the 1.3B with the speed table (bench_gpu.py); the
toy world trained on the GPU, and again under ZeRO-3 on one rank; a sampled scene. Each is a command of its own with a
limit of time. DIR gets report.md, report.json and every command's log. --tiny is the same in a minute on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from experiments.bench_gpu import device_name
from one4d_pl.commands.command import Command
from one4d_pl.config import ConfigError
from one4d_pl.files import check_folder, write_json, write_text

REPO = Path(__file__).parents[1]
TOY = REPO / "configs" / "dlc.yaml"
PYTHON_M = [sys.executable, "-m"]
STEP_LINE = re.compile(r"step (\d+)/\d+ \| rgb ([\d.]+) \| xyz ([\d.]+) \| ([\d.e-]+) s/step")  # of StepLine
NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True)
class Part:
    """One command of the proof."""

    name: str
    shows: str
    command: list[str]
    limit_s: float
    read: Callable[[str], dict[str, object]]  # extracts its results from what it printed
    table: Path | None = None  # a json file that the report keeps whole


@dataclass
class Outcome:
    """The outcome of a part."""

    name: str
    shows: str
    command: str
    verdict: str  # passed, or why not
    seconds: float
    found: dict[str, object] = field(default_factory=dict)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_proof"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a minute on a CPU")


def _run(args: argparse.Namespace) -> int:
    """Run every part and write the report; return the exit code: 1 where a part failed."""
    if not torch.cuda.is_available() and not args.tiny:
        raise ConfigError("no CUDA device; --tiny runs the same on a CPU")
    out: Path = args.out.absolute()
    check_folder(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    outcomes = []
    for part in parts(out, args.tiny):
        print(f"{part.name} ...", flush=True)
        outcomes.append(run(part, out))
        print(f"  {outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s", flush=True)
    about = {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    write_json(out / "report.json", {**about, "parts": [asdict(outcome) for outcome in outcomes]})
    write_text(out / "report.md", "\n".join(markdown(about, outcomes)) + "\n")
    print(f"report: {out / 'report.md'}")
    return 0 if all(outcome.verdict == "passed" for outcome in outcomes) else 1


def parts(out: Path, tiny: bool) -> Iterator[Part]:
    """List the parts, the quickest to find a fault first."""
    bench = ["--tiny", "--steps", "1", "--warmup", "1"] if tiny else ["--steps", "3", "--warmup", "1"]
    yield Part(
        "tests",
        "the tests marked gpu pass",
        [*PYTHON_M, "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(REPO / "tests/gpu")],
        150,
        lambda text: {"summary": _last(r"^.*\d+ (?:passed|skipped|failed).*$", text)},
    )
    yield Part(
        "training",
        "the toy world is learnt on this device",
        _fit(out / "training", tiny, f"train.max_steps={4 if tiny else 100}"),
        180,
        _losses,
    )
    yield Part(
        "zero3",
        "DeepSpeed ZeRO-3 on one rank trains the same",
        _fit(
            out / "zero3",
            tiny,
            f"train.max_steps={2 if tiny else 10}",
            "train.strategy=deepspeed",
            "train.zero_stage=3",
        ),
        150,
        _losses,
    )
    scene = out / "scene"
    yield Part(
        "scene",
        "the shipped adapters sample a scene",
        [
            *PYTHON_M,
            "one4d_pl",
            "generate",
            "--prompt",
            "a red cube on a table",
            "--out",
            str(scene),
            "--steps",
            "2" if tiny else "10",
        ],
        90,
        lambda text: {"files": sorted(path.name for path in scene.iterdir()) if scene.is_dir() else []},
    )
    yield Part(
        "speed",
        "a true step of the 14B and of the 1.3B",
        [*PYTHON_M, "experiments.bench_gpu", *bench, "--out", str(out / "speed.json")],
        300,
        lambda text: {"table": [line for line in text.splitlines() if not line or line.startswith("|")]},
        out / "speed.json",
    )


def run(part: Part, out: Path) -> Outcome:
    """Run one part; what it prints goes to its log."""
    log, began = out / f"{part.name}.log", time.perf_counter()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                part.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=part.limit_s
            ).returncode
            verdict = (
                "passed" if code in (0, NO_TESTS if part.name == "tests" else 0) else f"failed with exit code {code}"
            )
        except subprocess.TimeoutExpired:
            verdict = f"not done after {part.limit_s:.0f} s"
    text = log.read_text(errors="replace")
    found = part.read(text)
    if verdict != "passed":
        found["last lines"] = text.splitlines()[-5:]
        verdict = f"{verdict}; see {log.name}"
    elif part.table is not None:
        found["json"] = json.loads(part.table.read_text())
    return Outcome(part.name, part.shows, " ".join(part.command[1:]), verdict, time.perf_counter() - began, found)


def markdown(about: Mapping[str, object], outcomes: list[Outcome]) -> list[str]:
    """Write the report for people."""
    lines = ["# Proof on a GPU", "", ", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += ["| part | shows that | verdict | s |", "|---|---|---|---:|"]
    lines += [f"| {o.name} | {o.shows} | {o.verdict} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}", "", f"`{outcome.command}`", ""]
        for name, value in outcome.found.items():
            if name == "table" and isinstance(value, list):
                lines += value
            elif name != "json":
                lines.append(f"- {name}: {value}")
    return lines


def _fit(folder: Path, tiny: bool, *overrides: str) -> list[str]:
    """Make the command of a fresh `fit` on the toy world in a folder of its own. Both runs share the data."""
    data = folder.parent / "data"
    clips = 16 if tiny else 128
    sources = [f"data.sources=[{{path: {data}/train_synthetic}}]", f"data.val_sources=[{{path: {data}/val}}]"]
    toy = [f"data.toy.root={data}", f"data.toy.train_synthetic={clips}", "data.toy.train_real=0", "data.toy.val=2"]
    quiet = ["val.clips=2", "val.sigmas=[0.5]", "eval.every=0", "train.log_every=1", "train.resume=false"]
    small = ["train.global_batch_size=4", "train.micro_batch_size=4", "data.num_workers=0"] if tiny else []
    rest = [*sources, *toy, *quiet, *small, f"run_dir={folder}", *overrides]
    return [*PYTHON_M, "one4d_pl.fit", "--config", str(TOY), *rest]


def _losses(text: str) -> dict[str, object]:
    """Read the first and last logged losses, and the seconds of the last step."""
    steps = STEP_LINE.findall(text)
    if not steps:
        return {"steps": 0}
    (_, rgb_first, xyz_first, _), (last, rgb, xyz, seconds) = steps[0], steps[-1]
    return {
        "steps": int(last),
        "rgb": f"{rgb_first} -> {rgb}",
        "xyz": f"{xyz_first} -> {xyz}",
        "s/step": float(seconds),
        "memory": _last(r"[\d.]+ GiB", text),
    }


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    return found[-1] if found else "nothing"


main = Command("python -m experiments.gpu_proof", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
