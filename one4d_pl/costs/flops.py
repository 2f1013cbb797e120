"""Floating-point operations of a training step, in closed form from the transformer's shape.

As is usual, only matrix products count (a multiplication and an addition are two operations): linears, LoRAs, links,
attention scores and values, the patch embedding. Not counted are norms, softmax, elementwise work, the optimiser, and
the frozen VAE and text encoders, whose latents and embeddings may come from a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from one4d_pl.config import ConfigError, DLCConfig

# Dense bf16 tensor-core peaks in TFLOP/s, from the vendor's data sheets (without sparsity), by
# words of the device's name; the first row whose words all occur wins.
PEAK_TFLOPS = (
    (("B200",), 2250.0),
    (("GH200",), 989.0),
    (("H200", "NVL"), 835.0),
    (("H200",), 989.0),
    (("H100", "NVL"), 835.0),
    (("H100", "PCIe"), 756.0),
    (("H100",), 989.0),
    (("H800", "PCIe"), 756.0),
    (("H800",), 989.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("L40S",), 362.0),
    (("A40",), 150.0),
    (("L4",), 121.0),
    (("RTX 5090",), 209.0),
    (("RTX 4090",), 165.0),
    (("RTX 4080",), 97.0),
)


@dataclass(frozen=True)
class TransformerShape:
    """A Wan transformer with its One4D adapter."""

    num_layers: int
    width: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    patch: tuple[int, int, int]  # t, h, w
    freq_dim: int
    text_dim: int
    image_dim: int | None  # None = no image tokens
    rank: int
    num_links: int

    @staticmethod
    def of(wan: Mapping[str, object], dlc: DLCConfig) -> TransformerShape:
        """Read the transformer's config.json (diffusers) and the adapter's config. ConfigError names missing keys."""

        def number(name: str) -> int:
            value = wan.get(name)
            if not isinstance(value, int):
                raise ConfigError(f"base.path: transformer/config.json has no number {name}, but {value!r}")
            return value

        if dlc.coupling != "decoupled":
            raise ConfigError(f"dlc.coupling: the costs of {dlc.coupling} are not known, only those of decoupled")
        patch = wan.get("patch_size")
        if not isinstance(patch, list | tuple) or len(patch) != 3:
            raise ConfigError(f"base.path: transformer/config.json needs a patch_size of three numbers, has {patch!r}")
        return TransformerShape(
            num_layers=number("num_layers"),
            width=number("num_attention_heads") * number("attention_head_dim"),
            ffn_dim=number("ffn_dim"),
            in_channels=number("in_channels"),
            out_channels=number("out_channels"),
            patch=(int(patch[0]), int(patch[1]), int(patch[2])),
            freq_dim=number("freq_dim"),
            text_dim=number("text_dim"),
            image_dim=None if wan.get("image_dim") is None else number("image_dim"),
            rank=dlc.rank,
            num_links=dlc.num_links,
        )


@dataclass(frozen=True)
class BatchShape:
    """The sizes of one forward pass of one process."""

    clips: int  # B; the transformer sees 2B samples, rgb and xyz
    latent_grid: tuple[int, int, int]  # t, h, w of the latents
    text_tokens: int
    image_tokens: int = 0  # of the image encoder, per clip


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward passes, of one process."""

    forward: float
    backward: float  # the gradients that LoRA training needs: none of frozen weights, none before the adapter
    recompute: float  # done a second time by activation checkpointing (blocks, links) and flash attention (scores)

    @property
    def model(self) -> float:
        """Return the operations that the method needs: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """Return the operations that are executed: the numerator of HFU."""
        return self.model + self.recompute

    def __mul__(self, passes: int) -> Flops:
        return Flops(passes * self.forward, passes * self.backward, passes * self.recompute)


def training_flops(shape: TransformerShape, batch: BatchShape, checkpointing: str, flash: bool) -> Flops:
    """Count the operations of one forward and backward pass.

    Args:
        shape: the transformer's shape.
        batch: the pass's shape.
        checkpointing: none; full = every block is computed a second time in the backward pass; selective = all of it
            but self-attention, whose result is kept (where `flash`); offload = as full.
        flash: attention runs in fused kernels, as on GPUs, which recompute the scores in the backward pass.
    """
    samples, width = 2 * batch.clips, shape.width
    tokens = count_tokens(shape, batch)
    patch_row = shape.patch[0] * shape.patch[1] * shape.patch[2]
    embed = 2 * samples * tokens * width * shape.in_channels * patch_row  # one convolution over the whole batch
    head = 2 * samples * tokens * width * shape.out_channels * patch_row
    block_forward, block_backward, scores = _block(shape, batch)
    one_way = shape.num_links * samples * tokens * width * width
    links = 2 * one_way
    blocks = shape.num_layers * block_forward + links
    again = blocks - one_way  # torch does not recompute a link's last product, which the backward pass never reads
    # the head is frozen: input gradient alone; the patch embedding has a weight gradient, nothing trainable lies before
    backward = shape.num_layers * block_backward + 2 * links + head + embed
    if checkpointing == "selective" and flash:
        again -= shape.num_layers * 2 * 2 * samples * tokens * tokens * width  # scores and values
    recompute = (again if checkpointing != "none" else 0) + (shape.num_layers * scores if flash else 0)
    forward = 2 * embed + _condition(shape, batch) + blocks + head
    return Flops(float(forward), float(backward), float(recompute))


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the device's dense bf16 peak in FLOP/s. Returns None for unknown devices and float32 arithmetic."""
    if precision != "bf16-mixed":
        return None
    words = device_name.lower()
    rows = (tera for names, tera in PEAK_TFLOPS if all(_has_word(words, name.lower()) for name in names))
    tera = next(rows, None)
    return None if tera is None else tera * 1e12


def count_tokens(shape: TransformerShape, batch: BatchShape) -> int:
    """Count the tokens of one sample."""
    t, h, w = (size // patch for size, patch in zip(batch.latent_grid, shape.patch, strict=True))
    return t * h * w


def _condition(shape: TransformerShape, batch: BatchShape) -> int:
    """Count the operations of the frozen embedders of time, text and image. They need no backward pass."""
    samples, width = 2 * batch.clips, shape.width
    time = shape.freq_dim * width + width * width + width * 6 * width
    text = batch.text_tokens * (shape.text_dim * width + width * width)
    image = 0
    if shape.image_dim is not None:
        image = batch.image_tokens * (shape.image_dim * shape.image_dim + shape.image_dim * width)
    return 2 * samples * (time + text + image)


def _block(shape: TransformerShape, batch: BatchShape) -> tuple[int, int, int]:
    """Count a block's operations: forward, backward, and one product of attention scores.

    Every input has a gradient but the context.
    """
    samples, width, rank = 2 * batch.clips, shape.width, shape.rank
    tokens = count_tokens(shape, batch)
    context = batch.text_tokens + (batch.image_tokens if shape.image_dim is not None else 0)
    forward = backward = 0
    linears = [(tokens, width, width)] * 6  # q, k, v, out of self-attention; q, out of cross-attention
    linears += [(tokens, width, shape.ffn_dim), (tokens, shape.ffn_dim, width)]
    for rows, inputs, outputs in linears:
        lora = rank * (inputs + outputs)
        forward += 2 * samples * rows * (inputs * outputs + lora)
        backward += 2 * samples * rows * (inputs * outputs + 2 * lora)
    # keys and values of text and image tokens, which have no gradient: A needs its weight's gradient alone, B both
    forward += 2 * 2 * samples * context * (width * width + 2 * rank * width)
    backward += 2 * 2 * samples * context * (rank * width + 2 * rank * width)
    scores = 2 * samples * tokens * (tokens + context) * width  # over all heads; values take as many
    return forward + 2 * scores, backward + 4 * scores, scores


def _has_word(text: str, words: str) -> bool:
    """Tell whether `words` occur in `text` as whole words ("L4" is not in "NVIDIA L40S")."""
    return f" {words} " in f" {text.replace('-', ' ')} "
