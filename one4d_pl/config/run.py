"""Knobs of a run: optimiser, data, training, validation, scenes; and all of them together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from one4d_pl.config.checks import ConfigError, at_least, one_of, positive, share
from one4d_pl.config.model import NATIVE_ATTENTION, BaseConfig, DLCConfig, FlowConfig, MaskingConfig, SamplerConfig

TEMPORAL_FACTOR = 4  # Wan's video VAE: frame 0 alone, then groups of four (protocol: T = 4k + 1)
TOY_LEVELS = ("hard", "clear")  # data/toy_levels.py tells what they are
CHECKPOINTING = ("none", "full", "selective")


@dataclass
class OptimConfig:
    """AdamW, warm-up, then constant (paper.md sec. 8) with a linear cooldown at the end where asked for."""

    lr: float = 1e-4  # One4D, sec. 4.1
    # the links' lr is lr * min(1, link_lr_width / D); nano, open: link_lr_quarter (a quarter of lr) learns 6 % faster
    link_lr_width: int = 1280
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    cooldown_steps: int = 0  # the lr falls to 0 over the last so many steps; 0 = constant, as the paper
    grad_clip: float = 1.0  # norm over all trainables
    # validate, sample and export an exponential moving average of the trainables, and keep both; 0 = off
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        positive("optim.lr", self.lr)
        at_least("optim.link_lr_width", self.link_lr_width, 1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas: need values in [0, 1), got {self.betas}")
        for name in ("weight_decay", "warmup_steps", "cooldown_steps", "grad_clip"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"optim.ema_decay: need a value in [0, 1), got {self.ema_decay}; 0 = off, e.g. 0.99")


@dataclass
class SourceConfig:
    """One folder (or URL) of shards and its share of the mixture."""

    path: str = "???"
    weight: float = 1.0  # relative to the other sources


@dataclass
class ToyConfig:
    """The procedural world; `fit` writes it as shards at `root`/{train_synthetic,train_real,val} where absent."""

    root: str = "data/toy"
    level: str = "hard"  # clear: narrow depth, one lens, few large things, air between; an hour of training suffices
    train_synthetic: int = 192  # clips
    train_real: int = 64  # clips with sensor noise, holes and pseudo cameras
    val: int = 32  # clips, synthetic
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_synthetic", "train_real", "val", "seed"):
            at_least(f"data.toy.{name}", getattr(self, name), 0)
        one_of("data.toy.level", self.level, TOY_LEVELS)

    def folders(self) -> list[Path]:
        """The shard folders that `fit` writes."""
        counts = {"train_synthetic": self.train_synthetic, "train_real": self.train_real, "val": self.val}
        return [Path(self.root) / split for split, count in counts.items() if count]


@dataclass
class DataConfig:
    """What a training sample is made of."""

    sources: list[SourceConfig] = field(default_factory=list)
    val_sources: list[SourceConfig] = field(default_factory=list)
    toy: ToyConfig | None = None
    num_frames: int = 17  # 4k + 1, 9 .. 81; longer clips are cut to their first frames
    height: int = 64
    width: int = 96
    # valid depth ends at far_limit x the clip's median distance (design.md, Normalisation); nano, open: far_limit_5 and
    # z_offset cannot be told from ours
    far_limit: float = 10.0
    z_offset: bool = False  # move the normalisation's centre along z
    # distances r from camera 0 are r ** power to the VAE: below 1 near points get room; nano, open: see
    # dlc.standardise_xyz
    pointmap_power: float = 1.0
    block_shards: int = 8  # samples are shuffled inside blocks of this many shards
    num_workers: int = 2
    cache_latents: bool = True  # encode clips once and keep the latents beside the shards; local shards only
    cache_dir: str | None = None  # folder of a node's own disk for what is read of remote shards; null = kept nowhere
    cache_gib: float = 100.0  # GiB that cache_dir may take, over all processes of the node; the oldest reads go first
    max_skip_share: float = 0.05  # broken samples beyond this share stop the run

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
        at_least("data.block_shards", self.block_shards, 1)
        at_least("data.num_workers", self.num_workers, 0)
        positive("data.cache_gib", self.cache_gib)
        share("data.max_skip_share", self.max_skip_share)
        for name, sources in (("sources", self.sources), ("val_sources", self.val_sources)):
            for source in sources:
                positive(f"data.{name}: weight of {source.path}", source.weight)
                if source.weight < 0.001 * (1 - 1e-9) * sum(s.weight for s in sources):
                    raise ConfigError(f"data.{name}: {source.path} is less than 0.1 % of the mixture; leave it out")


@dataclass
class TrainConfig:
    """One run of `fit`."""

    max_steps: int = 5500  # optimiser steps; One4D, sec. 4.1
    global_batch_size: int = 32  # clips per optimiser step over all ranks; accumulation is derived
    micro_batch_size: int = 1  # clips per forward pass of one rank
    strategy: str = "single"  # single | ddp | deepspeed
    zero_stage: int = 2  # deepspeed: 1, 2 shard optimiser state (and gradients), 3 also the weights
    offload: bool = False  # deepspeed: optimiser state in host memory, at stage 3 the weights too
    num_nodes: int = 1
    devices: int = 1  # processes per node (GPUs where there are any)
    accelerator: str = "auto"  # auto: GPUs where there are any, else the CPU; gpu: without one, nothing starts
    precision: str = "32-true"  # 32-true | bf16-mixed; trainables and optimiser stay float32
    activation_checkpointing: str = (
        "none"  # full: blocks run again in the backward pass; selective: less self-attention
    )
    compile: bool = False  # torch.compile of the blocks: needs a C++ compiler, or Triton's on a GPU
    seed: int = 0
    overfit_clips: int = 0  # train on the first n clips only; 0 = off
    init_from: str | None = None  # adapter folder to start from, with a fresh optimiser; `embedded` = the demo's
    resume: bool = True  # continue from the newest checkpoint in run_dir, if there is one
    save_every: int = 250
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints with the lowest validation loss kept besides
    log_every: int = 10
    hang_minutes: float = 20.0  # without a pass through the transformer: write the stacks, exit with 76; 0 = wait on
    max_restarts: int = 5  # in a row without a new checkpoint, then fit refuses to start; 0 = no limit

    def __post_init__(self) -> None:
        one_of("train.strategy", self.strategy, ("single", "ddp", "deepspeed"))
        one_of("train.zero_stage", self.zero_stage, (1, 2, 3))
        one_of("train.accelerator", self.accelerator, ("auto", "gpu"))
        # what yaml's true and false become here: the knob was a switch once
        switch = {"True": "full", "False": "none"}
        self.activation_checkpointing = switch.get(self.activation_checkpointing, self.activation_checkpointing)
        one_of("train.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        one_of("train.precision", self.precision, ("32-true", "bf16-mixed"))
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "num_nodes", "devices", "save_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("keep_last", "log_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("seed", "overfit_clips", "keep_best", "hang_minutes", "max_restarts"):
            at_least(f"train.{name}", getattr(self, name), 0)
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
        return self.num_nodes * self.devices

    @property
    def accumulation(self) -> int:
        """Forward passes per optimiser step and rank."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)


@dataclass
class ValConfig:
    """`val/loss/*` at fixed sigmas, noise and frame masks, so that curves of different runs compare."""

    every: int = 250  # optimiser steps
    clips: int = 8
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])

    def __post_init__(self) -> None:
        at_least("val.every", self.every, 1)
        at_least("val.clips", self.clips, 1)
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            raise ConfigError(f"val.sigmas: need values in (0, 1], got {self.sigmas}")


@dataclass
class EvalConfig:
    """Scenes sampled while training; `every: 0` switches metrics and pictures off, `video_every: 0` the distance."""

    every: int = 500  # optimiser steps; rounded up to the next validation
    clips: int = 8  # of the validation set, over all ranks; the tasks take turns
    steps: int = 20  # of the sampler: a look, not the final quality
    video_every: int = 2000  # optimiser steps between Fréchet distances; rounded up to the next validation
    video_clips: int = 64  # of the validation set, over all ranks; more than the VAE's 48 features, or it is biased
    i3d: str | None = None  # TorchScript I3D: val/video/fvd; null = the base's VAE: val/video/fd_vae

    def __post_init__(self) -> None:
        at_least("eval.every", self.every, 0)
        at_least("eval.clips", self.clips, 1)
        at_least("eval.steps", self.steps, 1)
        at_least("eval.video_every", self.video_every, 0)
        at_least("eval.video_clips", self.video_clips, 2)


@dataclass
class Config:
    """The whole run; configs/dlc.yaml is the method, scale/*.yaml and data/*.yaml the rest."""

    run_dir: str = "runs/dlc"
    scale: str = "tiny"  # name only: said in the first log line
    base: BaseConfig = field(default_factory=BaseConfig)
    dlc: DLCConfig = field(default_factory=DLCConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    val: ValConfig = field(default_factory=ValConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.dlc.coupling != "decoupled" and (self.flow.separate_sigma or self.train.strategy == "deepspeed"):
            knob = "flow.separate_sigma" if self.flow.separate_sigma else "train.strategy=deepspeed"
            raise ConfigError(f"dlc.coupling: {self.dlc.coupling} does not go with {knob}; only decoupled does")
        if self.base.dtype == "bfloat16" and self.train.precision != "bf16-mixed":
            raise ConfigError("base.dtype: bfloat16 needs train.precision=bf16-mixed (the trainables are float32)")
        if self.train.activation_checkpointing == "selective" and self.base.attention not in NATIVE_ATTENTION:
            raise ConfigError(
                f"train.activation_checkpointing: selective knows torch's own fused kernels, not base.attention="
                f"{self.base.attention}; take one of {', '.join(NATIVE_ATTENTION)}, or full"
            )


def legal_worlds(global_batch_size: int, micro_batch_size: int) -> list[int]:
    """Numbers of processes whose micro batches add up to the global batch."""
    per_world = global_batch_size // micro_batch_size
    return [world for world in range(1, per_world + 1) if per_world % world == 0]
