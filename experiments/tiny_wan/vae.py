"""The tiny Wan's VAE: a small `AutoencoderKLWan` for the toy world's frames and pointmaps.

1. `render_pool` keeps a few hundred clips in memory: frames in bytes, normalised pointmaps in half precision.
2. `draw_batch` cuts crops from it, a pure function of (seed, step). The stage (crop size) follows from the progress:
   short crops first, whole clips last, because the causal cache drifts beyond the longest clip ever trained on.
3. `train_step` runs Wan's own chunked encoder and decoder without the final clamp (which has no gradient outside +-1),
   in bf16. The latents are kept near unit variance and get a little noise, so that a diffusion model can model them.
   `finishing_config` trains the decoder alone, at the size that the base and its adapters use: their latents stay
   valid.
4. `evaluate` goes through the public encode and decode; `pca_baseline` is the best linear code of the same size, for
   comparison.

Wan 2.2's residual blocks (`is_residual`) carry averages past every stage; at this size they learn
far faster than Wan 2.1's plain ones. Matrices are updated by Muon (Jordan 2024), all else by Adam.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from one4d_pl.files import whole_file
from one4d_pl.geometry.pointmap import bend, normalise_pointmap, unbend
from one4d_pl.models.encoder_files import CPU
from one4d_pl.models.precision import computes_bfloat16
from one4d_pl.progress import Progress
from one4d_pl.toy.world import render_clip

KINDS = ("frames", "pointmaps")  # the two videos of a clip
TIME_FACTOR, SPACE_FACTOR = 4, 4
ADAM_EPS = 1e-10
NEAR = 0.1  # normalised distance; nearer points get little more weight
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024: a quintic that moves singular values to about 1


@dataclass(frozen=True)
class Stage:
    """The crops of a part of the training."""

    until: float  # progress at which the stage ends
    num_frames: int
    height: int
    width: int
    batch: int


@dataclass(frozen=True)
class TinyVaeConfig:
    """Shape and recipe; a state file can only be resumed under the config it was started with."""

    base_dim: int = 16
    decoder_base_dim: int = 24
    dim_mult: tuple[int, ...] = (1, 2, 2)
    z_dim: int = 16
    pointmaps: bool = True  # half of every batch; Wan's own VAE never saw any
    lr: float = 6e-3  # peak of the cosine
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    muon_momentum: float = 0.95
    latent_noise: float = 0.04  # largest std, in std of each latent channel; each row draws its own
    latent_weight: float = 1e-3  # of the pull towards mean 0 and std 1
    square_weight: float = 8.0  # of the squared error beside the absolute one
    near_weight: float = 0.2  # of a pointmap's absolute error divided by the point's distance
    ema: float = 0.998
    seed: int = 0
    decoder_only: bool = False
    level: str = "hard"  # of the toy clips (toy/levels.py)
    pointmap_power: float = 1.0  # by which pointmaps are bent (data.pointmap_power)
    stages: tuple[Stage, ...] = (
        # two clips a step: in the same time, many small steps learn more than few large ones
        Stage(0.35, 9, 32, 48, 2),
        Stage(0.78, 17, 32, 48, 2),
        Stage(1.00, 17, 64, 96, 2),
    )


def finishing_config(config: TinyVaeConfig, num_frames: int, height: int, width: int) -> TinyVaeConfig:
    """Return the recipe that trains a finished VAE's decoder further, as the tiny scale uses it.

    It sees clips of one size, of the toy level and with the bent pointmaps that the base and the
    adapters are trained on; near points count more.
    """
    stages = (Stage(1.00, num_frames, height, width, 4),)
    return replace(
        config, decoder_only=True, lr=2e-3, near_weight=0.6, latent_noise=0.1, level="clear", pointmap_power=0.5,
        stages=stages,
    )  # fmt: skip


@dataclass(frozen=True)
class ClipPool:
    """Rendered clips, compact in memory."""

    frames: Tensor  # [N, 3, T, H, W] uint8
    pointmaps: Tensor  # [N, 3, T, H, W] float16, normalised, camera-0 coordinates
    valid: Tensor  # [N, T, H, W] bool
    pointmap_power: float = 1.0

    def __len__(self) -> int:
        return len(self.frames)

    def first(self, count: int) -> ClipPool:
        return replace(self, frames=self.frames[:count], pointmaps=self.pointmaps[:count], valid=self.valid[:count])

    def videos(self, kind: str, clips: slice | int) -> Tensor:  # [..., 3, T, H, W] float32 in [-1, 1]
        """Return frames or bent pointmaps as the VAE sees them."""
        if kind == "frames":
            return self.frames[clips].float() / 127.5 - 1
        return bend(self.pointmaps[clips].float().movedim(-4, -1), self.pointmap_power).movedim(-1, -4)


def render_pool(
    clips: Sequence[tuple[int, str]],
    num_frames: int,
    height: int,
    width: int,
    far_limit: float,
    z_offset: bool,
    level: str = "hard",
    pointmap_power: float = 1.0,
) -> ClipPool:
    """Render the toy clips of (seed, domain); normalise pointmaps as the data module does."""
    frames, pointmaps, valid = [], [], []
    for seed, domain in Progress(clips, desc="rendering clips", unit="clip", disable=len(clips) < 32):
        clip = render_clip(seed, num_frames, height, width, domain, level)
        geometry = normalise_pointmap(clip.depth, clip.valid, clip.intrinsics, clip.cam2world, far_limit, z_offset)
        frames.append(clip.frames.permute(3, 0, 1, 2))
        pointmaps.append(geometry.points.permute(3, 0, 1, 2).half())
        valid.append(geometry.valid)
    return ClipPool(torch.stack(frames), torch.stack(pointmaps), torch.stack(valid), pointmap_power)


def build_vae(config: TinyVaeConfig) -> AutoencoderKLWan:
    """Build a fresh VAE from the config's seed; 4x compression in time, 4x in space."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoencoderKLWan(
            base_dim=config.base_dim,
            decoder_base_dim=config.decoder_base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * config.z_dim,
            latents_std=[1.0] * config.z_dim,
            is_residual=True,
            scale_factor_temporal=TIME_FACTOR,
            scale_factor_spatial=SPACE_FACTOR,
        )


@dataclass
class VaeTraining:
    """The state of a training between two steps, all that resuming needs."""

    vae: AutoencoderKLWan
    average: dict[str, Tensor]  # exponential moving average of the weights
    first: dict[str, Tensor]  # Muon's momentum, Adam's first moment
    second: dict[str, Tensor]  # Adam's second moment; Muon has none
    step: int = 0
    seconds: float = 0.0  # spent in training steps

    @classmethod
    def start(cls, vae: AutoencoderKLWan) -> VaeTraining:
        named = {name: p.detach() for name, p in vae.named_parameters()}
        zeros = {name: torch.zeros_like(p) for name, p in named.items()}
        second = {name: torch.zeros_like(p) for name, p in named.items() if not uses_muon(p)}
        return cls(vae, {name: p.clone() for name, p in named.items()}, zeros, second)

    def averaged_vae(self) -> AutoencoderKLWan:
        """Return a copy of the VAE with the averaged weights."""
        vae = AutoencoderKLWan.from_config(self.vae.config)
        vae.load_state_dict(self.average)
        return vae.eval()


def save_training(training: VaeTraining, config: TinyVaeConfig, path: Path) -> None:
    """Write the state atomically."""
    weights = {name: p.detach() for name, p in training.vae.named_parameters()}
    groups = {"weight": weights, "average": training.average, "first": training.first, "second": training.second}
    tensors = {f"{group}.{name}": t.contiguous() for group, named in groups.items() for name, t in named.items()}
    metadata = {"step": str(training.step), "seconds": repr(training.seconds), "config": json.dumps(asdict(config))}
    with whole_file(path) as staging:
        save_file(tensors, staging, metadata=metadata)


def load_training(path: Path, config: TinyVaeConfig) -> VaeTraining:
    """Read a state; ValueError if it belongs to another config."""
    training = VaeTraining.start(build_vae(config))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["config"]) != json.loads(json.dumps(asdict(config))):
            raise ValueError(
                f"{path}: was trained with {metadata['config']}; resume with that config or another folder"
            )
        for group in ("average", "first", "second"):
            named: dict[str, Tensor] = getattr(training, group)
            named.update({name: file.get_tensor(f"{group}.{name}") for name in named})
        with torch.no_grad():
            for name, p in training.vae.named_parameters():
                p.copy_(file.get_tensor(f"weight.{name}"))
    training.step, training.seconds = int(metadata["step"]), float(metadata["seconds"])
    return training


def draw_batch(pool: ClipPool, stage: Stage, config: TinyVaeConfig, step: int) -> Tensor:  # [B, 3, t, h, w]
    """Draw random crops, a pure function of (seed, step). Odd rows are pointmaps where those are trained."""
    generator = torch.Generator().manual_seed((config.seed << 32) + step)
    _, _, num_frames, height, width = pool.frames.shape
    room = (len(pool), num_frames - stage.num_frames + 1, height - stage.height + 1, width - stage.width + 1)
    crops = []
    for row in range(stage.batch):
        clip, t, y, x = (int(torch.randint(n, (), generator=generator)) for n in room)
        video = pool.videos(KINDS[row % 2 if config.pointmaps else 0], clip)
        crops.append(video[:, t : t + stage.num_frames, y : y + stage.height, x : x + stage.width])
    return torch.stack(crops)


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:  # [B, C, t, h, w] -> [B, 3, T, H, W]
    """Compute what `vae.decode` computes before its clamp at +-1."""
    vae.clear_cache()
    hidden, chunks = vae.post_quant_conv(latents), []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        cache = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
        chunks.append(vae.decoder(hidden[:, :, i : i + 1], **cache, first_chunk=i == 0))
    vae.clear_cache()
    return torch.cat(chunks, dim=2)


def train_step(training: VaeTraining, pool: ClipPool, config: TinyVaeConfig, progress: float) -> Tensor:
    """Do one update at `progress` in [0, 1) of the run. Return each row's mean squared error [B]."""
    stage = next(stage for stage in config.stages if progress < stage.until)
    videos = draw_batch(pool, stage, config, training.step)
    vae = training.vae.train()
    vae.zero_grad()
    # convolutions are many times faster in bfloat16 than in float32, in the backward pass too
    with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16(CPU)):
        with torch.set_grad_enabled(not config.decoder_only):
            latents = vae.encode(videos).latent_dist.mode().float()
        std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
        generator = torch.Generator().manual_seed((config.seed << 32) + (1 << 31) + training.step)
        noise = torch.randn(latents.shape, generator=generator) * std.detach().view(1, -1, 1, 1, 1)
        level = config.latent_noise * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
        decoded = decode_unclamped(vae, latents + level * noise).float()
    error = decoded - videos
    spread = (mean.square() + std.clamp_min(1e-4).log().square()).mean()
    absolute = (importance(videos, config) * error.abs()).mean()
    loss = absolute + config.square_weight * error.square().mean() + config.latent_weight * spread
    loss.backward()
    warmth = min(1.0, (training.step + 1) / config.warmup_steps)
    update(training, config, config.lr * warmth * (0.5 + 0.5 * math.cos(math.pi * progress)))
    return error.detach().square().mean((1, 2, 3, 4))


def importance(videos: Tensor, config: TinyVaeConfig) -> Tensor:  # [B, 3, T, H, W] -> [B, 1, T, H, W]
    """Weigh each pixel's absolute error: 1, and more for near points of pointmaps."""
    weight = torch.ones_like(videos[:, :1])
    if config.pointmaps:
        weight[1::2] += config.near_weight / (videos[1::2].norm(dim=1, keepdim=True) + NEAR)
    return weight


def uses_muon(parameter: Tensor) -> bool:
    """Tell whether a parameter is a matrix (out, in x kernel) rather than a bias or a gain."""
    return parameter.ndim >= 4 and min(parameter.flatten(1).shape) > 1


@torch.no_grad()
def update(training: VaeTraining, config: TinyVaeConfig, lr: float) -> None:
    """Update the matrices by Muon, the rest by Adam, and the moving average."""
    training.step += 1
    beta1, beta2 = config.betas
    decay = min(config.ema, training.step / (training.step + 10))
    for name, p in training.vae.named_parameters():
        first, grad = training.first[name], p.grad
        if grad is None:  # the encoder, when the decoder alone is trained
            continue
        if uses_muon(p):
            first.lerp_(grad, 1 - config.muon_momentum)
            direction = orthogonalise(grad.lerp(first, config.muon_momentum).flatten(1))
            # scaled to the size of Adam's update (Liu et al. 2025)
            p.add_(direction.view_as(p), alpha=-lr * 0.2 * math.sqrt(max(direction.shape)))
        else:
            second = training.second[name]
            first.lerp_(grad, 1 - beta1)
            second.lerp_(grad.square(), 1 - beta2)
            scale = (second / (1 - beta2**training.step)).sqrt() + ADAM_EPS
            p.addcdiv_(first, scale, value=-lr / (1 - beta1**training.step))
        training.average[name].lerp_(p, 1 - decay)


def orthogonalise(matrix: Tensor) -> Tensor:  # [m, n] -> [m, n]
    """Approximate U Vᵀ of the matrix's U S Vᵀ by five Newton-Schulz steps (Jordan 2024).

    It computes in bf16 where the device does so fast.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-12)
    if computes_bfloat16(x.device):
        x = x.bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


@dataclass(frozen=True)
class Quality:
    """The quality of clips of one kind after a code's round trip.

    PSNR is in dB with a peak-to-peak of 2, over all pixels.
    """

    psnr: float
    psnr_per_frame: tuple[float, ...]
    point_error: float | None = None  # mean over valid points of |decoded - true| / |true|
    point_error_of_sums: float | None = None  # mean |decoded - true| over mean |true|


def psnr(squared_error: Tensor) -> float:
    """Return 10 log10(4 / mse), the PSNR (dB) for a range of 2."""
    return -10 * math.log10(float(squared_error.double().mean()) / 4)


def measure(decoded: Tensor, pool: ClipPool, kind: str) -> Quality:
    """Measure decoded [N, 3, T, H, W] against the pool's first N clips."""
    truth = pool.videos(kind, slice(len(decoded)))
    squared = (decoded - truth).square()
    quality = Quality(psnr(squared), tuple(psnr(squared[:, :, t]) for t in range(squared.shape[2])))
    if kind == "frames":
        return quality
    valid = pool.valid[: len(decoded)]
    points = [unbend(video.movedim(1, -1), pool.pointmap_power)[valid] for video in (decoded, truth)]
    distance, size = (points[0] - points[1]).norm(dim=-1), points[1].norm(dim=-1)
    relative, of_sums = (distance / size.clamp_min(1e-6)).mean(), distance.mean() / size.mean()
    return replace(quality, point_error=float(relative), point_error_of_sums=float(of_sums))


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, pool: ClipPool, bfloat16: bool) -> dict[str, Quality]:
    """Measure frames and pointmaps after the public encode (posterior mode) and decode. Clips go through one by one."""
    quality = {}
    for kind in KINDS:
        videos = (pool.videos(kind, slice(i, i + 1)) for i in range(len(pool)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16 and computes_bfloat16(CPU)):
            decoded = [vae.decode(vae.encode(v).latent_dist.mode()).sample.float() for v in videos]
        quality[kind] = measure(torch.cat(decoded), pool, kind)
    return quality


def pca_baseline(train: ClipPool, held_out: ClipPool, components: int) -> dict[str, Quality]:
    """Measure the best linear code of the latents' size, with a basis for each kind.

    One block of 4x4 pixels of frame 0, or of 4 frames later on, becomes `components` numbers, as in the VAE.
    """
    baseline = {}
    for kind in KINDS:
        videos, known = held_out.videos(kind, slice(None)), train.videos(kind, slice(None))
        decoded = torch.empty_like(videos)
        for part, length in ((slice(0, 1), 1), (slice(1, None), TIME_FACTOR)):
            blocks = _blocks(known[:, :, part], length).flatten(0, -2)
            mean, basis = principal_components(blocks, components)
            target = _blocks(videos[:, :, part], length)
            decoded[:, :, part] = _unblock((target - mean) @ basis @ basis.T + mean, length)
        baseline[kind] = measure(decoded.clamp(-1, 1), held_out, kind)
    return baseline


def principal_components(rows: Tensor, components: int) -> tuple[Tensor, Tensor]:  # [N, D] -> [D], [D, components]
    """Return the mean and the leading eigenvectors of the covariance."""
    mean = rows.mean(0)
    centred = rows - mean
    return mean, torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:]


def _blocks(videos: Tensor, length: int) -> Tensor:  # [N, 3, T, H, W] -> [N, t, h, w, D]
    split = videos.unflatten(4, (-1, SPACE_FACTOR)).unflatten(3, (-1, SPACE_FACTOR)).unflatten(2, (-1, length))
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _unblock(blocks: Tensor, length: int) -> Tensor:  # [N, t, h, w, D] -> [N, 3, T, H, W]
    split = blocks.unflatten(4, (3, length, SPACE_FACTOR, SPACE_FACTOR)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return split.flatten(6, 7).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, pool: ClipPool, count: int, bfloat16: bool) -> None:
    """Store mean and std of each latent channel in the VAE's config.

    They are measured over the frames of the first `count` clips.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16 and computes_bfloat16(CPU)):
        videos = (pool.videos("frames", slice(i, i + 1)) for i in range(min(count, len(pool))))
        latents = torch.cat([vae.encode(v).latent_dist.mode().float() for v in videos])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
