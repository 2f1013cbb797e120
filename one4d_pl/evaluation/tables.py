"""What an evaluation writes: results.json, sequences.csv, and table.md laid out as One4D's tables.

Published rows (One4D, Tables 3-6) stand beside ours wherever the benchmark has them; every row names its protocol.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from one4d_pl.evaluation.benchmarks import SINTEL_CAMERAS
from one4d_pl.evaluation.score import PARTS, BenchmarkScore, SequenceScore
from one4d_pl.files import finite, write_text
from one4d_pl.metrics.camera import ERROR_NAMES as CAMERA_ERRORS
from one4d_pl.metrics.depth import ERROR_NAMES as DEPTH_ERRORS

QUOTED = (
    "Published rows are quoted from One4D's tables, which do not say how each was scored; the protocols in the "
    "columns' names are those of our own rows."
)
STANDING = 0.9  # of a standing camera's ATE: a prediction above it has not found the path
# One4D, Tables 3 and 4: AbsRel and delta < 1.25 in percent; ATE, RPE-T, RPE-R
PUBLISHED_DEPTH = {
    "sintel": {
        "MonST3R": (0.335, 58.5), "CUT3R": (0.311, 62.0), "DepthCrafter": (0.270, 69.7), "Geo4D": (0.205, 73.5),
        "One4D": (0.273, 70.4),
    },
    "bonn": {
        "MonST3R": (0.063, 96.4), "CUT3R": (0.070, 96.7), "DepthCrafter": (0.071, 97.2), "Geo4D": (0.059, 97.2),
        "One4D": (0.092, 93.7),
    },
}  # fmt: skip
_TUM = {
    "MonST3R": (0.063, 0.009, 1.217), "CUT3R": (0.046, 0.014, 0.446), "Geo4D": (0.073, 0.020, 0.635),
    "One4D": (0.129, 0.022, 1.447),
}  # fmt: skip
PUBLISHED_CAMERAS = {
    "sintel": {
        "MonST3R": (0.108, 0.042, 0.732), "CUT3R": (0.208, 0.062, 0.610), "Geo4D": (0.185, 0.063, 0.547),
        "One4D": (0.213, 0.057, 0.818),
    },
    "tum": _TUM,
    "tum_30": _TUM,
}  # fmt: skip
# Tables 5 and 6: what is swept -> its value -> (AbsRel, delta) per benchmark
PUBLISHED_SWEEPS: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "sparsity": {
        "0.5": {"sintel": (0.314, 70.3), "bonn": (0.094, 93.5)},
        "0.25": {"sintel": (0.443, 67.7), "bonn": (0.094, 93.3)},
        "0.1": {"sintel": (0.453, 64.0), "bonn": (0.099, 92.9)},
        "0.05": {"sintel": (0.641, 57.6), "bonn": (0.151, 87.2)},
        "0.04": {"bonn": (0.191, 82.5)},
        "0.03": {"bonn": (0.277, 71.1)},
    },
    "guidance": {
        "4": {"sintel": (0.257, 71.5), "bonn": (0.092, 94.0)},
        "5": {"sintel": (0.259, 70.9), "bonn": (0.090, 94.1)},
        "6": {"sintel": (0.273, 70.4), "bonn": (0.092, 93.7)},
    },
    "checkpoint": {
        "1000": {"sintel": (0.331, 65.4), "bonn": (0.114, 88.9)},
        "3000": {"sintel": (0.284, 68.1), "bonn": (0.097, 91.8)},
        "5500": {"sintel": (0.273, 70.4), "bonn": (0.092, 93.7)},
    },
    "steps": {},
}


@dataclass(frozen=True)
class Row:
    """One scored set of predictions."""

    label: str  # "model", "ceiling", or the swept value
    score: BenchmarkScore
    settings: dict[str, object]  # how the predictions were made


def write_report(out: Path, rows: list[Row], total: int, sweep: str | None = None) -> str:
    """Write results.json, sequences.csv and table.md below `out`; return the table's text.

    `total` is the number of sequences of the whole benchmark; `sweep` says what the rows' labels are values of.
    """
    table = markdown(rows, total, sweep)
    results = finite([_as_dict(row) for row in rows])
    write_text(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_text(out / "sequences.csv", sequences_csv(rows))
    write_text(out / "table.md", table)
    return table


def markdown(rows: list[Row], total: int, sweep: str | None) -> str:
    """Format the tables, of depth and of cameras, published rows first."""
    benchmark, protocol = rows[0].score.benchmark, rows[0].score.protocol
    scored = len(rows[0].score.sequences)
    part = "" if scored == total else f" (**{scored} of its {total} sequences**: {_comparable(rows[0].score)})"
    lines = [f"# {benchmark}{part}", "", protocol.describe(benchmark), ""]
    if benchmark in PUBLISHED_DEPTH or benchmark in PUBLISHED_CAMERAS:
        lines += [QUOTED, ""]
    lines += _depth_table(rows, benchmark, sweep) + _camera_table(rows, benchmark)
    for row in rows:
        if row.score.degenerate:
            names = ", ".join(row.score.degenerate)
            lines.append(f"- {row.label}: degenerate camera paths, left out of the protocol's own mean: {names}")
        standing = [s.name for s in row.score.sequences if _stands_still(s)]
        if standing:
            lines.append(
                f"- {row.label}: cameras no better than standing ones (ATE at least {100 * STANDING:.0f} % of theirs; "
                f"the length of their path says nothing): {', '.join(standing)}"
            )
        noted = [f"{s.name} ({'; '.join(s.notes)})" for s in row.score.sequences if s.notes]
        if noted:
            lines.append(f"- {row.label}: flags of the predictions: {', '.join(noted)}")
    return "\n".join(lines).rstrip() + "\n"


def _comparable(score: BenchmarkScore) -> str:
    """Explain what compares with published means where not all sequences were scored."""
    if score.benchmark == "sintel" and {s.name for s in score.sequences} == set(SINTEL_CAMERAS):
        return "for cameras the published set; depth is not comparable with published means"
    return "not comparable with published means"


def sequences_csv(rows: list[Row]) -> str:
    """Format one line per row, sequence and part of its frames."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["row", "protocol", "sequence", "frames", "part", "pixels", *DEPTH_ERRORS, "fit_scale", "fit_shift"]
    writer.writerow([*head, *CAMERA_ERRORS, "degenerate", "notes"])
    for row in rows:
        for s in row.score.sequences:
            for part in s.depth or ("all",):
                depth = s.depth.get(part)
                errors = [depth.errors[n] for n in DEPTH_ERRORS] if depth else [""] * len(DEPTH_ERRORS)
                cameras = s.cameras if part == "all" else None
                writer.writerow(
                    [
                        *(row.label, row.score.protocol.name, s.name, s.num_frames, part),
                        *(depth.num_valid if depth else "", *errors),
                        *(s.fit or ("", "")),
                        *([cameras[n] for n in CAMERA_ERRORS] if cameras else [""] * len(CAMERA_ERRORS)),
                        *(int(s.degenerate) if cameras else "", "; ".join(s.notes)),
                    ]
                )
    return text.getvalue()


def _depth_table(rows: list[Row], benchmark: str, sweep: str | None) -> list[str]:
    if all(row.score.depth_mean("all") is None for row in rows):
        return []
    protocol = rows[0].score.protocol
    name = protocol.name
    lines = [
        "## Video depth",
        "",
        f"| row | frames | AbsRel ↓ ({name}) | δ<1.25 ↑ (%) ({name}) | log RMSE ↓ ({name}) | "
        f"not positive (%) ({name}) |",
        "|---|---|---|---|---|---|",
    ]
    published = PUBLISHED_DEPTH.get(benchmark, {})
    if sweep is None:
        lines += [f"| {n}, published | all | {a:.3f} | {d:.1f} | | |" for n, (a, d) in published.items()]
    for row in rows:
        held = sum(s.fit is not None and s.fit[0] == protocol.lowest_scale for s in row.score.sequences)
        mark = f" (scale held at {protocol.lowest_scale:g} in {held})" if held else ""
        for part in PARTS:
            mean = row.score.depth_mean(part)
            if mean is None:
                continue
            lines.append(
                f"| {row.label} | {part} | {_number(mean['abs_rel'])}{mark} | {100 * mean['delta_1']:.1f} | "
                f"{_number(mean['log_rmse'])} | {100 * mean['not_positive']:.2f} |"
            )
        known = PUBLISHED_SWEEPS.get(sweep or "", {}).get(row.label.removeprefix(f"{sweep} "), {}).get(benchmark)
        if known is not None:
            lines.append(f"| {row.label}, published | all | {known[0]:.3f} | {known[1]:.1f} | | |")
    return [*lines, ""]


def _camera_table(rows: list[Row], benchmark: str) -> list[str]:
    if all(row.score.camera_mean(True) is None for row in rows):
        return []
    lines = [
        "## Cameras",
        "",
        "ATE and RPE are evo's under Sim(3), as in MonST3R, CUT3R and Geo4D; the columns after them are our own.",
        "",
        "| row | mean over | ATE ↓ (evo) | RPE-T ↓ (evo) | RPE-R ↓ (°) (evo) | AUC@30 ↑ | standing ATE | "
        "path / true path | rotation / true (°) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    published = PUBLISHED_CAMERAS.get(benchmark, {})
    lines += [f"| {n}, published | | {a:.3f} | {t:.3f} | {r:.3f} | | | | |" for n, (a, t, r) in published.items()]
    for row in rows:
        counted = sum(s.cameras is not None for s in row.score.sequences)
        aligned = counted - len(row.score.degenerate)
        for name, mean in (
            (f"{aligned} that evo aligns", row.score.camera_mean(False)),
            (f"all {counted}", row.score.camera_mean(True)),
        ):
            if mean is None:
                continue
            lines.append(
                f"| {row.label} | {name} | {_number(mean['ate'])} | {_number(mean['rpe_trans'])} | "
                f"{_number(mean['rpe_rot'])} | {mean['auc_30']:.3f} | {_number(mean['ate_standing'])} | "
                f"{_number(mean['path_length'])} / {_number(mean['path_length_target'])} | "
                f"{mean['total_rotation']:.1f} / {mean['total_rotation_target']:.1f} |"
            )
    return [*lines, ""]


def _stands_still(sequence: SequenceScore) -> bool:
    """Tell whether the cameras follow the true path no better than a camera that stands still."""
    errors = sequence.cameras
    return errors is not None and not sequence.degenerate and errors["ate"] >= STANDING * errors["ate_standing"]


def _number(value: float) -> str:
    """Format with three decimals as the paper does; what would read 0.000 keeps two digits."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"


def _as_dict(row: Row) -> dict[str, object]:
    score = row.score
    return {
        "row": row.label,
        "benchmark": score.benchmark,
        "protocol": asdict(score.protocol),
        "settings": row.settings,
        "depth_mean": {part: mean for part in PARTS if (mean := score.depth_mean(part)) is not None},
        "camera_mean": {"protocol": score.camera_mean(False), "all_sequences": score.camera_mean(True)},
        "degenerate": score.degenerate,
        "sequences": [
            {
                "name": s.name,
                "frames": s.num_frames,
                "depth": {part: {"pixels": d.num_valid, **d.errors} for part, d in s.depth.items()},
                "fit": s.fit,
                "cameras": s.cameras,
                "degenerate": s.degenerate,
                "notes": s.notes,
            }
            for s in score.sequences
        ],
    }
