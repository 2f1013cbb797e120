"""One run of `make nano`: train or sample, measure, write result.json.

An interrupted `fit` resumes from its checkpoint; a VAE's training starts again.
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
    DEMO_ADAPTERS,
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

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.types import Sample

log = logging.getLogger("one4d_pl")

CLIPS = 64  # held-out clips; more than the 48 features of fd_vae
MEAN_CLIPS = 256  # training clips for the mean pointmap
VAE_CLIPS = 100  # training clips of a VAE
VAE_CROP = (32, 48)  # at most, half of a clip's area; two crops a step
RESULT = "result.json"
LOCK_WAIT_S, LOCK_POLL_S = 3600, 1.0
CURVES = ("rgb", "xyz")


@dataclass(frozen=True)
class Plan:
    """The settings that all runs share."""

    out: Path
    configs: tuple[str, ...] = ("configs/nano.yaml",)
    overrides: tuple[str, ...] = ()
    adapters: Path = DEMO_ADAPTERS  # of the runs that only sample or train further
    clips: int = CLIPS

    def folder(self, run: Run, seed: int) -> Path:
        return self.out / f"{run.name}-{seed}"

    def config(self, run: Run, seed: int) -> Config:
        """Load one run's config; it depends on no other run and on no machine."""
        place = [f"run_dir={self.folder(run, seed)}", f"train.seed={seed}"]
        start = self._init_overrides() if run.from_adapters else []
        return load_config(list(self.configs), [*self.overrides, *run.overrides, *start, *place])

    def _init_overrides(self) -> list[str]:
        """Return overrides to train the adapters further, with pointmaps encoded as theirs."""
        from one4d_pl.models.adapters import AdapterCard

        card = AdapterCard.read(self.adapters)
        return [
            f"train.init_from={self.adapters}",
            f"dlc.standardise_xyz={card.dlc.standardise_xyz}",
            f"data.pointmap_power={card.pointmap_power}",
        ]


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
    from tqdm import tqdm

    from experiments.nano.measure import measure, measure_references, measure_vae, sampled_clips

    folder, config, began = plan.folder(run, seed), plan.config(run, seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(plan, run, seed)
    curves: dict[str, list[tuple[int, float]]] = {}
    if run.kind == "train":
        _train(config)
        curves = _read_curves(folder)
    clips = _held_out(plan.config(RUNS[REFERENCE], seed), plan.clips)  # every run is measured on the same clips
    if run.kind in ("vae", "vae_rgb"):
        numbers = measure_vae(_train_vae(config, run.kind == "vae", seed), clips)
    else:
        pipeline, count = _open_pipeline(config, run, plan.adapters), sampled_clips(len(clips), run.given)
        with tqdm(total=count, desc=f"{run.name} {seed}: sampling", unit="clip") as bar:
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
    write_json(folder / RESULT, stored)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # dozens of runs would fill the disk


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


def _train_vae(config: Config, pointmaps: bool, seed: int) -> AutoencoderKLWan:
    """Train a VAE by the shipped one's recipe, with or without pointmaps. It takes as many steps as the other runs."""
    from tqdm import tqdm

    from experiments.tiny_wan.vae import Stage, TinyVaeConfig, VaeTraining, build_vae, render_pool, train_step

    data, steps = config.data, config.train.max_steps
    height, width = (min(side, most) for side, most in zip((data.height, data.width), VAE_CROP, strict=True))
    recipe = TinyVaeConfig(pointmaps=pointmaps, seed=seed, stages=(Stage(1.0, data.num_frames, height, width, 2),))
    toy = _toy_config(config)
    clips = [(toy.seed + i, "synthetic") for i in range(min(VAE_CLIPS, toy.train_synthetic))]
    pool = render_pool(clips, data.num_frames, data.height, data.width, data.far_limit, data.z_offset)
    training = VaeTraining.start(build_vae(recipe))
    for step in tqdm(range(steps), desc="training a VAE", unit="step"):
        train_step(training, pool, recipe, step / steps)
    return training.averaged_vae()


def _machine() -> str:
    import torch

    threads = torch.get_num_threads()
    cores = f"{'one core' if threads == 1 else f'{threads} cores'}, {platform.machine()}"
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cores}, torch {torch.__version__}"


def _open_pipeline(config: Config, run: Run, adapters: Path) -> One4DPipeline:
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.models.adapters import AdapterCard
    from one4d_pl.training.checkpoint_files import newest_checkpoint

    if run.kind == "references":
        return One4DPipeline.open(config, None)
    folder = newest_checkpoint(config.run_dir) if run.kind == "train" else adapters
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
    """Collect what decides a run's numbers, apart from the code: config, first weights, what it is measured on."""
    config = plan.config(run, seed)
    recipe = flatten(as_dict(config)) | {"nano.kind": run.kind, "nano.clips": plan.clips, "nano.given": run.given}
    recipe["nano.broken"] = run.broken
    del recipe["run_dir"]
    recipe["nano.base"] = _digest(base_folder(config.base.path))
    if run.from_adapters:
        recipe["train.init_from"] = None  # the adapters' digest counts, not their path
    if run.kind == "sample" or run.from_adapters:
        recipe["nano.adapters"] = _digest(plan.adapters)
    return recipe


@cache
def _digest(folder: Path) -> str:
    """Hash every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = (f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
