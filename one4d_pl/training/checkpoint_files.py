"""A run's checkpoint folders: which are whole, which may be deleted.

Imports nothing heavier than the config. Only folders named step-00000100 are checkpoints. Whatever
else lies beside them (a copy, a backup, files of a file browser) is neither read nor deleted. Files
inside them that trainer.json does not list do not count as damage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import uuid
from pathlib import Path

from one4d_pl.config import ConfigError
from one4d_pl.files import write_json

log = logging.getLogger(__name__)

SCORES = "validation.json"
STATE = "trainer.json"
STEP_FOLDER = re.compile(r"step-(\d{8})")
STAGED = re.compile(r"\.step-\d{8}(\.[0-9a-f]{8})?\.tmp")  # being written, or being deleted


def checkpoint_folder(run_dir: str, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def read_step(folder: Path) -> int:
    """Read the optimiser step after which a checkpoint was taken."""
    return int(json.loads((folder / STATE).read_text())["step"])


def step_folders(run_dir: str) -> list[Path]:
    """List a run's checkpoints by the step they hold, damaged ones too; ConfigError where they cannot be read."""
    root = Path(run_dir) / "checkpoints"
    try:
        # a dangling link counts: it is a checkpoint that cannot be read
        found = [f for f in root.iterdir() if STEP_FOLDER.fullmatch(f.name) and (f.is_dir() or f.is_symlink())]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not root.is_symlink():
            return []
        raise ConfigError(
            f"run_dir: {root} cannot be read ({error.strerror}); mend it, or set another run_dir"
        ) from None
    return sorted(found, key=lambda folder: (_step_of(folder), folder.name))


def newest_checkpoint(run_dir: str) -> Path | None:
    """Find the newest whole checkpoint of a run; None where there are no checkpoints.

    Damaged ones are named in a warning and passed over. Raises ConfigError where all are damaged,
    rather than silently starting at 0.
    """
    faults = []
    for folder in reversed(step_folders(run_dir)):
        fault = find_fault(folder)
        if fault is None:
            return folder
        faults.append(f"{folder.name}: {fault}")
        log.warning("checkpoint %s is damaged (%s); trying the one before", folder, fault)
    if faults:
        raise ConfigError(
            f"run_dir: every checkpoint in {Path(run_dir) / 'checkpoints'} is damaged ({'; '.join(faults)}); restore "
            "one, or set another run_dir"
        )
    return None


def refuse_used_folder(run_dir: str) -> None:
    """Raise ConfigError where a run from step 0 would mix its checkpoints with an older run's."""
    folders = step_folders(run_dir)
    if folders:
        raise ConfigError(
            f"run_dir: {run_dir} holds checkpoints up to step {_step_of(folders[-1])}, and train.resume=false starts "
            f"at 0; name a new folder, or remove {folders[-1].parent}"
        )


def find_fault(folder: Path) -> str | None:
    """Say why a checkpoint cannot be used, or None; files that it does not list are ignored."""
    try:
        state = json.loads((folder / STATE).read_text())
        hashes, step, config = state["sha256"], state["step"], state["config"]
        if not (isinstance(hashes, dict) and hashes and isinstance(step, int) and isinstance(config, dict)):
            raise ValueError("not what fit wrote")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE}: {error}"
    for name, digest in sorted(hashes.items()):
        try:
            if _sha256(folder / name) != digest:
                return f"{name} is not the file that was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def hash_files(folder: Path) -> dict[str, str]:
    """Hash every file of a checkpoint being written, by sha256. `find_fault` compares with these."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): _sha256(f) for f in files}


def superfluous(run_dir: str, keep_last: int, keep_best: int, saved_step: int) -> list[Path]:
    """List the checkpoints that are neither among the newest nor among the best.

    Unscored ones are not the best. The one that was just saved counts as the newest. Those of later
    steps were damaged when the run was resumed, and stay as they are.
    """
    folders = [f for f in step_folders(run_dir) if _step_of(f) <= saved_step]
    scores = read_scores(run_dir)
    scored = [f for f in folders if str(_step_of(f)) in scores]
    best = sorted(scored, key=lambda f: scores[str(_step_of(f))])[:keep_best]
    return [f for f in folders[:-keep_last] if f not in best and f != checkpoint_folder(run_dir, saved_step)]


def new_staging(folder: Path) -> Path:
    """Return an unused name beside a checkpoint's, for one that is being written or deleted."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")


def discard(folder: Path) -> None:
    """Delete a checkpoint, renamed first lest a kill leave half of one; where that fails, warn and put it back."""
    aside = new_staging(folder)
    try:
        folder.rename(aside)
        if not _delete(aside):
            aside.rename(folder)
    except OSError as error:
        log.warning("%s cannot be moved aside to be deleted (%s)", folder, error.strerror)


def discard_leftovers(checkpoints: Path) -> None:
    """Delete what a killed process has left of writing or deleting; warn where that fails."""
    for leftover in checkpoints.glob(".step-*.tmp"):
        if STAGED.fullmatch(leftover.name):
            _delete(leftover)


def write_score(run_dir: str, step: int, loss: float) -> None:
    """Note the validation loss of a step beside the checkpoints, atomically."""
    write_json(Path(run_dir) / "checkpoints" / SCORES, {**read_scores(run_dir), str(step): loss})


def read_scores(run_dir: str) -> dict[str, float]:
    """Read the finite validation losses by step; empty where none was noted."""
    try:
        scores = json.loads((Path(run_dir) / "checkpoints" / SCORES).read_text())
        return {str(step): float(loss) for step, loss in scores.items() if math.isfinite(loss)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _step_of(folder: Path) -> int:
    """Return the step a folder holds, whatever its name. Where that cannot be read, return the step in its name."""
    try:
        return read_step(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return int(folder.name.removeprefix("step-"))


def _delete(folder: Path) -> bool:
    try:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s; trying to delete it again after the next save", error)
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
