"""The tiny base's transformer and text encoder, pretrained on the toy world's RGB video.

It is an inpainting model, the small analogue of Wan2.1-Fun-InP: 36 channels, random frame masks,
captions with dropout, flow matching. It sees RGB frames only; the adapters add geometry later.
DataModule, trainer and flow are those of `fit`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from one4d_pl.config import Config, ConfigError
from one4d_pl.data.sample_order import derived_generator
from one4d_pl.diffusion.flow_matching import interpolate, shift_sigma
from one4d_pl.files import replaced_folder, whole_file, write_json
from one4d_pl.models.attention_norms import norm_without_autocast
from one4d_pl.models.conditioning import encode_condition
from one4d_pl.models.precision import can_compile, training_attention
from one4d_pl.models.transformer import attend_with, compile_wan
from one4d_pl.models.wan import WanEncoders, load_transformer
from one4d_pl.types import Batch

EMA_DECAY = 0.998
MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT_FILES = {"transformer": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
META = {"format": "pt"}


class TinyBaseModule(lightning.LightningModule):
    """A module that pretrains transformer and text encoder, every weight, on RGB inpainting.

    Args:
        config: base, data, masking, flow, optim and train are read as `fit` reads them.
        images: train on the first frame of each clip by its caption alone. An image has a third of
            a clip's tokens, so that captions meet three times as many scenes in the same time.
    """

    encoders: WanEncoders
    trained: nn.ModuleDict  # transformer, text_encoder

    def __init__(self, config: Config, images: bool = False) -> None:
        super().__init__()
        self.config, self.images = config, images
        self._conditions: dict[str, Tensor] = {}  # of image to video, where a clip's never changes

    def configure_model(self) -> None:
        """Open the bundle: a trained VAE, and seeded weights for the rest."""
        if hasattr(self, "trained"):
            return
        self.encoders = WanEncoders.of(self.config.base)
        transformer = load_transformer(self.config.base.path, self.config.base.dtype)
        norm_without_autocast(transformer)  # as in the training of adapters
        attention = training_attention(self.config, transformer.device)
        attend_with(transformer, attention)
        if self.config.train.compile and can_compile(transformer.device):
            compile_wan(transformer, attention)
        text_encoder = self.encoders.text_encoder
        # an exported base stores the word embedding under two names, and only one would be trained
        text_encoder.set_input_embeddings(text_encoder.encoder.embed_tokens)
        self.trained = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
        self.trained.requires_grad_(True)
        self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.average.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.encoded is not None
        seed, positions = self.config.train.seed, batch.position.tolist()
        latents = torch.stack([e.latents[0] for e in batch.encoded])  # [B, C, t, h, w]
        if self.images:
            latents = latents[:, :, :1]  # Wan's VAE encodes frame 0 alone
        condition = self._empty_condition(batch, latents) if self.images else self.condition(batch, latents)
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=derived_generator(seed, p, "noise")) for p in positions]
        ).to(latents)
        uniform = torch.cat([torch.rand(1, generator=derived_generator(seed, p, "sigma")) for p in positions])
        sigma = shift_sigma(uniform, self.config.flow.shift).to(latents)
        noisy, velocity = interpolate(latents, noise, sigma)
        prediction = self.trained["transformer"](
            hidden_states=torch.cat([noisy, condition], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=self._embed(list(batch.prompts)),
            return_dict=False,
        )[0]
        loss = (prediction.float() - velocity).square().mean()
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def condition(self, batch: Batch, latents: Tensor) -> Tensor:  # [B, 4 + C, t, h, w]
        """Encode the condition as Unified Masked Conditioning does for the rgb branch.

        One clip at a time, so that cached conditions do not depend on the batch.
        """
        factor, given = self.encoders.temporal_factor, batch.frame_mask
        rows = []
        for i, (key, task) in enumerate(zip(batch.keys, batch.tasks, strict=True)):
            row = self._conditions.get(key) if task == "image" else None
            if row is None:
                one = slice(i, i + 1)
                row = encode_condition(self.encoders.encode, batch.frames[one], given[one], factor, latents[one])
                if task == "image":
                    self._conditions[key] = row
            rows.append(row)
        return torch.cat(rows)

    def _empty_condition(self, batch: Batch, latents: Tensor) -> Tensor:  # [B, 4 + C, 1, h, w]
        """Return the condition of an image without any given frame."""
        factor, hidden = self.encoders.temporal_factor, torch.zeros(1, 1, dtype=torch.bool)
        row = self._conditions.get("")
        if row is None:
            row = encode_condition(self.encoders.encode, batch.frames[:1, :, :1], hidden, factor)
            self._conditions[""] = row
        return row.expand(len(latents), *row.shape[1:])

    def _embed(self, prompts: list[str]) -> Tensor:  # [B, L, D], with gradients
        tokens = self.encoders.tokenizer(
            prompts, padding="longest", max_length=self.config.base.max_text_tokens, truncation=True,
            return_attention_mask=True, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        embeds = self.trained["text_encoder"](tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds = embeds * tokens.attention_mask[..., None]
        return nn.functional.pad(embeds, (0, 0, 0, self.config.base.max_text_tokens - embeds.shape[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        return torch.optim.AdamW(
            self.trained.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate: a warm-up, then a cosine to zero."""
        step, train = self.global_step, self.config.train
        warm = min(1.0, (step + 1) / max(1, self.config.optim.warmup_steps))
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / train.max_steps)).item())
        for group in optimizer.param_groups:
            group["lr"] = self.config.optim.lr * warm * cosine

    def export(self, folder: Path) -> None:
        """Write a bundle with averaged transformer and text encoder, in bfloat16, atomically."""
        with replaced_folder(folder) as staging:
            shutil.copytree(self.config.base.path, staging, dirs_exist_ok=True)
            for name, file in WEIGHT_FILES.items():
                state = self.average.module.get_submodule(name).state_dict()
                save_file({k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}, staging / name / file, META)


class BaseState(Callback):
    """A callback that averages the weights after every step, saves the state and resumes from it.

    It saves every `train.save_every` steps and at the end.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.run_dir) / "state.safetensors"

    def step(self) -> int:
        """Return the step to resume at; 0 where nothing was saved."""
        note = self.path.with_suffix(".json")
        return int(json.loads(note.read_text())["step"]) if self.path.is_file() and note.is_file() else 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, TinyBaseModule)
        self.averaged_step = trainer.global_step
        if self.step() == 0:
            return
        tensors = load_file(self.path)
        if int(tensors["step"]) != self.step():
            raise ConfigError(f"{self.path}: is of step {int(tensors['step'])}, its note of {self.step()}; remove both")
        with torch.no_grad():
            for name, tensor in _weights(module).items():
                tensor.copy_(tensors[name])
        for name, parameter in module.trained.named_parameters():
            state = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
            trainer.optimizers[0].state[parameter] = {"step": tensors["step"].float(), **state}

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, TinyBaseModule)
        step = trainer.global_step
        if step == self.averaged_step:
            return  # in the middle of an accumulation
        self.averaged_step = step
        # not in the module's own hook, which runs after this save
        module.average.update_parameters(module.trained)
        if step % self.config.train.save_every == 0 or step == self.config.train.max_steps:
            if trainer.is_global_zero:
                self._save(module, trainer.optimizers[0], step)
            trainer.strategy.barrier()

    def _save(self, module: TinyBaseModule, optimizer: torch.optim.Optimizer, step: int) -> None:
        tensors = {"step": torch.tensor(step)} | {k: v.detach().clone() for k, v in _weights(module).items()}
        for name, parameter in module.trained.named_parameters():
            tensors |= {f"{moment}/{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
        with whole_file(self.path) as staging:
            save_file(tensors, staging)
        write_json(self.path.with_suffix(".json"), {"step": step})
        module.export(Path(self.config.run_dir) / "wan")


def _weights(module: TinyBaseModule) -> dict[str, Tensor]:
    """Return the trained weights and their average by name, as views."""
    return {f"{kind}/{name}": tensor for kind, part in (("trained", module.trained), ("average", module.average))
            for name, tensor in part.state_dict().items()}  # fmt: skip
