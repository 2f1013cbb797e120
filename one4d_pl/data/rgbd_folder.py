"""Sequence folders of TUM RGB-D (Sturm et al., 2012) and Bonn RGB-D (Palazzolo et al., 2019).

A folder holds `rgb/` and `depth/` (pngs whose names are timestamps in seconds), `rgb.txt` and `depth.txt` (lines
`timestamp file`; without them the file names are taken) and `groundtruth.txt` (lines `timestamp tx ty tz qx qy qz qw`,
metres). Depth is 16-bit z-depth, 5000 per metre, 0 = no measurement.

- TUM's ground truth is camera to world in OpenCV axes, as it stands.
- Bonn's is the pose of markers: cam2world = T_ros · T_gt · T_ros · T_m, with both matrices as the dataset's page
  publishes them. T_m's 3x3 block is a rotation times 1.0593; the rotation alone is kept here.
- The published intrinsics count pixel centres at integers (ROS); here they lie at +0.5, so half a pixel is added to the
  principal point. Lens distortion (none in TUM's freiburg3) is left in the images.

Nothing is decoded before a frame is asked for it.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from one4d_pl.errors import UserError
from one4d_pl.files import read_text
from one4d_pl.geometry.se3 import se3_matrix, xyzw_to_matrix

Layout = Literal["tum", "bonn"]

DEPTH_PER_METRE = 5000.0
MAX_DIFFERENCE = 0.02  # seconds between an image and its depth or camera, as TUM's own association
INTRINSICS = {  # fx fy cx cy in pixels, integer centres; TUM's differ by the camera in the sequence's name
    "freiburg1": (517.3, 516.5, 318.6, 255.3),
    "freiburg2": (520.9, 521.0, 325.1, 249.7),
    "freiburg3": (535.4, 539.2, 320.1, 247.6),
    "bonn": (542.822841, 542.576870, 315.593520, 237.756098),
}
# raised by Pillow for a broken png, and for one whose header claims a huge size
UNDECODABLE = (OSError, SyntaxError, struct.error, zlib.error, EOFError, Image.DecompressionBombError)
BONN_ROS = ((-1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
BONN_MARKER = (
    (1.0157, 0.1828, -0.2389, 0.0113),
    (0.0009, -0.8431, -0.6413, -0.0098),
    (-0.3009, 0.6147, -0.8085, 0.0111),
    (0.0, 0.0, 0.0, 1.0),
)


@dataclass(frozen=True)
class StampedFile:
    """One line of rgb.txt or depth.txt."""

    timestamp: float  # seconds
    path: Path


@dataclass(frozen=True)
class Trajectory:
    """Timed cameras."""

    timestamps: Tensor  # [N] float64, seconds
    cam2world: Tensor  # [N, 4, 4] float64, OpenCV axes, metres


@dataclass(frozen=True)
class RGBDFrame:
    """One image with the depth map and the camera nearest in time. Files are read when asked for."""

    timestamp: float  # of the image, seconds
    rgb_path: Path
    depth_path: Path
    cam2world: Tensor  # [4, 4] float64, OpenCV axes, metres

    @property
    def present(self) -> bool:
        """Tell whether both files are on disk."""
        return self.rgb_path.is_file() and self.depth_path.is_file()

    def read_depth(self) -> Tensor:  # [H, W] float32, metres; nan = no measurement
        """Read the depth map; UserError names a broken or missing file."""
        return read_depth_png(self.depth_path)


@dataclass(frozen=True)
class RGBDSequence:
    """An opened folder."""

    root: Path
    layout: Layout
    intrinsics: Tensor  # [3, 3] float32, pixels, centres at +0.5; of every frame
    frames: tuple[RGBDFrame, ...]  # by time; images without a depth map or camera within 0.02 s are left out


def open_sequence(root: str | Path) -> RGBDSequence:
    """List a folder's frames; UserError names what is missing.

    The folder's name tells the layout and the camera (…freiburg1…, …bonn…). Each image is paired with a depth map and
    with a camera, nearest pairs first, each used once. Files are not opened, and need not exist (`RGBDFrame.present`).
    """
    root = Path(root)
    camera = _camera_of(root.resolve().name, root.absolute().name)  # a link may have a name of its own
    layout: Layout = "bonn" if camera == "bonn" else "tum"
    images, depths = list_files(root, "rgb"), list_files(root, "depth")
    trajectory = read_trajectory(root / "groundtruth.txt")
    if layout == "bonn":
        trajectory = Trajectory(trajectory.timestamps, bonn_cam2world(trajectory.cam2world))
    times = torch.tensor([image.timestamp for image in images], dtype=torch.float64)
    depth_of = dict(associate(times, torch.tensor([d.timestamp for d in depths], dtype=torch.float64)))
    camera_of = dict(associate(times, trajectory.timestamps))
    frames = tuple(
        RGBDFrame(image.timestamp, image.path, depths[depth_of[i]].path, trajectory.cam2world[camera_of[i]])
        for i, image in enumerate(images)
        if i in depth_of and i in camera_of
    )
    return RGBDSequence(root, layout, camera_intrinsics(camera), frames)


def list_files(root: Path, kind: str) -> list[StampedFile]:  # kind "rgb" or "depth" -> by time
    """List the files in `kind`.txt or, without it, the pngs in `kind`/. Raises UserError where neither exists."""
    text, folder = root / f"{kind}.txt", root / kind
    if text.is_file():
        rows = _rows(text, 2)
        files = [StampedFile(_number(text, i, row[0]), root / _inside(text, i, row[1])) for i, row in rows]
    elif folder.is_dir():
        files = list_pngs(folder)
    else:
        raise UserError(f"{root}: neither {kind}.txt nor {kind}/, need a TUM or Bonn RGB-D sequence folder")
    if not files:
        raise UserError(f"{root}: no {kind} image is listed")
    return sorted(files, key=lambda file: file.timestamp)


def list_pngs(folder: Path) -> list[StampedFile]:  # by time
    """List the pngs, not hidden, that are named after seconds; UserError where two names mean the same time."""
    paths = [path for path in folder.glob("*.png") if not path.name.startswith(".")]
    files = sorted((_number(path, 0, path.stem), path) for path in paths)
    for (before, first), (after, second) in itertools.pairwise(files):
        if before == after:
            raise UserError(f"{folder}: {first.name!r} and {second.name!r} are named after the same time")
    return [StampedFile(seconds, path) for seconds, path in files]


def read_trajectory(path: Path) -> Trajectory:
    """Read rows `timestamp tx ty tz qx qy qz qw`. UserError names the file and line that is broken."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, need TUM's trajectory text")
    rows = _rows(path, 8)
    if not rows:
        raise UserError(f"{path}: no camera in it")
    numbers = torch.tensor([[_number(path, i, word) for word in row] for i, row in rows], dtype=torch.float64)
    norm = torch.linalg.vector_norm(numbers[:, 4:], dim=1)
    for (i, _), length in zip(rows, norm.tolist()):
        if not abs(length - 1) < 1e-2:
            raise UserError(f"{path}: line {i}: the quaternion's norm is {length:.4f}, need 1")
    return Trajectory(numbers[:, 0], se3_matrix(xyzw_to_matrix(numbers[:, 4:]), numbers[:, 1:4]))


def associate(
    first: Tensor,  # [N] float64, seconds
    second: Tensor,  # [M] float64, seconds
    max_difference: float = MAX_DIFFERENCE,  # seconds
) -> list[tuple[int, int]]:  # indices into both, by the first
    """Pair timestamps less than `max_difference` apart, nearest first, each used once (as TUM)."""
    order = torch.argsort(second)
    ranked = second[order]
    # near 1e9 s, adding to a time rounds to 2e-7 s while differences are exact: search a little
    # wider, then decide by the difference
    low = torch.searchsorted(ranked, first - 1.01 * max_difference).tolist()
    high = torch.searchsorted(ranked, first + 1.01 * max_difference, right=True).tolist()
    gaps = ((abs(float(first[i] - ranked[k])), i, k) for i in range(len(first)) for k in range(low[i], high[i]))
    candidates = sorted((gap, i, int(order[k])) for gap, i, k in gaps if gap < max_difference)
    pairs: dict[int, int] = {}
    used: set[int] = set()
    for _, i, j in candidates:
        if i not in pairs and j not in used:
            pairs[i] = j
            used.add(j)
    return sorted(pairs.items())


def bonn_cam2world(groundtruth: Tensor) -> Tensor:  # [..., 4, 4] float64 -> [..., 4, 4]
    """Turn Bonn's ground truth into cameras: T_ros · T_gt · T_ros · T_m, without T_m's scale."""
    ros, marker = groundtruth.new_tensor(BONN_ROS), groundtruth.new_tensor(BONN_MARKER)
    left, _, right = torch.linalg.svd(marker[:3, :3])
    marker[:3, :3] = left @ right
    return ros @ groundtruth @ ros @ marker


def read_rgb_png(path: Path) -> Tensor:  # [H, W, 3] uint8
    """Read a colour png; UserError names a broken or missing file."""
    return torch.from_numpy(_decode(path, "RGB"))


def read_depth_png(path: Path) -> Tensor:  # [H, W] float32, metres; nan = no measurement
    """Read a 16-bit depth png; UserError names a broken or missing file."""
    codes = _decode(path, "I;16").astype(np.float32)
    return torch.from_numpy(np.where(codes == 0, np.float32(np.nan), codes / np.float32(DEPTH_PER_METRE)))


def unrounded(depth: Tensor) -> Tensor:  # [...] float32, metres, of `read_depth_png` -> [...] float64
    """Undo float32's rounding of a depth map: return the file's whole numbers over 5000."""
    return (depth.double() * DEPTH_PER_METRE).round() / DEPTH_PER_METRE


def _decode(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if mode == "I;16" and image.mode != "I;16":
                raise UserError(f"{path}: {image.mode} picture, need 16-bit grey")
            return np.array(image if mode == "I;16" else image.convert(mode))
    except UNDECODABLE as error:
        raise UserError(f"{path}: cannot be decoded ({error})") from error


def _rows(path: Path, columns: int) -> list[tuple[int, list[str]]]:
    """Read line numbers and words of the lines that are neither empty nor comments."""
    rows = []
    for i, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) < columns:
            raise UserError(f"{path}: line {i}: {len(words)} columns, need {columns}, with spaces between them")
        rows.append((i, words[:columns]))
    return rows


def _inside(path: Path, line: int, name: str) -> str:
    """Return the name. Raises UserError where it leaves the folder: a downloaded list must not reach other files."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{path}: line {line}: {name!r} lies outside of the folder")
    return name


def _number(path: Path, line: int, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        where = f"{path}: line {line}" if line else f"{path}: its name"
        raise UserError(f"{where}: {word!r} is no finite number") from None
    return value


def _camera_of(*names: str) -> str:
    for camera in INTRINSICS:
        if any(camera in name for name in names):
            return camera
    raise UserError(f"{names[0]}: the folder's name tells the camera, need one of {', '.join(INTRINSICS)} in it")


def camera_intrinsics(camera: str) -> Tensor:  # [3, 3] float32, pixels
    """Return the published intrinsics of a key of `INTRINSICS`, moved to pixel centres at +0.5."""
    fx, fy, cx, cy = INTRINSICS[camera]
    return torch.tensor([[fx, 0.0, cx + 0.5], [0.0, fy, cy + 0.5], [0.0, 0.0, 1.0]])
