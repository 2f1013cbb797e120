"""Scenes as files that people open: videos, pictures, point clouds. Every file appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN = 84  # pixels left of a panel, for the names of its rows


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_whole(path, lambda staging: staging.write_text(text, encoding="utf-8"))


def save_video(
    path: Path,
    frames: Tensor,  # [T, H, W, 3] uint8, H and W even
    fps: float,
    crf: int = 16,  # x264's quality, lower = better
) -> None:
    """H.264 in an mp4 that browsers play."""

    def write(staging: Path) -> None:
        with av.open(str(staging), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.options = {"crf": str(crf)}
            for frame in frames.numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())

    write_whole(path, write)


def save_picture(path: Path, picture: Tensor, rows: list[str]) -> None:  # [H, W, 3] uint8
    """A png, with the names of its equally high rows in a margin on the left where there are any."""
    image = Image.fromarray(picture.numpy())
    if rows:
        labelled = Image.new("RGB", (image.width + MARGIN, image.height), "white")
        labelled.paste(image, (MARGIN, 0))
        draw, height = ImageDraw.Draw(labelled), image.height / len(rows)
        for i, name in enumerate(rows):
            draw.multiline_text((4, (i + 0.5) * height), name.replace(" ", "\n"), fill="black", anchor="lm")
        image = labelled
    write_whole(path, lambda staging: image.save(staging, format="png"))


def save_ply(path: Path, points: Tensor, colours: Tensor) -> None:  # [N, 3] float, [N, 3] uint8
    """A binary point cloud with colours; axes as they are (OpenCV: x right, y down, z forward)."""
    vertices = np.empty(len(points), [(a, "<f4") for a in "xyz"] + [(c, "u1") for c in ("red", "green", "blue")])
    for i, axis in enumerate("xyz"):
        vertices[axis] = points[:, i].numpy()
    for i, channel in enumerate(("red", "green", "blue")):
        vertices[channel] = colours[:, i].numpy()
    properties = [f"property float {a}" for a in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header"]
    write_whole(path, lambda staging: staging.write_bytes("\n".join(header).encode() + b"\n" + vertices.tobytes()))
