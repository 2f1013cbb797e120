"""Writers of the files that people open: videos, pictures, point clouds. Every file appears whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from one4d_pl.files import open_whole, whole_file

QUALITIES = (85, 75, 65, 50, 35, 20)  # of webp, tried from the finest on
MARGIN = 84  # pixels left of a panel, for the names of its rows


def save_video(
    path: Path,
    frames: Iterable[Tensor],  # [H, W, 3] uint8 each, H and W even; a tensor [T, H, W, 3] is one
    fps: float,
    crf: int = 16,  # x264's quality, lower = better
) -> None:
    """Write H.264 in an mp4 that browsers play."""
    with whole_file(path) as staging, av.open(str(staging), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.options = {"crf": str(crf)}
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
            picture = np.ascontiguousarray(frame.numpy())
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def save_animation(
    path: Path,
    pictures: Tensor,  # [T, H, W, 3] uint8
    fps: float,
    limit: int,  # bytes
) -> None:
    """Write a webp that repeats for ever, of the finest quality that stays within `limit` bytes.

    ValueError where none does.
    """
    first, *others = [Image.fromarray(picture.numpy()) for picture in pictures]
    for quality in QUALITIES:
        data = io.BytesIO()
        first.save(
            data, "webp", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=quality
        )
        if data.tell() <= limit:
            with open_whole(path) as file:
                file.write(data.getvalue())
            return
    raise ValueError(f"{path}: {data.tell()} bytes at webp quality {QUALITIES[-1]}, need {limit} or less")


def save_picture(path: Path, picture: Tensor, rows: list[str]) -> None:  # [H, W, 3] uint8
    """Write a png, with the names of its equally high rows in a margin on the left if given."""
    image = Image.fromarray(picture.numpy())
    if rows:
        labelled = Image.new("RGB", (image.width + MARGIN, image.height), "white")
        labelled.paste(image, (MARGIN, 0))
        draw, height = ImageDraw.Draw(labelled), image.height / len(rows)
        for i, name in enumerate(rows):
            draw.multiline_text((4, (i + 0.5) * height), name.replace(" ", "\n"), fill="black", anchor="lm")
        image = labelled
    with whole_file(path) as staging:
        image.save(staging, format="png")


def save_frames(folder: Path, frames: Tensor) -> None:  # [T, H, W, 3] uint8
    """Write a png per frame: 000000.png, ..."""
    for i, frame in enumerate(frames):
        save_picture(folder / f"{i:06d}.png", frame, [])


def save_ply(path: Path, points: Tensor, colours: Tensor) -> None:  # [N, 3] float, [N, 3] uint8
    """Write a binary point cloud with colours; axes stay OpenCV's (x right, y down, z forward)."""
    vertices = np.empty(len(points), [(a, "<f4") for a in "xyz"] + [(c, "u1") for c in ("red", "green", "blue")])
    for i, axis in enumerate("xyz"):
        vertices[axis] = points[:, i].numpy()
    for i, channel in enumerate(("red", "green", "blue")):
        vertices[channel] = colours[:, i].numpy()
    properties = [f"property float {a}" for a in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header"]
    with open_whole(path) as file:
        file.write("\n".join(header).encode() + b"\n" + vertices.tobytes())
