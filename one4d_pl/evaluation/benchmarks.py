"""What is scored: MPI Sintel, Bonn, TUM-dynamics and toy scenes, in their original folders.

sintel  training/{final,depth,camdata_left}/<sequence>: depth of 23 sequences (1064 frames), cameras
        of 14 (643 frames)
bonn    rgbd_bonn_<sequence>: depth of 5 sequences, rgb and depth each sorted by name, entries
        [30:140], paired by position; its cameras are associated by time and never scored, because
        the published preparation pairs them with no frame
tum     rgbd_dataset_freiburg3_<sequence>: cameras of 8 sequences; images and ground truth paired by
        time, every third pair, the first 90 of those ("tum_30": the first 30, One4D's count)
toy     scenes of `one4d_pl.toy`, seeds 3000000 .. 3000015, 9 frames of 48x64: depth and cameras

A sequence reads its files only when asked, so no more than one sequence has to be in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.data.frame_order import numbered_files
from one4d_pl.data.rgbd_folder import (
    StampedFile,
    associate,
    bonn_cam2world,
    camera_intrinsics,
    list_files,
    list_pngs,
    read_depth_png,
    read_rgb_png,
    read_trajectory,
)
from one4d_pl.errors import UserError
from one4d_pl.evaluation.formats import read_cam, read_dpt
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Clip

SINTEL_CAMERAS = (
    *("alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6"),
    *("shaman_3", "sleeping_1", "sleeping_2", "temple_2", "temple_3"),
)
SINTEL_DEPTH_ONLY = (
    *("alley_1", "ambush_2", "ambush_7", "bamboo_1", "bamboo_2", "bandage_1", "bandage_2", "mountain_1", "shaman_2"),
)
SINTEL_FRAMES = {"ambush_2": 21, "ambush_4": 33, "ambush_6": 20, "market_6": 40}  # all others have 50
BONN = ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous")
BONN_SLICE = slice(30, 140)
BONN_MAX_DIFFERENCE = 0.05  # seconds between an image and its camera: the ground truth has the images' rate
TUM = tuple(f"{who}_{motion}" for who in ("sitting", "walking") for motion in ("static", "xyz", "halfsphere", "rpy"))
TUM_STRIDE = 3
TUM_FRAMES = {"tum": 90, "tum_30": 30}
TOY_SEEDS = range(3_000_000, 3_000_016)  # training uses seeds below
TOY_SHAPE = (9, 48, 64)  # what the tiny base in the package was trained on
NAMES = ("toy", "sintel", "bonn", "tum", "tum_30")

DOWNLOAD_HINTS = {
    "sintel": "get MPI Sintel's complete training set and its depth and camera archive, and unpack both into one "
    "folder that holds training/{final,depth,camdata_left}",
    "bonn": "get Bonn RGB-D Dynamic's sequences " + ", ".join(BONN) + " and unpack them side by side",
    "tum": "get TUM RGB-D's freiburg3 sitting and walking sequences (static, xyz, halfsphere, rpy) and unpack them "
    "side by side",
}


@dataclass(frozen=True)
class EvalSequence(ABC):
    """One video with its ground truth."""

    name: str
    num_frames: int
    scores: tuple[str, ...]  # of "depth" and "cameras"

    @property
    def zooms(self) -> bool:
        """Tell whether the focal length changes within the video."""
        return False

    def caption(self) -> str:
        """Return the prompt for the model; real benchmarks have none."""
        return ""

    @abstractmethod
    def read_frames(self) -> Tensor:  # [T, H, W, 3] uint8
        """Read the images."""

    @abstractmethod
    def read_depth(self) -> Tensor:  # [T, H, W] float32
        """Read the true z-depth; not finite or <= 0 = unknown."""

    @abstractmethod
    def read_cameras(self) -> tuple[Tensor, Tensor]:  # intrinsics [T, 3, 3] float64, cam2world [T, 4, 4] float64
        """Read the true cameras: OpenCV axes, pixels with centres at +0.5."""


@dataclass(frozen=True)
class SintelSequence(EvalSequence):
    """One of Sintel's training sequences, final pass."""

    training: Path

    def _paths(self, kind: str, suffix: str) -> list[Path]:
        return numbered_files(self.training / kind / self.name, (suffix,), "frame_")

    def read_frames(self) -> Tensor:
        return torch.stack([read_rgb_png(path) for path in self._paths("final", ".png")])

    def read_depth(self) -> Tensor:
        return torch.stack([read_dpt(path) for path in self._paths("depth", ".dpt")])

    def read_cameras(self) -> tuple[Tensor, Tensor]:
        intrinsics, cam2world = zip(*(read_cam(path) for path in self._paths("camdata_left", ".cam")))
        return torch.stack(intrinsics), torch.stack(cam2world)


@dataclass(frozen=True)
class RGBDFolderSequence(EvalSequence):
    """Chosen frames of a TUM or Bonn folder."""

    images: tuple[StampedFile, ...]
    depths: tuple[StampedFile | None, ...]  # None = no depth map for this image
    camera: str  # whose intrinsics
    cam2world: Tensor  # [T, 4, 4] float64

    def read_frames(self) -> Tensor:
        return torch.stack([read_rgb_png(image.path) for image in self.images])

    def read_depth(self) -> Tensor:
        maps = [None if depth is None else read_depth_png(depth.path) for depth in self.depths]
        known = next((depth for depth in maps if depth is not None), None)
        if known is None:
            raise UserError(f"{self.name}: no depth map belongs to any of its images")
        return torch.stack([torch.full_like(known, torch.nan) if depth is None else depth for depth in maps])

    def read_cameras(self) -> tuple[Tensor, Tensor]:
        return camera_intrinsics(self.camera).double().expand(self.num_frames, 3, 3), self.cam2world


@dataclass(frozen=True)
class ToySequence(EvalSequence):
    """A rendered scene."""

    seed: int

    def clip(self) -> Clip:
        """Render the scene, a pure function of the seed."""
        return _render(self.seed, TOY_SHAPE)

    @property
    def zooms(self) -> bool:
        return True

    def caption(self) -> str:
        return self.clip().caption

    def read_frames(self) -> Tensor:
        return self.clip().frames

    def read_depth(self) -> Tensor:
        return self.clip().depth

    def read_cameras(self) -> tuple[Tensor, Tensor]:
        clip = self.clip()
        return clip.intrinsics.double(), clip.cam2world.double()


def open_benchmark(name: str, root: Path | None, only: tuple[str, ...] = ()) -> list[EvalSequence]:
    """Open the sequences of a benchmark, all or those named in `only`.

    They are checked to be complete before anything is read; UserError says in one line what is missing.
    """
    if name not in NAMES:
        raise UserError(f"benchmark {name!r}, need one of {', '.join(NAMES)}")
    listed = sequence_names(name)
    if unknown := sorted(set(only) - set(listed)):
        raise UserError(f"{name}: no sequence {unknown[0]}; it has {', '.join(listed)}")
    wanted = [sequence for sequence in listed if not only or sequence in only]
    if name == "toy":
        both = ("depth", "cameras")
        return [ToySequence(toy, TOY_SHAPE[0], both, int(toy.removeprefix("toy_"))) for toy in wanted]
    family = name.split("_")[0]
    if root is None or not root.is_dir():
        raise UserError(f"{name}: no folder at {root}; {DOWNLOAD_HINTS[family]}, then say where with --root")
    opened = {"sintel": _open_sintel, "bonn": _open_bonn, "tum": lambda r, s: _open_tum(r, s, TUM_FRAMES[name])}[family]
    return [opened(root, sequence) for sequence in wanted]


def sequence_names(name: str) -> list[str]:
    """List all sequences of a benchmark, in the order of its tables."""
    if name == "sintel":
        return sorted(SINTEL_CAMERAS + SINTEL_DEPTH_ONLY)
    if name == "bonn":
        return list(BONN)
    return [f"toy_{seed}" for seed in TOY_SEEDS] if name == "toy" else list(TUM)


@lru_cache(maxsize=1)  # frames, depth and cameras of a scene are read one after the other
def _render(seed: int, shape: tuple[int, int, int]) -> Clip:
    return render_clip(seed, *shape)


def _open_sintel(root: Path, sequence: str) -> SintelSequence:
    training = root / "training" if (root / "training").is_dir() else root
    count = SINTEL_FRAMES.get(sequence, 50)
    scores = ("depth", "cameras") if sequence in SINTEL_CAMERAS else ("depth",)
    for kind, suffix in (("final", "png"), ("depth", "dpt"), ("camdata_left", "cam")):
        folder = training / kind / sequence
        found = len(numbered_files(folder, (f".{suffix}",), "frame_")) if folder.is_dir() else 0
        if found != count:
            raise UserError(f"sintel: {found} .{suffix} files in {folder}, need {count}; {DOWNLOAD_HINTS['sintel']}")
    return SintelSequence(sequence, count, scores, training)


def _open_bonn(root: Path, sequence: str) -> RGBDFolderSequence:
    folder = _sequence_folder(root, f"rgbd_bonn_{sequence}", "bonn")
    # the published preparation sorts file names: the text files beside them are not read
    images, depths = (list_pngs(folder / kind)[BONN_SLICE] for kind in ("rgb", "depth"))
    count = BONN_SLICE.stop - BONN_SLICE.start
    if len(images) != count or len(depths) != count:
        raise UserError(
            f"bonn: {folder} gives {len(images)} images and {len(depths)} depth maps at [30:140], need {count} of "
            f"each; {DOWNLOAD_HINTS['bonn']}"
        )
    trajectory = read_trajectory(folder / "groundtruth.txt")
    times = torch.tensor([image.timestamp for image in images], dtype=torch.float64)
    pairs = associate(times, trajectory.timestamps, BONN_MAX_DIFFERENCE)
    if len(pairs) != count:
        raise UserError(f"bonn: {count - len(pairs)} images of {folder} have no camera in groundtruth.txt")
    cam2world = bonn_cam2world(trajectory.cam2world[torch.tensor([row for _, row in pairs])])
    return RGBDFolderSequence(sequence, count, ("depth",), tuple(images), tuple(depths), "bonn", cam2world)


def _open_tum(root: Path, sequence: str, count: int) -> RGBDFolderSequence:
    folder = _sequence_folder(root, f"rgbd_dataset_freiburg3_{sequence}", "tum")
    images, trajectory = list_files(folder, "rgb"), read_trajectory(folder / "groundtruth.txt")
    times = torch.tensor([image.timestamp for image in images], dtype=torch.float64)
    pairs = associate(times, trajectory.timestamps)[::TUM_STRIDE][:count]
    absent = [images[i].path for i, _ in pairs if not images[i].path.is_file()]
    if len(pairs) != count or absent:
        missing = f"no {absent[0]}" if absent else f"{len(pairs)} images at stride {TUM_STRIDE} have a camera"
        raise UserError(f"tum: {folder}: {missing}, need {count} images; {DOWNLOAD_HINTS['tum']}")
    depths = list_files(folder, "depth")
    depth_of = dict(associate(times, torch.tensor([d.timestamp for d in depths], dtype=torch.float64)))
    cam2world = trajectory.cam2world[torch.tensor([row for _, row in pairs])]
    chosen = tuple(images[i] for i, _ in pairs)
    maps = tuple(depths[depth_of[i]] if i in depth_of else None for i, _ in pairs)
    return RGBDFolderSequence(sequence, count, ("cameras",), chosen, maps, "freiburg3", cam2world)


def _sequence_folder(root: Path, name: str, benchmark: str) -> Path:
    """Find the sequence's folder below root, or inside the archive's own top folder."""
    for folder in (root / name, *sorted(root.glob(f"*/{name}"))):
        if (folder / "groundtruth.txt").is_file():
            return folder
    raise UserError(f"{benchmark}: no {name}/groundtruth.txt under {root}; {DOWNLOAD_HINTS[benchmark]}")
