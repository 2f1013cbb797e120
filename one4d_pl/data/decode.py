"""From a raw clip to a training sample, and the stream that reads positions.

1. `ClipStream[position]` asks the order which clip stands there and reads it from its shard.
2. A broken clip is named, counted and replaced by a stand-in that is the same for any number of ranks and workers. A
   process remembers it as broken, a resumed run does not: which clip stands where must follow from the shards alone.
3. The clip is cut to its first frames and resized, frames and intrinsics together.
4. Depth becomes a pointmap in camera-0 coordinates, normalised into the VAE's range.
5. Task, given frames and caption dropout are drawn from (seed, position), never from generator state.

An encoded set skips steps 3 and 4: its samples hold latents, and frames and pointmaps of 0 x 0
pixels. There the position chooses which of the K stored draws gives the sparse frames.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from one4d_pl.config import Config, DataConfig, MaskingConfig
from one4d_pl.data.encoded import EncodedSet, StoredClip
from one4d_pl.data.masking import draw_frame_mask, draw_task, trained_tasks
from one4d_pl.data.ranged_reads import own_text
from one4d_pl.data.sample_order import EachOnceOrder, MixtureOrder, derived_numpy_generator, derived_seed
from one4d_pl.data.shards import SampleError, ShardSet
from one4d_pl.geometry.camera import resize_crop_intrinsics, resize_frames, resize_nearest_valid
from one4d_pl.geometry.pointmap import normalise_pointmap
from one4d_pl.geometry.se3 import rebase_to_first
from one4d_pl.types import Clip, Encoded, Sample, Task

log = logging.getLogger(__name__)

MAX_BROKEN = 20  # broken clips in a row before the stream gives up


class NoStandInError(SampleError):
    """No sample can stand at a position; the error has one text, see `own_text`."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, own_text(type(self).__name__, text))

    def __str__(self) -> str:
        return str(self.args[0])


def resize_clip(clip: Clip, height: int, width: int) -> Clip:
    """Resize a clip to cover height x width (frames antialiased, geometry by nearest pixel) and crop its centre."""
    if clip.frames.shape[1:3] == (height, width):
        return clip
    size = clip.frames.shape[1], clip.frames.shape[2]
    return replace(
        clip,
        frames=resize_frames(clip.frames, height, width),
        intrinsics=resize_crop_intrinsics(clip.intrinsics, size, (height, width)),
        depth=resize_nearest_valid(clip.depth, height, width),
        valid=resize_nearest_valid(clip.valid, height, width),
        moving=None if clip.moving is None else resize_nearest_valid(clip.moving, height, width),
    )


def cut_clip(clip: Clip, num_frames: int) -> Clip:
    """Cut a clip to its first `num_frames` frames; ValueError where it has fewer."""
    if clip.num_frames < num_frames:
        raise ValueError(f"has {clip.num_frames} frames, data.num_frames asks for {num_frames}")
    cut: dict[str, Any] = {name: part[:num_frames] for name, part in vars(clip).items() if isinstance(part, Tensor)}
    return replace(clip, **cut)


@dataclass(frozen=True)
class Draw:
    """The random choices of one sample."""

    task: Task
    frame_mask: Tensor  # [T] bool, 1 = given
    drop_caption: bool


def draw_training(config: MaskingConfig, caption_dropout: float, num_frames: int, seed: int, position: int) -> Draw:
    """Draw task, given frames and caption dropout for a training position (One4D, sec. 4.1)."""
    task = draw_task(config, derived_numpy_generator(seed, position, "task"))
    given = draw_frame_mask(task, num_frames, derived_numpy_generator(seed, position, "frames"))
    dropped = bool(derived_numpy_generator(seed, position, "caption").random() < caption_dropout)
    return Draw(task, given, dropped)


def draw_validation(config: MaskingConfig, num_frames: int, seed: int, position: int) -> Draw:
    """Draw for a validation position: the trained tasks take turns, so a small set has all."""
    tasks = trained_tasks(config)
    task = tasks[position % len(tasks)]
    given = draw_frame_mask(task, num_frames, derived_numpy_generator(seed, position, "validation frames"))
    return Draw(task, given, drop_caption=False)


def make_sample(clip: Clip, position: int, draw: Draw, config: DataConfig, encoded: Encoded | None) -> Sample:
    """Cut, resize and normalise a clip (steps 3 and 4); ValueError tells why it cannot be used."""
    clip = resize_clip(cut_clip(clip, config.num_frames), config.height, config.width)
    geometry = normalise_pointmap(
        clip.depth, clip.valid, clip.intrinsics, clip.cam2world, config.far_limit, config.z_offset
    )
    return Sample(
        key=clip.key,
        position=position,
        frames=clip.frames.permute(3, 0, 1, 2).float() / 127.5 - 1,
        pointmap=geometry.points.permute(3, 0, 1, 2).contiguous(),
        valid=geometry.valid,
        moving=torch.zeros_like(clip.valid) if clip.moving is None else clip.moving,
        scale=geometry.scale,
        intrinsics=clip.intrinsics,
        cam2world=rebase_to_first(clip.cam2world),
        frame_mask=draw.frame_mask,
        task=draw.task,
        caption=clip.caption,
        drop_caption=draw.drop_caption,
        encoded=encoded,
    )


def make_encoded_sample(key: str, stored: StoredClip, position: int, draw: Draw, seed: int) -> Sample:
    """Make a training sample without pictures. A sparse draw becomes a stored one, another in each epoch."""
    given, num_frames = draw.frame_mask, stored.intrinsics.shape[0]
    if draw.task == "sparse":
        given = stored.sparse_masks[derived_seed(seed, position, "stored draw") % len(stored.sparse_masks)]
    none = torch.zeros(3, num_frames, 0, 0)
    return Sample(
        key=key,
        position=position,
        frames=none,
        pointmap=none,
        valid=none[0].bool(),
        moving=none[0].bool(),
        scale=stored.scale,
        intrinsics=stored.intrinsics,
        cam2world=stored.cam2world,
        frame_mask=given,
        task=draw.task,
        caption=stored.caption,
        drop_caption=draw.drop_caption,
        encoded=stored.for_draw(draw.drop_caption, given),
    )


class ClipStream(Dataset[Sample]):
    """A map from stream position to sample; position is the only state.

    Args:
        sources: opened shard sets, in the order of the mixture.
        caches: one per source; None = encode in the training step, or the source is encoded itself.
        order: which sample stands at which position.
        config: its data, masking, flow.caption_dropout, train.seed and train.overfit_clips are read; the latter walk
            over the stream's first n clips only, while the draws still change with the position.
        validation: fixed draws instead of random ones.
    """

    def __init__(
        self,
        sources: list[ShardSet | EncodedSet],
        caches: list[EncodedSet | None],
        order: MixtureOrder | EachOnceOrder,
        config: Config,
        validation: bool,
    ) -> None:
        self.sources, self.caches, self.order = sources, caches, order
        self.config, self.validation = config, validation
        self._broken: dict[tuple[int, int], str] = {}  # (source, index) -> reason, as seen by this process

    def __getitem__(self, position: int) -> Sample:
        draw = self._draw(position)
        overfit = self.config.train.overfit_clips
        clip_position = position % overfit if overfit else position
        first = self.order.locate(clip_position)
        skipped: list[str] = []
        source, cache = self.sources[first.source], self.caches[first.source]  # stand-ins share the source
        for attempt in range(min(MAX_BROKEN, len(source))):
            place = self.order.replacement(clip_position, attempt - 1) if attempt else first
            reason = self._broken.get((place.source, place.index))
            if reason is None:
                try:
                    return replace(self._read(source, cache, place.index, position, draw), skipped=tuple(skipped))
                except SampleError as error:
                    log.warning("skipped %s (%s)", error, source.location)
                    reason = self._broken[place.source, place.index] = str(error)
            skipped.append(reason)
        raise NoStandInError(
            f"{source.location}: position {position}: {len(skipped)} of {len(source)} samples tried, all broken; "
            f"the first: {skipped[0]}"
        )

    def _draw(self, position: int) -> Draw:
        masking, num_frames, seed = self.config.masking, self.config.data.num_frames, self.config.train.seed
        if self.validation:
            return draw_validation(masking, num_frames, seed, position)
        return draw_training(masking, self.config.flow.caption_dropout, num_frames, seed, position)

    def _read(
        self, source: ShardSet | EncodedSet, cache: EncodedSet | None, index: int, position: int, draw: Draw
    ) -> Sample:
        key = source.key(index)
        if isinstance(source, EncodedSet):
            return make_encoded_sample(key, source.read(index), position, draw, self.config.train.seed)
        encoded = None if cache is None else cache.read_key(key).for_draw(draw.drop_caption, draw.frame_mask)
        clip = source.read(index)
        try:
            return make_sample(clip, position, draw, self.config.data, encoded)
        except ValueError as error:
            raise SampleError(key, source.location, str(error)) from error


class PaddedStream(Dataset[Sample]):
    """The first `count` positions of a validation stream; past them it starts again, not counted."""

    def __init__(self, stream: ClipStream, count: int) -> None:
        self.stream, self.count = stream, count

    def __getitem__(self, position: int) -> Sample:
        return replace(self.stream[position % self.count], counted=position < self.count)
