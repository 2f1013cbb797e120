"""The report (report.md, its two figures), from the finished runs' result.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import expm1, isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from experiments.nano.experiments import (
    ALL_TASKS,
    CLAIMS,
    ERROR,
    EXPERIMENTS,
    FD,
    LABELS,
    REFERENCE,
    RGB,
    RUNS,
    XYZ,
    Claim,
    Experiment,
    Run,
    in_decibels,
)
from experiments.nano.verdicts import CONFIDENCE, Verdict, judge
from experiments.nano.work import Plan, Result, differences, read_result
from one4d_pl.files import whole_file, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE_ROWS = {
    "mean": "(mean pointmap of the training clips)",
    "ceiling": "(truth through the shipped VAE)",
    "base": "(the base alone)",
}

Results = Mapping[str, Mapping[int, Result]]  # run -> seed -> what is finished


def write_report(plan: Plan) -> Path:
    """Write the report and return its path; what has not run is said to be so."""
    found = {name: _finished(plan, run) for name, run in RUNS.items()}
    results = {
        name: {seed: r for seed, r in seeds.items() if not differences(plan, RUNS[name], seed, r.recipe)}
        for name, seeds in found.items()
    }
    stale = sum(map(len, found.values())) - sum(map(len, results.values()))
    lines = ["# Nano-One4D", "", *_method(plan, results)]
    if stale:
        lines += ["", f"Left out: {stale} runs under another config than today's."]
    lines += ["", *_claims(results)]
    for experiment in EXPERIMENTS:
        lines += ["", *_section(experiment, results)]
    lines += _figures(results, plan.out / "figures")
    write_text(plan.out / "report.md", "\n".join(lines) + "\n")
    return plan.out / "report.md"


def _finished(plan: Plan, run: Run) -> dict[int, Result]:
    found = ((seed, read_result(plan, run, seed)) for seed in range(run.seeds))
    return {seed: result for seed, result in found if result is not None}


def _method(plan: Plan, results: Results) -> list[str]:
    config = plan.config(RUNS[REFERENCE], 0)
    train, data = config.train, config.data
    finished = [result for seeds in results.values() for result in seeds.values()]
    wanted = sum(run.seeds for run in RUNS.values())
    machines = ", ".join(sorted({result.machine for result in finished})) or "nothing run"
    settings = " ".join(["", *plan.overrides]) if plan.overrides else ""
    return [
        f"`python -m experiments.nano{settings}`: {len(finished)} of {wanted} runs, "
        f"{sum(r.minutes for r in finished):.0f} minutes added up ({machines}; {train.precision}).",
        "",
        f"Every training: {train.max_steps} steps of {train.global_batch_size} toy clips, {data.num_frames} frames of "
        f"{data.height}x{data.width}, adapters from scratch on the shipped base at a learning rate of "
        f"{config.optim.lr:g}, falling over the last {config.optim.cooldown_steps} steps. `given_*`, `guidance_*`, "
        f"`other_clip` and `links_zeroed` sample the adapters of `{REFERENCE}`, seed by seed. Every run is measured on "
        f"the same {plan.clips} held-out clips with the same frames given, but for `given_*`; the seed decides the "
        "noise. ± in a run's row is the standard deviation over seeds.",
        "",
        "A claim holds, or does not, where the difference is beyond what Student's t allows for chance at "
        f"{CONFIDENCE:.0%}, in a model value = run + seed + noise. The noise is pooled over the runs that trained the "
        f"metric's task or, where adapters of `{REFERENCE}` are sampled, over the unbroken ones that sample them. `by` "
        "is how much higher the other run's error is, or dB, and its standard error; positive speaks for the claim, "
        "its margin is not in it. Of claims about what makes no difference one in "
        f"{1 / (1 - CONFIDENCE):.0f} gets a word by chance.",
    ]


def _claims(results: Results) -> list[str]:
    lines = ["## Claims", "", "| | claim | metric | margin | seeds | by | verdict |", "|---|---|---|---|---|---:|---|"]
    for number, claim in enumerate(CLAIMS, 1):
        verdict = judge(claim, {name: _values(name, claim.metric, results) for name in pooled(claim)})
        by, outcome = ("", "not run") if verdict is None else (_by(claim, verdict), f"**{verdict.outcome}**")
        text = f"{claim.text} ({claim.source}; `{claim.better}`, `{claim.than}`)"
        cells = [str(number), text, LABELS[claim.metric], claim.margin, claim.seeds, by, outcome]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pooled(claim: Claim) -> list[str]:
    """List the runs whose noise is like that of the claim's two, themselves among them."""
    if "sample" in (RUNS[claim.better].kind, RUNS[claim.than].kind):
        return [REFERENCE, *(name for name, run in RUNS.items() if run.kind == "sample" and not run.broken)]
    task = claim.metric.partition(".")[0]
    return [name for name, run in RUNS.items() if run.kind == "train" and task in run.trained]


def _section(experiment: Experiment, results: Results) -> list[str]:
    header = ["run", *(LABELS[metric] for metric in experiment.metrics)]
    lines = [f"## {experiment.name}", "", experiment.question, ""]
    lines += [f"| {' | '.join(header)} |", f"|---|{'---:|' * len(experiment.metrics)}"]
    for name in experiment.runs:
        if RUNS[name].kind == "references":
            lines += _reference_rows(experiment, results[name])
            continue
        label = f"`{name}`" if results[name] else f"`{name}` (not run)"
        cells = [_cell(list(_values(name, metric, results).values())) for metric in experiment.metrics]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def _by(claim: Claim, verdict: Verdict) -> str:
    if in_decibels(claim.metric):
        difference, error, unit = verdict.difference, verdict.standard_error, " dB"
    else:
        difference, error, unit = 100 * expm1(verdict.difference), 100 * verdict.standard_error, " %"
    return f"{difference:+.2f}{f' ± {error:.2f}' if isfinite(error) else ''}{unit}"


def _reference_rows(experiment: Experiment, seeds: Mapping[int, Result]) -> list[str]:
    rows = []
    for prefix, label in REFERENCE_ROWS.items():
        cells = [_cell(_reference_values(prefix, metric, seeds)) for metric in experiment.metrics]
        if any(cells):
            rows.append(f"| {' | '.join([label, *cells])} |")
    return rows


def _reference_values(prefix: str, metric: str, seeds: Mapping[int, Result]) -> list[float]:
    keys = (f"{prefix}.{metric}", f"{prefix}.{metric.partition('.')[2]}")  # measured for one task, or for all
    return [result.numbers[key] for result in seeds.values() for key in keys if key in result.numbers]


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def _values(name: str, metric: str, results: Results) -> dict[int, float]:
    return {seed: r.numbers[metric] for seed, r in results[name].items() if metric in r.numbers}


def _figures(results: Results, folder: Path) -> list[str]:
    """Draw both figures, of what has run, and return the report's lines that show them."""
    measured = [name for name, run in RUNS.items() if run.kind != "references" and results[name]]
    # a validation is of the trained tasks, so the losses of a run without some of them compare with no other's
    trained = [name for name in measured if RUNS[name].kind == "train" and RUNS[name].trained == ALL_TASKS]
    lines: list[str] = []
    for name, names, draw in (("errors", measured, _draw_bars), ("losses", trained, _draw_curves)):
        if names:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / f"{name}.png") as staging:
                draw(names, results).savefig(staging, dpi=90, format="png")
            lines += ["", f"![{name}](figures/{name}.png)"]
    return lines


def _draw_bars(names: list[str], results: Results) -> Figure:
    """Draw a bar per run, a dot per seed."""
    figure, panels = _panels(1.6 + 0.22 * len(names))
    for metric, axes in zip((ERROR, FD), panels, strict=True):
        values = {name: list(_values(name, metric, results).values()) for name in names}
        shown = [name for name in names if values[name]]
        axes.barh(shown, [fmean(values[name]) for name in shown], color="#8fb3d9", height=0.65)
        for name in shown:
            axes.plot(values[name], [name] * len(values[name]), "o", color="#1c3f66", markersize=3.5)
        for prefix, style in (("mean", "--"), ("base", "-."), ("ceiling", ":")):
            for value in _reference_values(prefix, metric, results["references"]):
                axes.axvline(value, color="#444444", linestyle=style, linewidth=1, label=REFERENCE_ROWS[prefix])
                axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)  # above
        axes.invert_yaxis()
        axes.set_xlabel(f"{LABELS[metric]} (lower is better)", fontsize=9)
    return figure


def _draw_curves(names: list[str], results: Results) -> Figure:
    """Draw a line per seed."""
    figure, panels = _panels(4)
    for metric, axes in zip((XYZ, RGB), panels, strict=True):
        for number, name in enumerate(names):
            for place, result in enumerate(results[name].values()):
                steps, values = zip(*result.curves[metric.partition(".")[2]], strict=True)
                axes.plot(steps, values, f"C{number}", linewidth=1.2, label=None if place else name)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(f"{LABELS[metric]} on held-out clips", fontsize=9)
        axes.set_yscale("log")  # a run that starts far above would flatten the others
        axes.legend(fontsize=7)
    return figure


def _panels(height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height), layout="tight")
    panels = list(figure.subplots(1, 2))
    for axes in panels:
        axes.tick_params(labelsize=8)
    return figure, panels
