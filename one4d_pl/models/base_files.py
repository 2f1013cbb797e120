"""A base's folder, its layout and its identity, read from files alone: no heavy import is needed.

Two layouts of a folder are known: diffusers' (model_index.json, a folder per part) and the original one of Wan-AI and
VideoX-Fun (config.json and diffusion_pytorch_model*.safetensors at the top, one .pth file per encoder).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from one4d_pl.config import (
    DIFFUSERS_MARK,
    ORIGINAL_MARK,
    TEMPORAL_FACTOR,
    ConfigError,
    base_folder,
    cached_base,
    holds_base,
    hub_name,
)
from one4d_pl.errors import is_lfs_pointer
from one4d_pl.files import read_json

ENCODER_PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder")
PARTS = ("transformer", *ENCODER_PARTS)
ORIGINAL_FILES = {  # the same names in every release of Wan 2.1
    "vae": ORIGINAL_MARK,
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
ORIGINAL_TOKENIZER = "google/umt5-xxl"
TEXT_DIM, IMAGE_DIM = 4096, 1280  # widths of UMT5-XXL and CLIP ViT-H/14; the original config.json does not say them

ORIGINAL_PATTERNS = ["config.json", "diffusion_pytorch_model*", *ORIGINAL_FILES.values(), f"{ORIGINAL_TOKENIZER}/*"]
DIFFUSERS_PATTERNS = [DIFFUSERS_MARK, *(f"{part}/*" for part in PARTS), "scheduler/*"]


@dataclass(frozen=True)
class Base:
    """A repository of the hub, and its size as its owners state it."""

    repo: str
    patterns: list[str]
    gigabytes: int | None


BASES = {
    "Wan2.1-Fun-V1.1-14B-InP": Base("alibaba-pai/Wan2.1-Fun-V1.1-14B-InP", ORIGINAL_PATTERNS, 47),  # the paper's
    "Wan2.1-Fun-V1.1-1.3B-InP": Base("alibaba-pai/Wan2.1-Fun-V1.1-1.3B-InP", ORIGINAL_PATTERNS, 19),
    "Wan2.1-I2V-14B-480P": Base("Wan-AI/Wan2.1-I2V-14B-480P", ORIGINAL_PATTERNS, None),
    "Wan2.1-I2V-14B-720P": Base("Wan-AI/Wan2.1-I2V-14B-720P", ORIGINAL_PATTERNS, None),
    "Wan2.1-I2V-14B-480P-Diffusers": Base("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", DIFFUSERS_PATTERNS, None),
    "Wan2.1-I2V-14B-720P-Diffusers": Base("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", DIFFUSERS_PATTERNS, None),
}

_RELEASED = {
    "patch_size": [1, 2, 2], "attention_head_dim": 128, "freq_dim": 256, "in_channels": 36, "out_channels": 16,
    "text_dim": TEXT_DIM, "image_dim": IMAGE_DIM,
}  # fmt: skip
# transformers of the released bases, for plans without weights; both are image-to-video models
RELEASED: dict[str, dict[str, object]] = {
    "14B": {**_RELEASED, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "added_kv_proj_dim": 5120},
    "1.3B": {**_RELEASED, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "added_kv_proj_dim": 1536},
}
# Wan 2.1's encoders: parameters, channels, and CLIP's tokens (16 x 16 patches and the class token)
ENCODER_PARAMETERS = {"vae": 126_892_531, "text_encoder": 5_680_910_336, "image_encoder": 630_766_080}
TEXT_BLOCKS, TEXT_BLOCK_PARAMETERS = 24, 192_948_224  # of UMT5-XXL
VAE_BASE_DIM, IMAGE_TOKENS = 96, 257
HEADER_LIMIT = 100_000_000  # bytes of a safetensors header; the format's own


class TensorHeader(TypedDict):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]  # begin and end, in bytes after the header


def resolve_base(path: str) -> Path:
    """Return a local folder as it is, or a hub name's folder in the local cache. Nothing is downloaded."""
    folder: Path | None = base_folder(path)
    if folder is None or not folder.is_dir():
        folder = cached_base(path)
    if folder is None:
        raise ConfigError(
            f"base.path: {path} is neither a folder nor a hub id in the local cache; "
            f"get it with `hf download {path}` or set base.path"
        )
    if not any((folder / mark).is_file() for mark in (DIFFUSERS_MARK, ORIGINAL_MARK)):
        raise ConfigError(
            f"base.path: {folder} is neither in diffusers layout (no {DIFFUSERS_MARK}) nor in Wan's own "
            f"(no {ORIGINAL_MARK})"
        )
    return folder


def known_repository(path: str) -> str | None:
    """Return the hub's repository of a released base by its folder, as weights/NAME; None for others and hub names."""
    base = BASES.get(Path(path).name)
    is_folder = hub_name(path) is None or Path(path).parts[0] == "weights"  # where `one4d fetch-weights` puts it
    return base.repo if base is not None and is_folder else None


def is_original(folder: Path) -> bool:
    """Tell whether the base lies in Wan's own layout; where both are there, diffusers' is taken."""
    return (folder / ORIGINAL_MARK).is_file() and not (folder / DIFFUSERS_MARK).is_file()


def weight_files(folder: Path, part: str) -> list[Path]:
    """List the files of a part's weights, sorted; [] where the base lacks the part."""
    if not is_original(folder):
        return sorted((folder / part).glob("*.safetensors"))
    if part == "transformer":
        return sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    return [file for file in [folder / ORIGINAL_FILES[part]] if file.is_file()]


def tokenizer_folder(folder: Path) -> Path:
    """Return the tokenizer's folder inside a base."""
    return folder / (ORIGINAL_TOKENIZER if is_original(folder) else "tokenizer")


def transformer_config(folder: Path) -> dict[str, object]:
    """Read the transformer's settings, under diffusers' names. ConfigError names what One4D cannot use."""
    file = folder / "config.json" if is_original(folder) else folder / "transformer" / "config.json"
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: holds no settings")
    config = _diffusers_settings(settings, file) if is_original(folder) else settings
    expected = 2 * int(str(config.get("out_channels", 0))) + TEMPORAL_FACTOR
    if config.get("in_channels") != expected:
        raise ConfigError(
            f"base.path: {folder} takes {config.get('in_channels')} input channels, One4D needs an inpainting "
            f"or image-to-video Wan with {expected} (latents, mask, conditioning latents)"
        )
    return config


def lacking(folder: Path) -> str | None:
    """Say the first part or file that the base lacks, by its own indices; None if it is whole."""
    if is_original(folder):
        needed = ["vae", "text_encoder"]
        needed += ["image_encoder"] if transformer_config(folder)["image_dim"] is not None else []
        absent = [ORIGINAL_FILES[part] for part in needed if not weight_files(folder, part)]
        absent += missing_shards(folder)
        absent += [] if weight_files(folder, "transformer") else ["diffusion_pytorch_model*.safetensors"]
        absent += [] if tokenizer_folder(folder).is_dir() else [ORIGINAL_TOKENIZER]
        return f"{folder} lacks {absent[0]}" if absent else None
    for part in ("transformer", "vae", "text_encoder", "image_encoder"):
        place = folder / part
        if (place / "config.json").is_file():
            if missing := missing_shards(place):
                return f"{place} lacks {missing[0]}"
            if not weight_files(folder, part):
                return f"{place} lacks its safetensors"
        elif part != "image_encoder":
            return f"{folder} has no {part}"
    return None if tokenizer_folder(folder).is_dir() else f"{folder} has no tokenizer"


def missing_shards(place: Path) -> list[str]:
    """List the files that an index of shards in this folder names and that do not exist."""
    named = [json.loads(index.read_text())["weight_map"].values() for index in place.glob("*.index.json")]
    return sorted({name for names in named for name in names if not (place / name).is_file()})


def fingerprint(path: str, parts: tuple[str, ...] = PARTS) -> str:
    """Hash a base's identity: each weight file's name, size, header and 64 samples of 4 KiB.

    Hashing 60 GB in full would take minutes at every start, and another training of the same architecture differs in
    every sample. The same weights in another layout are other files, and so count as another base.
    """
    digest = hashlib.sha256()
    folder = resolve_base(path)
    files = sorted(_identifying_files(folder, parts))
    for file in (f for f in files if f.suffix in (".safetensors", ".pth")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as stream:
            start = 0
            if file.suffix == ".safetensors":
                safetensors_header(file)  # raises where a damaged length points far beyond the file's end
                start = 8 + int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(min(start - 8, size)))
            for i in range(64):
                stream.seek(start + (size - start) * i // 64)
                digest.update(stream.read(4096))
    for file in (f for f in files if f.name.endswith("config.json")):
        digest.update(json.dumps(read_json(file), sort_keys=True).encode())
    return digest.hexdigest()


def safetensors_header(file: Path) -> dict[str, TensorHeader]:
    """Read names, dtypes, shapes and places of a file's tensors. Raises ConfigError where it is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size, HEADER_LIMIT):
            hint = " (a git-lfs pointer: git lfs pull)" if is_lfs_pointer(file) else ""
            raise ConfigError(f"{file}: {size} bytes: cut short, or no safetensors file{hint}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            ends = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ConfigError(f"{file}: its header is damaged") from None
    if size != 8 + length + ends:
        raise ConfigError(f"{file}: {size} bytes, its header promises {8 + length + ends}")
    return header


def sizes_of(path: str) -> tuple[Path | None, dict[str, object], str]:
    """Return a base's folder, its transformer's settings, and in words where they come from.

    Where nothing lies at `path`: None and the settings of the release that `path` names; ConfigError if it names none.
    """
    if holds_base(path):
        folder = resolve_base(path)
        return folder, transformer_config(folder), str(base_folder(path))
    name = Path(path).name
    size = next((size for size in RELEASED if f"-{size}-" in f"-{name}-"), None)
    if size is None:
        raise ConfigError(f"base.path: no base at {path}, and {name} names none of {', '.join(RELEASED)}")
    return None, RELEASED[size], f"{name} (not there; sizes of the released Wan 2.1 {size})"


def encoder_sizes(folder: Path | None) -> tuple[dict[str, int], dict[str, int], int]:
    """Count the parameters of a base's encoders.

    Returns each part's; what of each is at most on a GPU at a time, since the text encoder visits it block by block,
    two blocks at once; and the VAE's width. Without a folder, and in Wan's own layout, these are Wan 2.1's.
    """
    if folder is None or is_original(folder):
        config = {"image_dim": IMAGE_DIM} if folder is None else transformer_config(folder)
        parts = [part for part in ENCODER_PARAMETERS if part != "image_encoder" or config["image_dim"] is not None]
        counts = {part: ENCODER_PARAMETERS[part] for part in parts}
        away, base_dim = (TEXT_BLOCKS - 2) * TEXT_BLOCK_PARAMETERS, VAE_BASE_DIM
    else:
        tensors = {
            part: [tensor for file in weight_files(folder, part) for tensor in safetensors_header(file).items()]
            for part in ENCODER_PARAMETERS
        }
        counts = {part: sum(math.prod(tensor["shape"]) for _, tensor in found) for part, found in tensors.items()}
        blocks = [(name, tensor) for name, tensor in tensors["text_encoder"] if ".block." in name]
        number = len({name.split(".block.")[1].partition(".")[0] for name, _ in blocks})
        away = sum(math.prod(tensor["shape"]) for _, tensor in blocks) * max(0, number - 2) // max(1, number)
        base_dim = json.loads((folder / "vae" / "config.json").read_text()).get("base_dim", VAE_BASE_DIM)
    return counts, counts | {"text_encoder": counts["text_encoder"] - away}, base_dim


def image_tokens(folder: Path) -> int:
    """Count the tokens of a picture in a base's image encoder, class token included.

    Returns 0 where the base has none.
    """
    if transformer_config(folder).get("image_dim") is None:
        return 0
    if is_original(folder):
        return IMAGE_TOKENS
    path = folder / "image_encoder" / "config.json"
    if not path.is_file():
        return 0
    settings = json.loads(path.read_text())
    return (settings["image_size"] // settings["patch_size"]) ** 2 + 1


def _identifying_files(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    for part in parts:
        if part == "tokenizer":
            yield from tokenizer_folder(folder).glob("*")
        elif is_original(folder):
            yield from weight_files(folder, part)
        else:
            yield from (folder / part).glob("*")
    if is_original(folder) and "transformer" in parts:
        yield folder / "config.json"


def _diffusers_settings(settings: dict[str, object], file: Path) -> dict[str, object]:
    """Translate Wan's own config.json to diffusers' names.

    Raises ConfigError for Wan's control variants: they have inputs that One4D has no data for.
    """

    def number(name: str) -> int:
        value = settings.get(name)
        if not isinstance(value, int):
            raise ConfigError(f"{file}: has no number {name}, but {value!r}")
        return value

    for switch in ("add_control_adapter", "add_ref_conv"):
        if settings.get(switch):
            raise ConfigError(f"{file}: {switch} is on: a control variant of Wan; One4D needs the InP one")
    model_type, cross = settings.get("model_type"), settings.get("cross_attn_type")
    if model_type not in ("i2v", "t2v") or cross not in (None, f"{model_type}_cross_attn"):
        raise ConfigError(f"{file}: model_type {model_type!r}, cross_attn_type {cross!r}: not a Wan 2.1 InP or I2V")
    width, heads = number("dim"), number("num_heads")
    image = model_type == "i2v"
    return {
        "patch_size": settings.get("patch_size", [1, 2, 2]),
        "num_layers": number("num_layers"),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "ffn_dim": number("ffn_dim"),
        "freq_dim": number("freq_dim"),
        "in_channels": number("in_dim"),
        "out_channels": number("out_dim"),
        "text_dim": settings.get("text_dim", TEXT_DIM),
        "image_dim": settings.get("image_dim", IMAGE_DIM) if image else None,
        "added_kv_proj_dim": width if image else None,
        "eps": settings.get("eps", 1e-6),
    }
