"""One run of `make nano`: train or sample, measure, leave result.json. Resumable: fit goes on from its checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.config import DEMO_ADAPTERS, Config, ConfigError, as_dict, flatten, load_config
from one4d_pl.nano.experiments import TRAINED, Run

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.types import Sample

log = logging.getLogger("one4d_pl")

CLIPS = 64  # held-out ones; more than the 48 features of fd_vae
MEAN_CLIPS = 256  # training clips behind the mean pointmap
VAE_CLIPS = 100  # training clips of a VAE
VAE_CROP = (32, 48)  # at most; two crops a step, half of each clip's area
RESULT = "result.json"
LOCK = "data.lock"
LOCK_WAIT_S, LOCK_POLL_S = 3600, 1.0
CURVES = ("rgb", "xyz")


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    out: Path
    configs: tuple[str, ...] = ("configs/nano.yaml",)
    overrides: tuple[str, ...] = ()
    adapters: Path = DEMO_ADAPTERS  # of the runs that only sample
    clips: int = CLIPS

    def folder(self, run: Run, seed: int) -> Path:
        return self.out / f"{run.name}-{seed}"

    def config(self, run: Run, seed: int) -> Config:
        """Of one run; the same whatever else is run, and on any machine."""
        place = [f"run_dir={self.folder(run, seed)}", f"train.seed={seed}"]
        return load_config(list(self.configs), [*self.overrides, *run.overrides, *place])


@dataclass(frozen=True)
class Result:
    """What a finished run has left."""

    numbers: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]  # val/loss of rgb and xyz by step
    minutes: float
    steps: int
    machine: str
    recipe: str


def read_result(plan: Plan, run: Run, seed: int) -> Result | None:
    """None where the run is not finished; ConfigError where its result is broken."""
    path = plan.folder(run, seed) / RESULT
    try:
        return Result(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove the folder to run it again") from None


def is_finished(plan: Plan, run: Run, seed: int) -> bool:
    """ConfigError where the folder holds a run of another recipe."""
    result = read_result(plan, run, seed)
    if result is not None and result.recipe != recipe_of(plan, run, seed):
        raise ConfigError(
            f"{plan.folder(run, seed)}: a run of another config; remove the folder, or choose another --out"
        )
    return result is not None


def work(plan: Plan, run: Run, seed: int) -> None:
    """Do one run, unless it is done."""
    if is_finished(plan, run, seed):
        return
    from tqdm import tqdm

    from one4d_pl.inference.scene_files import write_text
    from one4d_pl.nano.measure import measure, measure_references, measure_vae, sampled_clips

    folder, config, began = plan.folder(run, seed), plan.config(run, seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[tuple[int, float]]] = {}
    if run.kind == "train":
        _train(config, plan.out / LOCK)
        curves = _read_curves(folder)
    clips = _held_out(config, plan.clips)
    if run.kind in ("vae", "vae_rgb"):
        numbers = measure_vae(_train_vae(config, run.kind == "vae", seed), clips)
    else:
        pipeline, count = _open(config, run, plan.adapters), sampled_clips(len(clips), run.given)
        with tqdm(total=count, desc=f"{run.name} {seed}: sampling", unit="clip") as bar:
            if run.kind == "references":
                numbers = measure_references(pipeline, clips, _mean_pointmap(config), seed, bar.update)
            else:
                numbers = measure(pipeline, clips, seed, run.given, bar.update)
    numbers |= {f"val.{name}": points[-1][1] for name, points in curves.items()}
    stored = {
        "numbers": {name: float(f"{value:.6g}") for name, value in numbers.items()},
        "curves": {name: [(step, float(f"{v:.6g}")) for step, v in points] for name, points in curves.items()},
        "minutes": round((time.monotonic() - began) / 60, 2),
        "steps": config.train.max_steps if run.kind in TRAINED else 0,
        "machine": _machine(),
        "recipe": recipe_of(plan, run, seed),
    }
    write_text(folder / RESULT, json.dumps(stored, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # dozens of runs; what they showed is kept


def _train(config: Config, lock: Path) -> None:
    from one4d_pl.data.file_lock import locked
    from one4d_pl.fit import fit, training_data

    with locked(lock, LOCK_WAIT_S, LOCK_POLL_S):  # two writers of the same shards or encodings would collide
        training_data(config).prepare_data()
    if fit(config):
        raise ConfigError(f"{config.run_dir}: stopped by a signal; the same command goes on from there")


def _train_vae(config: Config, pointmaps: bool, seed: int) -> AutoencoderKLWan:
    """The shipped VAE's recipe, cut to as many steps as the other runs have, with or without pointmaps."""
    from tqdm import tqdm

    from one4d_pl.training.tiny_vae import Stage, TinyVaeConfig, VaeTraining, build_vae, render_pool, train_step

    data, steps = config.data, config.train.max_steps
    height, width = (min(side, most) for side, most in zip((data.height, data.width), VAE_CROP, strict=True))
    recipe = TinyVaeConfig(pointmaps=pointmaps, seed=seed, stages=(Stage(1.0, data.num_frames, height, width, 2),))
    assert data.toy is not None
    clips = [(data.toy.seed + i, "synthetic") for i in range(min(VAE_CLIPS, data.toy.train_synthetic))]
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


def _open(config: Config, run: Run, adapters: Path) -> One4DPipeline:
    import torch

    from one4d_pl.evaluation.open_model import open_pipeline
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.training.checkpoint import newest_checkpoint

    if run.kind == "references":
        return One4DPipeline.open(config, None)
    folder = newest_checkpoint(config.run_dir) if run.kind == "train" else adapters
    assert folder is not None  # it was trained just now
    return open_pipeline(config, folder, torch.device("cpu"))[0]


def _held_out(config: Config, count: int) -> list[Sample]:
    from one4d_pl.data.datamodule import VAL_SEED_OFFSET
    from one4d_pl.evaluation.toy_clips import render_samples

    first = _toy_seed(config) + VAL_SEED_OFFSET
    return render_samples(config, range(first, first + count), "held-out clips")


def _mean_pointmap(config: Config) -> Tensor:  # [3, T, H, W]
    import torch

    from one4d_pl.evaluation.toy_clips import render_samples

    assert config.data.toy is not None
    first, count = config.data.toy.seed, min(MEAN_CLIPS, config.data.toy.train_synthetic)
    clips = render_samples(config, range(first, first + count), "training clips")
    return torch.stack([clip.pointmap for clip in clips]).mean(0)


def _toy_seed(config: Config) -> int:
    if config.data.toy is None:
        raise ConfigError("data.toy: null, but nano measures on clips it renders; leave configs/nano.yaml's")
    return config.data.toy.seed


def _read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The validation losses that TensorBoard shows; of steps that a resumed run did twice, the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: sorted({e.step: e.value for e in events.Scalars(f"val/loss/{name}")}.items()) for name in CURVES}


def recipe_of(plan: Plan, run: Run, seed: int) -> str:
    """A digest of all that decides a run's numbers; a knob at its default says nothing: others may be added later."""
    ours, usual = flatten(as_dict(plan.config(run, seed))), flatten(as_dict(Config()))
    changed = [f"{k}={ours[k]}" for k in sorted(ours) if ours[k] != usual.get(k) and k != "run_dir"]
    parts = [*changed, run.kind, str(plan.clips), str(run.given)]
    if run.kind == "sample":
        card = plan.adapters / "card.json"
        parts.append(hashlib.sha256(card.read_bytes() if card.is_file() else b"").hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
