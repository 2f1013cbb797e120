"""Ways to sample on less memory: what each needs, and the seconds that a scene takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from one4d_pl.config import TEMPORAL_FACTOR
from one4d_pl.costs.flops import BatchShape, TransformerShape, count_tokens, training_flops
from one4d_pl.costs.memory import (
    CUDA_CONTEXT,
    FLOAT,
    FRAGMENTATION,
    SPATIAL_FACTOR,
    Layout,
    Memory,
    count_parameters,
    frozen_weights,
)
from one4d_pl.costs.transfers import PCIE

TILE = 256  # pixels along the side of a VAE tile (diffusers)
DECODING_MAPS = 57  # peak of decoding, in feature maps of [base_dim, H, W]; measured, for any length
VIDEOS = 4  # float32 copies of the scene's frames or pointmaps at that peak


@dataclass(frozen=True)
class SamplingMode:
    """A way to sample."""

    title: str
    # encoders wait on the host, the VAE works in tiles, guidance takes two calls, the adapter is bfloat16
    frugal: bool = True
    quantisation: str = "none"
    offload: bool = False  # the blocks' weights lie on the host


MODES = (  # from the fastest to the smallest
    SamplingMode("everything on the GPU", frugal=False),
    SamplingMode("encoders on the host, VAE in tiles, guidance in two calls"),
    SamplingMode("int8 base, encoders on the host, VAE in tiles, guidance in two calls", quantisation="int8"),
    SamplingMode("int8 base that visits from the host block by block, encoders too", quantisation="int8", offload=True),
)


def sampling_memory(shape: TransformerShape, batch: BatchShape, layout: Layout, mode: SamplingMode) -> Memory:
    """Compute the memory of one process at the peak of sampling one scene.

    Args:
        shape: the transformer's shape.
        batch: the scene's size; its one clip.
        layout: precision and encoders of the base; what else it says is training's.
        mode: how much lies on the GPU.
    """
    layout = replace(layout, quantised=mode.quantisation != "none", visiting=mode.offload)
    itemsize = 2 if layout.bfloat16 else FLOAT
    frozen, gathered, on_host = frozen_weights(shape, layout)
    adapter = (itemsize if mode.frugal else FLOAT) * count_parameters(shape).trainable
    encoders = 0.0 if mode.frugal else layout.encoder_bytes
    t, h, w = batch.latent_grid
    frames, height, width = TEMPORAL_FACTOR * (t - 1) + 1, SPATIAL_FACTOR * h, SPATIAL_FACTOR * w
    video = 3 * frames * height * width * FLOAT
    maps = DECODING_MAPS * layout.vae_base_dim * FLOAT
    decoding = maps * (min(TILE, height) * min(TILE, width) if mode.frugal else height * width) + VIDEOS * video
    samples = 2 if mode.frugal else 4  # with and without the prompt at once
    # at a block's last residual sum: 5 tensors of the network's precision, and 3 (without autocast 2) of float32
    residual = (
        samples * count_tokens(shape, batch) * shape.width * (5 * itemsize + (3 if layout.bfloat16 else 2) * FLOAT)
    )
    floats = shape.width * shape.ffn_dim * itemsize if layout.quantised else 0
    visit = layout.largest_encoder_bytes if mode.frugal else 0.0
    activations = video + max(residual + floats, visit, decoding + (layout.vae_bytes if mode.frugal else 0.0))
    tensors = frozen + adapter + encoders + gathered + activations
    allowance = CUDA_CONTEXT + FRAGMENTATION * tensors
    host = on_host + (layout.encoder_bytes if mode.frugal else 0.0)
    return Memory(frozen + adapter + encoders, gathered, 0.0, 0.0, 0.0, activations, allowance, host)


def best_mode(shape: TransformerShape, batch: BatchShape, layout: Layout, gpu_bytes: float) -> SamplingMode | None:
    """Return the fastest mode that fits a GPU of this size, or None."""
    return next((m for m in MODES if sampling_memory(shape, batch, layout, m).fits(gpu_bytes)), None)


def scene_seconds(
    shape: TransformerShape, batch: BatchShape, layout: Layout, mode: SamplingMode, steps: int, flops_per_s: float
) -> float:
    """Estimate the seconds of sampling one scene with guidance, without encoders and VAE.

    Blocks that visit come while the one before them works, so the slower of the two counts.
    """
    forward = training_flops(shape, batch, "none", flash=True).forward / flops_per_s
    layout = replace(layout, quantised=mode.quantisation != "none", visiting=mode.offload)
    return 2 * steps * max(forward, frozen_weights(shape, layout)[2] / PCIE)
