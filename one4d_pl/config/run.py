"""Knobs of a run: optimiser, data, training, validation, scenes; and all of them together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from one4d_pl.config.checks import ConfigError, check, knob, refuse
from one4d_pl.config.model import NATIVE_ATTENTION, BaseConfig, DLCConfig, FlowConfig, MaskingConfig, SamplerConfig

TEMPORAL_FACTOR = 4  # Wan's video VAE: frame 0 alone, then groups of four, so T = 4k + 1
TOY_LEVELS = ("hard", "clear")  # described in toy/levels.py
CHECKPOINTING = ("none", "full", "selective", "offload")
LOGGERS = ("tensorboard", "csv", "wandb")


@dataclass
class OptimConfig:
    """AdamW with a warm-up, a constant learning rate and, if asked for, a linear cooldown.

    The paper gives lr alone; the other values are those of 4DNeX and VideoX-Fun.
    """

    lr: float = knob(1e-4, above=0)  # One4D, sec. 4.1
    link_lr_width: int = knob(1280, low=1)  # the links' lr is lr * min(1, link_lr_width / D)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = knob(1e-4, low=0)
    warmup_steps: int = knob(100, low=0)
    # the lr falls to 0 over so many last steps; 0 = constant; may change until the fall has begun
    cooldown_steps: int = knob(0, low=0, may_change=True)
    grad_clip: float = knob(1.0, low=0)  # norm over all trainables
    # validate, sample and export an exponential moving average of the trainables; 0 = off
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check("optim", self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas: need values in [0, 1), got {self.betas}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"optim.ema_decay: need a value in [0, 1), got {self.ema_decay}; 0 = off, e.g. 0.99")


@dataclass
class SourceConfig:
    """One folder (or URL) of shards and its share of the mixture."""

    path: str = "???"
    weight: float = 1.0  # relative to the other sources


@dataclass
class ToyConfig:
    """The procedural toy world. `fit` writes it as shards at `root`/{train_synthetic,train_real,val} where absent."""

    root: str = "data/toy"
    # clear: narrow depth, one lens, few large things far apart; made for a laptop to learn
    level: str = knob("hard", one_of=TOY_LEVELS)
    train_synthetic: int = knob(192, low=0)  # clips
    train_real: int = knob(64, low=0)  # clips with sensor noise, holes and pseudo cameras
    val: int = knob(32, low=0)  # clips, synthetic
    seed: int = knob(0, low=0)

    def __post_init__(self) -> None:
        check("data.toy", self)

    def folders(self) -> list[Path]:
        """List the shard folders that `fit` writes."""
        counts = {"train_synthetic": self.train_synthetic, "train_real": self.train_real, "val": self.val}
        return [Path(self.root) / split for split, count in counts.items() if count]


@dataclass
class DataConfig:
    """What a training sample is made of."""

    sources: list[SourceConfig] = field(default_factory=list)
    val_sources: list[SourceConfig] = knob(factory=list, may_change=True)
    toy: ToyConfig | None = knob(None, may_change=True)
    num_frames: int = 17  # 4k + 1, 9 .. 81; longer clips are cut to their first frames
    height: int = 64
    width: int = 96
    # depth beyond far_limit x the clip's median distance is not valid (geometry/pointmap.py)
    far_limit: float = 10.0
    z_offset: bool = False  # move the normalisation's centre along z
    # the VAE sees r ** power for a distance r from camera 0: below 1, near points get more room
    pointmap_power: float = 1.0
    block_shards: int = knob(8, low=1)  # samples are shuffled inside blocks of this many shards
    num_workers: int = knob(2, low=0, may_change=True)
    # encode clips once and keep the latents beside the shards; local shards only
    cache_latents: bool = knob(True, may_change=True)
    # folder on a node's own disk that keeps what is read of remote shards; null = nothing is kept
    cache_dir: str | None = knob(None, may_change=True)
    # GiB that a node's processes may keep there together; what was used longest ago goes first
    cache_gib: float = knob(100.0, above=0, may_change=True)
    max_skip_share: float = knob(0.05, low=0, high=1, may_change=True)  # broken samples beyond this share stop the run
    # train on clips whose depth and cameras agree this well among frames: 0.95 = to 5 %; 0 = all (docs/data.md)
    min_consistency: float = knob(0.0, low=0, high=1)

    def __post_init__(self) -> None:
        if self.num_frames % TEMPORAL_FACTOR != 1 or not 9 <= self.num_frames <= 81:
            raise ConfigError(f"data.num_frames: {self.num_frames} is not 4k+1 in 9..81 (Wan VAE); try 17, 49 or 81")
        for name, size in (("height", self.height), ("width", self.width)):
            if size % 16 or size <= 0:
                raise ConfigError(
                    f"data.{name}: {size} is not a multiple of 16 (VAE x patch); try {max(16, 16 * round(size / 16))}"
                )
        if not 1 < self.far_limit < math.inf:
            raise ConfigError(f"data.far_limit: must be > 1 (x median distance), got {self.far_limit}")
        if not 0.1 <= self.pointmap_power <= 1:  # below, a decoding error may overflow
            raise ConfigError(f"data.pointmap_power: need 0.1 to 1, got {self.pointmap_power}; 1 = linear")
        if self.z_offset and self.pointmap_power != 1:
            raise ConfigError("data.pointmap_power: bends about camera 0, which data.z_offset moves; set it to 1")
        check("data", self)
        for name, sources in (("sources", self.sources), ("val_sources", self.val_sources)):
            for source in sources:
                refuse(f"data.{name}: weight of {source.path}", source.weight, above=0)
                if source.weight < 0.001 * (1 - 1e-9) * sum(s.weight for s in sources):
                    raise ConfigError(f"data.{name}: {source.path} is less than 0.1 % of the mixture; leave it out")


@dataclass
class TrainConfig:
    """One run of `fit`."""

    max_steps: int = knob(5500, low=1, may_change=True)  # optimiser steps; One4D, sec. 4.1
    global_batch_size: int = knob(32, low=1)  # clips per optimiser step over all ranks; accumulation is derived
    micro_batch_size: int = knob(1, low=1, may_change=True)  # clips per forward pass of one rank
    strategy: str = knob("single", one_of=("single", "ddp", "deepspeed"), may_change=True)
    # deepspeed: 1, 2 shard optimiser state (and gradients), 3 also the weights
    zero_stage: int = knob(2, one_of=(1, 2, 3), may_change=True)
    offload: bool = knob(False, may_change=True)  # deepspeed: optimiser state on the host, at stage 3 the weights too
    num_nodes: int = knob(1, low=1, may_change=True)
    devices: int = knob(1, low=1, may_change=True)  # processes per node (GPUs where there are any)
    # auto: GPUs where there are any, else the CPU; gpu: without one, nothing starts
    accelerator: str = knob("auto", one_of=("auto", "gpu"), may_change=True)
    precision: str = knob("32-true", one_of=("32-true", "bf16-mixed"))  # trainables and optimiser stay float32
    # full: blocks run again in the backward pass; selective: all of a block but self-attention; offload: as full,
    # and the blocks' inputs wait in host memory
    activation_checkpointing: str = knob("none", may_change=True)
    # torch.compile of the blocks: needs a C++ compiler, or Triton's on a GPU
    compile: bool = knob(False, may_change=True)
    seed: int = knob(0, low=0)
    overfit_clips: int = knob(0, low=0)  # train on the first n clips only; 0 = off
    # adapter folder to start from, with a fresh optimiser; `embedded` = the demo's
    init_from: str | None = knob(None, may_change=True)
    resume: bool = knob(True, may_change=True)  # continue from the newest checkpoint in run_dir, if there is one
    save_every: int = knob(250, low=1, may_change=True)
    keep_last: int = knob(2, low=1, may_change=True)  # newest checkpoints kept
    keep_best: int = knob(1, low=0, may_change=True)  # checkpoints with the lowest validation loss kept besides
    log_every: int = knob(10, low=1, may_change=True)
    # any of tensorboard (and pictures), csv, wandb (to be installed): where the curves go
    logger: list[str] = knob(factory=lambda: ["tensorboard"], may_change=True)
    # minutes without a pass through the transformer, then fit writes all stacks and exits with 76; 0 = wait for ever
    hang_minutes: float = knob(20.0, low=0, may_change=True)
    # restarts in a row without a new checkpoint, after which fit refuses to start; 0 = no limit
    max_restarts: int = knob(5, low=0, may_change=True)

    def __post_init__(self) -> None:
        check("train", self)
        # older configs have yaml's true or false here, which omegaconf turns into these texts
        switch = {"True": "full", "False": "none"}
        self.activation_checkpointing = switch.get(self.activation_checkpointing, self.activation_checkpointing)
        refuse("train.activation_checkpointing", self.activation_checkpointing, one_of=CHECKPOINTING)
        for number, name in enumerate(self.logger):
            refuse(f"train.logger[{number}]", name, one_of=LOGGERS)
            if name in self.logger[:number]:
                raise ConfigError(f"train.logger: {name} twice")
        if self.compile and self.strategy == "deepspeed" and self.zero_stage == 3:
            raise ConfigError(
                "train.compile: blocks whose weights come and go are not compiled; set train.zero_stage=2"
            )
        if self.strategy == "single" and self.world_size != 1:
            raise ConfigError(
                f"train.strategy: single runs one process, asked for {self.world_size}; use ddp or deepspeed"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"train.micro_batch_size: {self.micro_batch_size} does not divide train.global_batch_size "
                f"{self.global_batch_size}"
            )
        if self.global_batch_size % (self.world_size * self.micro_batch_size):
            raise ConfigError(
                f"train.global_batch_size: {self.global_batch_size} cannot be made by {self.world_size} processes x "
                f"micro batch {self.micro_batch_size}; legal numbers of processes: "
                f"{legal_worlds(self.global_batch_size, self.micro_batch_size)}"
            )

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.num_nodes * self.devices

    @property
    def accumulation(self) -> int:
        """Return the number of forward passes per optimiser step and rank."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)


@dataclass
class ValConfig:
    """Validation losses at fixed sigmas, noise and frame masks, so that runs can be compared."""

    every: int = knob(250, low=1)  # optimiser steps
    clips: int = knob(8, low=1)
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])

    def __post_init__(self) -> None:
        check("val", self)
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            raise ConfigError(f"val.sigmas: need values in (0, 1], got {self.sigmas}")


@dataclass
class EvalConfig:
    """Scenes sampled while training.

    `every: 0` switches metrics and pictures off, `video_every: 0` the Fréchet distance.
    """

    every: int = knob(500, low=0)  # optimiser steps; rounded up to the next validation
    clips: int = knob(8, low=1)  # of the validation set, over all ranks; the tasks take turns
    steps: int = knob(20, low=1)  # of the sampler; enough for a look, not for the final quality
    video_every: int = knob(2000, low=0)  # optimiser steps between Fréchet distances; rounded up as `every`
    # of the validation set, over all ranks; as few as the VAE's 48 features would bias the distance
    video_clips: int = knob(64, low=2)
    i3d: str | None = None  # TorchScript I3D: val/video/fvd; null = the base's VAE: val/video/fd_vae

    def __post_init__(self) -> None:
        check("eval", self)


@dataclass
class Config:
    """The whole run; configs/dlc.yaml is the method, scale/*.yaml and data/*.yaml the rest."""

    run_dir: str = knob("runs/dlc", may_change=True)
    scale: str = knob("tiny", may_change=True)  # a name only, printed in the first log line
    base: BaseConfig = field(default_factory=BaseConfig)
    dlc: DLCConfig = field(default_factory=DLCConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sampler: SamplerConfig = knob(factory=SamplerConfig, may_change=True)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    val: ValConfig = knob(factory=ValConfig, may_change=True)
    eval: EvalConfig = knob(factory=EvalConfig, may_change=True)

    def __post_init__(self) -> None:
        if self.dlc.coupling != "decoupled" and self.train.strategy == "deepspeed":
            raise ConfigError(
                f"dlc.coupling: {self.dlc.coupling} does not go with train.strategy=deepspeed; only decoupled does"
            )
        train, base = self.train, self.base
        if base.quantisation != "none" and self.dlc.coupling != "decoupled":
            raise ConfigError(f"base.quantisation: only dlc.coupling=decoupled knows it, not {self.dlc.coupling}")
        if train.strategy == "deepspeed" and train.zero_stage == 3 and (base.offload or base.quantisation != "none"):
            knob = "base.offload" if base.offload else "base.quantisation"
            raise ConfigError(
                f"{knob}: ZeRO stage 3 shares out the blocks' weights itself; set train.zero_stage=2, or leave {knob} "
                "away (at stage 3 train.offload=true keeps them on the host)"
            )
        if base.offload and train.compile:
            raise ConfigError("train.compile: blocks whose weights come and go are not compiled; drop base.offload")
        if self.base.dtype == "bfloat16" and self.train.precision != "bf16-mixed":
            raise ConfigError("base.dtype: bfloat16 needs train.precision=bf16-mixed (the trainables are float32)")
        if self.train.activation_checkpointing == "selective" and self.base.attention not in NATIVE_ATTENTION:
            raise ConfigError(
                f"train.activation_checkpointing: selective knows torch's own fused kernels, not base.attention="
                f"{self.base.attention}; take one of {', '.join(NATIVE_ATTENTION)}, or full"
            )


def legal_worlds(global_batch_size: int, micro_batch_size: int) -> list[int]:
    """List the numbers of processes whose micro batches add up to the global batch."""
    per_world = global_batch_size // micro_batch_size
    return [world for world in range(1, per_world + 1) if per_world % world == 0]
