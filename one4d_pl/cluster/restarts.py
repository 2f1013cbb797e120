"""The marker that asks for a requeue, and the count of starts without progress; quick to import."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from one4d_pl.config import ConfigError
from one4d_pl.files import write_json

MARKER, STARTS = "PREEMPTED", "restarts.json"


def write_marker(run_dir: str, step: int, number: int) -> None:
    """Ask the batch script for a requeue: signal `number` stopped the run after `step`. Only rank 0 does this."""
    content = {"step": step, "signal": signal.Signals(number).name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(Path(run_dir) / MARKER, content)


def begin_start(run_dir: str, max_restarts: int) -> None:
    """Remove the marker and count this start; rank 0 only, once per start.

    Raises ConfigError after more than `max_restarts` restarts in a row without a new checkpoint; 0 = no limit.
    """
    folder = Path(run_dir)
    (folder / MARKER).unlink(missing_ok=True)
    starts, last_end = _read_starts(folder)
    if max_restarts and starts > max_restarts:
        raise ConfigError(
            f"run_dir: {folder} was started {starts} times in a row without a new checkpoint; the last start ended "
            f"with: {last_end}; see {folder / 'logs'}, then remove {folder / STARTS} or raise train.max_restarts"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTS, {"starts": starts + 1, "last_end": "a kill, or a lost node"})


def note_end(run_dir: str, reason: str) -> None:
    """Note how this start ended, for the message of a later refusal."""
    starts, _ = _read_starts(Path(run_dir))
    if starts:
        write_json(Path(run_dir) / STARTS, {"starts": starts, "last_end": reason})


def forget_starts(run_dir: str) -> None:
    """Reset the count of starts, after progress or an end that says nothing about the run."""
    (Path(run_dir) / STARTS).unlink(missing_ok=True)


def _read_starts(folder: Path) -> tuple[int, str]:
    try:
        content = json.loads((folder / STARTS).read_text())
        return int(content["starts"]), str(content["last_end"])
    except FileNotFoundError:
        return 0, ""
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"run_dir: {folder / STARTS} is not what fit wrote; remove it") from None
