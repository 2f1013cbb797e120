"""What a training step keeps in memory, in closed form from its shape: parameters, states, activations, per process.

The activations are those of the diffusers Wan block with our LoRAs and links, counted tensor by
tensor; the largest moment of a step is, under activation checkpointing, a recomputed block's
residual sum or its feed-forward's backward pass, and without it the same of the last block. Counted
is what tensors hold; what else a GPU holds is `allowance`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from one4d_pl.config import TEMPORAL_FACTOR, Config
from one4d_pl.costs.flops import BatchShape, TransformerShape

FLOAT = 4  # bytes
SPATIAL_FACTOR = 8  # pixels of a latent's side, Wan 2.1's VAE
REDUCE_BUCKET = 200_000_000 * FLOAT  # training/zero.py: gradients on their way
PREFETCH_BUCKET = 200_000_000  # elements that stage 3 gathers ahead
PERSISTENT = 1_000_000  # parameters below it stay whole at stage 3
MOMENTS, MASTER = 2, 1  # float32 copies of a trainable that AdamW keeps, and that DeepSpeed keeps besides
VAE_MAPS = 37.5  # peak of encoding, in feature maps of [B, base_dim, H, W]; measured, for any length
# What a GPU holds besides tensors; estimates, to be replaced by a measurement
CUDA_CONTEXT = 0.7 * 2**30  # driver, kernels, cuBLAS and cuDNN workspaces
NCCL = 1.0 * 2**30  # buffers of its channels, where there are several processes
FRAGMENTATION = 0.05  # of the tensors
# What drivers report of a GPU's memory, in GiB
GPU_GIB = {
    "B200": 178.4, "H200": 139.8, "H100": 79.2, "A100-80GB": 79.2, "L40S": 44.4, "A100-40GB": 39.4, "RTX 4090": 23.5,
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by what becomes of them."""

    blocks: int  # frozen, in base.dtype
    rest: int  # frozen, outside of the blocks
    float32: int  # frozen, norms and modulation of blocks and embedders, which Wan keeps in float32
    lora: int
    links: int
    patch_embedding: int  # the xyz branch's

    @property
    def frozen(self) -> int:
        return self.blocks + self.rest + self.float32

    @property
    def trainable(self) -> int:
        return self.lora + self.links + self.patch_embedding


@dataclass(frozen=True)
class Layout:
    """How a run is spread and what it saves."""

    world: int  # processes
    zero_stage: int  # 0 = ddp or a single process
    checkpointing: str  # train.activation_checkpointing
    offload: bool
    bfloat16: bool  # autocast of activations; else float32
    bfloat16_base: bool  # the frozen transformer's weights
    encoder_bytes: float  # VAE, text and image encoder, whole in the host memory of every process
    visitor_bytes: float  # the largest of them: they visit the GPU one at a time; 0 = nothing is encoded in the step
    vae_base_dim: int  # width of the VAE that encodes in the step; 0 = nothing is encoded there
    average: bool = False  # optim.ema_decay

    def without_encoders(self) -> Layout:
        """The same run on encoded shards."""
        return replace(self, encoder_bytes=0.0, visitor_bytes=0.0, vae_base_dim=0)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the step's largest moment, by part."""

    weights: float  # frozen and trainable, this process's share
    gathered: float  # of other processes' shares, at stage 3
    gradients: float
    optimizer: float  # moments, DeepSpeed's float32 copy, and the average (optim.ema_decay)
    checkpoints: float  # inputs of the blocks, where activations are recomputed, and what selective keeps besides
    activations: float  # everything else that is computed; without checkpointing of every block
    allowance: float  # CUDA context, NCCL, fragmentation: an estimate
    host: float  # not on the GPU: encoders, and what offload moved away

    @property
    def tensors(self) -> float:
        """On the GPU, without the allowance."""
        return sum(value for name, value in self.parts() if name != "allowance")

    @property
    def total(self) -> float:
        """On the GPU."""
        return self.tensors + self.allowance

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a GPU of this size holds it all: the one verdict of planner and pre-flight."""
        return self.total <= gpu_bytes

    def parts(self) -> Iterator[tuple[str, float]]:
        """What lies on the GPU, by name."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "host")


def layout_of(config: Config, encoders: Mapping[str, int], vae_base_dim: int) -> Layout:
    """The run that a config describes; `encoders` are numbers of parameters, vae among them."""
    train, base = config.train, config.base
    bytes_each = {"vae": FLOAT}  # the others in base.dtype
    wide = 2 if base.dtype == "bfloat16" else FLOAT
    sizes = [count * bytes_each.get(name, wide) for name, count in encoders.items()]
    return Layout(
        world=train.world_size,
        zero_stage=train.zero_stage if train.strategy == "deepspeed" else 0,
        checkpointing=train.activation_checkpointing,
        offload=train.strategy == "deepspeed" and train.offload,
        bfloat16=train.precision == "bf16-mixed",
        bfloat16_base=base.dtype == "bfloat16",
        encoder_bytes=sum(sizes),
        visitor_bytes=max(sizes, default=0.0),
        vae_base_dim=vae_base_dim,
        average=config.optim.ema_decay > 0,
    )


def batch_of(config: Config, image_tokens: int) -> BatchShape:
    """One forward pass of one process."""
    data = config.data
    grid = ((data.num_frames - 1) // TEMPORAL_FACTOR + 1, data.height // SPATIAL_FACTOR, data.width // SPATIAL_FACTOR)
    return BatchShape(config.train.micro_batch_size, grid, config.base.max_text_tokens, image_tokens)


def count_parameters(shape: TransformerShape) -> Parameters:
    """Of the base and its adapter; equal to the model's own count."""
    d, f, r = shape.width, shape.ffn_dim, shape.rank
    image = shape.image_dim is not None
    linears = [(d, d)] * (10 if image else 8) + [(d, f), (f, d)]
    block = sum(i * o + o for i, o in linears) + (5 if image else 4) * d  # and the norms of queries and keys
    patch = shape.patch[0] * shape.patch[1] * shape.patch[2]
    embedding = d * shape.in_channels * patch + d
    rest = embedding + 6 * d * (d + 1) + (shape.text_dim + 1) * d + (d + 1) * d + (d + 1) * shape.out_channels * patch
    float32 = shape.num_layers * (2 * d + 6 * d) + 2 * d + (shape.freq_dim + 1) * d + (d + 1) * d
    if shape.image_dim is not None:
        rest += (shape.image_dim + 1) * (shape.image_dim + d)
        float32 += 2 * shape.image_dim + 2 * d
    return Parameters(
        blocks=shape.num_layers * block,
        rest=rest,
        float32=float32,
        lora=shape.num_layers * 2 * r * sum(i + o for i, o in linears),
        links=shape.num_links * shape.link_ways * d * d,
        patch_embedding=embedding if shape.xyz_patch_embedding else 0,
    )


def step_memory(shape: TransformerShape, batch: BatchShape, layout: Layout) -> Memory:
    """Of one process, at the largest moment of a step with all gradients there (as under ddp, or in an accumulation).

    Args:
        shape: of the transformer.
        batch: of one forward pass.
        layout: strategy, precision, checkpointing.
    """
    n = count_parameters(shape)
    weights, gathered, moved = _weights(shape, n, layout)
    sharded = layout.world if layout.zero_stage else 1
    optimizer = FLOAT * n.trainable * (MOMENTS + (MASTER if layout.zero_stage else 0)) / sharded
    gradients = FLOAT * n.trainable / (layout.world if layout.zero_stage >= 2 else 1)
    if layout.offload:
        moved += optimizer + gradients
        optimizer = gradients = 0.0
    if layout.average:  # lies where the weights do: training/average.py
        share = FLOAT * n.trainable / (layout.world if layout.zero_stage == 3 else 1)
        if layout.offload and layout.zero_stage == 3:
            moved += share
        else:
            optimizer += share
    if layout.zero_stage:
        gradients += min(REDUCE_BUCKET, FLOAT * n.trainable)
    checkpoints, activations = step_activations(shape, batch, layout.checkpointing, layout.bfloat16)
    # the encoders' turn comes before the transformer's, AdamW's (one more copy of its share) after
    # it
    encoding = max(layout.visitor_bytes, _vae(batch, layout.vae_base_dim))
    beside = max(encoding, FLOAT * n.trainable / sharded if not layout.offload else 0)
    activations = max(activations, beside - checkpoints)
    tensors = weights + gathered + gradients + optimizer + checkpoints + activations
    allowance = CUDA_CONTEXT + (NCCL if layout.world > 1 else 0) + FRAGMENTATION * tensors
    host = moved + layout.encoder_bytes
    return Memory(weights, gathered, gradients, optimizer, checkpoints, activations, allowance, host)


def step_activations(
    shape: TransformerShape, batch: BatchShape, checkpointing: str, bfloat16: bool
) -> tuple[float, float]:
    """Bytes kept of every block (0 without checkpointing) and of all else, at the largest moment."""
    wide = 2 if bfloat16 else FLOAT  # bytes of what linears and attention read and write
    samples, d = 2 * batch.clips, shape.width
    grid = [size // patch for size, patch in zip(batch.latent_grid, shape.patch, strict=True)]
    length = grid[0] * grid[1] * grid[2]
    rows = samples * length
    image_tokens = batch.image_tokens if shape.image_dim is not None else 0
    context = samples * (batch.text_tokens + image_tokens)
    hidden, ffn = rows * d, rows * shape.ffn_dim  # elements
    block = _saved_by_block(shape, rows, context, image_tokens > 0, wide)
    pixels = samples * batch.latent_grid[0] * batch.latent_grid[1] * batch.latent_grid[2]
    shared = context * d * wide + 2 * length * (d / _heads(d)) * FLOAT  # text and image tokens, rotary embedding
    shared += context * shape.text_dim * FLOAT  # repeated for both branches
    shared += pixels * (shape.in_channels + 4 * shape.out_channels) * FLOAT  # inputs, noise, velocities
    if bfloat16:
        shared += pixels * shape.in_channels * wide
    # beyond what a block saves: gradients around its GELU, or its residual sum in float32
    residual = hidden * (3 * (FLOAT + wide) if bfloat16 else 4 * FLOAT)
    last = max(2 * ffn * wide, residual)
    if checkpointing != "none":
        kept = shape.num_layers * hidden * wide
        if checkpointing == "selective":  # and of self-attention result and statistics; the block at work has its own
            kept += (shape.num_layers - 1) * (hidden * wide + rows * _heads(d) * FLOAT)
        return kept, shared + block + last
    links = shape.num_links * (hidden * wide + (2 * d * d * wide if bfloat16 else 0))
    return 0.0, shared + shape.num_layers * block + links + hidden * FLOAT + last


def _saved_by_block(shape: TransformerShape, rows: int, context: int, image: bool, wide: int) -> float:
    """Bytes that one block's forward pass leaves for its backward pass."""
    d, r = shape.width, shape.rank
    heads = _heads(d)
    # what linears, attention and the norms of queries and keys read, and attention's output: 12 (14
    # with image tokens); inputs of the other norms, widened to float32: 3
    saved: float = rows * d * ((14 if image else 12) * wide + 3 * FLOAT)
    saved += 2 * rows * shape.ffn_dim * wide  # before and after the GELU
    saved += context * d * (2 * wide + FLOAT)  # keys, values, keys before their norm
    saved += r * wide * (8 * rows + 2 * context)  # between A and B of every LoRA
    saved += FLOAT * rows * (9 + (3 if image else 2) * heads)  # norms' and softmax's statistics
    if wide != FLOAT:  # autocast's copies of the LoRAs
        saved += wide * count_parameters(shape).lora / shape.num_layers
    return saved


def _weights(shape: TransformerShape, n: Parameters, layout: Layout) -> tuple[float, float, float]:
    """Bytes of this process's weights, of what it gathers from others, and of what offload moved to the host."""
    wide = 2 if layout.bfloat16_base else FLOAT
    frozen = wide * (n.blocks + n.rest) + FLOAT * n.float32
    if layout.zero_stage < 3:
        return frozen + FLOAT * n.trainable, 0.0, 0.0
    d, r = shape.width, shape.rank
    persistent = n.lora if r * max(d, shape.ffn_dim) < PERSISTENT else 0
    share = (wide * (n.blocks + n.rest) + FLOAT * (n.trainable - persistent)) / layout.world
    whole = FLOAT * (n.float32 + persistent)  # small ones, and float32 norms, are never sharded
    block = wide * n.blocks / shape.num_layers
    gathered = block + min(block, wide * PREFETCH_BUCKET)  # the block at work and the one that is fetched ahead
    return (whole, gathered, share) if layout.offload else (whole + share, gathered, 0.0)


def _vae(batch: BatchShape, base_dim: int) -> float:
    """Peak of encoding frames and pointmaps, in float32."""
    _, h, w = batch.latent_grid
    return VAE_MAPS * 2 * batch.clips * (SPATIAL_FACTOR * h) * (SPATIAL_FACTOR * w) * base_dim * FLOAT


def _heads(width: int) -> int:
    """Wan's heads have 128 channels, tiny ones fewer: one at least."""
    return max(1, width // 128)
