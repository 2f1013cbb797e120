"""Every task of an adapter measured on held-out clips of its toy world, with its goals."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from one4d_pl.config import Config
from one4d_pl.evaluation.fit_quality import FitQuality, measure_fit
from one4d_pl.evaluation.goals import goal_table, goals
from one4d_pl.evaluation.toy_clips import HeldOut
from one4d_pl.files import finite, write_text
from one4d_pl.inference.pipeline import One4DPipeline

SEED = 0


@dataclass(frozen=True)
class TaskReport:
    """The clips that were sampled, their measurements, and the tables."""

    held_out: HeldOut
    quality: FitQuality
    text: str  # tables, goals last


def evaluate_tasks(config: Config, adapters: Path, clips: int, out: Path) -> TaskReport:
    """Sample and measure every task on `clips` held-out clips; write metrics.json and tables.txt.

    The numbers are the same every time. ConfigError where the adapter is not of the config's base,
    or the config has no toy world.
    """
    began = time.process_time()
    pipeline, base = One4DPipeline.open(config, adapters), One4DPipeline.open(config, None)
    held_out = HeldOut.render(config, clips)
    quality = measure_fit(pipeline, base, held_out, SEED)
    assert config.data.toy is not None  # HeldOut.render has checked
    found = goals(quality)
    text = f"{tables(quality, clips)}\n\n{goal_table(found, clips, config.data.toy.level)}\n"
    metrics = {
        "clips": clips,
        "level": config.data.toy.level,
        "steps": config.sampler.steps,
        "pointmaps": quality.pointmaps,
        "frames_db": quality.frames_db,
        "geometry": quality.geometry,
        "image_to_4d": quality.consistency["image"],
        "text_to_4d": quality.consistency["text"],
        "colours": quality.colours,
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in found],
        "cpu_seconds": round(time.process_time() - began),
    }
    write_text(out / "metrics.json", json.dumps(finite(metrics), indent=2, allow_nan=False) + "\n")
    write_text(out / "tables.txt", text)
    return TaskReport(held_out, quality, text)


def tables(quality: FitQuality, clips: int) -> str:
    """Format tables of pointmaps and frames against the truth, and of generated scenes."""
    lines = [
        f"Pointmaps of {clips} held-out clips, after one scale and shift per clip:",
        f"  {'':18} {'rel. error':>10} {'inliers':>8} {'moving':>8}",
    ]
    for name, row in quality.pointmaps.items():
        lines.append(f"  {name:18} {row['rel_error']:10.3f} {row['inliers']:8.1%} {row['rel_error_moving']:8.3f}")
    lines += ["", "Frames against the true ones, dB:"]
    for name, row in quality.frames_db.items():
        lines.append(f"  {name:18} " + "  ".join(f"{kind} {value:5.1f}" for kind, value in row.items()))
    for task, row in quality.consistency.items():
        lines += ["", f"{task.capitalize()} to 4D, median over clips:"]
        lines += [f"  {name:24} {value:.3f}" for name, value in row.items()]
    return "\n".join(lines)
