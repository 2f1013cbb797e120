"""Generated videos in the names, folder and frame rate that the VBench tool reads.

VBench and VBench-I2V look for `<prompt>-<index>.mp4`, index 0 .. 4, all in one folder; prompts are VBench's own, to the
letter. dynamic_degree samples frames by the rate in the file's header, so it must be true. H.264, crf 10, 4:2:0, as the
tool's own sampling example.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

SAMPLES = 5  # videos per prompt
MAX_NAME = 255  # bytes of a file name


@dataclass(frozen=True)
class VBenchPrompt:
    """One entry of vbench2_i2v_full_info.json: what is generated from what."""

    prompt: str
    image: Path | None  # crop/<ratio>/<image_name>; None = text to video


def video_name(prompt: str, index: int) -> str:
    """The file name VBench asks for; ValueError where a file system could not hold it."""
    name = f"{prompt}-{index}.mp4"
    if not prompt.strip() or "/" in prompt or "\0" in prompt or len(name.encode()) > MAX_NAME:
        raise ValueError(f"prompt {prompt!r}: empty, with a slash, or too long for a file name")
    if not 0 <= index < SAMPLES:
        raise ValueError(f"prompt {prompt!r}: index {index}, VBench reads 0 .. {SAMPLES - 1}")
    return name


def read_i2v_prompts(info: object, images: Path, dimensions: tuple[str, ...]) -> list[VBenchPrompt]:
    """The entries of VBench-I2V's list (parsed json) that some dimension needs; ValueError where it is another list."""
    if not isinstance(info, list) or not all(
        isinstance(e, dict) and {"prompt_en", "image_name", "dimension"} <= e.keys() for e in info
    ):
        raise ValueError("need vbench2_i2v_full_info.json: a list of prompt_en, image_name, dimension")
    wanted = [entry for entry in info if set(dimensions) & set(entry["dimension"])]
    unique = {entry["prompt_en"]: VBenchPrompt(entry["prompt_en"], images / entry["image_name"]) for entry in wanted}
    return list(unique.values())


def write_video(
    folder: Path,
    prompt: str,
    index: int,
    frames: Tensor,  # [3, T, H, W] in [-1, 1], H and W even
    fps: float,
) -> Path:
    """Write one video under its VBench name, by temporary file and rename."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / video_name(prompt, index)
    temporary = folder / f".writing-{index}.mp4"
    pixels = ((frames.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    temporary.replace(path)
    return path
