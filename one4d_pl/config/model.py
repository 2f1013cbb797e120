"""Knobs of the method: base, adapter, conditioning, flow, sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

from one4d_pl.config.checks import ConfigError, check, knob

SOLVERS = ("euler", "unipc")
NATIVE_ATTENTION = ("native", "_native_cudnn", "_native_flash", "_native_efficient")  # torch's fused kernels
ATTENTION = (*NATIVE_ATTENTION, "_native_math", "flash", "_flash_3")  # diffusers' names; the last two need packages
MAX_SCENE_FRAMES = 10_000  # of one scene; a typing mistake must not fill the disk
EMBEDDED_BASE = "embedded"  # the base.path of the tiny Wan inside the package


@dataclass
class TinyWanConfig:
    """Shape of the seeded tiny Wan that experiments/tiny_wan pretrains."""

    seed: int = knob(0, low=0)
    num_layers: int = knob(10, low=1)
    num_heads: int = knob(4, low=1)
    head_dim: int = knob(48, low=1)
    ffn_dim: int = knob(512, low=1)
    text_dim: int = knob(64, low=1)
    image_tokens: bool = False  # with CLIP image keys and values, as the 14B has them

    def __post_init__(self) -> None:
        check("base.tiny", self)


@dataclass
class BaseConfig:
    """The frozen Wan, in diffusers layout or in that of Wan-AI and VideoX-Fun."""

    # folder, or hub id already in the local cache; `embedded` is the shipped tiny Wan
    path: str = knob(EMBEDDED_BASE, may_change=True)
    # dtype of the frozen transformer and text encoder; the VAE stays float32
    dtype: str = knob("float32", one_of=("float32", "bfloat16"))
    # of the linears of the transformer's blocks: one byte per weight; int8 has a fifth of fp8's error
    quantisation: str = knob("none", one_of=("none", "int8", "fp8"))
    # the blocks' weights lie in host memory and visit the GPU while they work
    offload: bool = knob(False, may_change=True)
    # kernels, by diffusers' name; native = torch chooses, flash and _flash_3 need flash-attn
    attention: str = knob("native", one_of=ATTENTION, may_change=True)
    max_text_tokens: int = knob(192, low=1)  # prompts are cut or zero-padded to this, as Wan does with 512
    negative_prompt: str = knob("", may_change=True)  # inference only; training drops captions to the empty prompt
    tiny: TinyWanConfig | None = knob(None, may_change=True)  # for experiments/tiny_wan alone

    def __post_init__(self) -> None:
        check("base", self)


@dataclass
class DLCConfig:
    """Decoupled LoRA Control (One4D, Eq. 5-9)."""

    rank: int = knob(64, low=1)  # One4D, sec. 4.1
    # alpha / rank; not in the paper, stored with every adapter
    lora_scale: float = knob(1.0, above=0)
    num_links: int = knob(5, low=0)  # One4D, sec. 3.2; 0 leaves the branches independent
    # give xyz latents mean 0 and deviation 1 per channel, measured on some clips of each source;
    # 4DNeX (arXiv 2508.13154) found theirs to differ from frames'; not in the paper
    standardise_xyz: bool = False
    # channel, width: the alternatives that One4D is compared with (Fig. 2-3); one LoRA, no links
    coupling: str = knob("decoupled", one_of=("decoupled", "channel", "width"))

    def __post_init__(self) -> None:
        check("dlc", self)


@dataclass
class MaskingConfig:
    """How many frames of a training clip the model is shown (One4D, sec. 4.1).

    The paper does not say how sparse frames are drawn; our draw stands at `sparse_prob`.
    """

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

    # sigma' = k sigma / (1 + (k - 1) sigma); set here, never read from the base's scheduler file
    shift: float = knob(1.0, above=0)
    xyz_weight: float = knob(1.0, low=0)  # loss = rgb + xyz_weight * xyz, each a mean
    caption_dropout: float = knob(0.1, low=0, high=1)  # one draw for both branches

    def __post_init__(self) -> None:
        check("flow", self)


@dataclass
class GuidanceConfig:
    """Classifier-free guidance per task; 1 switches it off. The paper's own value is 6 for all (Table 6 prefers 4)."""

    text: float = 6.0
    image: float = 6.0
    sparse: float = 4.0
    video: float = 4.0

    def of(self, task: str) -> float:
        """Return the guidance of one of types.TASKS."""
        return {"text": self.text, "image": self.image, "sparse": self.sparse, "video": self.video}[task]


@dataclass
class SamplerConfig:
    """How a trained model is sampled; the sigma shift is flow.shift."""

    steps: int = knob(50, low=1)  # One4D, sec. 4.1
    solver: str = knob("euler", one_of=SOLVERS)  # unipc, Wan's own solver, has a higher order: for few steps
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    guidance_xyz: GuidanceConfig | None = None  # None = as rgb

    def __post_init__(self) -> None:
        check("sampler", self)
