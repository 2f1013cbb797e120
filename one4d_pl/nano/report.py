"""report.md and a figure per experiment, from the finished runs' result.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from one4d_pl.inference.scene_files import write_text, write_whole
from one4d_pl.nano.experiments import REFERENCE, RUNS, Experiment
from one4d_pl.nano.verdicts import CONFIDENCE, Values, judge
from one4d_pl.nano.work import Plan, Result, differences, read_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "video.rel_error": "video to 4D: point error",
    "video.rel_error_moving": "moving points",
    "video.rel_error_edges": "at edges",
    "image.rel_error": "image to 4D: point error",
    "image.hidden_db": "image to 4D: hidden frames, dB",
    "image.fd_vae": "image to 4D: fd_vae",
    "video.given_db": "given frames, dB",
    "video.hidden_db": "hidden frames, dB",
    "val.xyz": "pointmaps' loss",
    "val.rgb": "frames' loss",
    "vae.rel_error": "round trip: point error",
    "vae.rel_error_moving": "moving points",
    "vae.given_db": "frames, dB",
}
REFERENCE_ROWS = {"mean": "(mean pointmap of the training clips)", "ceiling": "(truth through the shipped VAE)",
                  "base": "(the base alone)"}  # fmt: skip

Results = Mapping[str, list[Result]]  # run -> one per finished seed


def write_report(plan: Plan, experiments: list[Experiment]) -> Path:
    """The report's path. What has not been run is said to be missing."""
    names = dict.fromkeys(name for experiment in experiments for name in experiment.runs)
    found = {name: [read_result(plan, RUNS[name], seed) for seed in range(RUNS[name].seeds)] for name in names}
    results = {
        name: [r for seed, r in enumerate(seeds) if r is not None and not differences(plan, RUNS[name], seed, r)]
        for name, seeds in found.items()
    }
    stale = sum(r is not None for seeds in found.values() for r in seeds) - sum(map(len, results.values()))
    lines = ["# Nano-One4D", "", *_method(plan, results)]
    if stale:
        lines += ["", f"Left out: {stale} runs under another config than today's."]
    for experiment in experiments:
        lines += ["", *_section(experiment, results)]
        if any(results[name] for name in experiment.runs):
            path = plan.out / "figures" / f"{experiment.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _draw(experiment, results, path)
            lines += ["", f"![{experiment.name}](figures/{path.name})"]
    write_text(plan.out / "report.md", "\n".join(lines) + "\n")
    return plan.out / "report.md"


def _method(plan: Plan, results: Results) -> list[str]:
    config = plan.config(RUNS[REFERENCE], 0)
    train, data = config.train, config.data
    finished = [result for seeds in results.values() for result in seeds]
    wanted = sum(RUNS[name].seeds for name in results)
    machines = ", ".join(sorted({result.machine for result in finished})) or "nothing run"
    settings = " ".join(["", *plan.overrides]) if plan.overrides else ""
    return [
        f"`python -m one4d_pl.nano{settings}`: {len(finished)} of {wanted} runs, "
        f"{sum(r.minutes for r in finished):.0f} minutes added up ({machines}; {train.precision}).",
        "",
        f"Every training: {train.max_steps} steps of {train.global_batch_size} toy clips, {data.num_frames} frames of "
        f"{data.height}x{data.width}, adapters on the shipped base, from scratch unless the question says otherwise "
        f"(a VAE: as many steps of two crops); {plan.clips} held-out clips, the same noise and given frames for every "
        f"run. ± is the standard deviation over seeds. A claim holds, or does not, where the means differ by more than "
        f"Student's t allows at {CONFIDENCE:.0%}, with the variance pooled over the experiment's runs that have "
        f"several seeds; so of claims about what makes no difference one in {1 / (1 - CONFIDENCE):.0f} gets such a "
        "word by chance. So few steps say which of two ways learns faster, not where they end.",
    ]


def _section(experiment: Experiment, results: Results) -> list[str]:
    lines = [
        f"## {experiment.name}",
        "",
        f"**{experiment.question}** Claim ({experiment.source}): {experiment.claim}",
        "",
    ]
    header = ["run", *(LABELS[metric] for metric in experiment.metrics)]
    lines += [f"| {' | '.join(header)} |", f"|---|{'---:|' * len(experiment.metrics)}"]
    for name in experiment.runs:
        seeds = results[name]
        if RUNS[name].kind == "references":
            lines += _reference_rows(experiment, seeds)
            continue
        label = f"`{name}`" if seeds else f"`{name}` (not run)"
        shown = [m for m in experiment.metrics if m != "val.xyz" or not RUNS[name].own_target]
        cells = [_cell([r.numbers[m] for r in seeds if m in r.numbers and m in shown]) for m in experiment.metrics]
        lines.append(f"| {' | '.join([label, *cells])} |")
    lines += ["", "| claim | by | verdict |", "|---|---:|---|"]
    for claim in experiment.claims:
        values = _values(claim.metric, results)
        # seeds of a training and seeds of the noise spread differently
        kinds = {RUNS[claim.better].kind, RUNS[claim.than].kind}
        verdict = judge(claim, {name: values[name] for name in experiment.runs if RUNS[name].kind in kinds})
        by = "" if verdict is None else f"{verdict.advantage:+.3g}"
        if verdict is not None and isfinite(verdict.standard_error):
            by += f" ± {verdict.standard_error:.2g}"
        word = "not run" if verdict is None else f"**{verdict.word}**"
        lines.append(f"| {claim.text} (`{claim.better}`, `{claim.than}`; {LABELS[claim.metric]}) | {by} | {word} |")
    return lines


def _reference_rows(experiment: Experiment, seeds: list[Result]) -> list[str]:
    rows = []
    for prefix, label in REFERENCE_ROWS.items():
        cells = []
        for metric in experiment.metrics:
            keys = (f"{prefix}.{metric}", f"{prefix}.{metric.partition('.')[2]}")
            cells.append(_cell([r.numbers[key] for r in seeds for key in keys if key in r.numbers]))
        if any(cells):
            rows.append(f"| {' | '.join([label, *cells])} |")
    return rows


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def _values(metric: str, results: Results) -> Values:
    return {name: [r.numbers[metric] for r in seeds if metric in r.numbers] for name, seeds in results.items()}


def _draw(experiment: Experiment, results: Results, path: Path) -> None:
    """Bars of the first metric with every seed as a dot; beside them the curves of the pointmaps' loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = [n for n in experiment.runs if any(r.curves for r in results[n]) and not RUNS[n].own_target]
    if "val.xyz" not in experiment.metrics:  # where tasks are drawn otherwise the loss is over other tasks
        trained = []
    figure, axes = pyplot.subplots(1, 2 if trained else 1, figsize=(11 if trained else 6.5, 3.8), squeeze=False)
    _draw_bars(axes[0][0], experiment, results)
    if trained:
        _draw_curves(axes[0][1], trained, results)
    figure.tight_layout()
    write_whole(path, lambda staging: figure.savefig(staging, dpi=90, format="png"))
    pyplot.close(figure)


def _draw_bars(axes: Axes, experiment: Experiment, results: Results) -> None:
    metric = experiment.metrics[0]
    shown = {n: v for n, v in _values(metric, results).items() if n in experiment.runs and v}
    names = [name for name in experiment.runs if name in shown]
    axes.barh(names, [fmean(shown[name]) for name in names], color="#8fb3d9", height=0.65)
    for name in names:
        axes.plot(shown[name], [name] * len(shown[name]), "o", color="#1c3f66", markersize=3.5)
    for prefix, style in (("mean", "--"), ("ceiling", ":")):
        for result in results.get("references", []) if "references" in experiment.runs else []:
            value = result.numbers.get(f"{prefix}.{metric.partition('.')[2]}")
            if value is not None:
                label = "mean pointmap" if prefix == "mean" else "truth through the shipped VAE"
                axes.axvline(value, color="#444444", linestyle=style, linewidth=1, label=label)
                axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)  # above
    axes.invert_yaxis()
    axes.set_xlabel(f"{LABELS[metric]} (lower is better)", fontsize=9)
    axes.tick_params(labelsize=8)


def _draw_curves(axes: Axes, names: list[str], results: Results) -> None:
    for number, name in enumerate(names):
        for result in results[name]:
            steps, values = zip(*result.curves["xyz"], strict=True)
            label = name if result is results[name][0] else None
            axes.plot(
                steps,
                values,
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                linewidth=1.2,
                label=label,
            )
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("pointmaps' loss on held-out clips", fontsize=9)
    axes.set_yscale("log")  # what starts far off would flatten the others
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)
