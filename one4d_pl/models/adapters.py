"""Adapters on disk; no other module reads or writes them.

rgb/adapter_model.safetensors, rgb/adapter_config.json    PEFT's format and names; alpha stored
xyz/...                                                   the same for the other branch
links.safetensors, xyz_patch_embedding.safetensors        parts that PEFT has no name for
coupled.safetensors                                       the adapter of another dlc.coupling, whole
card.json                                                 base, shape of the adapter, its training
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from one4d_pl.config import GONE, Config, ConfigError, DLCConfig, GuidanceConfig, SamplerConfig
from one4d_pl.errors import reading
from one4d_pl.models.concat import ConcatTransformer
from one4d_pl.models.transformer import CoupledTransformer, One4DTransformer
from one4d_pl.types import MODALITIES

PEFT_PREFIX = "base_model.model."
CARD = "card.json"
COUPLED = "coupled.safetensors"
LINKS, XYZ_PATCH = "links.safetensors", "xyz_patch_embedding.safetensors"
BRANCH_FILES = tuple(f"{m}/{file}" for m in MODALITIES for file in ("adapter_model.safetensors", "adapter_config.json"))
# what older cards say, see config.GONE; link_blocks they still say, and it is compared
GONE_FROM_CARDS = {key: GONE[f"dlc.{key}"] for key in ("link_direction", "xyz_patch_embedding")}
ADAPTER_FILES = (*BRANCH_FILES, LINKS, XYZ_PATCH, COUPLED, CARD)  # all that an adapter can consist of


@dataclass(frozen=True)
class AdapterCard:
    """What a program must know to use an adapter correctly."""

    base_path: str
    base_fingerprint: str
    rank: int
    lora_scale: float  # alpha / rank
    link_blocks: list[int]
    tasks: list[str]  # trained on
    shift: float  # sigma shift in training
    step: int
    num_frames: int  # of the training clips, as height and width
    height: int
    width: int
    max_text_tokens: int
    negative_prompt: str
    sampler: dict[str, object]  # steps, solver and guidance of the training's samples (config.SamplerConfig)
    latent_statistics: dict[str, object] | None  # of training clips (data.latent_stats); None = not measured
    data_sources: list[dict[str, str]]  # name and licence tag of each
    coupling: str = "decoupled"  # see config.DLCConfig
    pointmap_power: float = 1.0  # see config.DataConfig
    xyz_statistics: dict[str, list[float]] | None = None  # mean and std of dlc.standardise_xyz; None = off
    base_quantisation: str = "none"  # of the base that it was trained on; see config.BaseConfig

    @property
    def dlc(self) -> DLCConfig:
        """Return the adapter's shape."""
        return DLCConfig(
            rank=self.rank,
            lora_scale=self.lora_scale,
            num_links=len(self.link_blocks),
            standardise_xyz=self.xyz_statistics is not None,
            coupling=self.coupling,
        )

    def configure(self, config: Config) -> Config:
        """Return the config with what belongs to the adapter: its shape, sigma shift and pointmap power."""
        flow, data = replace(config.flow, shift=self.shift), replace(config.data, pointmap_power=self.pointmap_power)
        return replace(config, dlc=self.dlc, flow=flow, data=data)

    @property
    def sampler_config(self) -> SamplerConfig:
        """Return how the training sampled; ConfigError where the card holds something else."""
        try:
            guidance, xyz = (
                None if self.sampler[key] is None else GuidanceConfig(**self.sampler[key])  # type: ignore[arg-type]
                for key in ("guidance", "guidance_xyz")
            )
            return SamplerConfig(self.sampler["steps"], self.sampler["solver"], guidance, xyz)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{CARD}: sampler: {error}") from None

    @staticmethod
    def read(folder: Path) -> AdapterCard:
        """Read the card of an adapter folder; UserError where there is none or it is broken."""
        with reading(folder / CARD, "an adapter of one4d_pl"):
            stored = json.loads((folder / CARD).read_text(encoding="utf-8"))
            for key, left in GONE_FROM_CARDS.items():
                if (value := stored.pop(key, left)) != left:
                    raise ConfigError(f"{folder / CARD}: {key} = {value}: this knob is gone; what is left is {left}")
            return AdapterCard(**stored)


def adapter_tensors(transformer: CoupledTransformer) -> dict[str, dict[str, nn.Parameter]]:
    """Map file -> name in the file -> parameter; every trainable occurs exactly once."""
    if isinstance(transformer, ConcatTransformer):
        return {COUPLED: {name: p for name, p in transformer.named_parameters() if name in transformer.adapter_names}}
    assert isinstance(transformer, One4DTransformer)
    files: dict[str, dict[str, nn.Parameter]] = {f"{m}/adapter_model.safetensors": {} for m in MODALITIES}
    for path in transformer.linear_paths:
        linear = transformer.base.blocks.get_submodule(path)
        for modality in MODALITIES:
            for part in ("lora_A", "lora_B"):
                name = f"{PEFT_PREFIX}blocks.{path}.{part}.weight"
                files[f"{modality}/adapter_model.safetensors"][name] = getattr(linear, part)[modality].weight
    if len(transformer.links):
        files[LINKS] = dict(transformer.links.named_parameters())
    files[XYZ_PATCH] = dict(transformer.base.patch_embedding.xyz.named_parameters())
    return files


def adapter_files(folder: Path) -> list[Path]:
    """List the adapter's files in a checkpoint or adapter folder, relative to it; links if there are any."""
    if (folder / COUPLED).is_file():
        return [Path(COUPLED), Path(CARD)]
    links = [LINKS] if (folder / LINKS).is_file() else []
    return [Path(name) for name in (*BRANCH_FILES, *links, XYZ_PATCH, CARD)]


def missing_file(folder: Path, card: AdapterCard) -> str | None:
    """Return the first file that the card promises and the folder lacks."""
    names = [COUPLED]
    if card.coupling == "decoupled":
        names = [*BRANCH_FILES, *([LINKS] if card.link_blocks else []), XYZ_PATCH]
    return next((name for name in names if not (folder / name).is_file()), None)


def check_complete(folder: Path, card: AdapterCard) -> None:
    """Raise ConfigError where the folder lacks a file that its card promises."""
    if (name := missing_file(folder, card)) is not None:
        raise ConfigError(f"{folder}: an incomplete adapter, no {name}; copy the whole folder of the checkpoint")


def save_adapters(
    transformer: CoupledTransformer,
    folder: Path,
    card: AdapterCard,
    # values to write, as `adapter_tensors`; None = the transformer's own, which must not be sharded
    files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write an adapter into an existing, empty folder; the caller renames it into place."""
    written: Mapping[str, Mapping[str, Tensor]] = adapter_tensors(transformer) if files is None else files
    for file, tensors in written.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    config = transformer.config
    if isinstance(transformer, One4DTransformer):
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.rank * config.lora_scale,
            target_modules=[f"blocks.{path}" for path in transformer.linear_paths],
            base_model_name_or_path=card.base_path,
            inference_mode=True,
        )
        for modality in MODALITIES:
            lora.save_pretrained(str(folder / modality))
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")


def load_adapters(transformer: CoupledTransformer, folder: Path, base_fingerprint: str) -> AdapterCard:
    """Fill the transformer's trainables from an adapter folder.

    Raises ConfigError where the adapter belongs to another base or has another shape, naming what differs.
    """
    card, config = AdapterCard.read(folder), transformer.config
    if card.base_fingerprint != base_fingerprint:
        raise ConfigError(
            f"{folder}: trained on another base ({card.base_path}, {card.base_fingerprint[:12]}), "
            f"this one is {base_fingerprint[:12]}; set base.path to it"
        )
    ours = {
        "rank": config.rank,
        "lora_scale": config.lora_scale,
        "link_blocks": [int(i) for i in transformer.links],
        "coupling": config.coupling,
        "standardise_xyz": config.standardise_xyz,
        "pointmap_power": transformer.codec.power,
    }
    theirs = asdict(card) | {"standardise_xyz": card.dlc.standardise_xyz}
    for key, value in ours.items():
        if theirs[key] != value:
            raise ConfigError(f"{folder}: adapter has {key} = {theirs[key]}, the config asks for {value}")
    for file, tensors in adapter_tensors(transformer).items():
        with reading(folder / file):
            stored = load_file(folder / file)
        differing = sorted(stored.keys() ^ tensors.keys())
        if differing:
            raise ConfigError(f"{folder / file}: missing or unexpected tensors, first {differing[0]}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if stored[name].shape != tensor.shape:
                    raise ConfigError(
                        f"{folder / file}: {name} is {list(stored[name].shape)}, need {list(tensor.shape)}"
                    )
                tensor.copy_(stored[name])
    if card.xyz_statistics is not None:
        if set(card.xyz_statistics) != {"mean", "std"}:
            raise ConfigError(f"{folder / CARD}: xyz_statistics: need mean and std, got {sorted(card.xyz_statistics)}")
        transformer.codec.set_statistics(**card.xyz_statistics)
    return card
