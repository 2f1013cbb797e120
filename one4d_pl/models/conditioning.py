"""Unified Masked Conditioning: how the network sees the given frames (One4D, Eq. 10).

Hidden frames are blanked in pixels, before the VAE: one latent mixes four frames, so blanking
latents would leak. The result is concatenated in Wan's image-to-video layout: [noisy latents | mask
| conditioning latents].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fold_frame_mask(
    frame_mask: Tensor,  # [B, T] bool, 1 = given
    factor: int,  # the VAE's temporal compression r; T = r k + 1
) -> Tensor:  # [B, r, k + 1] float
    """Fold a per-frame mask to latent frames: frame 0 fills all r channels, then groups of r."""
    batch, num_frames = frame_mask.shape
    if num_frames % factor != 1:
        raise ValueError(f"frame_mask: {num_frames} frames, need {factor}k+1 (Wan VAE)")
    first = frame_mask[:, :1].expand(batch, factor)  # [B, r]
    return torch.cat([first, frame_mask[:, 1:]], dim=1).view(batch, -1, factor).transpose(1, 2).float()


def blank_hidden_frames(
    frames: Tensor,  # [B, 3, T, H, W] in [-1, 1]
    frame_mask: Tensor,  # [B, T] bool, 1 = given
) -> Tensor:  # [B, 3, T, H, W]
    """Return given frames as they are, all others zero in pixels: mid-grey, as Wan was trained."""
    return torch.where(frame_mask[:, None, :, None, None], frames, 0.0)


def encode_condition(
    encode: Callable[[Tensor], Tensor],  # [B, 3, T, H, W] in [-1, 1] -> [B, C, t, h, w] normalised posterior modes
    frames: Tensor,  # [B, 3, T, H, W] in [-1, 1]; hidden frames are never read
    frame_mask: Tensor,  # [B, T] bool, 1 = given
    factor: int,  # the VAE's temporal compression
    latents: Tensor | None = None,  # [B, C, t, h, w] of all frames, where known: clips given whole need no encoding
    stored: Sequence[Tensor | None] = (),  # [C, t, h, w] each: known conditioning latents; read only with `latents`
) -> Tensor:  # [B, r + C, t, h, w] = [mask | conditioning latents]
    """Make the rgb branch's condition: literal zeros where no frame is given, not encoded grey."""
    if latents is None:
        latents = encode(blank_hidden_frames(frames, frame_mask))
    else:
        latents = latents.clone()
        for row, known in enumerate(stored):
            if known is not None:
                latents[row] = known
        unknown = torch.tensor([known is None for known in stored] or [True] * len(latents), device=latents.device)
        partly = frame_mask.any(1) & ~frame_mask.all(1) & unknown
        if bool(partly.any()):
            latents[partly] = encode(blank_hidden_frames(frames[partly], frame_mask[partly]))
    folded = fold_frame_mask(frame_mask, factor).to(latents)  # [B, r, t]
    folded = folded[..., None, None].expand(*folded.shape, *latents.shape[-2:])
    any_given = frame_mask.any(dim=1)[:, None, None, None, None]
    return torch.where(any_given, torch.cat([folded, latents], dim=1), 0.0)
