"""A finished 4D scene, and the folder that holds it and that every command can open again.

frames/000000.png ...               the frames, lossless
rgb.mp4, depth.mp4                  frames and depth, to look at
pointmap.npz                        pointmap [T, H, W, 3] and valid
depth.npy, valid.npy, cameras.json  as in `predictions`
panel.png                           frames, pointmap and depth below each other
scene.json                          prompt, frames per second, how it was made
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from one4d_pl.data.frame_order import numbered_files
from one4d_pl.errors import UserError, reading
from one4d_pl.files import open_whole, read_json, replaced_folder, write_json
from one4d_pl.geometry.camera import Placement
from one4d_pl.scene.folder import save_frames, save_picture, save_video
from one4d_pl.scene.panels import SKY_COLOUR, near_to_far, panel, pointmap_colours, to_bytes
from one4d_pl.scene.predictions import Prediction, read_prediction, write_prediction

FORMAT = "one4d_pl scene 1"
FRAMES = "frames"
STORED = ("depth.npy", "valid.npy", "cameras.json")  # written by `predictions`
NAMES = frozenset({FRAMES, "rgb.mp4", "depth.mp4", "panel.png", "pointmap.npz", "scene.json", *STORED})


@dataclass(frozen=True)
class Scene:
    """RGB frames, pointmaps and the cameras and depth recovered from them, on the CPU."""

    frames: Tensor  # [T, H, W, 3] uint8
    pointmap: Tensor  # [T, H, W, 3] float32, OpenCV axes of the first frame's camera, no metric unit
    valid: Tensor  # [T, H, W] bool, the point lies on a surface: no sky, and in front of its camera
    depth: Tensor  # [T, H, W] float32, z in each frame's own camera, unit of the pointmap; 0 = behind it
    intrinsics: Tensor  # [T, 3, 3] float64, pixels, pixel centres at +0.5
    cam2world: Tensor  # [T, 4, 4] float64, world of the pointmap
    fps: float
    prompt: str = ""
    given: tuple[int, ...] = ()  # frames that the model was shown
    placement: Placement | None = None  # of the frames on the given images; None = the same size
    flags: tuple[str, ...] = ()  # what is unusual or degenerate, in words
    report: dict[str, object] = field(default_factory=dict)  # of the camera recovery, as json can hold it
    made: dict[str, object] = field(default_factory=dict)  # seed, steps, guidance, adapters: how it was made

    @property
    def num_frames(self) -> int:
        """Count the frames."""
        return len(self.frames)


def save_scene(folder: Path, scene: Scene) -> None:
    """Write a scene folder.

    A scene that is already there is replaced once the new one is complete; other files stay.
    """
    depth = depth_pictures(scene.depth, scene.valid)
    prediction = Prediction(
        scene.depth, scene.cam2world, scene.intrinsics, scene.valid, scene.placement, scene.given, scene.flags
    )
    metadata = {"format": FORMAT, "prompt": scene.prompt, "fps": scene.fps, "made": scene.made}
    with replaced_folder(folder, NAMES, last="scene.json") as staging:
        save_frames(staging / FRAMES, scene.frames)
        save_video(staging / "rgb.mp4", _even_sized(scene.frames), scene.fps)
        save_video(staging / "depth.mp4", _even_sized(depth), scene.fps)
        save_panel(staging / "panel.png", scene)
        with open_whole(staging / "pointmap.npz") as file:  # np.savez would add a suffix to a path
            np.savez_compressed(file, pointmap=scene.pointmap.numpy(), valid=scene.valid.numpy())
        write_prediction(staging, prediction, scene.report)
        write_json(staging / "scene.json", metadata)


def save_panel(path: Path, scene: Scene) -> None:
    """Write a picture of some frames, with their pointmaps and depth below them."""
    depth = depth_pictures(scene.depth, scene.valid)
    rows = [scene.frames / 255, pointmap_colours(scene.pointmap, scene.valid), depth / 255]
    shown = panel(rows, zoom=max(1, 256 // scene.frames.shape[1]))
    save_picture(path, shown, ["frames", "pointmap", "depth"])


def may_become_scene(folder: Path) -> bool:
    """Tell whether a scene may be written to a folder.

    It may hold a scene, the files of one that was cut short, or no visible file. Frames and a video
    alone may be the user's own.
    """
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return is_scene(folder) or not visible or (visible <= NAMES and bool(visible & {"depth.mp4", "pointmap.npz"}))


def is_scene(folder: Path) -> bool:
    """Tell whether a folder holds a complete scene."""
    return (folder / "scene.json").is_file()


def open_scene(folder: Path) -> Scene:
    """Read a scene folder; UserError names a missing or broken file. Nothing is unpickled."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; need a scene that `one4d generate` wrote")
    if not is_scene(folder):
        raise UserError(f"{folder}: no scene.json; not a scene, or its writer was cut short")
    for name in ("cameras.json", "depth.npy", "pointmap.npz"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing")
    prompt, fps, made = _read_metadata(folder / "scene.json")
    prediction = read_prediction(folder)
    pointmap, valid = _read_points(folder / "pointmap.npz")
    frames = _read_frames(folder / FRAMES)
    size = tuple(pointmap.shape[:3])
    if prediction.depth is None or prediction.cam2world is None or prediction.intrinsics is None:
        raise UserError(f"{folder / 'cameras.json'}: a camera is missing")
    for name, tensor in (("frames", frames), ("depth.npy", prediction.depth)):
        if tuple(tensor.shape[:3]) != size:
            raise UserError(f"{folder / name}: {list(tensor.shape[:3])}, but pointmap.npz has {list(size)}")
    if len(prediction.cam2world) != size[0]:
        raise UserError(f"{folder / 'cameras.json'}: {len(prediction.cam2world)} cameras for {size[0]} frames")
    geometry = pointmap, valid, prediction.depth, prediction.intrinsics, prediction.cam2world
    told = prediction.given or (), prediction.placement, prediction.flags, _read_report(folder / "cameras.json")
    return Scene(frames, *geometry, fps, prompt, *told, made)


def depth_pictures(depth: Tensor, valid: Tensor) -> Tensor:  # [T, H, W] x 2 -> [T, H, W, 3] uint8
    """Show log depth as colours, nearer = lighter, with one range for the video.

    Pixels without a surface get the sky's blue.
    """
    seen = depth[valid]
    if len(seen) == 0:
        near, far = 1.0, 2.0
    else:
        some = seen.float()[:: max(1, len(seen) // 100_000)]
        near, far = torch.quantile(some, some.new_tensor([0.02, 0.98])).tolist()
        near = max(near, 1e-6)
        far = max(far, near * 1.001)
    colours = near_to_far(torch.log(depth.clamp(near, far) / near) / math.log(far / near))
    return to_bytes(torch.where(valid[..., None], colours, colours.new_tensor(SKY_COLOUR)))


def _even_sized(frames: Tensor) -> Tensor:  # [T, H, W, 3]: H.264 in yuv420 has even sides
    return frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]


def _read_metadata(path: Path) -> tuple[str, float, dict[str, object]]:  # prompt, fps, made
    with reading(path):
        metadata = read_json(path)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"not of the format {FORMAT!r}")
        prompt, fps, made = metadata["prompt"], float(metadata["fps"]), metadata["made"]
        if not isinstance(prompt, str) or not isinstance(made, dict) or not 0 < fps < math.inf:
            raise ValueError("prompt, fps or made is of the wrong kind")
    return prompt, fps, made


def _read_report(path: Path) -> dict[str, object]:
    content = read_json(path)
    report = content.get("report", {}) if isinstance(content, dict) else None
    if not isinstance(report, dict):
        raise UserError(f"{path}: its report is of the wrong kind")
    return report


def _read_points(path: Path) -> tuple[Tensor, Tensor]:  # [T, H, W, 3] float32, [T, H, W] bool
    with reading(path):
        with np.load(path, allow_pickle=False) as arrays:
            pointmap, valid = arrays["pointmap"], arrays["valid"]
        if pointmap.dtype != np.float32 or pointmap.ndim != 4 or pointmap.shape[-1] != 3 or 0 in pointmap.shape:
            raise ValueError(f"pointmap is {pointmap.dtype} {list(pointmap.shape)}, need float32 [T, H, W, 3]")
        if valid.dtype != np.bool_ or valid.shape != pointmap.shape[:3]:
            raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}, need bool {list(pointmap.shape[:3])}")
    return torch.from_numpy(pointmap), torch.from_numpy(valid)


def _read_frames(folder: Path) -> Tensor:  # [T, H, W, 3] uint8
    pictures = []
    for path in numbered_files(folder, (".png",)) if folder.is_dir() else []:
        with reading(path), Image.open(path, formats=["PNG"]) as image:
            pictures.append(np.asarray(image.convert("RGB")))
        if pictures[-1].shape != pictures[0].shape:
            raise UserError(f"{path}: another size than the first frame")
    if not pictures:
        raise UserError(f"{folder}: no frames (000000.png, ...)")
    return torch.from_numpy(np.stack(pictures))
