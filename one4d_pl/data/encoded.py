"""Encoded shards: what the frozen encoders make of every clip of a raw set, in a TarSet.

A sample holds the latents of frames and pointmaps (float32, since they are the targets), the pointmap's scale, the
cameras, and the embeddings of its caption, of the empty prompt and of frame 0. With K sparse draws it also holds the
conditioning latents of its first frame alone and of K sets of sparse frames (bfloat16, since the network rounds them
anyway). Where all frames are given, these are the latents themselves; where none is, zeros. Every epoch takes another
of the K draws.

`fit` keeps such a set, without draws, as a cache beside local raw shards. With draws it is a source of its own that
needs neither frames nor the VAE. Tars hold many clips each, so that 34,000 clips are a hundred files to list and copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from one4d_pl.config import Config, DataConfig
from one4d_pl.data.clip_codec import tar_members
from one4d_pl.data.masking import draw_frame_mask
from one4d_pl.data.ranged_reads import PLAIN_READER, RangeReader, StoreError, one_line
from one4d_pl.data.sample_order import derived_numpy_generator
from one4d_pl.data.shards import ShardSet
from one4d_pl.data.staging import Dropped, Plan, Staging, is_finished
from one4d_pl.data.tar_set import Origin, Recipe, SampleEntry, SampleError, TarSet, read_manifest, tar_bytes
from one4d_pl.progress import Progress
from one4d_pl.types import Encoded, PointmapScale, Sample

log = logging.getLogger(__name__)

FORMAT = 2  # version of an encoded sample; each version gets a folder of its own
FIELDS = ("latents", "prompt_embeds", "empty_prompt", "scale", "intrinsics", "cam2world", "sparse_masks")


class SampleEncoder(Protocol):
    """The frozen encoders as this room sees them: it does not import the models."""

    def encode_sample(self, sample: Sample) -> Encoded: ...

    def encode_prompts(self, prompts: list[str]) -> list[Tensor]: ...  # [n, D] each

    def encode_conditions(self, sample: Sample, frame_masks: Tensor) -> Tensor: ...  # [K, T] -> [K, C, t, h, w]


def encoding_recipe(encoders: str, max_text_tokens: int, config: DataConfig) -> Recipe:
    """Collect what changes an encoding: the encoders' fingerprint and the form of their input."""
    return {
        "encoders": encoders,
        "max_text_tokens": max_text_tokens,
        "num_frames": config.num_frames,
        "height": config.height,
        "width": config.width,
        "far_limit": config.far_limit,
        "z_offset": config.z_offset,
        "format": FORMAT,
        # only where distances are bent, so that encodings older than the knob stay valid
        **({} if config.pointmap_power == 1 else {"pointmap_power": config.pointmap_power}),
    }


def cache_folder(shards: str, recipe: Recipe) -> Path:
    """Return the folder of a shard folder's encodings: one per recipe, so none is stale."""
    return Path(shards) / "encoded" / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def raw_digest(shards: ShardSet) -> str:
    """Hash the content of a raw set."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards.manifest.shards).encode()).hexdigest()


@dataclass(frozen=True)
class StoredClip:
    """One sample of an encoded set."""

    latents: Tensor  # [2, C, t, h, w] normalised posterior modes of frames and pointmap
    prompt_embeds: Tensor  # [n, D]
    empty_prompt: Tensor  # [m, D]
    image_embeds: Tensor | None  # [N, D]
    scale: PointmapScale  # scalars
    intrinsics: Tensor  # [T, 3, 3]
    cam2world: Tensor  # [T, 4, 4], world = camera 0
    sparse_masks: Tensor  # [K, T] bool
    conditions: Tensor | None  # [1 + K, C, t, h, w] of frame 0 alone, then of the sparse masks; None where K = 0
    caption: str

    def for_draw(self, drop_caption: bool, frame_mask: Tensor) -> Encoded:  # frame_mask [T] bool
        """Return what one training sample needs. Its condition is None where none is stored for these given frames."""
        condition = None
        if self.conditions is not None:
            same = (_condition_masks(self.sparse_masks) == frame_mask).all(1).nonzero()[:, 0]
            condition = self.conditions[int(same[0])].float() if len(same) else None
        prompt = self.empty_prompt if drop_caption else self.prompt_embeds
        return Encoded(self.latents, prompt, self.image_embeds, condition)


@dataclass(frozen=True)
class EncodedSet(TarSet):
    """Random access to the encodings of one raw set."""

    kind: ClassVar[str] = "encoded"
    remedy: ClassVar[str] = "make it with: python -m data_prep.encode_latents --config ... --raw ... --out {folder}"

    @property
    def sparse_draws(self) -> int:
        """Return K; 0 = no conditioning latents are stored."""
        return int(self.manifest.recipe["sparse_draws"] or 0)

    @cached_property
    def indices(self) -> dict[str, int]:
        """Map each key to its index."""
        return {entry.key: index for index, entry in enumerate(self.entries)}

    def read(self, index: int) -> StoredClip:
        """Read one clip's encodings; SampleError for whatever is wrong with them, StoreError if the store fails."""
        shard, entry = self.locate(index)
        try:
            return _unpack(self.fetch(shard, entry), entry.key)
        except StoreError:
            raise
        except ValueError as error:
            remedy = f"remove {self.location} to encode it anew"
            raise SampleError(entry.key, self.location, f"broken encoding ({one_line(error)}); {remedy}") from error

    def read_key(self, key: str) -> StoredClip:
        """Read the encodings of a clip of the raw set by its key; SampleError where it has none."""
        if key not in self.indices:
            reason = f"was not encoded (dropped.jsonl there says why); remove {self.location} to try again"
            raise SampleError(key, self.location, reason)
        return self.read(self.indices[key])


def open_set(location: str | Path, reader: RangeReader = PLAIN_READER) -> ShardSet | EncodedSet:
    """Open a folder or URL of raw or of encoded shards; ShardSetError as in ShardSet.open."""
    folder = str(location).rstrip("/")
    manifest = read_manifest(folder, (ShardSet.kind, EncodedSet.kind), ShardSet.remedy.format(folder=folder), reader)
    kind = EncodedSet if manifest.kind == EncodedSet.kind else ShardSet
    return kind.of(folder, manifest, reader)


def trains_on_encoded(config: Config) -> bool:
    """Tell whether all training sources, but for toy shards not made yet, hold encoded clips."""
    made_by_fit = config.data.toy.folders() if config.data.toy else []
    paths = [source.path for source in config.data.sources if Path(source.path) not in made_by_fit]
    return bool(paths) and all(isinstance(open_set(path), EncodedSet) for path in paths)


def encode_set(
    raw: ShardSet,
    folder: Path,
    recipe: Recipe,
    sparse_draws: int,
    open_encoder: Callable[[], SampleEncoder],
    make_sample: Callable[[int], Sample],  # of a clip's index in `raw`; SampleError or ValueError if it is broken
    rank: int = 0,
    world: int = 1,
    on_clip: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> bool:
    """Encode those clips of this rank's share that are not encoded yet; return True once the set is whole.

    It may be stopped at any moment and then goes on where it was; the encoders are opened only if a clip is missing.
    `on_clip` is called after each clip and may raise to stop.
    """
    recipe = {**recipe, "raw": raw_digest(raw), "sparse_draws": sparse_draws}
    if is_finished(folder, EncodedSet.kind, recipe):
        return True
    keys = [entry.key for entry in raw.entries]
    staging = Staging(folder, Plan(keys, max(raw.samples_per_shard), None, EncodedSet.kind, raw.manifest.split, recipe))
    if is_finished(folder, EncodedSet.kind, recipe):  # another process has just finished it
        return True
    todo = [i for i in range(len(keys)) if i % world == rank and not staging.has(i)]
    if todo:
        encoder = open_encoder()
        empty_prompt = encoder.encode_prompts([""])[0]
        origin = Origin(raw.manifest.source, raw.manifest.domain, raw.manifest.licence)
        share = len(keys[rank::world])
        done, quiet = share - len(todo), not show_progress
        for index in Progress(todo, "encoding clips", share, unit="clip", initial=done, disable=quiet):
            key = keys[index]
            try:
                sample = make_sample(index)
            except StoreError:  # the store failed, which says nothing about the clip
                raise
            except ValueError as error:  # a SampleError names the clip already
                log.warning("not encoded: %s: %s", key, error)  # the stream will meet it again, skip and count it
                staging.write_unit(index, [], [Dropped(key, key, one_line(error))])
            else:
                packed = _encode_clip(raw.locate(index)[1], sample, sparse_draws, encoder, empty_prompt)
                staging.write_unit(index, [(origin, *packed)], [])
            staging.assemble()
            on_clip()
    return staging.assemble()


def draw_sparse_masks(key: str, num_frames: int, sparse_draws: int) -> Tensor:  # [K, T] bool
    """Draw the K sets of sparse frames to encode of a clip: as in training, by its key alone."""
    number = zlib.crc32(key.encode())
    generators = [derived_numpy_generator(0, number, f"stored sparse draw {k}") for k in range(sparse_draws)]
    masks = [draw_frame_mask("sparse", num_frames, generator) for generator in generators]
    return torch.stack(masks) if masks else torch.zeros(0, num_frames, dtype=torch.bool)


def _condition_masks(sparse_masks: Tensor) -> Tensor:  # [K, T] bool -> [1 + K, T]
    """Put the mask of frame 0 alone before the sparse ones."""
    return torch.cat([(torch.arange(sparse_masks.shape[1]) == 0)[None], sparse_masks])


def _encode_clip(
    entry: SampleEntry,
    sample: Sample,
    sparse_draws: int,
    encoder: SampleEncoder,
    empty_prompt: Tensor,  # [m, D]
) -> tuple[SampleEntry, bytes]:
    masks = draw_sparse_masks(entry.key, len(sample.frame_mask), sparse_draws)
    conditions = encoder.encode_conditions(sample, _condition_masks(masks)) if sparse_draws else None
    encoded = encoder.encode_sample(sample)
    tensors = {
        "latents": encoded.latents.float(),
        "prompt_embeds": encoded.prompt_embeds,
        "empty_prompt": empty_prompt,
        "scale": torch.stack([sample.scale.scale, sample.scale.offset]),
        "intrinsics": sample.intrinsics,
        "cam2world": sample.cam2world,
        "sparse_masks": masks,
    }
    if encoded.image_embeds is not None:
        tensors["image_embeds"] = encoded.image_embeds
    if conditions is not None:
        tensors["conditions"] = conditions.bfloat16()
    members = {
        "safetensors": save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        "json": json.dumps({"caption": sample.caption}).encode(),
    }
    content = tar_bytes(entry.key, members)
    num_frames, height, width = sample.frames.shape[1:]
    place = replace(entry, offset=0, size=len(content), crc32=zlib.crc32(content))
    return replace(place, num_frames=num_frames, height=height, width=width), content


def _check_shapes(tensors: dict[str, Tensor], caption: object) -> None:
    """Raise ValueError where a field is not as StoredClip says: a set may come from anywhere."""
    axes = {"latents": 5, "prompt_embeds": 2, "empty_prompt": 2, "image_embeds": 2, "conditions": 5, "sparse_masks": 2}
    if wrong := [name for name, count in axes.items() if name in tensors and tensors[name].ndim != count]:
        raise ValueError(f"{wrong[0]} is {list(tensors[wrong[0]].shape)}, need {axes[wrong[0]]} axes")
    (draws, total), conditions = tensors["sparse_masks"].shape, tensors.get("conditions")
    expected = {"scale": [2], "intrinsics": [total, 3, 3], "cam2world": [total, 4, 4]}
    if wrong := [name for name, shape in expected.items() if list(tensors[name].shape) != shape]:
        raise ValueError(f"{wrong[0]} is {list(tensors[wrong[0]].shape)}, need {expected[wrong[0]]}")
    if len(tensors["latents"]) != 2 or (conditions is not None and len(conditions) != 1 + draws):
        raise ValueError("need latents of two branches and a condition of frame 0 and of each sparse draw")
    if not isinstance(caption, str):
        raise ValueError("the caption is no text")


def _unpack(content: bytes, key: str) -> StoredClip:
    members = tar_members(content, key)
    try:
        tensors = load(members["safetensors"])
        caption = json.loads(members["json"])["caption"]
        if missing := set(FIELDS) - set(tensors):
            raise ValueError(f"no {', '.join(sorted(missing))}")
        _check_shapes(tensors, caption)
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(one_line(error)) from error
    scale, offset = tensors["scale"]
    return StoredClip(
        **{name: tensors[name] for name in FIELDS if name != "scale"},
        image_embeds=tensors.get("image_embeds"),
        conditions=tensors.get("conditions"),
        scale=PointmapScale(scale, offset),
        caption=caption,
    )
