"""one4d demo: see and measure what the shipped adapter makes of the toy world, on clips it never saw.

Leaves a folder: animation.webp (a scene from its video, its first frame and its caption), tables.txt, metrics.json, a
picture of every task, videos side by side (input | frames | pointmap | distance), a coloured point cloud and a
turntable of it. On two idle cores a few minutes; the same numbers every time. With --quick one scene each from a
video, an image and a text, without any numbers, in less than a minute.
"""

from __future__ import annotations

import argparse
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
    from one4d_pl.postopt.recover import RecoverOptions
    from one4d_pl.types import Sample, Task

log = logging.getLogger("one4d_pl")

SHOWN = 3  # clips of each task that are drawn
ANIMATED: tuple[Task, ...] = ("video", "image", "text")
ANIMATION_WIDTH = 320  # pixels of a column
ANIMATION_BYTES = 2_000_000
ZOOM = 4  # pixels of a picture per pixel of the model
FPS = 6.0  # half the toy world's speed, because nine frames are short
ROWS = ["given", "output frames", "output pointmap", "distance", "true distance"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", metavar="FILE", help="yaml; default: configs/demo.yaml")
    parser.add_argument("--adapters", type=Path, default=DEMO_ADAPTERS, help="adapter folder; default: the shipped one")
    parser.add_argument("--clips", type=int, default=16, help="held-out clips to measure on (default %(default)s)")
    parser.add_argument(
        "--animate", type=int, default=0, metavar="N", help="held-out clip in animation.webp (default 0)"
    )
    parser.add_argument("--quick", action="store_true", help="one scene each from video, image and text, not measured")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. sampler.steps=20")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(args.config or ["configs/demo.yaml"], args.overrides)
    if args.clips < 2:
        raise ConfigError(f"--clips: {args.clips}, need 2 or more (one clip's condition is tried on another)")
    if not 0 <= args.animate < args.clips:
        raise ConfigError(f"--animate: {args.animate}, need one of the held-out clips, 0 to {args.clips - 1}")
    check_folder(args.out, "--out")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fit does
    if args.quick:
        quick_demo(config, args.adapters, args.animate, args.out)
    else:
        demo(config, args.adapters, args.clips, args.animate, args.out)


def quick_demo(config: Config, adapters: Path, number: int, out: Path) -> None:
    """Make and draw one scene each from a held-out clip's frames, its first frame and its caption."""
    began = time.monotonic()

    from one4d_pl.evaluation.fit_quality import ClipSampler, task_masks
    from one4d_pl.evaluation.tasks import SEED
    from one4d_pl.evaluation.toy_clips import held_out_clips, recovery_options
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.progress import Progress

    pipeline, clips = One4DPipeline.open(config, adapters), held_out_clips(config, range(number, number + 1))
    masks = {task: task_masks(task, 1, config.data.num_frames, SEED) for task in ANIMATED}
    with Progress(desc="sampling 4D scenes", total=len(ANIMATED), unit="scene") as bar:
        sampler = ClipSampler(clips, SEED, bar.update)
        scenes = {task: sampler(pipeline, masks[task]) for task in ANIMATED}
    print(clips[0].caption)
    _draw(scenes, masks, clips, 0, recovery_options(config), out)
    print(f"Took {time.monotonic() - began:.0f} s. Measured, of every task: one4d demo. Yours: one4d generate --help")


def demo(config: Config, adapters: Path, clips: int, animated: int, out: Path) -> None:
    """Sample every task on held-out clips, measure and draw them."""
    began = time.monotonic()

    from one4d_pl.evaluation.tasks import evaluate_tasks

    report = evaluate_tasks(config, adapters, clips, out)
    quality, held_out = report.quality, report.held_out
    print(f"\n{report.text}")
    _draw(quality.scenes, quality.masks, held_out.clips, animated, held_out.recovery, out)
    print(f"All numbers: {out}/metrics.json; of more clips: make eval. Took {(time.monotonic() - began) / 60:.1f} min.")


def _draw(
    scenes: dict[Task, GeneratedScene],
    masks: dict[Task, Tensor],
    clips: list[Sample],
    animated: int,
    recovery: RecoverOptions,
    out: Path,
) -> None:
    """Draw the first clips of every task that was sampled, and the animation of one; say where they are."""
    from one4d_pl.progress import Progress

    todo = [(task, i) for task in scenes for i in range(len(clips[:SHOWN]))]
    for task, i in Progress(todo, desc="drawing", unit="scene"):
        _draw_scene(out / f"{task}_{i}", scenes[task], i, clips[i], masks[task][i], recovery)
    _animate(scenes, animated, clips[animated], recovery, out / "animation.webp")
    write_text(out / "captions.txt", "".join(f"{i}: {clip.caption}\n" for i, clip in enumerate(clips[:SHOWN])))
    print(
        f"Look at {out}/animation.webp; of each task at {out}/video_0.png, {out}/video_0.mp4 and "
        f"{out}/video_0_turntable.mp4; likewise {', '.join(task for task in scenes if task != 'video')}."
    )


def _draw_scene(
    stem: Path, scenes: GeneratedScene, i: int, clip: Sample, given: Tensor, recovery: RecoverOptions
) -> None:
    """Draw a picture, a video and a point cloud of one clip's scene."""
    import torch

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
    recovered = recover_scene(points, ~is_sky(points), recovery)
    solid = solid_pixels(points, recovered.depth)
    save_ply(stem.with_suffix(".ply"), points[solid], colours[solid])
    height, width = points.shape[1:3]
    save_video(
        stem.with_name(f"{stem.name}_turntable.mp4"), turntable(recovered, colours, 6 * height, 6 * width), 2 * FPS
    )


def _animate(scenes: dict[Task, GeneratedScene], i: int, clip: Sample, recovery: RecoverOptions, path: Path) -> None:
    """Animate one clip as video, image and text to 4D, side by side."""
    from one4d_pl.evaluation.recovered import recover_scenes
    from one4d_pl.scene.animation import FPS as ANIMATION_FPS
    from one4d_pl.scene.animation import Column, animate
    from one4d_pl.scene.folder import save_animation
    from one4d_pl.scene.panels import to_bytes

    true = to_bytes((clip.frames.movedim(0, -1) + 1) / 2)  # [T, H, W, 3]
    given: dict[Task, Tensor | str] = {"video": true, "image": true[:1], "text": clip.caption}
    columns = []
    for task in ANIMATED:
        frames, pointmap = scenes[task].frames[i], scenes[task].pointmap[i]
        (recovered,) = recover_scenes(pointmap[None], recovery)
        shown = to_bytes((frames.movedim(0, -1) + 1) / 2)
        columns.append(Column(f"{task} to 4D", given[task], shown, recovered))
    save_animation(path, animate(columns, ANIMATION_WIDTH), ANIMATION_FPS, ANIMATION_BYTES)


main = Command("one4d demo", __doc__, _add_arguments, _run)
