"""One clip as the members of one WebDataset sample: what may be stored, and its bytes.

The members share `key.`: `frame_000.jpg` ... (JPEG quality 95, 4:4:4), `depth.png` (16-bit log depth, the frames
stacked to [T*H, W]), `valid.png` and, where known, `moving.png` (1 bit, stacked alike), `meta.json` (cameras, texts,
sizes). Depth codes: 0 = no measurement (nan), 65535 = sky (+inf), 1 .. 65534 log-uniform between the clip's nearest and
farthest finite depth, so the relative error is at most 2e-4. Cameras come back bit for bit.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from one4d_pl.data.texts import caption_text, is_missing
from one4d_pl.types import DOMAINS, Clip

SCHEMA_VERSION = 1
MIN_FRAMES, MAX_FRAMES = 9, 81  # One4D trains on up to 81, the embedded base on 9; 4k+1 for the Wan VAE
MAX_STACKED_PIXELS = 89_000_000  # T*H*W; Pillow takes larger images for decompression bombs
MAX_DEPTH_ERROR = 2e-4  # relative, of the depth code
NO_MEASUREMENT, SKY = 0, 65535  # depth codes
LAST_STEP = 65533  # codes 1 .. 65534 are steps 0 .. 65533
# The longest member name is key + ".frame_080.jpg", and a ustar header holds 100 bytes.
SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
META_FIELDS = (
    *("num_frames", "height", "width", "intrinsics", "cam2world", "depth_range", "has_moving"),
    *("caption", "source", "domain", "fps", "licence"),
)


def clip_fault(clip: Clip) -> str | None:
    """Say what first breaks the schema of `types.Clip`, or keeps a clip from being stored; None where nothing does."""
    return next(_faults(clip), None)


def _faults(clip: Clip) -> Iterator[str]:
    """Yield what is wrong with a clip. Only the first fault is reliable: later checks assume earlier ones passed."""
    if not SAFE_KEY.fullmatch(clip.key):
        yield f"key must match {SAFE_KEY.pattern}"
    if clip.depth.dim() != 3:
        yield f"depth is {tuple(clip.depth.shape)}, need [T, H, W]"
    t, h, w = clip.depth.shape
    if not MIN_FRAMES <= t <= MAX_FRAMES or t % 4 != 1:
        yield f"{t} frames, need 4k+1 between {MIN_FRAMES} and {MAX_FRAMES} (One4D, Wan VAE); set --num-frames"
    if min(h, w) < 1 or t * h * w > MAX_STACKED_PIXELS:
        yield f"{t}x{h}x{w} pixels, need 1 to {MAX_STACKED_PIXELS}; set --height and --width"
    expected: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("frames", clip.frames, (t, h, w, 3), torch.uint8),
        ("depth", clip.depth, (t, h, w), torch.float32),
        ("intrinsics", clip.intrinsics, (t, 3, 3), torch.float32),
        ("cam2world", clip.cam2world, (t, 4, 4), torch.float32),
        ("valid", clip.valid, (t, h, w), torch.bool),
        ("moving", clip.moving, (t, h, w), torch.bool),
    ]
    for name, tensor, shape, dtype in expected:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            yield f"{name} is {tuple(tensor.shape)} {tensor.dtype}, need {shape} {dtype}"
    yield from _camera_faults(clip.intrinsics, clip.cam2world)
    if bool((clip.depth <= 0).any()):  # false for nan
        yield "depth has values <= 0; nan means no measurement"
    if bool((clip.valid & ~clip.depth.isfinite()).any()):
        yield "depth that is nan or infinite is marked valid"
    if not isinstance(clip.caption, str) or (clip.caption and is_missing(clip.caption)):
        yield f"caption is {clip.caption!r}, need a text; '' = none"
    if any(not isinstance(name, str) or is_missing(name) for name in (clip.source, clip.licence)):
        yield f"source and licence must be named, got {clip.source!r} and {clip.licence!r}"
    if clip.domain not in DOMAINS:
        yield f"domain must be one of {DOMAINS}, got {clip.domain!r}"
    if not (math.isfinite(clip.fps) and clip.fps > 0):
        yield f"fps is {clip.fps}"


def _camera_faults(intrinsics: Tensor, cam2world: Tensor) -> Iterator[str]:
    bottom3, bottom4 = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    if not bool(intrinsics.isfinite().all()) or bool((intrinsics[:, [0, 1], [0, 1]] <= 0).any()):
        yield "intrinsics are not finite or a focal length is not positive"
    if not bool((intrinsics[:, 2] == bottom3).all()) or not bool((cam2world[:, 3] == bottom4).all()):
        yield "the last row of intrinsics or cam2world is not 0 .. 0 1"
    if not bool(cam2world.isfinite().all()):
        yield "cam2world is not finite"
    rotation = cam2world[:, :3, :3].double()
    error = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().max().item()
    if error > 1e-3 or bool((torch.linalg.det(rotation) < 0).any()):
        yield f"cam2world holds no rotation (R R^T differs from 1 by {error:.2g}, or a reflection)"


def encode_depth(
    depth: np.ndarray,  # [...] float32, > 0, +inf or nan
) -> tuple[np.ndarray, tuple[float, float] | None]:  # [...] uint16, (nearest, farthest) finite depth
    """Encode a clip's depth in 16-bit log codes. Raises ValueError where these cannot hold its range to 2e-4."""
    finite = np.isfinite(depth)
    codes = np.where(np.isnan(depth), NO_MEASUREMENT, SKY).astype(np.uint16)
    if not finite.any():
        return codes, None
    near, far = float(depth[finite].min()), float(depth[finite].max())
    span = math.log(far / near)
    if span / LAST_STEP / 2 > math.log1p(MAX_DEPTH_ERROR):
        raise ValueError(f"depth from {near:.3g} to {far:.3g} is too wide for 16-bit log codes; mark outliers nan")
    steps = np.log(depth[finite].astype(np.float64) / near) * (LAST_STEP / span if span else 0.0)
    codes[finite] = 1 + np.rint(steps).clip(0, LAST_STEP)
    return codes, (near, far)


def decode_depth(
    codes: np.ndarray,  # [...] uint16
    near_far: tuple[float, float] | None,
) -> np.ndarray:  # [...] float32
    """Undo `encode_depth`, to a relative error of 2e-4; ValueError for an impossible range."""
    table = np.full(SKY + 1, np.nan, np.float32)  # no finite depth: every code but sky reads as no measurement
    if near_far is not None:
        near, far = near_far
        if not 0 < near <= far < math.inf:
            raise ValueError(f"depth range {near_far} is not 0 < near <= far < inf")
        steps = np.linspace(0.0, math.log(far / near), LAST_STEP + 1)
        table[1:SKY] = (near * np.exp(steps)).clip(near, far)
    table[SKY] = np.inf
    return table[codes]


def encode_clip(clip: Clip) -> dict[str, bytes]:
    """Encode a valid clip as the members of one sample, by extension."""
    codes, near_far = encode_depth(clip.depth.numpy())
    members = {f"frame_{t:03d}.jpg": _image_bytes(frame.numpy(), "JPEG") for t, frame in enumerate(clip.frames)}
    members["depth.png"] = _image_bytes(codes.reshape(-1, codes.shape[-1]), "PNG")
    members["valid.png"] = _image_bytes(clip.valid.flatten(0, 1).numpy(), "PNG")
    if clip.moving is not None:
        members["moving.png"] = _image_bytes(clip.moving.flatten(0, 1).numpy(), "PNG")
    meta = {
        "version": SCHEMA_VERSION,
        "num_frames": clip.num_frames,
        "height": clip.depth.shape[1],
        "width": clip.depth.shape[2],
        "intrinsics": clip.intrinsics.tolist(),  # float32 -> double -> shortest decimal reads back exactly
        "cam2world": clip.cam2world.tolist(),
        "depth_range": near_far,
        "has_moving": clip.moving is not None,
        "caption": clip.caption,
        "source": clip.source,
        "domain": clip.domain,
        "fps": clip.fps,
        "licence": clip.licence,
    }
    members["meta.json"] = json.dumps(meta, allow_nan=False).encode()
    return members


def _image_bytes(pixels: np.ndarray, image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, quality=95, subsampling=0)  # of JPEG; 0 = 4:4:4
    return buffer.getvalue()


def decode_clip(
    content: bytes,  # of a tar: the members of one sample
    key: str,
    shape: tuple[int, int, int],  # T, H, W
) -> Clip:
    """Decode the clip in one sample's bytes; ValueError names the broken member."""
    members = tar_members(content, key)
    meta = _decode_meta(_member(members, "meta.json"), shape)
    num_frames, height, width = shape
    size, stacked = (width, height), (width, num_frames * height)
    names = [f"frame_{t:03d}.jpg" for t in range(num_frames)]
    frames = np.stack([_decode_image(members, name, "JPEG", "RGB", size) for name in names])
    codes = _decode_image(members, "depth.png", "PNG", "I;16", stacked)
    valid = _decode_image(members, "valid.png", "PNG", "1", stacked)
    moving = _decode_image(members, "moving.png", "PNG", "1", stacked) if meta["has_moving"] else None
    try:
        clip = Clip(
            key=key,
            frames=torch.from_numpy(frames),
            depth=torch.from_numpy(decode_depth(codes, meta["depth_range"]).reshape(shape)),
            intrinsics=torch.tensor(meta["intrinsics"], dtype=torch.float32),
            cam2world=torch.tensor(meta["cam2world"], dtype=torch.float32),
            valid=torch.from_numpy(valid.reshape(shape)),
            moving=None if moving is None else torch.from_numpy(moving.reshape(shape)),
            caption=meta["caption"],
            source=meta["source"],
            domain=meta["domain"],
            fps=meta["fps"],
            licence=meta["licence"],
        )
        fault = clip_fault(clip)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"meta.json: {error}") from error
    if fault:
        raise ValueError(fault)
    return clip


def tar_members(content: bytes, key: str) -> dict[str, bytes]:
    """Read the files in one sample's bytes, by extension; ValueError where they are no such tar."""
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.type == tarfile.REGTYPE else None  # no links, no sparse files
                if file is None or not member.name.startswith(f"{key}."):
                    raise ValueError(f"the bytes hold {member.name!r}, which is no member of this sample")
                members[member.name.removeprefix(f"{key}.")] = file.read()
    except tarfile.TarError as error:
        raise ValueError(f"broken tar ({error})") from error
    return members


def _member(members: dict[str, bytes], name: str) -> bytes:
    if name not in members:
        raise ValueError(f"{name} is missing")
    return members[name]


def _decode_meta(content: bytes, shape: tuple[int, int, int]) -> dict:
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise ValueError(f"meta.json: {error}") from error
    if not isinstance(meta, dict) or meta.get("version") != SCHEMA_VERSION or not set(META_FIELDS) <= set(meta):
        raise ValueError(f"meta.json: need version {SCHEMA_VERSION} and {', '.join(META_FIELDS)}")
    for name, expected in zip(("num_frames", "height", "width"), shape):
        if meta[name] != expected:
            raise ValueError(f"meta.json: {name} {meta[name]} differs from the manifest's {expected}")
    try:
        return meta | {"caption": caption_text(meta["caption"])}
    except ValueError as error:
        raise ValueError(f"meta.json: {error}") from None


def _decode_image(
    members: dict[str, bytes],
    name: str,
    image_format: str,
    mode: str,  # Pillow's
    size: tuple[int, int],  # width, height
) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(_member(members, name)), formats=(image_format,)) as image:
            if (image.mode, image.size) != (mode, size):  # known from the header, before anything is decoded
                raise ValueError(f"is {image.mode} {image.size}, need {mode} {size}")
            return np.array(image)
    except (OSError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded ({error})") from error
