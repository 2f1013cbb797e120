"""The LightningModule: the loss and `sample()`; measuring, drawing and writing are callbacks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import lightning
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics import MeanMetric

from one4d_pl.config import TEMPORAL_FACTOR, Config, ConfigError
from one4d_pl.data.datamodule import datamodule_of
from one4d_pl.data.latent_stats import LatentStats
from one4d_pl.data.sample_order import derived_generator
from one4d_pl.diffusion.flow_matching import interpolate, mse_per_sample, shift_sigma
from one4d_pl.inference.pipeline import GeneratedScene, One4DPipeline
from one4d_pl.models.conditioning import encode_condition
from one4d_pl.models.open_model import open_model
from one4d_pl.models.precision import can_compile, training_attention, uses_bfloat16
from one4d_pl.models.transformer import CoupledTransformer
from one4d_pl.models.wan import WanEncoders, fingerprint, pad_prompt_embeds
from one4d_pl.training.optim import build_optimizer, set_learning_rates
from one4d_pl.training.zero import ZeroStrategy
from one4d_pl.types import MODALITIES, Batch

log = logging.getLogger("one4d_pl")

WEIGHTS = "weights.safetensors"  # of a checkpoint with optim.ema_decay; training/checkpoint.py


class One4DModule(lightning.LightningModule):
    """Frozen Wan, trainable adapter, flow matching on both branches (One4D, sec. 3).

    Args:
        config: the whole run's config.
        adapters: folder to start from (a checkpoint, or train.init_from); None = a fresh adapter.
        resume: where a checkpoint's adapter is an average (optim.ema_decay), start from the weights beside it.
    """

    transformer: CoupledTransformer

    def __init__(self, config: Config, adapters: Path | None, resume: bool = False) -> None:
        super().__init__()
        self.config, self.adapters, self.resume = config, adapters, resume
        self.base_fingerprint = fingerprint(config.base.path)
        self.val_loss = torch.nn.ModuleDict({m: MeanMetric() for m in MODALITIES})
        self._encoders: tuple[WanEncoders, ...] = ()
        self._built = False

    def configure_model(self) -> None:
        """Open the base and build the adapter, once; Lightning calls this on every rank."""
        if self._built:
            return
        # Lightning makes the GPU the default device here. Building draws, reads and computes on the
        # CPU, and puts each part on its device explicitly.
        with torch.device("cpu"):
            self._build()
        self._built = True

    def _build(self) -> None:
        config = self.config
        strategy = None if self._trainer is None else self._trainer.strategy
        device = torch.device("cpu") if strategy is None else strategy.root_device
        if config.base.offload and config.train.activation_checkpointing == "none":
            raise ConfigError(
                "base.offload: the backward pass would keep every block on the GPU; set "
                "train.activation_checkpointing=full"
            )
        partitioner = strategy.partitioner() if isinstance(strategy, ZeroStrategy) else None
        statistics = self._measure_latents() if config.dlc.standardise_xyz and self.adapters is None else None
        self.transformer, _ = open_model(config, self.adapters, device, partitioner)
        if statistics is not None:
            self.transformer.codec.set_statistics(*statistics)
        if self.adapters is not None and self.resume and config.optim.ema_decay:
            stored = load_file(self.adapters / WEIGHTS)
            with torch.no_grad():
                for name, parameter in self.transformer.trainable_parameters():
                    parameter.copy_(stored[name])
        self.transformer.set_attention(training_attention(config, device))
        self.transformer.set_activation_checkpointing(config.train.activation_checkpointing)
        if config.train.compile and can_compile(device):
            self.transformer.compile_blocks()
        elif config.train.compile and (self._trainer is None or self.trainer.is_global_zero):
            log.warning("train.compile: no C++ compiler is found (install g++), so the blocks run as they are, slower")

    def _measure_latents(self) -> tuple[list[float], list[float]]:
        """Measure mean and deviation of xyz latents, [C] each, for a fresh adapter.

        Rank 0 reads clips for all ranks; an error there is raised on every rank.
        """
        if self._trainer is None:
            raise ConfigError("dlc.standardise_xyz: the latents are measured by a trainer's data; there is none")
        found: LatentStats | str | None = None
        if self.trainer.is_global_zero:
            try:
                found = datamodule_of(self.trainer).describe_latents()
            except (OSError, ValueError) as error:  # the errors of shards and stores
                found = f"dlc.standardise_xyz: {error}"
        found = self.trainer.strategy.broadcast(found)
        if isinstance(found, str):
            raise ConfigError(found)
        if found is None:
            raise ConfigError(
                "dlc.standardise_xyz: no training clip is encoded ahead, so there is nothing to measure; set "
                "data.cache_latents=true with local shards, encode them (python -m data_prep.encode_latents), or set "
                "dlc.standardise_xyz=false"
            )
        return found.xyz_mean, found.xyz_std

    @property
    def encoders(self) -> WanEncoders:
        """Return the frozen encoders, opened at the first use; whole in every process.

        They stay in host memory and are on the GPU only while they work. The tuple hides them from
        the strategy: ZeRO-3 would shard them, and a sharded encoder needs all processes at every
        call, but which clips are encoded differs from rank to rank.
        """
        if not self._encoders:
            # the first use may be in a validation, where Lightning switches inference mode on
            with torch.device("cpu"), torch.inference_mode(False):
                self._encoders = (WanEncoders.of(self.config.base).wait_on_host(self.device),)
        return self._encoders[0]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Compute a micro batch's loss, and each sample's loss per branch for the callbacks."""
        seed = self.config.train.seed
        uniform = [torch.rand(1, generator=derived_generator(seed, p, "sigma")) for p in batch.position.tolist()]
        # one t for both branches (One4D, Eq. 3)
        sigma = shift_sigma(torch.cat(uniform * 2), self.config.flow.shift).to(self.device)
        rgb, xyz = self.losses(batch, sigma, self.draw_noise(batch, "noise"))
        loss = rgb.mean() + self.config.flow.xyz_weight * xyz.mean()
        # the gradients of an infinite loss may be finite: make them NaN, for training/step_guard.py
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        return {"loss": loss, "rgb": rgb.detach(), "xyz": xyz.detach()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the losses at fixed sigmas, noise and frame masks to the means of both branches."""
        noise = self.draw_noise(batch, "validation noise")
        for sigma in self.config.val.sigmas:
            losses = self.losses(batch, torch.full((2 * len(batch),), sigma, device=self.device), noise)
            for modality, loss in zip(MODALITIES, losses, strict=True):
                self.val_loss_of(modality).update(loss[batch.counted])

    def val_loss_of(self, modality: str) -> MeanMetric:
        """Return the metric of one branch's mean validation loss, over all ranks."""
        metric = self.val_loss[modality]
        assert isinstance(metric, MeanMetric)
        return metric

    def losses(
        self,
        batch: Batch,
        sigma: Tensor,  # [2B], rgb first
        noise: Tensor,  # [2B, C, t, h, w], each branch its own
    ) -> tuple[Tensor, Tensor]:  # rgb [B], xyz [B]
        """Compute the squared velocity error of each sample and branch (One4D, Eq. 4)."""
        encoded, prompt_embeds, image_embeds = self.encode(batch)
        condition = encode_condition(
            lambda frames: self.encoders.encode(frames),
            batch.frames,
            batch.frame_mask,
            TEMPORAL_FACTOR,
            encoded[: len(batch)],
            () if batch.encoded is None else [e.condition for e in batch.encoded],
        )
        noisy_latents, velocity = interpolate(self.transformer.codec.standardise(encoded), noise, sigma)
        velocity_pred = self.transformer(noisy_latents, condition, sigma, prompt_embeds, image_embeds)
        return mse_per_sample(velocity_pred, velocity)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a batch's encodings, cached or computed.

        These are latents [2B, C, t, h, w], prompt embeddings [B, L, D] and, where the base has
        them, image tokens [B, N, D].
        """
        if batch.encoded is None:
            encoders = self.encoders
            latents = self.transformer.codec.encode_clips(encoders, batch.frames, batch.pointmap)
            prompts = encoders.pad_prompt_embeds(encoders.encode_prompts(list(batch.prompts)))
            return latents, prompts, encoders.encode_first_frame(batch.frames, batch.frame_mask)
        latents = torch.stack([e.latents for e in batch.encoded], dim=1).flatten(0, 1)
        prompts = pad_prompt_embeds([e.prompt_embeds for e in batch.encoded], self.config.base.max_text_tokens)
        images = [e.image_embeds for e in batch.encoded if e.image_embeds is not None]
        if not images:
            return latents, prompts, None
        return latents, prompts, torch.where(batch.frame_mask[:, :1, None], torch.stack(images), 0.0)

    def draw_noise(self, batch: Batch, purpose: str) -> Tensor:  # [2B, C, t, h, w]
        """Draw each sample's noise from (seed, position): the same for any ranks, and on resume."""
        if batch.encoded is not None:  # encoded shards hold no pixels
            shape = tuple(batch.encoded[0].latents.shape)
        else:
            shape = (2, *self.encoders.latent_shape(*batch.frames.shape[2:]))
        seed, positions = self.config.train.seed, batch.position.tolist()
        noise = [torch.randn(shape, generator=derived_generator(seed, p, purpose)) for p in positions]
        return torch.stack(noise, dim=1).flatten(0, 1).to(self.device)

    def sample(self, batch: Batch, steps: int | None = None) -> GeneratedScene:
        """Generate the batch's scenes from its given frames and true captions.

        `steps` replaces sampler.steps where it is given.
        """
        config = self.config
        sampler = config.sampler if steps is None else replace(config.sampler, steps=steps)
        pipeline = One4DPipeline(
            self.transformer,
            self.encoders,
            sampler,
            config.flow.shift,
            config.base.negative_prompt,
            bfloat16=uses_bfloat16(config, self.device),
        )
        return pipeline.sample(
            list(batch.captions), batch.frames, batch.frame_mask, self.draw_noise(batch, "sampling noise")
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.transformer, self.config.optim)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        set_learning_rates(optimizer, self.global_step, self.config.train.max_steps, self.config.optim)
