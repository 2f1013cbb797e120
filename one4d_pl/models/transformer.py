"""The One4D transformer: diffusers' Wan on a stacked batch, BranchLinears and control links."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import diffusers
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn

from one4d_pl.config import ConfigError, DLCConfig
from one4d_pl.models.activation_checkpointing import compile_selective, run_checkpointed
from one4d_pl.models.attention_norms import norm_without_autocast
from one4d_pl.models.control_links import ControlLink, link_positions
from one4d_pl.models.host_memory import WaitingInputs
from one4d_pl.models.lora import BranchPatchEmbedding, wrap_linears
from one4d_pl.models.pointmap_codec import PointmapCodec


class CoupledTransformer(nn.Module):
    """A frozen Wan that denoises frames and pointmaps together.

    A subclass decides how the two are coupled.

    Args:
        base: a 36-channel (inpainting layout) Wan, changed in place.
        config: shape of the adapter.
        pointmap_power: data.pointmap_power, for the codec.
    """

    def __init__(self, base: WanTransformer3DModel, config: DLCConfig, pointmap_power: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        norm_without_autocast(base)
        self.config = config
        self.keeps_attention = False  # see set_activation_checkpointing
        self.attention = "native"  # see set_attention
        self.links = nn.ModuleDict()  # block -> ControlLink; only Decoupled LoRA Control has any
        self.codec = PointmapCodec(pointmap_power, base.config.out_channels, base.proj_out.weight.device)

    def forward(
        self,
        noisy_latents: Tensor,  # [2B, C, t, h, w], rgb first
        condition: Tensor,  # [B, 4 + C, t, h, w], the rgb branch's; xyz gets none
        sigma: Tensor,  # [2B], in [0, 1], 1 = noise
        prompt_embeds: Tensor,  # [B, L, D], one text for both
        image_embeds: Tensor | None,  # [B, N, D], where the base has image tokens
    ) -> Tensor:  # [2B, C, t, h, w] velocity = noise - latents
        raise NotImplementedError

    def set_activation_checkpointing(self, mode: str) -> None:
        """Set what the backward pass computes again.

        Args:
            mode: none; full = each block with its link; selective = the same, but self-attention is
                kept; offload = as full, and the blocks' inputs wait in host memory.
        """
        self.base.gradient_checkpointing = mode != "none"
        self.keeps_attention = mode == "selective"
        waiting = WaitingInputs() if mode == "offload" else None
        self.base._gradient_checkpointing_func = partial(
            run_checkpointed, keep_attention=self.keeps_attention, waiting=waiting
        )

    def set_attention(self, backend: str) -> None:
        """Choose the attention kernels by diffusers' name; ConfigError where they are absent."""
        self.attention = backend
        attend_with(self.base, backend)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks, and links, by torch.compile; all are alike, so once serves them all.

        To be called after `set_activation_checkpointing` and `set_attention`.
        """
        compile_wan(self.base, self.attention, backend)
        if self.keeps_attention:
            self.base._gradient_checkpointing_func = compile_selective(backend)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield named trainables in a fixed order: the adapter, nothing of the base."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def parameter_counts(self) -> dict[str, int]:
        """Count the trainable parameters: lora (both branches), links, xyz_patch_embedding."""
        counts = {"lora": 0, "links": 0, "xyz_patch_embedding": 0}
        for name, parameter in self.trainable_parameters():
            # a parameter that ZeRO-3 has sharded is empty while it is not used; ds_numel is its full size
            counts[adapter_part(name)] += getattr(parameter, "ds_numel", parameter.numel())
        return counts


def attend_with(base: WanTransformer3DModel, backend: str) -> None:
    """Set a Wan's attention kernels by diffusers' name; ConfigError where they are absent."""
    if backend == "native":
        return  # torch's own choice, or that of diffusers' environment variable
    try:
        if backend == "_native_math" and base.device.type == "cpu":
            # this CUDA setting also rules the CPU: without it these products widen bfloat16 to float32
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        # set_attention_backend also sets a global default, which this restores, and calls itself experimental
        with attention_backend("native"), _diffusers_quiet():
            base.set_attention_backend(backend)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"base.attention: {backend} cannot be used here ({error}); native always can") from error


@contextmanager
def _diffusers_quiet() -> Iterator[None]:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def compile_wan(base: WanTransformer3DModel, attention: str, backend: str = "inductor") -> None:
    """Compile a Wan's blocks by torch.compile. `attend_with` has set their kernels to `attention`."""
    # inductor recognises plain products as attention and would replace them by the fused kernels
    plain = backend == "inductor" and attention == "_native_math"
    base.compile_repeated_blocks(backend=backend, options={"pattern_matcher": False} if plain else None)


class One4DTransformer(CoupledTransformer):
    """Decoupled LoRA Control around a frozen Wan (One4D, Eq. 5-9).

    The branches are the two halves of the batch.

    Args:
        base: a 36-channel (inpainting layout) Wan; its block linears and patch embedding are wrapped in place.
        config: rank, scale, links.
        seed: seeds the LoRA A matrices; everything else starts at zero or as a copy.
        pointmap_power: data.pointmap_power, for the codec.
    """

    def __init__(self, base: WanTransformer3DModel, config: DLCConfig, seed: int, pointmap_power: float = 1.0) -> None:
        super().__init__(base, config, pointmap_power)
        generator = torch.Generator().manual_seed(seed)
        device = base.proj_out.weight.device
        self.linear_paths = wrap_linears(base.blocks, config.rank, config.lora_scale, generator, device)
        base.patch_embedding = BranchPatchEmbedding(base.patch_embedding)
        width = base.config.num_attention_heads * base.config.attention_head_dim
        positions = link_positions(len(base.blocks), config.num_links)
        self.links = nn.ModuleDict({str(i): ControlLink(width, device) for i in positions})
        for i in positions:
            # a hook runs between this block and the next, inside the checkpointed region: recomputed with the block
            base.blocks[i].register_forward_hook(_LinkHook(self.links[str(i)]))

    def forward(
        self,
        noisy_latents: Tensor,  # [2B, C, t, h, w], rgb first
        condition: Tensor,  # [B, 4 + C, t, h, w], the rgb branch's; xyz is fed zeros
        sigma: Tensor,  # [2B], in [0, 1], 1 = noise
        prompt_embeds: Tensor,  # [B, L, D], both branches see the same text
        image_embeds: Tensor | None,  # [B, N, D], where the base has image tokens
    ) -> Tensor:  # [2B, C, t, h, w] velocity = noise - latents
        return self.base(
            hidden_states=torch.cat([noisy_latents, torch.cat([condition, torch.zeros_like(condition)])], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=prompt_embeds.repeat(2, 1, 1),
            encoder_hidden_states_image=None if image_embeds is None else image_embeds.repeat(2, 1, 1),
            return_dict=False,
        )[0]


class _LinkHook:
    """A forward hook that is no module, so that links are registered (and saved) once."""

    def __init__(self, link: nn.Module) -> None:
        self.link = link

    def __call__(self, block: nn.Module, inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
        return self.link(hidden)


def adapter_part(name: str) -> str:
    """Return the adapter's part that a trainable of One4DTransformer belongs to, by its name."""
    if name.startswith("links."):
        return "links"
    if ".lora_" in name:
        return "lora"
    return "xyz_patch_embedding"


def describe_sizes(counts: dict[str, int]) -> str:
    """Print the adapter's size as the paper does: LoRA / control / total, in 2^20."""
    mega = {part: count / 2**20 for part, count in counts.items()}
    control = mega["links"] + mega["xyz_patch_embedding"]
    return f"{mega['lora']:.1f} / {control:.1f} / {mega['lora'] + control:.1f} (x 2^20: LoRA / control / total)"
