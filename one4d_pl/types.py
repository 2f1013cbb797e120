"""The dataclasses that cross rooms: a raw clip, a training sample and a batch.

Shapes stand beside each field. Dims: B batch, T frames, H W pixels, t h w latent grid, C latent channels, L text
tokens, D text width. Geometry side `[..., H, W, 3]`, network side `[B, C, T, H, W]` (diffusers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

Task = Literal["text", "image", "sparse", "video"]

MODALITIES = ("rgb", "xyz")  # the two branches; rgb is the first half of every stacked batch
TASKS: tuple[Task, ...] = ("text", "image", "sparse", "video")  # which frames are given: none, the first, some, all
DOMAINS = ("synthetic", "real")

Record = TypeVar("Record", "PointmapScale", "Encoded", "Batch")


@dataclass(frozen=True)
class Clip:
    """One raw sample, the only schema that training knows. data_prep/sources brings every dataset into it."""

    key: str  # unique within its source, safe as a file name
    frames: Tensor  # [T, H, W, 3] uint8, sRGB
    depth: Tensor  # [T, H, W] float32, z in camera coordinates; +inf = sky, nan = no measurement
    intrinsics: Tensor  # [T, 3, 3] float32, pixels, pixel centres at +0.5
    cam2world: Tensor  # [T, 4, 4] float32, OpenCV axes, same unit as depth
    valid: Tensor  # [T, H, W] bool, geometry known and trusted (implies finite, positive depth)
    moving: Tensor | None  # [T, H, W] bool, pixel shows something that moves in the world; None = unknown
    caption: str
    source: str  # dataset name
    domain: str  # one of DOMAINS
    fps: float
    licence: str  # SPDX id or the dataset's own tag

    @property
    def num_frames(self) -> int:
        return self.frames.shape[0]


@dataclass(frozen=True)
class PointmapScale:
    """The similarity from camera-0 coordinates to the normalised cube. x = (x_cam0 - (0, 0, offset)) / scale."""

    scale: Tensor  # [...], one for all axes, same unit as depth
    offset: Tensor  # [...], along z only; 0 unless the normalisation's switch is on

    def to(self, device: torch.device | str) -> PointmapScale:
        """Return the same similarity on `device`."""
        return _with_tensors(self, lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Encoded:
    """What the frozen encoders make of one clip, cached beside its shard."""

    latents: Tensor  # [2, C, t, h, w] normalised posterior modes of frames and pointmap
    prompt_embeds: Tensor  # [n, D], not padded; of the caption, or of the empty prompt where it was dropped
    image_embeds: Tensor | None  # [N, D], CLIP tokens of frame 0, where the base has them
    condition: Tensor | None = None  # [C, t, h, w] conditioning latents of the sample's given frames, where stored


@dataclass(frozen=True)
class Sample:
    """One training sample after decode, resize, normalisation and the conditioning draw."""

    key: str
    position: int  # global stream position: every random draw of this sample derives from (seed, position)
    frames: Tensor  # [3, T, H, W] float32 in [-1, 1]
    pointmap: Tensor  # [3, T, H, W] float32 in [-1, 1], camera-0 coordinates, normalised
    valid: Tensor  # [T, H, W] bool, 1 = geometry known
    moving: Tensor  # [T, H, W] bool
    scale: PointmapScale  # scalars
    intrinsics: Tensor  # [T, 3, 3] of the resized frames
    cam2world: Tensor  # [T, 4, 4], world = camera 0, unit of the raw depth
    frame_mask: Tensor  # [T] bool, 1 = given
    task: Task
    caption: str  # the true caption, whatever was dropped
    drop_caption: bool  # train this sample on the empty prompt
    encoded: Encoded | None  # cached; None = encode in the step
    skipped: tuple[str, ...] = ()  # "shard: sample key: reason" of broken samples that this one replaces
    counted: bool = True  # False: a validation clip shown again, so that every rank takes equally many steps


@dataclass(frozen=True)
class Batch:
    """A stack of samples; the branches are stacked later, in the module."""

    keys: tuple[str, ...]
    position: Tensor  # [B] int64
    frames: Tensor  # [B, 3, T, H, W]
    pointmap: Tensor  # [B, 3, T, H, W]
    valid: Tensor  # [B, T, H, W] bool
    moving: Tensor  # [B, T, H, W] bool
    scale: PointmapScale  # [B] each
    intrinsics: Tensor  # [B, T, 3, 3]
    cam2world: Tensor  # [B, T, 4, 4]
    frame_mask: Tensor  # [B, T] bool, 1 = given
    tasks: tuple[Task, ...]
    prompts: tuple[str, ...]  # "" where the caption was dropped
    captions: tuple[str, ...]
    encoded: tuple[Encoded, ...] | None  # one per sample
    skipped: tuple[str, ...]
    counted: Tensor  # [B] bool, 0 = shown a second time: takes part in every forward pass, enters no metric

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on `device` (strings stay). Pinned tensors are copied while the CPU goes on."""
        return _with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory; with a GPU, torch's DataLoader calls this in a thread."""
        return _with_tensors(self, Tensor.pin_memory)


def _with_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Return the same record with every tensor changed, those of the records inside it too."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = change(value)
        elif isinstance(value, PointmapScale):
            values[name] = _with_tensors(value, change)
        elif name == "encoded" and value is not None:
            values[name] = tuple(_with_tensors(encoded, change) for encoded in value)
    return replace(record, **values)


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one shape; cached encodings are used only if every sample has them."""
    encoded = tuple(s.encoded for s in samples if s.encoded is not None)
    scales, offsets = ([getattr(s.scale, name) for s in samples] for name in ("scale", "offset"))
    stacked = ("frames", "pointmap", "valid", "moving", "intrinsics", "cam2world", "frame_mask")
    return Batch(
        **{name: torch.stack([getattr(s, name) for s in samples]) for name in stacked},
        keys=tuple(s.key for s in samples),
        position=torch.tensor([s.position for s in samples]),
        scale=PointmapScale(torch.stack(scales), torch.stack(offsets)),
        tasks=tuple(s.task for s in samples),
        prompts=tuple("" if s.drop_caption else s.caption for s in samples),
        captions=tuple(s.caption for s in samples),
        encoded=encoded if len(encoded) == len(samples) else None,
        skipped=tuple(reason for s in samples for reason in s.skipped),
        counted=torch.tensor([s.counted for s in samples]),
    )
