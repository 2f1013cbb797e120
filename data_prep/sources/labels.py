"""Clips that other people's models have labelled: the folders that these tools write -> clips.

All of them hold the same things under other names, so one reader serves all: `TOOLS` says per tool which files there
are, and a function brings their arrays into the terms of `generic.py`. Read in code, at these commits (nothing copied):

- Cameras: ViPE, MegaSaM, MonST3R, CUT3R and Pi3 store OpenCV cam2world. Depth Anything 3 stores world2cam, 3x4.
  MapAnything's `extrinsic` is cam2world in spite of its name.
- Pixel centres: every one of them unprojects pixel (u, v) at the integers u and v, also where its principal point is
  the picture's middle. Cameras and depth agree among frames only in that reading, so 0.5 is added to cx and cy.
- Depth is z. Its unit is metres (ViPE, MapAnything) or the tool's own.
- Licence: of the labels. It is that of the weights that the tool takes by itself, and the strictest where it cannot be
  told. A `clip.json` beside the files (see `generic.py`; `data_prep.label` writes one) says it better, and the frame
  rate, which only ViPE's video knows.

Sources: nv-tlabs/vipe @ 157494a, mega-sam/mega-sam @ c2e0099, Junyi42/monst3r @ 574cc77, CUT3R/CUT3R @ 8bc15dc,
ByteDance-Seed/Depth-Anything-3 @ 2c21ea8, facebookresearch/map-anything @ f7ebafb, yyfz/Pi3 @ 9fa3ddb.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources import generic
from data_prep.sources.decoding import (
    finite,
    read_exr,
    read_frames,
    read_npy,
    read_npz,
    read_video,
    read_zip,
    rigid_transforms,
    stack_alike,
    zip_names,
)
from data_prep.sources.tracks import Track, walk_once
from one4d_pl.data.frame_order import by_number, numbered_files
from one4d_pl.errors import reading
from one4d_pl.files import read_json, read_text
from one4d_pl.scene.media import frame_rate

Arrays = dict[str, np.ndarray]
TO_OUR_CENTRES = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
CVD_FARTHEST = 100.0  # MegaSaM cuts its depth there [cvd_opt/cvd_opt.py:L454]
PI3_CONFIDENT = 0.1  # of 1; Pi3's demo takes the rest for no surface [demo_gradio.py:L300-302]


@dataclass(eq=False)
class Tool:
    """What a tool writes for one clip, and how to read it. Serves as a source of the registry."""

    name: str
    title: str
    LAYOUT: str
    LICENCE: str  # of the labels
    files: tuple[str, ...]  # what a clip's folder holds; with a * where the clip's name stands: several share a folder
    read: Callable[[Path, str], Arrays]  # folder and name -> arrays of a generic clip, with integer pixel centres

    def list_units(self, root: Path) -> list[str]:
        """List the labelled clips at or below `root`, relative to it."""
        found = []
        for folder, _, _ in walk_once(root):
            found += [(folder / name).relative_to(root).as_posix() for name in self._names(folder)]
        return sorted(found)

    def has_unit(self, root: Path, unit: str) -> bool:
        """Tell whether there is a clip of this name."""
        folder, name = self._place(root, unit)
        return folder.is_dir() and name in self._names(folder)

    def open_unit(self, root: Path, unit: str, stride: int, min_confidence: float = 0.0) -> list[Track]:
        """Return the clip's only track."""
        folder, name = self._place(root, unit)
        texts = self._texts(folder, name, root / unit)
        with reading(root / unit, self.LAYOUT):  # whose arrays may have any shape and type
            arrays = self.read(folder, name)
            arrays["intrinsics"] = arrays["intrinsics"] + TO_OUR_CENTRES
        alone = name != "" and name == folder.name  # in a folder of its own, as `data_prep.label` leaves it
        named = Path(unit).parent.as_posix() if alone else unit
        return generic.track_of(self.name, root, named, root / unit, arrays, texts, stride, min_confidence)

    def _place(self, root: Path, unit: str) -> tuple[Path, str]:
        """Return the folder that holds a unit's files, and the unit's name in it ("" = it has the folder alone)."""
        if "*" in "".join(self.files):
            return (root / unit).parent, Path(unit).name
        return root / unit, ""

    def _names(self, folder: Path) -> list[str]:
        """List the clips whose files lie in a folder."""
        first, *others = self.files
        if "*" not in first:
            return [""] if all((folder / name).exists() for name in self.files) else []
        before, after = first.split("*")
        names = [path.name[: len(path.name) - len(Path(after).name)] for path in folder.glob(f"{before}*{after}")]
        return [name for name in names if all((folder / other.replace("*", name)).is_file() for other in others)]

    def _texts(self, folder: Path, name: str, where: Path) -> generic.Texts:
        path, video = folder / "clip.json", folder / f"rgb/{name}.mp4"
        tree = read_json(path) if path.is_file() else {}
        if not isinstance(tree, dict):
            raise ValueError(f"{path}: no object")
        if "fps" not in tree and not video.is_file():
            raise ValueError(f'{where}: {self.title} keeps no frame rate; say it in {path}: {{"fps": 24}}')
        rate = tree["fps"] if "fps" in tree else frame_rate(video)
        return generic.texts_of({"licence": self.LICENCE, **tree, "fps": rate}, where)


def _vipe(folder: Path, name: str) -> Arrays:
    """Read what `vipe infer` leaves [vipe/utils/io.py]: metric depth as half-float EXRs, rows by frame number."""
    poses = _keys(folder / f"pose/{name}.npz", "data", "inds")
    lenses = _keys(folder / f"intrinsics/{name}.npz", "data", "inds")
    numbers = poses["inds"].tolist()
    archive = folder / f"depth/{name}.zip"
    pictures = by_number((member for member in zip_names(archive) if member.endswith(".exr")), str(archive))
    if not numbers == lenses["inds"].tolist() == [int(Path(picture).stem) for picture in pictures]:
        raise ValueError(f"{archive}: depth, poses and intrinsics are of different frames")
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{archive}: frames are left out; label the clip again")
    kinds = folder / f"intrinsics/{name}_camera.txt"
    if kinds.is_file() and any(line.split(":")[-1].strip() != "PINHOLE" for line in read_text(kinds).splitlines()):
        raise ValueError(f"{kinds}: not a pinhole camera; label the clip with ViPE's pipeline for pinholes")
    contents = read_zip(archive, pictures)
    depth = stack_alike([read_exr(contents[p], f"{archive}: {p!r}", "Z") for p in pictures], [archive] * len(pictures))
    lens = finite(lenses["data"], f"{folder / 'intrinsics' / name}.npz", len(numbers), 4)
    matrices = np.tile(np.eye(3), (len(numbers), 1, 1))
    matrices[:, [0, 1, 0, 1], [0, 1, 2, 2]] = lens
    frames = read_video(folder / f"rgb/{name}.mp4", range(len(numbers))).numpy()
    return {"frames": frames, "depth": depth, "intrinsics": matrices, "cam2world": poses["data"]}


def _megasam(folder: Path, name: str) -> Arrays:
    """Read the consistent depth of [cvd_opt/cvd_opt.py:L451-457]: half floats, cut at 1e-3 and 100."""
    arrays = _keys(folder / f"{name}_sgd_cvd_hr.npz", "images", "depths", "intrinsic", "cam_c2w")
    depth = arrays["depths"]
    return {
        "frames": arrays["images"],
        "depth": depth,
        "intrinsics": _one_per_frame(arrays["intrinsic"], len(depth)),
        "cam2world": arrays["cam_c2w"],
        "valid": depth < CVD_FARTHEST,
    }


def _monst3r(folder: Path, name: str) -> Arrays:
    """Read what its demo saves [demo.py:L153-163, dust3r/cloud_opt/base_opt.py:L311-366].

    pred_traj.txt: time, x y z, then the quaternion *with w first* [dust3r/utils/vo_eval.py:L281-288].
    """
    rows = _numbers(folder / "pred_traj.txt", 8)
    lenses = _numbers(folder / "pred_intrinsics.txt", 9).reshape(-1, 3, 3)
    pictures = numbered_files(folder, (".png",), prefix="frame_")
    depth = _stacked(numbered_files(folder, (".npy",), prefix="frame_"))
    confidence = _stacked(numbered_files(folder, (".npy",), prefix="conf_"))
    turned = rigid_transforms(rows[:, [5, 6, 7, 4]], rows[:, 1:4], str(folder / "pred_traj.txt"))
    masks = numbered_files(folder, (".png",), prefix="dynamic_mask_")
    arrays = {
        "frames": read_frames(pictures).numpy(), "depth": depth, "confidence": confidence, "intrinsics": lenses,
        "cam2world": turned.numpy(),
    }  # fmt: skip
    if masks:
        arrays["moving"] = np.stack([_grey(path) > 127 for path in masks])
    return arrays


def _cut3r(folder: Path, name: str) -> Arrays:
    """Read what its demo saves [demo.py:L267-287]; depth is the z of each view's own points."""
    cameras = [_keys(path, "pose", "intrinsics") for path in numbered_files(folder / "camera", (".npz",))]
    return {
        "frames": read_frames(numbered_files(folder / "color", (".png",))).numpy(),
        "depth": _stacked(numbered_files(folder / "depth", (".npy",))),
        "confidence": _stacked(numbered_files(folder / "conf", (".npy",))),
        "intrinsics": np.stack([camera["intrinsics"] for camera in cameras]),
        "cam2world": np.stack([camera["pose"] for camera in cameras]),
    }


def _da3(folder: Path, name: str) -> Arrays:
    """Read the export format npz [src/depth_anything_3/utils/export/npz.py]; cameras are world2cam [README.md:L117]."""
    path = folder / "exports/npz/results.npz"
    arrays = _keys(path, "image", "depth", "conf", "extrinsics", "intrinsics")
    world2cam = finite(arrays["extrinsics"][:, :3], str(path), len(arrays["depth"]), 3, 4)
    square = np.tile(np.eye(4), (len(world2cam), 1, 1))
    square[:, :3] = world2cam
    return {
        "frames": arrays["image"],
        "depth": arrays["depth"],
        "intrinsics": arrays["intrinsics"],
        "cam2world": np.linalg.inv(square),
        "confidence": arrays["conf"],
    }


def _mapanything(folder: Path, name: str) -> Arrays:
    """Read what its app saves [scripts/gradio_app.py:L149-205, L541]."""
    arrays = _keys(folder / "predictions.npz", "extrinsic", "intrinsic", "depth", "images", "final_mask", "conf")
    return {
        "frames": _bytes(arrays["images"]),
        "depth": arrays["depth"][..., 0],
        "intrinsics": arrays["intrinsic"],
        "cam2world": arrays["extrinsic"],
        "valid": arrays["final_mask"],
        "confidence": arrays["conf"],
    }


def _pi3(folder: Path, name: str) -> Arrays:
    """Read what its demo saves [demo_gradio.py:L270-318, L445]: points of one world, cameras, no lens.

    The lens is the one that sends each frame's points to their pixels, with its axis through the picture's middle.
    """
    path = folder / "predictions.npz"
    arrays = _keys(path, "points", "conf", "camera_poses", "images")
    points, confidence = arrays["points"].astype(np.float64), arrays["conf"][..., 0]
    cam2world = finite(arrays["camera_poses"], str(path), len(points), 4, 4)
    valid = (confidence > PI3_CONFIDENT) & np.isfinite(points).all(-1)
    height, width = confidence.shape[1:]
    v, u = np.mgrid[:height, :width] + 0.5 - np.array([height / 2, width / 2])[:, None, None]
    matrices = np.tile(np.array([[1, 0, width / 2 - 0.5], [0, 1, height / 2 - 0.5], [0, 0, 1]]), (len(points), 1, 1))
    for t, camera in enumerate(cam2world):
        local = (points[t][valid[t]] - camera[:3, 3]) @ camera[:3, :3]
        front = local[:, 2] > 0
        if not front.any():
            raise ValueError(f"{path}: frame {t} has no trusted point before the camera")
        matrices[t, [0, 1], [0, 1]] = _focal(local[front], np.stack([u, v], -1)[valid[t]][front])
    return {
        "frames": _bytes(arrays["images"]), "pointmaps": arrays["points"], "intrinsics": matrices,
        "cam2world": arrays["camera_poses"], "valid": valid, "confidence": confidence,
    }  # fmt: skip


def _focal(local: np.ndarray, pixels: np.ndarray) -> float:  # [N, 3], [N, 2] from the axis
    """Fit a focal length by least absolute distances (ten rounds of reweighted least squares)."""
    slopes, weights = local[:, :2] / local[:, 2:], np.ones(len(local))
    focal = 0.0
    for _ in range(10):
        focal = float((weights * (slopes * pixels).sum(1)).sum() / (weights * (slopes**2).sum(1)).sum())
        weights = 1 / np.maximum(np.linalg.norm(focal * slopes - pixels, axis=1), 1e-6)
    return focal


def _keys(path: Path, *names: str) -> Arrays:
    """Read these arrays of an npz; ValueError names the one that it lacks."""
    arrays = read_npz(path, names)
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{path}: no {missing[0]!r} in it, need {', '.join(names)}")
    return arrays


def _stacked(paths: list[Path]) -> np.ndarray:  # [T, h, w]
    arrays = [read_npy(path) for path in paths]
    if wrong := [path for path, array in zip(paths, arrays) if array.ndim != 2]:
        raise ValueError(f"{wrong[0]}: not an array [h, w]")
    if not arrays:
        raise ValueError("no arrays of depth or confidence")
    return stack_alike(arrays, paths)


def _numbers(path: Path, columns: int) -> np.ndarray:  # [T, columns] float64
    try:
        rows = [[float(word) for word in line.split()] for line in read_text(path).splitlines() if line.strip()]
        return finite(np.array(rows), str(path), -1, columns)
    except ValueError as error:
        raise ValueError(f"{path}: need rows of {columns} numbers ({error})") from error


def _one_per_frame(matrix: np.ndarray, total: int) -> np.ndarray:
    return np.repeat(matrix[None], total, axis=0) if matrix.ndim == 2 else matrix


def _bytes(images: np.ndarray) -> np.ndarray:  # float in [0, 1] -> uint8
    if images.dtype == np.uint8:
        return images
    return (np.nan_to_num(images).clip(0, 1) * 255).round().astype(np.uint8)


def _grey(path: Path) -> np.ndarray:  # [H, W]
    with Image.open(path, formats=("PNG",)) as image:
        return np.asarray(image.convert("L"))


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "vipe",
            "ViPE (Huang et al., 2025)",
            "ViPE's output (pose/, depth/, intrinsics/ and rgb/, a file per clip)",
            "CC-BY-NC-4.0",  # of UniDepth, or Video Depth Anything's large model: one of them is in every pipeline
            ("pose/*.npz", "depth/*.zip", "intrinsics/*.npz", "rgb/*.mp4"),
            _vipe,
        ),
        Tool(
            "megasam",
            "MegaSaM (Li et al., 2024)",
            "MegaSaM's consistent depth (<scene>_sgd_cvd_hr.npz)",
            "CC-BY-NC-4.0",  # of UniDepth, which it starts from; its own code and weights are Apache-2.0 and CC-BY-4.0
            ("*_sgd_cvd_hr.npz",),
            _megasam,
        ),
        Tool(
            "monst3r",
            "MonST3R (Zhang et al., 2024)",
            "MonST3R's output (pred_traj.txt, pred_intrinsics.txt, frame_*.png and .npy, conf_*.npy)",
            "CC-BY-NC-SA-4.0",
            ("pred_traj.txt", "pred_intrinsics.txt"),
            _monst3r,
        ),
        Tool(
            "cut3r",
            "CUT3R (Wang et al., 2025)",
            "CUT3R's output (depth/, conf/, color/ and camera/)",
            "CC-BY-NC-SA-4.0",
            ("camera", "conf", "color", "depth"),
            _cut3r,
        ),
        Tool(
            "da3",
            "Depth Anything 3 (Lin et al., 2025)",
            "Depth Anything 3's export (exports/npz/results.npz)",
            "CC-BY-NC-4.0",  # of its larger models; DA3-BASE and DA3-SMALL are Apache-2.0
            ("exports/npz/results.npz",),
            _da3,
        ),
        Tool(
            "mapanything",
            "MapAnything (Keetha et al., 2025)",
            "MapAnything's predictions.npz",
            "CC-BY-NC-4.0",  # of facebook/map-anything; map-anything-apache is Apache-2.0
            ("predictions.npz",),
            _mapanything,
        ),
        Tool("pi3", "Pi3 (Wang et al., 2025)", "Pi3's predictions.npz", "CC-BY-NC-4.0", ("predictions.npz",), _pi3),
    )
}
