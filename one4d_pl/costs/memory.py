"""The memory of a training step per process, in closed form from its shape.

Activations are those of the diffusers Wan block with our LoRAs and links, counted tensor by tensor. With activation
checkpointing, a step's peak is a recomputed block's residual sum or the backward pass of its feed-forward; without it,
the same of the last block. These numbers count tensors; all else that a GPU holds is `allowance`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from one4d_pl.config import TEMPORAL_FACTOR, Config
from one4d_pl.costs.flops import BatchShape, TransformerShape

FLOAT = 4  # bytes
SPATIAL_FACTOR = 8  # pixels along the side of a latent, Wan 2.1's VAE
REDUCE_BUCKET = 200_000_000 * FLOAT  # gradients that are being reduced, see training/zero.py
PREFETCH_BUCKET = 200_000_000  # elements that stage 3 gathers ahead
PERSISTENT = 1_000_000  # smaller parameters stay whole at stage 3
MOMENTS, MASTER = 2, 1  # float32 copies of a trainable: AdamW's, and one more of DeepSpeed's
VAE_MAPS = 37.5  # peak of encoding, in feature maps of [B, base_dim, H, W]; measured, for any length
# What a GPU holds besides tensors; estimates, not measured yet
CUDA_CONTEXT = 0.7 * 2**30  # driver, kernels, cuBLAS and cuDNN workspaces
NCCL = 1.0 * 2**30  # buffers of its channels, with several processes
FRAGMENTATION = 0.05  # of the tensors
# What drivers report of a GPU's memory, in GiB
GPU_GIB = {
    "B200": 178.4, "H200": 139.8, "H100": 79.2, "A100-80GB": 79.2, "L40S": 44.4, "A100-40GB": 39.4, "RTX 5090": 31.3,
    "RTX 4090": 23.5, "RTX 4080": 15.6,
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, frozen and trainable."""

    blocks: int  # frozen, in base.dtype
    outputs: int  # of all the blocks' linears: biases, and scales of a quantised base
    products: int  # of `blocks`: weights of linears, which may be quantised and live on the host
    rest: int  # frozen, outside of the blocks
    float32: int  # frozen, norms and modulation of blocks and embedders, which Wan keeps in float32
    lora: int
    links: int
    patch_embedding: int  # the xyz branch's

    @property
    def frozen(self) -> int:
        """Return the number of frozen parameters."""
        return self.blocks + self.rest + self.float32

    @property
    def trainable(self) -> int:
        """Return the number of trainable parameters."""
        return self.lora + self.links + self.patch_embedding


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes, and what it does to save memory."""

    world: int  # processes
    zero_stage: int  # 0 = ddp or a single process
    checkpointing: str  # train.activation_checkpointing
    offload: bool
    bfloat16: bool  # autocast of activations; else float32
    bfloat16_base: bool  # the frozen transformer's weights
    encoder_bytes: float  # VAE, text and image encoder, whole in the host memory of every process
    # the most that one of them has on the GPU at a time; 0 = nothing is encoded in the step
    largest_encoder_bytes: float
    vae_base_dim: int  # width of the VAE that encodes in the step; 0 = nothing is encoded there
    average: bool = False  # optim.ema_decay
    quantised: bool = False  # base.quantisation: one byte per weight
    visiting: bool = False  # base.offload: the blocks' weights lie on the host
    vae_bytes: float = 0.0

    def without_encoders(self) -> Layout:
        """Return the layout of the same run on encoded shards."""
        return replace(self, encoder_bytes=0.0, largest_encoder_bytes=0.0, vae_base_dim=0)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the step's peak, by part."""

    weights: float  # frozen and trainable, this process's share
    gathered: float  # weights that come for their block's work: of other shares at stage 3, or from the host
    gradients: float
    optimizer: float  # moments, DeepSpeed's float32 copy, and the average (optim.ema_decay)
    checkpoints: float  # with activation checkpointing: inputs of the blocks, and what selective keeps besides
    activations: float  # all other computed tensors; without checkpointing those of every block
    allowance: float  # CUDA context, NCCL, fragmentation: an estimate
    host: float  # in host memory: encoders, and what offload moved there

    @property
    def tensors(self) -> float:
        """Return the bytes on the GPU, without the allowance."""
        return sum(value for name, value in self.parts() if name != "allowance")

    @property
    def total(self) -> float:
        """Return the bytes on the GPU."""
        return self.tensors + self.allowance

    def fits(self, gpu_bytes: float) -> bool:
        """Tell whether it fits a GPU of this size; planner and pre-flight both ask here."""
        return self.total <= gpu_bytes

    def parts(self) -> Iterator[tuple[str, float]]:
        """Yield the parts on the GPU, by name."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "host")


def layout_of(config: Config, encoders: Mapping[str, int], visiting: Mapping[str, int], vae_base_dim: int) -> Layout:
    """Make the layout that a config describes; the encoders' sizes are those of `encoder_sizes`."""
    train, base = config.train, config.base
    itemsize = 2 if base.dtype == "bfloat16" else FLOAT

    def in_bytes(parameters: Mapping[str, int]) -> list[int]:
        return [count * (FLOAT if part == "vae" else itemsize) for part, count in parameters.items()]

    return Layout(
        world=train.world_size,
        zero_stage=train.zero_stage if train.strategy == "deepspeed" else 0,
        checkpointing=train.activation_checkpointing,
        offload=train.strategy == "deepspeed" and train.offload,
        bfloat16=train.precision == "bf16-mixed",
        bfloat16_base=base.dtype == "bfloat16",
        encoder_bytes=sum(in_bytes(encoders)),
        largest_encoder_bytes=max(in_bytes(visiting), default=0.0),
        vae_base_dim=vae_base_dim,
        average=config.optim.ema_decay > 0,
        quantised=base.quantisation != "none",
        visiting=base.offload,
        vae_bytes=FLOAT * encoders.get("vae", 0),
    )


def batch_of(config: Config, image_tokens: int) -> BatchShape:
    """Return the sizes of one forward pass of one process."""
    data = config.data
    grid = ((data.num_frames - 1) // TEMPORAL_FACTOR + 1, data.height // SPATIAL_FACTOR, data.width // SPATIAL_FACTOR)
    return BatchShape(config.train.micro_batch_size, grid, config.base.max_text_tokens, image_tokens)


def count_parameters(shape: TransformerShape) -> Parameters:
    """Count the parameters of the base and its adapter; equal to the model's own count."""
    d, f, r = shape.width, shape.ffn_dim, shape.rank
    image = shape.image_dim is not None
    linears = [(d, d)] * (10 if image else 8) + [(d, f), (f, d)]
    block = sum(i * o + o for i, o in linears) + (5 if image else 4) * d  # the last are norms of queries and keys
    patch = shape.patch[0] * shape.patch[1] * shape.patch[2]
    embedding = d * shape.in_channels * patch + d
    rest = embedding + 6 * d * (d + 1) + (shape.text_dim + 1) * d + (d + 1) * d + (d + 1) * shape.out_channels * patch
    float32 = shape.num_layers * (2 * d + 6 * d) + 2 * d + (shape.freq_dim + 1) * d + (d + 1) * d
    if shape.image_dim is not None:
        rest += (shape.image_dim + 1) * (shape.image_dim + d)
        float32 += 2 * shape.image_dim + 2 * d
    return Parameters(
        blocks=shape.num_layers * block,
        outputs=shape.num_layers * sum(o for _, o in linears),
        products=shape.num_layers * sum(i * o for i, o in linears),
        rest=rest,
        float32=float32,
        lora=shape.num_layers * 2 * r * sum(i + o for i, o in linears),
        links=shape.num_links * 2 * d * d,
        patch_embedding=embedding,
    )


def step_memory(shape: TransformerShape, batch: BatchShape, layout: Layout) -> Memory:
    """Compute one process's memory at the peak of a step that holds all gradients.

    It does under ddp, and in an accumulation.

    Args:
        shape: the transformer's shape.
        batch: the sizes of one forward pass.
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
    if layout.average:  # it lies where the weights do, see training/weight_average.py
        share = FLOAT * n.trainable / (layout.world if layout.zero_stage == 3 else 1)
        if layout.offload and layout.zero_stage == 3:
            moved += share
        else:
            optimizer += share
    if layout.zero_stage:
        gradients += min(REDUCE_BUCKET, FLOAT * n.trainable)
    checkpoints, activations, waiting = step_activations(shape, batch, layout)
    moved += waiting
    # the encoders work before the transformer, and AdamW (with one more copy of its share) after it
    encoding = max(layout.largest_encoder_bytes, _vae(batch, layout.vae_base_dim))
    other_work = max(encoding, FLOAT * n.trainable / sharded if not layout.offload else 0)
    activations = max(activations, other_work - checkpoints)
    tensors = weights + gathered + gradients + optimizer + checkpoints + activations
    allowance = CUDA_CONTEXT + (NCCL if layout.world > 1 else 0) + FRAGMENTATION * tensors
    host = moved + layout.encoder_bytes
    return Memory(weights, gathered, gradients, optimizer, checkpoints, activations, allowance, host)


def step_activations(shape: TransformerShape, batch: BatchShape, layout: Layout) -> tuple[float, float, float]:
    """Compute the bytes kept of all blocks (0 without checkpointing), of all else, and on the host."""
    checkpointing, bfloat16 = layout.checkpointing, layout.bfloat16
    itemsize = 2 if bfloat16 else FLOAT  # bytes of what linears and attention read and write
    samples, d = 2 * batch.clips, shape.width
    grid = [size // patch for size, patch in zip(batch.latent_grid, shape.patch, strict=True)]
    length = grid[0] * grid[1] * grid[2]
    rows = samples * length
    image_tokens = batch.image_tokens if shape.image_dim is not None else 0
    context = samples * (batch.text_tokens + image_tokens)
    hidden, ffn = rows * d, rows * shape.ffn_dim  # elements
    block = _saved_by_block(shape, rows, context, image_tokens > 0, itemsize)
    pixels = samples * batch.latent_grid[0] * batch.latent_grid[1] * batch.latent_grid[2]
    shared = context * d * itemsize + 2 * length * (d / _heads(d)) * FLOAT  # text and image tokens, rotary embedding
    shared += context * shape.text_dim * FLOAT  # repeated for both branches
    shared += pixels * (shape.in_channels + 4 * shape.out_channels) * FLOAT  # inputs, noise, velocities
    if bfloat16:
        shared += pixels * shape.in_channels * itemsize
    # the peak beyond what a block saves: gradients around its GELU, or its residual sum in float32
    residual = hidden * (3 * (FLOAT + itemsize) if bfloat16 else 4 * FLOAT)
    floats = d * shape.ffn_dim * itemsize if layout.quantised else 0  # a quantised weight, while it multiplies
    last = max(2 * ffn * itemsize + floats, residual)
    inputs = shape.num_layers * hidden * itemsize
    if checkpointing == "offload":
        return 2 * hidden * itemsize, shared + block + last, inputs  # the present block's and the next one's
    if checkpointing != "none":
        kept = inputs
        if checkpointing == "selective":  # result and statistics of self-attention, of all blocks but the present one
            kept += (shape.num_layers - 1) * (hidden * itemsize + rows * _heads(d) * FLOAT)
        return kept, shared + block + last, 0.0
    links = shape.num_links * (hidden * itemsize + (2 * d * d * itemsize if bfloat16 else 0))
    return 0.0, shared + shape.num_layers * block + links + hidden * FLOAT + last, 0.0


def _saved_by_block(shape: TransformerShape, rows: int, context: int, image: bool, itemsize: int) -> float:
    """Compute the bytes that one block's forward pass saves for its backward pass."""
    d, r = shape.width, shape.rank
    heads = _heads(d)
    # 12 (14 with image tokens): inputs of linears, attention and the norms of queries and keys, and
    # attention's output; 3: inputs of the other norms, in float32
    saved: float = rows * d * ((14 if image else 12) * itemsize + 3 * FLOAT)
    saved += 2 * rows * shape.ffn_dim * itemsize  # before and after the GELU
    saved += context * d * (2 * itemsize + FLOAT)  # keys, values, keys before their norm
    saved += r * itemsize * (8 * rows + 2 * context)  # what lies between A and B of every LoRA
    saved += FLOAT * rows * (9 + (3 if image else 2) * heads)  # norms' and softmax's statistics
    if itemsize != FLOAT:  # autocast's copies of the LoRAs
        saved += itemsize * count_parameters(shape).lora / shape.num_layers
    return saved


def frozen_weights(shape: TransformerShape, layout: Layout) -> tuple[float, float, float]:
    """Compute the bytes of a whole base: what stays on the GPU, what visits it at a time, what lies on the host."""
    n = count_parameters(shape)
    itemsize = 2 if layout.bfloat16_base else FLOAT
    products = n.products + FLOAT * n.outputs if layout.quantised else itemsize * n.products
    rest = itemsize * (n.blocks - n.products + n.rest) + FLOAT * n.float32
    if not layout.visiting:
        return products + rest, 0.0, 0.0
    # two blocks: the present one and the one that is fetched ahead
    return rest, products * min(1.0, 2 / shape.num_layers), products


def _weights(shape: TransformerShape, n: Parameters, layout: Layout) -> tuple[float, float, float]:
    """Compute the bytes of own weights, of gathered ones, and of those moved to the host."""
    if layout.zero_stage < 3:
        resident, visiting, on_host = frozen_weights(shape, layout)
        return resident + FLOAT * n.trainable, visiting, on_host
    itemsize = 2 if layout.bfloat16_base else FLOAT
    d, r = shape.width, shape.rank
    persistent = n.lora if r * max(d, shape.ffn_dim) < PERSISTENT else 0
    share = (itemsize * (n.blocks + n.rest) + FLOAT * (n.trainable - persistent)) / layout.world
    whole = FLOAT * (n.float32 + persistent)  # small parameters and float32 norms are never sharded
    block = itemsize * n.blocks / shape.num_layers
    gathered = block + min(block, itemsize * PREFETCH_BUCKET)  # the present block and the one that is fetched ahead
    return (whole, gathered, share) if layout.offload else (whole + share, gathered, 0.0)


def _vae(batch: BatchShape, base_dim: int) -> float:
    """Compute the peak bytes of encoding frames and pointmaps, in float32."""
    _, h, w = batch.latent_grid
    return VAE_MAPS * 2 * batch.clips * (SPATIAL_FACTOR * h) * (SPATIAL_FACTOR * w) * base_dim * FLOAT


def _heads(width: int) -> int:
    """Estimate the number of attention heads: Wan's have 128 channels; tiny models get one."""
    return max(1, width // 128)
