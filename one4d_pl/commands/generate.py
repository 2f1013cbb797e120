"""one4d generate --out DIR ...: a 4D scene from a prompt, an image, a few frames or a whole video.

  --prompt "a red ball rolls over grass"                     text to 4D
  --image photo.jpg                                          image to 4D
  --frames a.png@0 b.png@40                                  a few frames, each at its number, to 4D
  --video clip.mp4                                           video to 4D, any length

Pictures are covered by and cropped in the middle to the scene's size: by default as many pixels as the adapter was
trained with, in the first picture's shape. EXIF turns are applied, transparent parts become white, 16 bits become 8.
A video is read at a constant rate. Lengths that are not 4k+1 are filled by repeating the last frame and cut again;
what is longer than the adapter's clips runs in overlapping windows that are joined.

DIR gets rgb.mp4, depth.mp4, frames/, pointmap.npz, depth.npy, cameras.json, scene.json and panel.png.
Then: one4d view DIR; one4d export DIR --out FILES --formats ply glb colmap ...
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.commands.command import Command
from one4d_pl.config import DEMO_ADAPTERS, MAX_SCENE_FRAMES, SOLVERS, ConfigError
from one4d_pl.files import check_folder

if TYPE_CHECKING:
    from one4d_pl.inference.pipeline import One4DPipeline
    from one4d_pl.scene.scene import Scene

MAX_SIDE = 4096
LARGEST_ON_CPU = 2e9  # bytes of a transformer that runs on a CPU without --device; the 1.3B has 3e9


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to make").add_argument
    add("--prompt", default="", help="what the scene shows; may be left out where frames are given")
    add("--image", type=Path, metavar="FILE", help="frame 0")
    add("--video", type=Path, metavar="FILE", help="all frames; a folder of pictures will do")
    add("--frames", nargs="+", metavar="FILE@N", help="some frames with their numbers from 0; frame 0 among them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the scene; a scene that is there is replaced")
    add("--num-frames", type=int, metavar="T", help="length; default: the adapter's, a video's own")
    add("--size", metavar="HxW", help="of the scene, multiples of what the base takes (16 for Wan)")
    add("--fps", type=float, help="frames per second; default: 16, a video's own")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("the model").add_argument
    add(
        "--adapters",
        type=Path,
        default=DEMO_ADAPTERS,
        metavar="PATH",
        help="folder, or owner/name[@revision] of the hub; default: the shipped demo adapters",
    )
    add("--base", metavar="PATH", help="likewise; default: the adapter's own")
    add("--steps", type=int, help="of the solver; default: the adapter's")
    add("--solver", choices=SOLVERS, help="default: the adapter's")
    add("--guidance", type=float, metavar="G", help="of the prompt, 1 = off; default: the adapter's, by task")
    add("--negative-prompt", metavar="TEXT", help="default: the adapter's")
    add("--zooms", action="store_true", help="the camera zooms: one focal length per frame")
    add_machine_arguments(parser)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where and how the model runs, which `one4d app` asks too."""
    add = parser.add_argument_group("speed and memory").add_argument
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="of the transformer; default: bfloat16 on cuda")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="stay within so much GPU memory, as fast as that allows; default: what the GPU has free",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks: the first step takes longer, the others less",
    )


def generate(args: argparse.Namespace) -> None:
    """Sample the scene that the options ask for, write it, and print what was made."""
    start = time.monotonic()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fit does

    from one4d_pl.progress import Progress

    with contextlib.ExitStack() as stack:
        bar: Progress | None = None

        def on_step(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:  # a refused option shows no bar
                bar = stack.enter_context(Progress(desc="sampling", unit="step"))
            bar.total, bar.n = total or None, done
            bar.refresh()

        scene = make_scene(args, open_pipeline, on_step)
    print(*report_lines(scene, time.monotonic() - start), sep="\n")
    out = args.out
    print(f"Look at {out}/panel.png, {out}/rgb.mp4, {out}/depth.mp4; walk around it: one4d view {out}")


def make_scene(
    args: argparse.Namespace,
    opened: Callable[[argparse.Namespace], One4DPipeline],  # `open_pipeline`, or one that keeps what it has opened
    on_step: Callable[[int, int], None],  # called with the finished steps and all steps, first with 0, 0
) -> Scene:
    """Check the options, sample a scene and write it to --out; UserError names a wrong option or file."""
    _check(args)
    numbered = {0: args.image} if args.image else _numbered(args.frames or [])
    check_folder(args.out, "--out")

    import torch

    from one4d_pl.inference.pipeline import FPS
    from one4d_pl.scene.media import load_image, open_video
    from one4d_pl.scene.scene import may_become_scene, save_scene

    if args.out.is_dir() and not may_become_scene(args.out):
        raise ConfigError(f"--out: {args.out} holds other things than a scene; name a new folder")
    try:
        pictures = {number: load_image(path) for number, path in numbered.items()}
        if args.video:
            open_video(args.video, args.fps, FPS)  # refuse a wrong file before opening the model
        pipeline = opened(args).with_settings(args.steps, args.guidance, args.negative_prompt, args.solver)
        on_step(0, 0)
        scene = pipeline(
            args.prompt,
            pictures,
            args.num_frames,
            *_size(args.size),
            generator=torch.Generator().manual_seed(args.seed),
            fps=args.fps,
            zooms=args.zooms,
            on_step=on_step,
            video=args.video,
        )
        save_scene(args.out, scene)
    except (MemoryError, torch.OutOfMemoryError):
        raise ConfigError(
            "out of memory; make --size or --num-frames smaller, or --memory, with which more waits on the host"
        ) from None
    return scene


def _check(args: argparse.Namespace) -> None:
    """Check the options that need no file to be opened; ConfigError names a wrong one."""
    given = [name for name in ("image", "video", "frames") if getattr(args, name)]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]}, --{given[1]}: give one of them")
    if not given and not args.prompt.strip():
        raise ConfigError("--prompt: empty, and nothing else says what to make; give a prompt, an image or a video")
    try:
        (args.prompt + (args.negative_prompt or "")).encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("--prompt, --negative-prompt: not UTF-8 text") from None
    if args.num_frames is not None and not 1 <= args.num_frames <= MAX_SCENE_FRAMES:
        raise ConfigError(f"--num-frames: {args.num_frames}, need 1 to {MAX_SCENE_FRAMES}")
    if args.fps is not None and not 0.1 <= args.fps <= 240:  # written so that nan is refused
        raise ConfigError(f"--fps: {args.fps}, need 0.1 to 240")
    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise ConfigError(f"--steps: {args.steps}, need 1 to 1000")
    if args.memory is not None and not 0 < args.memory < 10_000:
        raise ConfigError(f"--memory: {args.memory}, need GiB above 0")
    if args.memory is not None and args.compile:
        raise ConfigError("--compile: not with --memory, under which the blocks' weights may come and go")
    if not 0 <= args.seed < 2**63:
        raise ConfigError(f"--seed: {args.seed}, need 0 to 2^63 - 1")
    _size(args.size)


def _numbered(arguments: list[str]) -> dict[int, Path]:
    """Parse FILE@N of every given frame; files are opened later."""
    frames: dict[int, Path] = {}
    for argument in arguments:
        file, at, number = argument.rpartition("@")
        if not at or not file or not number.isdecimal() or len(number) > 9:
            raise ConfigError(f"--frames: {argument!r}, need FILE@N with the frame's number, as in a.png@0")
        if int(number) in frames:
            raise ConfigError(f"--frames: {argument!r}, but frame {int(number)} is given already")
        if int(number) >= MAX_SCENE_FRAMES:
            raise ConfigError(f"--frames: {argument!r}, numbers go up to {MAX_SCENE_FRAMES - 1}")
        frames[int(number)] = Path(file)
    return frames


def _size(text: str | None) -> tuple[int | None, int | None]:  # height, width
    if text is None:
        return None, None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and 0 < int(side[:6]) <= MAX_SIDE for side in sides):
        raise ConfigError(f"--size: {text!r}, need HxW in pixels up to {MAX_SIDE}, as in 352x624")
    return int(sides[0]), int(sides[1])


def open_pipeline(args: argparse.Namespace) -> One4DPipeline:
    """Open the model on the device that the options ask for."""
    import torch

    from one4d_pl.inference.hub import find
    from one4d_pl.inference.pipeline import One4DPipeline

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(f"--device: {args.device!r} is no device; cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {args.device}, need cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: {args.device}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    base, adapters = find(args.base, args.adapters)
    if device.type == "cpu" and args.device is None:
        _refuse_large(base)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    memory = args.memory
    if memory is None and device.type == "cuda" and not args.compile:  # what is compiled has to stay where it is
        memory = torch.cuda.mem_get_info(device)[0] / 2**30
    pipeline = One4DPipeline.from_pretrained(base, adapters, dtype, device, memory, *_size(args.size))
    if args.compile:
        pipeline.compile_blocks()
    return pipeline


def _refuse_large(path: str) -> None:
    """Raise ConfigError for a base made for GPUs that would run on the CPU without --device."""
    from one4d_pl.models.base_files import resolve_base, weight_files

    base = resolve_base(path)
    size = sum(file.stat().st_size for file in weight_files(base, "transformer"))
    if size > LARGEST_ON_CPU:
        raise ConfigError(
            f"--device: torch finds no CUDA device, and a base of {size / 1e9:.0f} GB is made for one; "
            "--device cpu runs it here all the same"
        )


def report_lines(scene: Scene, seconds: float) -> list[str]:
    """Say what was made and how far to trust it."""
    num_frames, height, width = scene.pointmap.shape[:3]
    focal, surfaces = scene.intrinsics[:, 0, 0], float(scene.valid.float().mean())
    return [
        f"{scene.made['task']} to 4D: {num_frames} frames of {height}x{width} at {scene.fps:g} fps, {seconds:.0f} s",
        f"focal {float(focal.min()):.1f} .. {float(focal.max()):.1f} pixels, surfaces {surfaces:.0%} of the pixels",
        "unusual or degenerate: " + ("; ".join(scene.flags) or "nothing"),
    ]


main = Command("one4d generate", __doc__, _add_arguments, generate)
