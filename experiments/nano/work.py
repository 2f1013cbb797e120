"""One run of `make nano`: train or sample, measure, write result.json.

An interrupted training resumes from its checkpoint. That of `dlc` leaves its adapters, which the runs that only sample
open: they are decided by its config and seed, so a sampling run's recipe is the same with other overrides.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.nano.experiments import REFERENCE, RUNS, Run
from one4d_pl.config import (
    Config,
    ConfigError,
    DataConfig,
    ToyConfig,
    as_dict,
    base_folder,
    changes,
    flatten,
    load_config,
)
from one4d_pl.files import write_json
from one4d_pl.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.types import Sample

log = logging.getLogger("one4d_pl")

CLIPS = 64  # held-out clips; more than the 48 features of fd_vae
MEAN_CLIPS = 256  # training clips for the mean pointmap
RESULT, ADAPTERS = "result.json", "adapters"
LOCK_WAIT_S, LOCK_POLL_S = 3600, 1.0
CURVES = ("rgb", "xyz")


@dataclass(frozen=True)
class Plan:
    """The settings that all runs share."""

    out: Path
    configs: tuple[str, ...] = ("configs/nano.yaml",)
    overrides: tuple[str, ...] = ()
    clips: int = CLIPS

    def folder(self, run: Run, seed: int) -> Path:
        return self.out / f"{run.name}-{seed}"

    def config(self, run: Run, seed: int) -> Config:
        """Load one run's config; it depends on no other run and on no machine."""
        place = [f"run_dir={self.folder(run, seed)}", f"train.seed={seed}"]
        return load_config(list(self.configs), [*self.overrides, *run.overrides, *place])

    def adapters(self, seed: int) -> Path:
        """Return the folder where the reference's training leaves its adapters."""
        return self.folder(RUNS[REFERENCE], seed) / ADAPTERS


@dataclass(frozen=True)
class Result:
    """The stored result of a finished run."""

    numbers: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]  # val/loss of rgb and xyz by step
    minutes: float
    machine: str
    recipe: dict[str, object]  # see recipe_of


def read_result(plan: Plan, run: Run, seed: int) -> Result | None:
    """Read a run's result; None where it is not finished, ConfigError where it is broken."""
    path = plan.folder(run, seed) / RESULT
    try:
        return Result(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove the folder to run it again") from None


def is_finished(plan: Plan, run: Run, seed: int) -> bool:
    """Tell whether a run is finished. ConfigError where its folder holds a run of another recipe."""
    result = read_result(plan, run, seed)
    if result is not None and (differing := differences(plan, run, seed, result.recipe)):
        raise ConfigError(
            f"{plan.folder(run, seed)}: a run of another config ({', '.join(differing)}); remove the folder, or choose "
            "another --out"
        )
    return result is not None


def can_start(plan: Plan, run: Run, seed: int) -> bool:
    """Tell whether a run has the adapters that it samples. ConfigError where they are of another config."""
    return run.kind != "sample" or (is_finished(plan, RUNS[REFERENCE], seed) and plan.adapters(seed).is_dir())


def differences(plan: Plan, run: Run, seed: int, recipe: dict[str, object]) -> list[str]:
    """List the keys in which a stored recipe differs from today's; a knob it does not know yet had its default."""
    defaults = flatten(as_dict(Config(data=DataConfig(toy=ToyConfig()))))
    return [
        change.key for change in changes(recipe, recipe_of(plan, run, seed), defaults, lambda key: key == "run_dir")
    ]


def work(plan: Plan, run: Run, seed: int) -> None:
    """Do one run, unless it is done."""
    if is_finished(plan, run, seed):
        return
    from experiments.nano.measure import measure, measure_references, sampled_clips

    folder, config, began = plan.folder(run, seed), plan.config(run, seed), time.monotonic()
    if not can_start(plan, run, seed):
        raise ConfigError(
            f"{plan.adapters(seed)}: not there, and {run.name} samples them; remove the folder above it if there is "
            f"one, and --run {REFERENCE}:{seed}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(plan, run, seed)
    curves: dict[str, list[tuple[int, float]]] = {}
    if run.kind == "train":
        _train(config)
        curves = _read_curves(folder)
    clips = _held_out(config, plan.clips)
    pipeline, count = _open_pipeline(plan, run, seed), sampled_clips(len(clips), run.given)
    with Progress(total=count, desc=f"{run.name} {seed}: sampling", unit="clip") as bar:
        if run.kind == "references":
            numbers = measure_references(pipeline, clips, _mean_pointmap(config), seed, bar.update)
        else:
            numbers = measure(pipeline, clips, seed, run.given, bar.update, run.broken)
    numbers |= {f"val.{name}": points[-1][1] for name, points in curves.items()}
    stored = {
        "numbers": {name: float(f"{value:.6g}") for name, value in numbers.items()},
        "curves": {name: [(step, float(f"{v:.6g}")) for step, v in points] for name, points in curves.items()},
        "minutes": round((time.monotonic() - began) / 60, 2),
        "machine": _machine(),
        "recipe": recipe_of(plan, run, seed),
    }
    if run.name == REFERENCE:
        _keep_adapters(config, plan.adapters(seed))
    write_json(folder / RESULT, stored)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # with the optimiser's state; many would fill the disk


def _check_recipe(plan: Plan, run: Run, seed: int) -> None:
    """Store the recipe; ConfigError where an interrupted run began under another one."""
    path = plan.folder(run, seed) / "recipe.json"
    if path.is_file() and (differing := differences(plan, run, seed, json.loads(path.read_text()))):
        raise ConfigError(
            f"{path}: begun under another config ({', '.join(differing)}); remove the folder, or choose another --out"
        )
    write_json(path, recipe_of(plan, run, seed))


def _train(config: Config) -> None:
    from one4d_pl.data.file_lock import locked
    from one4d_pl.fit import fit
    from one4d_pl.training.run_lock import sole_run
    from one4d_pl.training.strategy import training_data

    root = Path(_toy_config(config).root)
    root.parent.mkdir(parents=True, exist_ok=True)
    try:  # one writer of the shared shards and encodings at a time
        with locked(root.with_name(f"{root.name}.lock"), LOCK_WAIT_S, LOCK_POLL_S):
            data = training_data(config)
            data.prepare_data()
            data.setup("fit")
    except TimeoutError as error:
        raise ConfigError(str(error)) from error
    with sole_run(config.run_dir):
        code = fit(config)
    if code:
        raise ConfigError(f"{config.run_dir}: stopped by a signal; the same command goes on from there")


def _keep_adapters(config: Config, out: Path) -> None:
    from one4d_pl.commands.export import export

    if not out.exists():  # kept by a run that was stopped before it wrote its result
        export(Path(config.run_dir), out, "float32", ())


def _machine() -> str:
    import torch

    threads = torch.get_num_threads()
    cores = f"{'one core' if threads == 1 else f'{threads} cores'}, {platform.machine()}"
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cores}, torch {torch.__version__}"


def _open_pipeline(plan: Plan, run: Run, seed: int) -> One4DPipeline:
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.models.adapters import AdapterCard
    from one4d_pl.training.checkpoint_files import newest_checkpoint

    config = plan.config(run, seed)
    if run.kind == "references":
        return One4DPipeline.open(config, None)
    folder = newest_checkpoint(config.run_dir) if run.kind == "train" else plan.adapters(seed)
    assert folder is not None  # the training has just written a checkpoint
    return One4DPipeline.open(AdapterCard.read(folder).configure(config), folder)


def _held_out(config: Config, count: int) -> list[Sample]:
    from one4d_pl.data.datamodule import VAL_SEED_OFFSET
    from one4d_pl.evaluation.toy_clips import render_samples

    first = _toy_config(config).seed + VAL_SEED_OFFSET
    return render_samples(config, range(first, first + count), "held-out clips")


def _mean_pointmap(config: Config) -> Tensor:  # [3, T, H, W]
    import torch

    from one4d_pl.evaluation.toy_clips import render_samples

    toy = _toy_config(config)
    first, count = toy.seed, min(MEAN_CLIPS, toy.train_synthetic)
    clips = render_samples(config, range(first, first + count), "training clips")
    return torch.stack([clip.pointmap for clip in clips]).mean(0)


def _toy_config(config: Config) -> ToyConfig:
    if config.data.toy is None:
        raise ConfigError("data.toy: null, but nano measures on clips it renders; leave configs/nano.yaml's")
    return config.data.toy


def _read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the validation losses from TensorBoard's events. Of steps that a resumed run did twice, the last counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: sorted({e.step: e.value for e in events.Scalars(f"val/loss/{name}")}.items()) for name in CURVES}


def recipe_of(plan: Plan, run: Run, seed: int) -> dict[str, object]:
    """Collect what decides a run's numbers, apart from the code: config, base, what it is measured on."""
    config = plan.config(run, seed)
    recipe = flatten(as_dict(config)) | {"nano.kind": run.kind, "nano.clips": plan.clips, "nano.given": run.given}
    recipe["nano.broken"] = run.broken
    del recipe["run_dir"]
    recipe["nano.base"] = _digest(base_folder(config.base.path))
    return recipe


@cache
def _digest(folder: Path) -> str:
    """Hash every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = (f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
