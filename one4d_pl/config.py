"""Every knob of the project: typed dataclasses, filled from yaml files that merge left to right, then `a.b=c`.

omegaconf only, no torch: a login node parses a config in a second; and omegaconf only where yaml is read, so that the
classes alone need nothing. The yaml tree dies in `load_config`; each class of the project gets its own node. A default
lives here or, where it belongs to a scale or a data mix, in one yaml.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from omegaconf import DictConfig

TEMPORAL_FACTOR = 4  # Wan's video VAE: frame 0 alone, then groups of four (protocol: T = 4k + 1)
DIFFUSERS_MARK = "model_index.json"  # a base in diffusers layout holds it
ORIGINAL_MARK = "Wan2.1_VAE.pth"  # a base in the layout of Wan-AI and VideoX-Fun holds it
SOLVERS = ("euler", "unipc")
CHECKPOINTING = ("none", "full", "selective")
NATIVE_ATTENTION = ("native", "_native_cudnn", "_native_flash", "_native_efficient")  # torch's fused kernels
ATTENTION = (*NATIVE_ATTENTION, "_native_math", "flash", "_flash_3")  # diffusers' names; the last two are own packages
DEMO_ADAPTERS = Path(__file__).parent / "assets" / "demo_adapters"  # of the embedded base, trained on the toy world
EMBEDDED_BASE = "embedded"  # base.path's word for the tiny Wan inside the package


class ConfigError(ValueError):
    """A mistake of the user; doors print its one line and exit with code 2."""


@dataclass
class TinyWanConfig:
    """Shape of the seeded tiny Wan that `build_tiny_base` pretrains."""

    seed: int = 0
    num_layers: int = 10
    num_heads: int = 4
    head_dim: int = 48
    ffn_dim: int = 512
    text_dim: int = 64
    image_tokens: bool = False  # with CLIP image keys and values, as the 14B has them

    def __post_init__(self) -> None:
        _at_least("base.tiny.seed", self.seed, 0)
        for name in ("num_layers", "num_heads", "head_dim", "ffn_dim", "text_dim"):
            _at_least(f"base.tiny.{name}", getattr(self, name), 1)


@dataclass
class BaseConfig:
    """The frozen Wan, in diffusers layout or in that of Wan-AI and VideoX-Fun."""

    path: str = EMBEDDED_BASE  # folder, or hub id already in the local cache; the name stands for the shipped one
    dtype: str = "float32"  # of the frozen transformer and text encoder; the VAE stays float32
    attention: str = "native"  # kernels, by diffusers' name; native = torch chooses, flash and _flash_3 need flash-attn
    max_text_tokens: int = 192  # prompts are cut or zero-padded to this, as Wan does with 512
    negative_prompt: str = ""  # inference only; training drops captions to the empty prompt
    tiny: TinyWanConfig | None = None  # for build_tiny_base alone

    def __post_init__(self) -> None:
        _one_of("base.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("base.attention", self.attention, ATTENTION)
        _at_least("base.max_text_tokens", self.max_text_tokens, 1)


@dataclass
class DLCConfig:
    """Decoupled LoRA Control (One4D, Eq. 5-9)."""

    rank: int = 64  # One4D, sec. 4.1
    lora_scale: float = 1.0  # alpha / rank; not in the paper, stored with every adapter
    num_links: int = 5  # One4D, sec. 3.2; 0 leaves the branches independent
    link_blocks: list[int] | None = None  # None = centre of num_links equal spans (the paper does not say which)
    xyz_patch_embedding: bool = True  # own trainable copy; makes the paper's 935.7 exact (our guess, paper.md sec. 3)
    link_direction: str = "both"  # or rgb_to_xyz: frames steer pointmaps and are left alone by them
    coupling: str = "decoupled"  # or what One4D is compared with (Fig. 2-3): channel, width; one LoRA, no links

    def __post_init__(self) -> None:
        _at_least("dlc.rank", self.rank, 1)
        _positive("dlc.lora_scale", self.lora_scale)
        _at_least("dlc.num_links", self.num_links, 0)
        if self.link_blocks is not None and len(set(self.link_blocks)) != len(self.link_blocks):
            raise ConfigError(f"dlc.link_blocks: {self.link_blocks} names a block twice")
        _one_of("dlc.link_direction", self.link_direction, ("both", "rgb_to_xyz"))
        _one_of("dlc.coupling", self.coupling, ("decoupled", "channel", "width"))


@dataclass
class MaskingConfig:
    """How many frames of a training clip the model is shown (One4D, sec. 4.1; sparse draw: paper.md sec. 8)."""

    text_prob: float = 0.0  # no frame, prompt only; not in the paper's training
    image_prob: float = 0.35  # only frame 0
    sparse_prob: float = 0.30  # 2 .. T-1 frames, count log-uniform, frame 0 always, the last with p 0.5
    video_prob: float = 0.35  # every frame: pure reconstruction

    def __post_init__(self) -> None:
        probs = (self.text_prob, self.image_prob, self.sparse_prob, self.video_prob)
        if not (min(probs) >= 0 and abs(sum(probs) - 1) <= 1e-6):  # so worded that nan fails
            raise ConfigError(
                f"masking: text/image/sparse/video_prob must be >= 0 and sum to 1, got {probs} = {sum(probs):.3f}"
            )


@dataclass
class FlowConfig:
    """Flow matching in Wan's sign (One4D, Eq. 1-4): sigma 1 = noise, velocity = noise - latents."""

    shift: float = 1.0  # sigma' = k sigma / (1 + (k - 1) sigma); from here, never from the base's scheduler file
    xyz_weight: float = 1.0  # loss = rgb + xyz_weight * xyz, each a mean
    caption_dropout: float = 0.1  # one draw for both branches
    separate_sigma: bool = False  # each branch its own noise level in training; the paper draws one t for both (Eq. 3)

    def __post_init__(self) -> None:
        _positive("flow.shift", self.shift)
        _at_least("flow.xyz_weight", self.xyz_weight, 0)
        _share("flow.caption_dropout", self.caption_dropout)


@dataclass
class GuidanceConfig:
    """Classifier-free guidance per task; 1 switches it off. The paper's own value is 6 for all (Table 6 prefers 4)."""

    text: float = 6.0
    image: float = 6.0
    sparse: float = 4.0
    video: float = 4.0

    def of(self, task: str) -> float:
        return {"text": self.text, "image": self.image, "sparse": self.sparse, "video": self.video}[task]


@dataclass
class SamplerConfig:
    """How a trained model is sampled; the sigma shift is flow.shift."""

    steps: int = 50  # One4D, sec. 4.1
    solver: str = "euler"  # or unipc, Wan's own: of higher order, for few steps
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    guidance_xyz: GuidanceConfig | None = None  # None = as rgb

    def __post_init__(self) -> None:
        _at_least("sampler.steps", self.steps, 1)
        _one_of("sampler.solver", self.solver, SOLVERS)


@dataclass
class OptimConfig:
    """AdamW, warm-up, then constant (paper.md sec. 8) with a linear cooldown at the end where asked for."""

    lr: float = 1e-4  # One4D, sec. 4.1
    link_lr_width: int = 1280  # the links' lr is lr * min(1, link_lr_width / D)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    cooldown_steps: int = 0  # the lr falls to 0 over the last so many steps; 0 = constant, as the paper
    grad_clip: float = 1.0  # norm over all trainables

    def __post_init__(self) -> None:
        _positive("optim.lr", self.lr)
        _at_least("optim.link_lr_width", self.link_lr_width, 1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas: need values in [0, 1), got {self.betas}")
        for name in ("weight_decay", "warmup_steps", "cooldown_steps", "grad_clip"):
            _at_least(f"optim.{name}", getattr(self, name), 0)


@dataclass
class SourceConfig:
    """One folder (or URL) of shards and its share of the mixture."""

    path: str = "???"
    weight: float = 1.0  # relative to the other sources


@dataclass
class ToyConfig:
    """The procedural world; `fit` writes it as shards at `root`/{train_synthetic,train_real,val} where absent."""

    root: str = "data/toy"
    train_synthetic: int = 192  # clips
    train_real: int = 64  # clips with sensor noise, holes and pseudo cameras
    val: int = 32  # clips, synthetic
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_synthetic", "train_real", "val", "seed"):
            _at_least(f"data.toy.{name}", getattr(self, name), 0)

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
    far_limit: float = 10.0  # valid depth ends at far_limit x the clip's median distance (design.md, Normalisation)
    z_offset: bool = False  # move the normalisation's centre along z
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
        _at_least("data.block_shards", self.block_shards, 1)
        _at_least("data.num_workers", self.num_workers, 0)
        _positive("data.cache_gib", self.cache_gib)
        _share("data.max_skip_share", self.max_skip_share)
        for name, sources in (("sources", self.sources), ("val_sources", self.val_sources)):
            for source in sources:
                _positive(f"data.{name}: weight of {source.path}", source.weight)
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
    precision: str = "32-true"  # 32-true | bf16-mixed; trainables and optimiser stay float32
    activation_checkpointing: str = (
        "none"  # full: blocks run again in the backward pass; selective: less self-attention
    )
    compile: bool = False  # torch.compile of the blocks: needs a C++ compiler, or Triton's on a GPU
    seed: int = 0
    overfit_clips: int = 0  # train on the first n clips only; 0 = off
    init_from: str | None = None  # adapter folder to start from, with a fresh optimiser
    resume: bool = True  # continue from the newest checkpoint in run_dir, if there is one
    save_every: int = 250
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints with the lowest validation loss kept besides
    log_every: int = 10
    hang_minutes: float = 20.0  # without a pass through the transformer: write the stacks, exit with 76; 0 = wait on
    max_restarts: int = 5  # in a row without a new checkpoint, then fit refuses to start; 0 = no limit

    def __post_init__(self) -> None:
        _one_of("train.strategy", self.strategy, ("single", "ddp", "deepspeed"))
        _one_of("train.zero_stage", self.zero_stage, (1, 2, 3))
        # what yaml's true and false become here: the knob was a switch once
        switch = {"True": "full", "False": "none"}
        self.activation_checkpointing = switch.get(self.activation_checkpointing, self.activation_checkpointing)
        _one_of("train.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        _one_of("train.precision", self.precision, ("32-true", "bf16-mixed"))
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "num_nodes", "devices", "save_every"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("keep_last", "log_every"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("seed", "overfit_clips", "keep_best", "hang_minutes", "max_restarts"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.compile and self.activation_checkpointing == "selective":
            raise ConfigError(
                "train.compile: decides itself what to keep; set train.activation_checkpointing=full or none"
            )
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
        _at_least("val.every", self.every, 1)
        _at_least("val.clips", self.clips, 1)
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
        _at_least("eval.every", self.every, 0)
        _at_least("eval.clips", self.clips, 1)
        _at_least("eval.steps", self.steps, 1)
        _at_least("eval.video_every", self.video_every, 0)
        _at_least("eval.video_clips", self.video_clips, 2)


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


def load_config(paths: list[str], overrides: list[str]) -> Config:
    """Merge yaml files left to right (each after its own `include`s), then `a.b=c` overrides, into a typed Config."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    for path in paths:
        for name, node in _read_with_includes(Path(path), ()):
            merged = _merge(merged, node, name)
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"override {override!r}")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{paths[-1] if paths else 'config'}: no value for {', '.join(missing)}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(_one_line(error)) from None
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config, in a form that `load_config` reads back to an equal one."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check_paths(config: Config) -> None:
    """Fail at once, before torch is imported, if a folder that `fit` cannot make is missing."""
    if not holds_base(config.base.path):
        raise ConfigError(
            f"base.path: no base at {config.base.path} (neither {DIFFUSERS_MARK} nor {ORIGINAL_MARK}); get it with "
            f"`python -m one4d_pl.fetch_weights {Path(config.base.path).name} --to {config.base.path} --run`, "
            "or set base.path"
        )
    made_by_fit = config.data.toy.folders() if config.data.toy else []
    for name, sources in (("sources", config.data.sources), ("val_sources", config.data.val_sources)):
        if not sources:
            raise ConfigError(f"data.{name}: empty; add `--config configs/data/toy.yaml` or list shard folders")
        for path in (Path(source.path) for source in sources if "://" not in source.path):
            if path not in made_by_fit and not (path / "manifest.json").is_file():
                raise ConfigError(
                    f"data.{name}: no shards at {path} (no manifest.json); write them with "
                    f"`python -m data_prep.write_shards --source <dataset> --root <raw folder> --out {path}`"
                )
    if config.train.init_from and not (Path(config.train.init_from) / "card.json").is_file():
        raise ConfigError(f"train.init_from: no adapter at {config.train.init_from} (no card.json)")
    if config.eval.i3d is not None and not Path(config.eval.i3d).is_file():
        raise ConfigError(
            f"eval.i3d: no I3D TorchScript file at {config.eval.i3d}; set eval.i3d=null for val/video/fd_vae"
        )


def base_folder(path: str) -> Path:
    """Where a base that is no hub id lies."""
    return Path(__file__).parent / "assets" / "tiny_wan" if path == EMBEDDED_BASE else Path(path)


def holds_base(path: str) -> bool:
    """Whether `path` is a folder in a known layout or a hub id in the local cache."""
    marks = (DIFFUSERS_MARK, ORIGINAL_MARK)
    if base_folder(path).is_dir():
        return any((base_folder(path) / mark).is_file() for mark in marks)
    from huggingface_hub import try_to_load_from_cache  # knows where the cache lies, and needs no torch
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(path, mark), str) for mark in marks)
    except HFValidationError:  # no hub id
        return False


def _read_with_includes(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    """The file's includes (relative to it), depth first, then the file itself."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if path.resolve() in seen:
        raise ConfigError(f"{path}: includes itself")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # yaml has many error classes, all of them the user's
        raise ConfigError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping of sections")
    includes = node.pop("include", [])
    if not isinstance(includes, ListConfig) and includes != []:
        raise ConfigError(f"{path}: include: need a list of files, e.g. [{includes or 'scale/tiny.yaml'}]")
    nodes: list[tuple[str, DictConfig]] = []
    for name in includes:
        nodes += _read_with_includes(path.parent / name, (*seen, path.resolve()))
    return [*nodes, (str(path), node)]


def _parse_override(override: str) -> DictConfig:
    from omegaconf import OmegaConf

    if "=" not in override:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # the value is yaml, see above
        raise ConfigError(f"override {override!r}: {_one_line(error)}") from None


def _merge(merged: DictConfig, node: DictConfig, name: str) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _refuse_unknown_keys(Config, node, name, prefix="")
    try:
        result = OmegaConf.merge(merged, node)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping where a list stands
        raise ConfigError(f"{name}: {_one_line(error)}") from None
    assert isinstance(result, DictConfig)
    return result


def _refuse_unknown_keys(cls: type, node: DictConfig, name: str, prefix: str) -> None:
    """Name the file, the key and the nearest right one."""
    from omegaconf import DictConfig

    hints = get_type_hints(cls)
    for key in node:
        key = str(key)
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
            raise ConfigError(f"{name}: unknown key {prefix}{key}; {hint}")
        child, nested = node._get_node(key), _dataclass_in(hints[key])
        if nested is not None and isinstance(child, DictConfig) and not child._is_none():
            _refuse_unknown_keys(nested, child, name, f"{prefix}{key}.")


def _dataclass_in(hint: object) -> type | None:
    """The dataclass in `X`, `X | None`; lists are checked by omegaconf itself."""
    if get_origin(hint) is list:
        return None
    candidates = [hint, *get_args(hint)]
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0] if lines else type(error).__name__


def _one_of(name: str, value: str | int, allowed: tuple[str | int, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(str, allowed))}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: must be > 0 and finite, got {value}")


def _at_least(name: str, value: float, low: int) -> None:
    if not low <= value < math.inf:
        raise ConfigError(f"{name}: must be >= {low}, got {value}")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: must be between 0 and 1, got {value}")
