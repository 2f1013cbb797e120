"""The checks of the pre-flight (commands/preflight.py): files, versions, GPUs, the run folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from one4d_pl.config import Config, ConfigError, SourceConfig
from one4d_pl.training.checkpoint_files import STATE, refuse_used_folder, step_folders

# packages that compute a step or write a file; others may differ between nodes
PACKAGES = (
    *("torch", "lightning", "deepspeed", "peft"),
    *("diffusers", "transformers", "safetensors", "webdataset", "numpy"),
)
MOMENTS_AND_WEIGHT = 12  # bytes of a trainable in a checkpoint: float32 weight and AdamW's two moments
AVERAGE = 4  # bytes more with optim.ema_decay
SHARED_FOLDER_PATIENCE_S = 10.0  # network filesystems may show another node's file late


@dataclass(frozen=True)
class Place:
    """Which process of the job this is, and the address where all of them meet."""

    rank: int
    world: int
    local_rank: int
    node: str
    node_index: int
    nodes: int
    launched: bool  # by srun; otherwise this is one process that checks its own machine
    address: str
    port: int  # 0 = any

    @staticmethod
    def from_environment() -> Place:
        """Read the place from srun's variables. Raises ConfigError where the meeting address is missing."""
        env = os.environ
        node = env.get("SLURMD_NODENAME", platform.node())
        if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
            return Place(0, 1, 0, node, 0, 1, False, "127.0.0.1", 0)
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ConfigError("MASTER_ADDR, MASTER_PORT: not set; start through slurm/train_8node.sh, which sets them")
        rank, world, local_rank, node_index, nodes = (
            int(env[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID", "NODEID", "NNODES")
        )
        port = int(env["MASTER_PORT"])
        return Place(rank, world, local_rank, node, node_index, nodes, True, env["MASTER_ADDR"], port)


@dataclass
class Report:
    """What one rank saw."""

    node: str
    versions: dict[str, str]
    base_fingerprint: str = ""  # set by the node's first rank
    faults: list[str] = field(default_factory=list)


def check_world(config: Config, place: Place) -> None:
    """Raise ConfigError if SLURM started another number of processes than the config needs."""
    train = config.train
    if place.launched and (place.world, place.nodes) != (train.world_size, train.num_nodes):
        raise ConfigError(
            f"train.num_nodes, train.devices: {train.num_nodes} x {train.devices} = {train.world_size} processes, but "
            f"SLURM started {place.world} on {place.nodes} nodes; set NODES and GPUS_PER_NODE instead of these keys"
        )


def refuse_absent_packages(config: Config) -> None:
    """Raise ConfigError if the run asks for DeepSpeed or wandb and it is not installed."""
    if "wandb" in config.train.logger and find_spec("wandb") is None:
        raise ConfigError("train.logger: wandb is not installed; pip install wandb, or leave it out of train.logger")
    if config.train.strategy == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            f"train.strategy: deepspeed is not installed on this {platform.system()} (one4d_pl requires it on Linux "
            "alone); set train.strategy=ddp, or single for one process"
        )


def look(config: Config, place: Place, probe: Path) -> Report:
    """Run this rank's checks; files are checked once per node."""
    from one4d_pl.data.shared_memory import refuse_small_shared_memory

    report = Report(place.node, _versions())
    checks: list[Callable[[], None]] = [lambda: _check_gpus(config)]
    if place.local_rank == 0:
        checks += [_check_driver, lambda: _check_shared(probe), lambda: _read_base(config, report)]
        checks += [lambda: _check_memory(config), lambda: refuse_small_shared_memory(config)]
        sources = {source.path: source for source in [*config.data.sources, *config.data.val_sources]}
        checks += [partial(_read_sample, config, source, place) for source in sources.values()]
        checks.append(lambda: _check_caches(config))
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as error:  # ConfigError and the shards' errors are ValueErrors
            fault = " ".join(str(error).split())
            if fault not in report.faults:
                report.faults.append(fault)
    return report


def faults_of(reports: list[Report]) -> list[str]:
    """Write a line per fault, with the nodes that found it."""
    nodes = _grouped([(fault, report.node) for report in reports for fault in report.faults])
    return [f"{_some(found)}: {fault}" for fault, found in nodes.items()]


def differences(reports: list[Report]) -> list[str]:
    """Write a line per package, and one for the base, that is not the same on all nodes."""
    faults = []
    for name in reports[0].versions:
        found = _grouped([(report.versions[name], report.node) for report in reports])
        if len(found) > 1:
            faults.append(
                f"mixed versions between nodes: {name} is {_on_nodes(found)}; use one VENV that all nodes see"
            )
    bases = _grouped([(report.base_fingerprint[:12], report.node) for report in reports if report.base_fingerprint])
    if len(bases) > 1:
        faults.append(f"base.path: other weights on other nodes: {_on_nodes(bases)}; copy them again")
    return faults


def checkpoint_bytes(config: Config) -> int:
    """Compute the size of one checkpoint, from the adapter's shape on the meta device."""
    import torch
    from diffusers import WanTransformer3DModel

    from one4d_pl.models.base_files import resolve_base, transformer_config
    from one4d_pl.models.coupling import couple

    settings = transformer_config(resolve_base(config.base.path))
    with torch.device("meta"):
        model = couple(WanTransformer3DModel.from_config(settings), config.dlc, seed=0)
    each = MOMENTS_AND_WEIGHT + (AVERAGE if config.optim.ema_decay else 0)
    return each * sum(model.parameter_counts().values())


def run_faults(config: Config) -> list[str]:
    """List what is wrong with the run folder: another run's checkpoints, or no room for ours."""
    try:
        folders = [f for f in step_folders(config.run_dir) if (f / STATE).is_file()]
        if folders and config.train.resume:
            from one4d_pl.training.checkpoint import refuse_other_run

            refuse_other_run(folders[-1], config)
        elif folders:
            refuse_used_folder(config.run_dir)
    except (ConfigError, KeyError) as error:
        return [str(error)]
    one = checkpoint_bytes(config)
    count = config.train.keep_last + config.train.keep_best + 1  # a new one is written before the oldest is deleted
    needed = count * one
    held = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(config.run_dir).free
    if free + held < needed:
        return [
            f"run_dir: {free / 1e9:.1f} GB free at {config.run_dir}, checkpoints need {(needed - held) / 1e9:.1f} GB "
            f"more ({count} x {one / 1e9:.1f} GB); free some or lower train.keep_last"
        ]
    return []


def _check_shared(probe: Path) -> None:
    deadline = time.monotonic() + SHARED_FOLDER_PATIENCE_S
    while not probe.exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"run_dir: {probe.parent} is not the folder that rank 0 sees; put it on shared storage")
        time.sleep(0.2)


def _check_gpus(config: Config) -> None:
    import torch

    from one4d_pl.models.device import device_of

    found = torch.cuda.device_count()
    if device_of(config).type == "cuda" and found < config.train.devices:
        raise ConfigError(
            f"train.devices: {config.train.devices} processes per node, but {found} GPUs; in SLURM ask for GPUs per "
            "node (--gpus-per-node), never per task: every process sees all of its node's and takes its own"
        )


def _check_driver() -> None:
    from one4d_pl.models.cuda_driver import driver_mismatch

    if mismatch := driver_mismatch():
        raise ConfigError(mismatch)


def _check_memory(config: Config) -> None:
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        refuse_too_large(config, gpu.name, gpu.total_memory)


def refuse_too_large(config: Config, gpu: str, gpu_bytes: int) -> None:
    """Raise ConfigError if, by the planner, a training step does not fit the GPU."""
    from one4d_pl.costs.flops import TransformerShape
    from one4d_pl.costs.memory import batch_of, layout_of, step_memory
    from one4d_pl.data.encoded import trains_on_encoded
    from one4d_pl.models.base_files import IMAGE_TOKENS, encoder_sizes, resolve_base, transformer_config

    folder = resolve_base(config.base.path)
    shape = TransformerShape.of(transformer_config(folder), config.dlc)
    layout = layout_of(config, *encoder_sizes(folder))
    if trains_on_encoded(config):
        layout = layout.without_encoders()
    memory = step_memory(shape, batch_of(config, IMAGE_TOKENS if shape.image_dim is not None else 0), layout)
    if not memory.fits(gpu_bytes):
        name, largest = max(memory.parts(), key=lambda part: part[1])
        raise ConfigError(
            f"train: a step needs {memory.total / 2**30:.1f} GiB of a GPU, {gpu} has {gpu_bytes / 2**30:.1f}; the "
            f"largest part is {name}, {largest / 2**30:.1f} GiB; `one4d plan` tells what fits"
        )


def _read_base(config: Config, report: Report) -> None:
    """Check that the base has every file that its own indices name, then note its fingerprint."""
    from one4d_pl.models.base_files import fingerprint, lacking, resolve_base

    if missing := lacking(resolve_base(config.base.path)):
        raise ConfigError(f"base.path: {missing}; get it again")
    report.base_fingerprint = fingerprint(config.base.path)


def _read_sample(config: Config, source: SourceConfig, place: Place) -> None:
    """Read one sample of a source, another one on every node."""
    from one4d_pl.data.encoded import open_set

    made_by_fit = config.data.toy.folders() if config.data.toy else []
    if Path(source.path) in made_by_fit and not (Path(source.path) / "manifest.json").is_file():
        return
    shards = open_set(source.path).without_flagged()
    try:
        shards.read(len(shards) * place.node_index // place.nodes)
    except ValueError as error:
        raise ConfigError(f"{source.path}: {error}; see `python -m data_prep.check_shards {source.path}`") from None


def _check_caches(config: Config) -> None:
    from one4d_pl.training.strategy import training_data

    training_data(config).check_caches()


def _versions() -> dict[str, str]:
    """Read the versions that must be the same on all nodes, this package's own source included."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
        versions.setdefault(name, "absent")
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    return {**versions, "one4d_pl's code": code.hexdigest()[:12]}


def _grouped(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Group (value, node) pairs as value -> nodes."""
    groups: dict[str, list[str]] = {}
    for value, node in pairs:
        if node not in groups.setdefault(value, []):
            groups[value].append(node)
    return groups


def _on_nodes(groups: dict[str, list[str]]) -> str:
    """List values with their nodes, the most common value first."""
    return "; ".join(f"{value} on {_some(groups[value])}" for value in sorted(groups, key=lambda v: -len(groups[v])))


def _some(nodes: list[str]) -> str:
    return f"{', '.join(nodes[:3])}{' ...' if len(nodes) > 3 else ''}"
