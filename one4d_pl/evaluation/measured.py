"""What an evaluation has measured, read again for an adapter's model card."""

from __future__ import annotations

import json
from pathlib import Path

from one4d_pl.errors import UserError, reading
from one4d_pl.files import read_text


def read_metrics(out: Path | str) -> dict[str, dict[str, float]]:
    """Read the model's means from a folder of `one4d evaluate`: benchmark -> metric -> value.

    UserError where it holds none.
    """
    folder, found = Path(out), {}
    results, tasks = folder / "results.json", folder / "metrics.json"
    if results.is_file():
        with reading(results, "what `one4d evaluate` writes"):
            for row in json.loads(read_text(results)):
                if row["row"] == "model":
                    name = f"{row['benchmark']} ({row['protocol']['name']})"
                    found[name] = row["depth_mean"].get("all", {}) | (row["camera_mean"]["all_sequences"] or {})
    if tasks.is_file():
        with reading(tasks, "what `one4d evaluate --bench tasks` writes"):
            tree = json.loads(read_text(tasks))
            name = f"toy world {tree['level']}, {tree['clips']} clips"
            found[name] = {f"{goal['about']}: {goal['what']}": goal["value"] for goal in tree["goals"]}
    if not found:
        raise UserError(f"{folder}: no results of a model (results.json or metrics.json of `one4d evaluate`)")
    return {
        name: {metric: float(value) for metric, value in values.items() if value is not None}  # None = not measured
        for name, values in found.items()
    }
