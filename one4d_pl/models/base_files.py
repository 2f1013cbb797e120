"""Where a base lies and which one it is: files alone, so that nothing heavy is imported to ask."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from one4d_pl.config import ConfigError, base_folder

ENCODER_PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder")


def resolve_base(path: str) -> Path:
    """A local folder as it is; a hub id through the local hub cache (nothing is downloaded here)."""
    folder = base_folder(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, local_files_only=True))
        except Exception:  # the hub client has many error classes for "not there"
            raise ConfigError(
                f"base.path: {path} is neither a folder nor a hub id in the local cache; "
                f"get it with `hf download {path}` or set base.path"
            ) from None
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"base.path: {folder} is not a diffusers folder (no model_index.json)")
    return folder


def fingerprint(path: str, parts: tuple[str, ...] = ("transformer", *ENCODER_PARTS)) -> str:
    """Identity of a base: sha256 over every safetensors file's name, size, header and 64 spread samples of 4 KiB.

    Reading 60 GB to hash them in full would cost minutes at every start; another training of the same architecture
    differs in every sample.
    """
    digest = hashlib.sha256()
    folder = resolve_base(path)
    files = sorted(file for part in parts for file in (folder / part).glob("*"))
    for file in (f for f in files if f.suffix == ".safetensors"):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, size)))
            for i in range(64):
                stream.seek(8 + header + (size - 8 - header) * i // 64)
                digest.update(stream.read(4096))
    for file in (f for f in files if f.name.endswith("config.json")):
        digest.update(json.dumps(json.loads(file.read_text()), sort_keys=True).encode())
    return digest.hexdigest()
