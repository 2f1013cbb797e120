"""Cached encodings beside the shards: latents of frames and pointmaps, text and image embeddings.

Keyed by the encoders' fingerprint and every setting that changes them, so a stale cache is never read. One
safetensors file per clip, written at once (temp + rename) and in any order, so an interrupted encoding continues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from one4d_pl.config import DataConfig
from one4d_pl.data.shards import SampleError
from one4d_pl.types import Encoded

EMPTY_PROMPT = "_empty_prompt"  # in the place of a key; no clip's key begins with an underscore


def cache_key(encoders: str, max_text_tokens: int, config: DataConfig) -> str:
    """Names the folder of one way of encoding: the encoders' fingerprint and what shapes their input."""
    settings = {
        "encoders": encoders,
        "max_text_tokens": max_text_tokens,
        "size": [config.num_frames, config.height, config.width],
        "normalisation": [config.far_limit, config.z_offset],
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EncodedCache:
    """The cached encodings of one shard folder."""

    folder: Path

    @staticmethod
    def beside(shards: str, key: str) -> EncodedCache:
        """The cache that belongs to a local shard folder."""
        return EncodedCache(Path(shards) / "encoded" / key)

    def has(self, key: str) -> bool:
        return self._path(key).is_file()

    def read(self, key: str, drop_caption: bool) -> Encoded:
        """One clip's encodings, with the empty prompt's embedding where its caption is dropped."""
        try:
            with safe_open(self._path(key), "pt") as tensors:
                image = tensors.get_tensor("image_embeds") if "image_embeds" in tensors.keys() else None  # noqa: SIM118
                prompt = _read_prompt(self._path(EMPTY_PROMPT if drop_caption else key))
                return Encoded(tensors.get_tensor("latents"), prompt, image)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            remedy = f"delete the broken file in {self.folder} and start again to encode it anew"
            raise SampleError(key, str(self.folder), f"cannot read its cached encoding ({reason}); {remedy}") from error

    def write(self, key: str, encoded: Encoded) -> None:
        """Store one clip's encodings."""
        tensors = {"latents": encoded.latents, "prompt_embeds": encoded.prompt_embeds}
        if encoded.image_embeds is not None:
            tensors["image_embeds"] = encoded.image_embeds
        self._write_file(key, tensors)

    def write_empty_prompt(self, embed: Callable[[], Tensor]) -> None:  # -> [n, D]
        """Store the empty prompt's embedding once."""
        if not self.has(EMPTY_PROMPT):
            self._write_file(EMPTY_PROMPT, {"prompt_embeds": embed()})

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _write_file(self, key: str, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{key}.{os.getpid()}.tmp"
        temporary.write_bytes(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
        temporary.replace(self._path(key))


def _read_prompt(path: Path) -> Tensor:  # [n, D]
    with safe_open(path, "pt") as tensors:
        return tensors.get_tensor("prompt_embeds")
