"""The report (report.md, a figure per experiment), from the finished runs' result.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import expm1, isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from experiments.nano.experiments import GENTLE, REFERENCE, RUNS, Claim, Experiment, Run, in_decibels
from experiments.nano.verdicts import CONFIDENCE, Verdict, judge
from experiments.nano.work import Plan, Result, differences, read_result
from one4d_pl.files import whole_file, write_text

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
REFERENCE_ROWS = {
    "mean": "(mean pointmap of the training clips)",
    "ceiling": "(truth through the shipped VAE)",
    "ceiling_bent": "(the same, bent)",
    "base": "(the base alone)",
}

Results = Mapping[str, Mapping[int, Result]]  # run -> seed -> what is finished


def write_report(plan: Plan, experiments: list[Experiment]) -> Path:
    """Write the report and return its path; runs that are missing are named."""
    names = dict.fromkeys(name for experiment in experiments for name in experiment.runs)
    found = {name: _finished(plan, RUNS[name]) for name in names}
    results = {
        name: {seed: r for seed, r in seeds.items() if not differences(plan, RUNS[name], seed, r.recipe)}
        for name, seeds in found.items()
    }
    stale = sum(map(len, found.values())) - sum(map(len, results.values()))
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


def _finished(plan: Plan, run: Run) -> dict[int, Result]:
    found = ((seed, read_result(plan, run, seed)) for seed in range(run.seeds))
    return {seed: result for seed, result in found if result is not None}


def _method(plan: Plan, results: Results) -> list[str]:
    config = plan.config(RUNS[REFERENCE], 0)
    train, data = config.train, config.data
    finished = [result for seeds in results.values() for result in seeds.values()]
    wanted = sum(RUNS[name].seeds for name in results)
    machines = ", ".join(sorted({result.machine for result in finished})) or "nothing run"
    settings = " ".join(["", *plan.overrides]) if plan.overrides else ""
    return [
        f"`python -m experiments.nano{settings}`: {len(finished)} of {wanted} runs, "
        f"{sum(r.minutes for r in finished):.0f} minutes added up ({machines}; {train.precision}).",
        "",
        f"Every training: {train.max_steps} steps of {train.global_batch_size} toy clips, {data.num_frames} frames of "
        f"{data.height}x{data.width}, adapters from scratch on the shipped base at a learning rate of "
        f"{config.optim.lr:g}; those of `unified` from the shipped adapters, {GENTLE[0]}; a VAE: as many steps of two "
        f"crops. Every run is measured on the same {plan.clips} held-out clips with the same frames given, but for "
        "`given_*`; the seed decides the noise. ± in a run's row is the standard deviation over seeds.",
        "",
        "A claim holds, or does not, where the difference is beyond what Student's t allows for chance at "
        f"{CONFIDENCE:.0%}, in a model value = run + seed + noise; the noise is pooled over all runs of this report "
        "that are trained, or sampled, alike. `by` is how much higher the other run's error is, or dB, and its "
        "standard error; positive speaks for the claim, what a claim allows for is not in it. Of claims about what "
        f"makes no difference one in {1 / (1 - CONFIDENCE):.0f} gets a word by chance; where nothing is trained the "
        "word is about one adapter on these clips. So few steps from scratch say which of two ways learns faster, not "
        "where they end. What gets worse with links zeroed relies on them; trained so, it might do without.",
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
        cells = [
            _cell([r.numbers[m] for r in seeds.values() if m in r.numbers and m in shown]) for m in experiment.metrics
        ]
        lines.append(f"| {' | '.join([label, *cells])} |")
    lines += ["", "| claim | by | verdict |", "|---|---:|---|"]
    for claim in experiment.claims:
        verdict = judge(claim, {name: _values(name, claim.metric, results) for name in results if _alike(name, claim)})
        by, outcome = ("", "not run") if verdict is None else (_by(claim, verdict), f"**{verdict.outcome}**")
        lines.append(f"| {claim.text} (`{claim.better}`, `{claim.than}`; {LABELS[claim.metric]}) | {by} | {outcome} |")
    return lines


def _alike(name: str, claim: Claim) -> bool:
    """Tell whether a run's noise is like that of the claim's runs; other encodings give other losses of pointmaps."""
    ours, theirs = ((run.kind.partition("_")[0], run.from_adapters) for run in (RUNS[name], RUNS[claim.better]))
    return ours == theirs and not (claim.metric == "val.xyz" and RUNS[name].own_target)


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


def _draw(experiment: Experiment, results: Results, path: Path) -> None:
    """Draw bars with a dot per seed; for the pointmaps' loss, curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in experiment.runs if RUNS[name].kind != "references" and results[name]]
    curved = [n for n in names if any(r.curves for r in results[n].values()) and not RUNS[n].own_target]
    panels = [metric for metric in experiment.drawn if metric != "val.xyz" or curved]
    size = (5.5 * len(panels) + 1, 1.6 + 0.22 * max(len(names), 10))
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for metric, panel in zip(panels, axes[0], strict=True):
        if metric == "val.xyz":
            _draw_curves(panel, curved, results)
        else:
            _draw_bars(panel, metric, names, results, "references" in experiment.runs)
    figure.tight_layout()
    with whole_file(path) as staging:
        figure.savefig(staging, dpi=90, format="png")
    pyplot.close(figure)


def _draw_bars(axes: Axes, metric: str, names: list[str], results: Results, references: bool) -> None:
    values = {name: list(_values(name, metric, results).values()) for name in names}
    shown = [name for name in names if values[name]]
    axes.barh(shown, [fmean(values[name]) for name in shown], color="#8fb3d9", height=0.65)
    for name in shown:
        axes.plot(values[name], [name] * len(values[name]), "o", color="#1c3f66", markersize=3.5)
    lines = (("mean", "--", "mean pointmap"), ("base", "-.", "the base alone"),
             ("ceiling", ":", "truth through the VAE"), ("ceiling_bent", (0, (1, 4)), "the same, bent"))  # fmt: skip
    for prefix, style, label in lines if references else ():
        for value in _reference_values(prefix, metric, results["references"]):
            axes.axvline(value, color="#444444", linestyle=style, linewidth=1, label=label)
            axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)  # above
    axes.invert_yaxis()
    axes.set_xlabel(f"{LABELS[metric]} ({'higher' if in_decibels(metric) else 'lower'} is better)", fontsize=9)
    axes.tick_params(labelsize=8)


def _draw_curves(axes: Axes, names: list[str], results: Results) -> None:
    for number, name in enumerate(names):
        for place, result in enumerate(results[name].values()):
            steps, values = zip(*result.curves["xyz"], strict=True)
            style = f"C{number % 10}{'-' if number < 10 else '--'}"
            axes.plot(steps, values, style, linewidth=1.2, label=None if place else name)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("pointmaps' loss on held-out clips", fontsize=9)
    axes.set_yscale("log")  # a run that starts far above would flatten the others
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)
