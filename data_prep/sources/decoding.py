"""Files of a dataset -> arrays, with the file named in every error and bounded memory.

Every function raises ValueError (or OSError where the file cannot be opened) and nothing else,
whatever the bytes: a damaged download must cost no more than one dropped clip. No pickle is ever
loaded and no archive is ever unpacked to disk.
"""

from __future__ import annotations

import csv
import io
import math
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from one4d_pl.errors import LFS_HINT, UserError, fault_of, is_lfs_pointer
from one4d_pl.files import read_text
from one4d_pl.geometry.se3 import se3_matrix, xyzw_to_matrix
from one4d_pl.scene.media import load_image, upright_frames

MAX_PIXELS = 89_000_000  # of one picture, as in clip_codec
MAX_BYTES = 4 << 30  # of one array or archive member: 81 pointmaps of 1280x720 take 0.9 GB
NPY_HEADER = re.compile(
    r"\{'descr': ?'([<>|=]?[a-zA-Z]\d+)', ?'fortran_order': ?(True|False), ?'shape': ?\(([\d, ]*)\),? ?\}\s*"
)
KINDS = "fiubU"  # of the arrays that may be read: float, int, unsigned, bool, text


def read_image(path: Path) -> NDArray[np.uint8]:  # [H, W, 3]
    """Read a picture upright and in 8 bits, as `scene.media` does."""
    return load_image(path).numpy()


def read_depth_codes(path: Path) -> NDArray[np.uint16]:  # [H, W]
    """Read a 16-bit grey png without any conversion."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode != "I;16":
                raise ValueError(f"{path}: {image.mode} picture, need 16-bit grey")
            return np.array(image, np.uint16)
    except (OSError, SyntaxError, struct.error, zlib.error, EOFError, Image.DecompressionBombError) as error:
        # Pillow: SyntaxError for a broken png
        raise ValueError(f"{path}: cannot be decoded ({fault_of(path, error)})") from error


def read_frames(paths: Sequence[Path]) -> Tensor:  # [T, H, W, 3] uint8
    """Read images, all of one size."""
    return torch.from_numpy(stack_alike([read_image(path) for path in paths], paths))


def stack_alike(arrays: Sequence[np.ndarray], paths: Sequence[Path]) -> np.ndarray:
    """Stack the arrays; ValueError names the first one whose shape differs."""
    for array, path in zip(arrays, paths):
        if array.shape != arrays[0].shape:
            wrong, right = (f"{a.shape[1]}x{a.shape[0]}" for a in (array, arrays[0]))
            raise ValueError(f"{path}: {wrong} pixels, the clip's first has {right}")
    return np.stack(arrays)


def read_npy(path: Path) -> np.ndarray:
    """Read a .npy file."""
    if is_lfs_pointer(path):
        raise ValueError(f"{path}: {LFS_HINT}")
    return npy_array(path.read_bytes(), str(path))


def npy_array(content: bytes, name: str) -> np.ndarray:
    """Parse the bytes of a .npy file; text and plain numbers only."""
    if content[:6] != b"\x93NUMPY" or len(content) < 12 or content[6] not in (1, 2, 3):
        raise ValueError(f"{name}: no npy file ({len(content)} bytes)")
    start, end = (10, 10 + int.from_bytes(content[8:10], "little"))
    if content[6] > 1:
        start, end = 12, 12 + int.from_bytes(content[8:12], "little")
    match = NPY_HEADER.fullmatch(content[start:end].decode("latin-1"))
    if not match or match[1].lstrip("<>|=")[0] not in KINDS:
        raise ValueError(f"{name}: no npy file of numbers (header {content[start : start + 80]!r})")
    try:
        dtype = np.dtype(match[1])
    except TypeError as error:
        raise ValueError(f"{name}: no npy file ({error})") from error
    shape = tuple(int(word) for word in match[3].split(",") if word.strip())
    size = math.prod(shape) * dtype.itemsize
    if size != len(content) - end or len(shape) > 8:
        raise ValueError(f"{name}: {shape} {dtype} needs {size} bytes, the file holds {len(content) - end}")
    array = np.frombuffer(content, dtype, offset=end) if size else np.empty(0, dtype)
    if dtype.kind == "U" and size and array.astype(dtype.newbyteorder("=")).view(np.uint32).max() > sys.maxunicode:
        raise ValueError(f"{name}: its text holds a character beyond Unicode")  # Python would raise a SystemError later
    return array.reshape(shape, order="F" if match[2] == "True" else "C")


def read_npz(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Read those of the wanted arrays that an .npz file holds."""
    members = read_zip(path, [f"{name}.npy" for name in wanted])
    return {name[:-4]: npy_array(content, f"{path}: {name}") for name, content in members.items()}


def zip_names(path: Path) -> list[str]:
    """List an archive's members by their raw names, which must never be used as paths."""
    with _open_zip(path) as archive:
        return archive.namelist()


def read_zip(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Read those of the wanted members that an archive holds, into memory."""
    found = {}
    with _open_zip(path) as archive:
        for info in archive.infolist():
            if info.filename not in wanted:
                continue
            if info.file_size > MAX_BYTES:
                raise ValueError(f"{path}: {info.filename} claims {info.file_size} bytes")
            try:
                found[info.filename] = archive.read(info)
            except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
                raise ValueError(f"{path}: {info.filename!r} cannot be read ({error})") from error
    return found


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, struct.error, NotImplementedError, EOFError, IndexError) as error:
        raise ValueError(f"{path}: no zip archive ({fault_of(path, error)})") from error


def read_exr(
    content: bytes,
    name: str,  # of the file, for errors
    channel: str,
) -> NDArray[np.float32]:  # [H, W]
    """Read one channel of an OpenEXR picture (the `exr` extra)."""
    try:
        import OpenEXR
    except ImportError as error:
        raise ImportError("OpenEXR is not installed: pip install 'one4d_pl[exr]'") from error
    try:
        header = OpenEXR.File(io.BytesIO(content), header_only=True).header()
        low, high = header["dataWindow"]
        if not 0 < math.prod(int(b) - int(a) + 1 for a, b in zip(low, high)) <= MAX_PIXELS:
            raise ValueError(f"data window {low} .. {high}")
        channels = OpenEXR.File(io.BytesIO(content), separate_channels=True, num_threads=0).channels()
        pixels = np.array(channels[channel].pixels, np.float32)
    except KeyError as error:
        raise ValueError(f"{name}: no channel {channel!r} in this EXR ({error})") from error
    except (RuntimeError, TypeError, ValueError, OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"{name}: no EXR picture ({error})") from error
    if pixels.ndim != 2:
        raise ValueError(f"{name}: channel {channel!r} is {pixels.shape}")
    return pixels


def json_numbers(tree: Mapping[str, object], field: str, path: Path, *shape: int) -> NDArray[np.float64]:
    """Return a field of finite numbers; ValueError unless it has this shape."""
    try:
        numbers = np.asarray(tree[field], np.float64)
    except KeyError:
        raise ValueError(f"{path}: no {field!r}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {field} is no list of numbers ({error})") from error
    return finite(numbers, f"{path}: {field}", *shape)


def finite(numbers: np.ndarray, name: str, *shape: int) -> NDArray[np.float64]:
    """Return the numbers as float64; ValueError unless finite and of this shape (-1: any)."""
    if numbers.dtype.kind not in "fiu" or len(shape) != numbers.ndim:
        raise ValueError(f"{name}: {numbers.dtype} {numbers.shape}, need numbers {list(shape)}")
    if any(want not in (-1, have) for want, have in zip(shape, numbers.shape)):
        raise ValueError(f"{name}: {numbers.shape}, need {list(shape)}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: not finite")
    return numbers.astype(np.float64)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a csv file with a header line; a field that a row lacks is ""."""
    try:
        lines = io.StringIO(read_text(path), newline="")
        return [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(lines)]
    except (csv.Error, UserError) as error:
        raise ValueError(f"{path}: no csv ({fault_of(path, error)})") from error


def rigid_transforms(
    quaternions: np.ndarray,  # [N, 4] xyzw
    translations: np.ndarray,  # [N, 3]
    name: str,
) -> Tensor:  # [N, 4, 4] float64
    """Join rotations and translations. ValueError names the first row whose quaternion is not of unit length."""
    norms = np.linalg.norm(quaternions, axis=1)
    for row, norm in enumerate(norms):
        if not abs(norm - 1) <= 1e-2:
            raise ValueError(f"{name}: row {row}: the quaternion's norm is {norm:.4f}, need 1")
    return se3_matrix(xyzw_to_matrix(torch.from_numpy(quaternions)), torch.from_numpy(translations))


def nearest_rotations(
    transforms: np.ndarray,  # [N, 4, 4]
    name: str,
) -> Tensor:  # [N, 4, 4] float64
    """Replace rounded rotations by exact ones; ValueError names a row further than 1e-2 from a rigid transform."""
    matrices = finite(transforms, name, -1, 4, 4).copy()
    left, _, right = np.linalg.svd(matrices[:, :3, :3])
    rotations = left @ right
    error = np.abs(rotations - matrices[:, :3, :3]).max((1, 2))
    bad = (error > 1e-2) | (np.linalg.det(rotations) < 0) | (matrices[:, 3] != [0, 0, 0, 1]).any(1)
    if bad.any():
        raise ValueError(f"{name}: row {int(bad.argmax())} is no rotation and translation")
    matrices[:, :3, :3] = rotations
    return torch.from_numpy(matrices)


def pinhole(
    focal_x: np.ndarray,  # [T] pixels
    focal_y: np.ndarray,  # [T]
    centre_x: np.ndarray,  # [T]
    centre_y: np.ndarray,  # [T]
) -> Tensor:  # [T, 3, 3] float32
    """Return the intrinsics of a camera without skew."""
    intrinsics = torch.zeros(len(focal_x), 3, 3)
    for (row, column), values in zip(((0, 0), (1, 1), (0, 2), (1, 2)), (focal_x, focal_y, centre_x, centre_y)):
        intrinsics[:, row, column] = torch.from_numpy(np.asarray(values, np.float32))
    intrinsics[:, 2, 2] = 1
    return intrinsics


def read_video(path: Path, numbers: Sequence[int]) -> Tensor:  # [T, H, W, 3] uint8
    """Read frames by ascending number from 0, upright as `scene.media`; ValueError where the video ends before."""
    wanted, found = set(numbers), []
    # without decoder threads: units of a dataset are processed in parallel
    for n, (_, frame) in enumerate(upright_frames(path, "NONE")):
        if n in wanted:
            found.append(frame.numpy())
        if n >= numbers[-1]:
            break
    if len(found) < len(numbers):
        raise ValueError(f"{path}: ends before frame {numbers[-1]}")
    return torch.from_numpy(stack_alike(found, [path] * len(found)))
