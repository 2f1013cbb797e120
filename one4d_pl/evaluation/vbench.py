"""Generated videos in the names, folder and frame rate that the VBench tool reads.

VBench and VBench-I2V look for `<prompt>-<index>.mp4`, index 0 .. 4, all in one folder; prompts are
exactly VBench's own. dynamic_degree samples frames by the rate in the file's header, so that rate
must be true. H.264, crf 10, 4:2:0, as the tool's own sampling example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from one4d_pl.evaluation.predict import PredictOptions, draw_noise
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.scene.folder import save_video
from one4d_pl.scene.media import load_image, to_network
from one4d_pl.scene.panels import to_bytes

SAMPLES = 5  # videos per prompt
MAX_NAME = 255  # bytes of a file name


@dataclass(frozen=True)
class VBenchPrompt:
    """One entry of vbench2_i2v_full_info.json: a prompt and its image."""

    prompt: str
    image: Path  # crop/<ratio>/<image_name>


def video_name(prompt: str, index: int) -> str:
    """Return the file name VBench asks for; ValueError where no file system could hold it."""
    name = f"{prompt}-{index}.mp4"
    if not prompt.strip() or "/" in prompt or "\0" in prompt or len(name.encode()) > MAX_NAME:
        raise ValueError(f"prompt {prompt!r}: empty, with a slash, or too long for a file name")
    if not 0 <= index < SAMPLES:
        raise ValueError(f"prompt {prompt!r}: index {index}, VBench reads 0 .. {SAMPLES - 1}")
    return name


def read_i2v_prompts(info: object, images: Path, dimensions: tuple[str, ...]) -> list[VBenchPrompt]:
    """Select the entries of VBench-I2V's list (parsed json) that some dimension needs.

    ValueError where it is another list.
    """
    if not isinstance(info, list) or not all(
        isinstance(e, dict) and {"prompt_en", "image_name", "dimension"} <= e.keys() for e in info
    ):
        raise ValueError("need vbench2_i2v_full_info.json: a list of prompt_en, image_name, dimension")
    wanted = [entry for entry in info if set(dimensions) & set(entry["dimension"])]
    unique = {entry["prompt_en"]: VBenchPrompt(entry["prompt_en"], images / entry["image_name"]) for entry in wanted}
    return list(unique.values())


def generate_videos(
    pipeline: One4DPipeline,
    prompts: list[VBenchPrompt],
    options: PredictOptions,
    folder: Path,
    fps: float,
    progress: Callable[[Iterable[VBenchPrompt]], Iterable[VBenchPrompt]] = iter,
) -> None:
    """Generate five videos per prompt from its image; those that are there already are kept."""
    encoders = pipeline.encoders
    for entry in progress(prompts):
        picture = load_image(entry.image)[None]
        framing = options.framing((picture.shape[1], picture.shape[2]))
        frame = to_network(framing.place_frames(picture))  # [3, 1, h, w]
        clip = frame.expand(-1, options.num_frames, -1, -1).to(pipeline.device)
        given = torch.zeros(1, options.num_frames, dtype=torch.bool, device=clip.device)
        given[:, 0] = True
        for index in range(SAMPLES):
            path = folder / video_name(entry.prompt, index)
            if path.is_file():
                continue
            shape = (2, *encoders.latent_shape(*clip.shape[1:]))
            noise = draw_noise(shape, entry.prompt, index, options.seed).to(clip.device)
            scene = pipeline.sample([entry.prompt], clip[None], given, noise)
            _write_video(path, framing.cut(scene.frames[0].cpu()), fps)


def _write_video(path: Path, frames: Tensor, fps: float) -> None:  # [3, T, H, W] in [-1, 1]
    """Write one video; an odd last row or column is cut, since 4:2:0 needs even sides."""
    height, width = frames.shape[2] // 2 * 2, frames.shape[3] // 2 * 2
    save_video(path, to_bytes((frames[:, :, :height, :width].permute(1, 2, 3, 0) + 1) / 2), fps, crf=10)
