"""One branch's LoRA in diffusers' `load_lora_weights` format and under Wan's original names.

Both formats hold the LoRA alone: they have no place for control links, the xyz patch embedding, or the card's
xyz_statistics and pointmap_power. The rgb LoRA is a plain Wan LoRA: our rgb branch with the links off.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from one4d_pl.errors import reading
from one4d_pl.models.adapters import PEFT_PREFIX, AdapterCard
from one4d_pl.models.original_names import transformer_source


def diffusers_lora(folder: Path, modality: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a branch's LoRA as diffusers' `save_lora_weights` has it: tensors, metadata."""
    card = AdapterCard.read(folder)
    tensors = {f"transformer.{path}.{part}.weight": tensor for path, part, tensor in _parts(folder, modality)}
    targets = sorted({path for path, _, _ in _parts(folder, modality)})
    adapter = {"r": card.rank, "lora_alpha": card.rank * card.lora_scale, "target_modules": targets}
    metadata = {f"transformer.{key}": value for key, value in adapter.items()}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)}


def original_lora(folder: Path, modality: str) -> dict[str, Tensor]:
    """Return a branch's LoRA under Wan's own names, with an alpha beside every pair.

    Wan's trainers and node editors read this format.
    """
    card = AdapterCard.read(folder)
    tensors = {}
    for path, part, tensor in _parts(folder, modality):
        name = f"diffusion_model.{transformer_source(f'{path}.weight').key.removesuffix('.weight')}"
        tensors[f"{name}.{part}.weight"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(card.rank * card.lora_scale)
    return tensors


def save_lora(folder: Path, modality: str, layout: str, path: Path) -> None:
    """Write a branch's LoRA of an adapter folder as one safetensors file.

    Args:
        folder: the adapter.
        modality: rgb or xyz.
        layout: diffusers or wan.
        path: the file to write.
    """
    if layout == "diffusers":
        tensors, metadata = diffusers_lora(folder, modality)
        save_file(tensors, path, metadata)
    else:
        save_file(original_lora(folder, modality), path, {"format": "pt"})


def _parts(folder: Path, modality: str) -> list[tuple[str, str, Tensor]]:
    """List (path of the linear in the transformer, lora_A or lora_B, weight) of a branch."""
    found, file = [], folder / modality / "adapter_model.safetensors"
    with reading(file):
        tensors = load_file(file)
    for name, tensor in tensors.items():
        path, part, _ = name.removeprefix(PEFT_PREFIX).rsplit(".", 2)
        found.append((path, part, tensor))
    return found
