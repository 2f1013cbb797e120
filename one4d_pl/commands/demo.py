"""one4d demo: see and measure what the shipped adapter makes of the toy world, on clips it never saw.

Leaves a folder: metrics.json, a picture of every task, videos side by side (input | frames | pointmap | distance), a
coloured point cloud and a turntable of it. On two idle cores a few minutes; the same numbers every time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.commands.command import Command
from one4d_pl.config import DEMO_ADAPTERS, Config, ConfigError, load_config
from one4d_pl.files import check_folder, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from one4d_pl.inference.pipeline import GeneratedScene
    from one4d_pl.types import Sample, Task

log = logging.getLogger("one4d_pl")

SEED = 0
TRAINING_CLIPS = 256  # behind the mean pointmap and the median camera path
SHOWN = 3  # scenes of each task that are drawn
ZOOM = 4  # pixels of a picture per pixel of the model
FPS = 6.0  # half the toy world's speed: nine frames are short
ROWS = ["given", "generated frames", "generated pointmap", "distance", "true distance"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", metavar="FILE", help="yaml; default: configs/demo.yaml")
    parser.add_argument("--adapters", type=Path, default=DEMO_ADAPTERS, help="adapter folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips to measure on (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. sampler.steps=20")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(args.config or ["configs/demo.yaml"], args.overrides)
    if args.clips < 2:
        raise ConfigError(f"--clips: {args.clips}, need 2 or more (one clip's condition is tried on another)")
    check_folder(args.out, "--out")
    demo(config, args.adapters, args.clips, args.out)


def demo(config: Config, adapters: Path, clips: int, out: Path) -> None:
    """Render held-out clips, sample every task on them, measure, draw."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fit does
    began = time.monotonic()

    import torch
    from tqdm import tqdm

    from one4d_pl.data.datamodule import VAL_SEED_OFFSET
    from one4d_pl.evaluation.fit_quality import measure_fit, sampled_clips
    from one4d_pl.evaluation.toy_clips import render_samples
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.models.precision import uses_bfloat16

    if config.data.toy is None:
        raise ConfigError("data.toy: null, but the demo renders its clips; add --config configs/data/toy.yaml")
    pipeline, base = One4DPipeline.open(config, adapters), One4DPipeline.open(config, None)
    seed = config.data.toy.seed
    held_out = render_samples(config, range(seed + VAL_SEED_OFFSET, seed + VAL_SEED_OFFSET + clips), "held-out clips")
    training = render_samples(config, range(seed, seed + TRAINING_CLIPS), "training clips")
    mean_pointmap = torch.stack([clip.pointmap for clip in training]).mean(0)
    bfloat16 = uses_bfloat16(config, pipeline.device)
    with tqdm(total=sampled_clips(clips), desc="sampling 4D scenes", unit="clip") as bar:
        path = _median_path(training)
        quality = measure_fit(pipeline, base, held_out, mean_pointmap, path, SEED, bfloat16, bar.update)
    metrics = {
        "clips": clips,
        "steps": config.sampler.steps,
        "pointmaps": quality.pointmaps,
        "frames_db": quality.frames_db,
        "image_to_4d": quality.consistency["image"],
        "text_to_4d": quality.consistency["text"],
    }
    shown = held_out[:SHOWN]
    _draw(quality.scenes, quality.masks, shown, out)
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(out / "captions.txt", "".join(f"{i}: {clip.caption}\n" for i, clip in enumerate(shown)))
    _report(metrics, out, time.monotonic() - began)


def _median_path(clips: list[Sample]) -> float:
    """Of the true camera paths, in median distances."""
    import torch

    from one4d_pl.evaluation.fit_quality import camera_path
    from one4d_pl.geometry.pointmap import denormalise

    paths = [camera_path(c.cam2world, denormalise(c.pointmap.movedim(0, -1), c.scale), c.valid) for c in clips]
    return float(torch.stack(paths).median())


def _draw(scenes: dict[Task, GeneratedScene], masks: dict[Task, Tensor], shown: list[Sample], out: Path) -> None:
    """Pictures, videos and point clouds of the first clips of every task."""
    from tqdm import tqdm

    from one4d_pl.types import TASKS

    todo = [(task, i) for task in TASKS for i in range(len(shown))]
    for task, i in tqdm(todo, desc="drawing", unit="scene"):
        _draw_scene(out / f"{task}_{i}", scenes[task], i, shown[i], masks[task][i])


def _draw_scene(stem: Path, scenes: GeneratedScene, i: int, clip: Sample, given: Tensor) -> None:
    import torch

    from one4d_pl.evaluation.fit_quality import ZOOMING
    from one4d_pl.geometry.pointmap import is_sky
    from one4d_pl.models.conditioning import blank_hidden_frames
    from one4d_pl.postopt.recover import recover_scene
    from one4d_pl.scene.folder import save_picture, save_ply, save_video
    from one4d_pl.scene.panels import distance_colours, distance_range, enlarge, scene_panel, to_bytes
    from one4d_pl.scene.point_cloud import solid_pixels, turntable

    shown = blank_hidden_frames(clip.frames[None], given[None])[0]
    frames, points = scenes.frames[i], scenes.pointmap[i].movedim(0, -1)
    save_picture(stem.with_suffix(".png"), scene_panel(shown, frames, scenes.pointmap[i], clip.pointmap, ZOOM), ROWS)
    near, far = distance_range(points)
    colours = to_bytes((frames.movedim(0, -1) + 1) / 2)  # [T, H, W, 3]
    columns = [(shown.movedim(0, -1) + 1) / 2, colours / 255, (points + 1) / 2, distance_colours(points, near, far)]
    save_video(stem.with_suffix(".mp4"), to_bytes(torch.cat([enlarge(c, ZOOM) for c in columns], dim=2)), FPS)
    recovered = recover_scene(points, ~is_sky(points), ZOOMING)
    solid = solid_pixels(points, recovered.depth)
    save_ply(stem.with_suffix(".ply"), points[solid], colours[solid])
    height, width = points.shape[1:3]
    save_video(
        stem.with_name(f"{stem.name}_turntable.mp4"),
        turntable(points, colours, recovered, 6 * height, 6 * width),
        2 * FPS,
    )


def _report(metrics: dict[str, object], out: Path, seconds: float) -> None:
    """What was measured, as a table, and where to look."""
    print(f"\nPointmaps of {metrics['clips']} held-out clips, after one scale and shift per clip:")
    print(f"  {'':18} {'rel. error':>10} {'inliers':>8} {'moving':>8}")
    for name, row in metrics["pointmaps"].items():  # type: ignore[attr-defined]
        print(f"  {name:18} {row['rel_error']:10.3f} {row['inliers']:8.1%} {row['rel_error_moving']:8.3f}")
    print("\nFrames against the true ones, dB:")
    for name, row in metrics["frames_db"].items():  # type: ignore[attr-defined]
        print(f"  {name:18} " + "  ".join(f"{kind} {value:5.1f}" for kind, value in row.items()))
    for title, key in (("Image to 4D", "image_to_4d"), ("Text to 4D", "text_to_4d")):
        print(f"\n{title}, median over clips:")
        for name, value in metrics[key].items():  # type: ignore[attr-defined]
            print(f"  {name:24} {value:.3f}")
    print(
        f"\nLook at {out}/video_0.png, {out}/video_0.mp4 and {out}/video_0_turntable.mp4; likewise sparse, image, text."
    )
    print(f"All numbers: {out}/metrics.json. Took {seconds / 60:.1f} minutes.")


main = Command("one4d demo", __doc__, _add_arguments, _run)
