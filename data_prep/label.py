"""Label clips with a tool of others: python -m data_prep.label --with da3 clips --out labels/da3

Runs the tool, which you have installed yourself, on one clip after another. Each leaves one folder in --out, as the
tool writes it, with a `clip.json` of frame rate, model and licence; what it printed is in <clip>.log. The folder
appears when the clip is done, so the command can be stopped at any moment and started again. The next step reads it:
`python -m data_prep.write_shards --source da3 --root labels/da3 ...`.

Labels carry the licence of the model that made them. What runs without --model may be used commercially; ViPE has no
such pipeline, so one has to be named. Nothing is downloaded by this command; the tools fetch their weights themselves.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_prep.cut_clips import SUFFIXES
from data_prep.sources.labels import TOOLS
from one4d_pl.commands.command import Command
from one4d_pl.data.texts import licence_text
from one4d_pl.errors import UserError, reading
from one4d_pl.files import check_folder, whole_folder, write_json
from one4d_pl.progress import Progress
from one4d_pl.scene.media import VideoReader, frame_rate

DRIVER = Path(__file__).parent / "run_mapanything.py"

log = logging.getLogger("data_prep")


@dataclass(frozen=True)
class Labeler:
    """How a tool is run on one clip; its folders are read by the tool of the same name in `sources.labels`."""

    program: str  # found on PATH, or given with --program
    home: str  # where to get it
    models: dict[str, str]  # by the name that --model takes: licence of the labels
    default: str | None  # a model whose labels may be used commercially; None where there is none
    command: Callable[[str, Path, Path, str], list[str]]  # program, clip, folder to write, model
    leftovers: tuple[str, ...] = ()  # what it leaves besides and nobody reads


def _vipe(program: str, clip: Path, out: Path, model: str) -> list[str]:
    return [program, "infer", str(clip), "--output", str(out), "--pipeline", model]


def _da3(program: str, clip: Path, out: Path, model: str) -> list[str]:
    # it keeps every int(rate / fps)-th frame, at least each one
    rate = ["--fps", "1000"]
    size = ["--process-res", "644"]  # the longer side, a multiple of 14: no less than the large scales' 352x624
    saved = ["--export-dir", str(out), "--auto-cleanup", "--export-format", "npz"]
    return [program, "video", str(clip), *rate, *size, "--model-dir", model, *saved]


def _mapanything(program: str, clip: Path, out: Path, model: str) -> list[str]:
    return [program, str(DRIVER), str(out / "images"), str(out / "predictions.npz"), model]


# Licences as the models' own pages state them, at the commits that `sources.labels` names. Each pipeline of ViPE
# runs UniDepth (lpiccinelli-eth/UniDepth @ 0e81f50), Video Depth Anything's large model (DepthAnything/
# Video-Depth-Anything @ 06b5825) or DA3-GIANT, all CC-BY-NC-4.0.
LABELERS = {
    "vipe": Labeler(
        "vipe",
        "https://github.com/nv-tlabs/vipe",
        dict.fromkeys(("default", "no_vda", "static_vda", "dav3", "lyra"), "CC-BY-NC-4.0"),
        None,
        _vipe,
    ),
    "da3": Labeler(
        "da3",
        "https://github.com/ByteDance-Seed/Depth-Anything-3",
        {
            "depth-anything/DA3-BASE": "Apache-2.0",
            "depth-anything/DA3-SMALL": "Apache-2.0",
            "depth-anything/DA3-LARGE-1.1": "CC-BY-NC-4.0",
            "depth-anything/DA3-GIANT-1.1": "CC-BY-NC-4.0",
            "depth-anything/DA3NESTED-GIANT-LARGE-1.1": "CC-BY-NC-4.0",
        },
        "depth-anything/DA3-BASE",
        _da3,
        ("input_images",),
    ),
    "mapanything": Labeler(
        sys.executable,
        "https://github.com/facebookresearch/map-anything",
        {"facebook/map-anything-apache": "Apache-2.0", "facebook/map-anything": "CC-BY-NC-4.0"},
        "facebook/map-anything-apache",
        _mapanything,
        ("images",),
    ),
}


class _ToolFailed(RuntimeError):
    """A tool did not label a clip."""


def model_and_licence(tool: str, model: str | None) -> tuple[str, str]:
    """Return the model to run and the licence of its labels; UserError where one has to be named."""
    labeler = LABELERS[tool]
    if model is None and labeler.default is None:
        known = ", ".join(f"{name} ({licence})" for name, licence in labeler.models.items())
        raise UserError(f"--with {tool}: no model of it may be used commercially, so none is taken: --model {known}")
    name = model or labeler.default or ""
    # of a model that is not on the list nothing is known: what the tool's own default asks for
    return name, labeler.models.get(name, TOOLS[tool].LICENCE)


def check_program(tool: str, program: str) -> None:
    """Raise UserError where the tool is not installed."""
    advice = f"install it ({LABELERS[tool].home}), or name it with --program"
    if shutil.which(program) is None:
        raise UserError(f"--with {tool}: no program {program}; {advice}")
    if tool == "mapanything":
        found = subprocess.run([program, "-c", "import mapanything"], capture_output=True, timeout=600, check=False)
        if found.returncode:
            raise UserError(f"--with mapanything: {program} has no package mapanything; {advice} (its Python)")


def label_clip(clip: Path, out: Path, tool: str, program: str, model: str, texts: dict[str, str], limit: float) -> str:
    """Label one clip; return "" or why it failed. OSError and interrupts pass; nothing half-done is left."""
    labeler = LABELERS[tool]
    try:
        with whole_folder(out / clip.stem) as staging:
            if tool == "mapanything":
                (staging / "images").mkdir()
                for number, frame in enumerate(VideoReader(clip)):
                    Image.fromarray(frame.numpy()).save(staging / "images" / f"{number:06d}.png", compress_level=1)
            _run_tool(labeler.command(program, clip, staging, model), out / f"{clip.stem}.log", limit)
            if len(TOOLS[tool].list_units(staging)) != 1:
                raise _ToolFailed(f"left no {TOOLS[tool].LAYOUT}")
            for name in labeler.leftovers:
                shutil.rmtree(staging / name, ignore_errors=True)
            write_json(staging / "clip.json", {"fps": frame_rate(clip), "tool": tool, "model": model, **texts})
    except (_ToolFailed, UserError) as error:
        return str(error)
    return ""


def _run_tool(words: Sequence[str], log_file: Path, limit: float) -> None:
    """Run a program with its output in a file; _ToolFailed where it fails or takes more than `limit` seconds."""
    with log_file.open("wb") as output:
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise _ToolFailed(f"took more than {limit / 60:g} minutes; see {log_file}") from error
    if done.returncode:
        raise _ToolFailed(f"ended with {done.returncode}; see {log_file}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clips", type=Path, metavar="CLIPS", help="folder of clips (of data_prep.cut_clips)")
    parser.add_argument("--with", dest="tool", choices=tuple(LABELERS), required=True, help="the tool that labels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the labels")
    parser.add_argument("--model", metavar="NAME", help="the tool's model, or ViPE's pipeline; default: a free one")
    parser.add_argument(
        "--program", metavar="PATH", help="the tool's command (mapanything: its Python); default: PATH's"
    )
    parser.add_argument(
        "--licence",
        default="LicenseRef-own-videos",
        help="licence of the videos, said beside that of the labels (default %(default)s)",
    )
    parser.add_argument("--domain", choices=("real", "synthetic"), default="real", help="(default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="limit of time per clip (default %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="number of this task of an array job (default %(default)s)")
    parser.add_argument("--world", type=int, default=1, help="tasks of the array job (default %(default)s)")


def _run(args: argparse.Namespace) -> int:
    """Label what is not labelled yet; return 1 where the tool failed on a clip."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not 0 <= args.rank < args.world or args.minutes <= 0:
        raise UserError(
            f"need 0 <= --rank < --world and --minutes above 0, got {args.rank}, {args.world}, {args.minutes}"
        )
    with reading(args.clips):
        clips = sorted(path for path in args.clips.iterdir() if path.suffix.lower() in SUFFIXES)
    if not clips:
        raise UserError(f"{args.clips}: no clips in it ({', '.join(SUFFIXES)}); data_prep.cut_clips makes them")
    model, licence = model_and_licence(args.tool, args.model)
    try:
        texts = {"licence": f"{licence_text(args.licence)} AND {licence}", "domain": args.domain}
    except ValueError as error:
        raise UserError(f"--licence: {error}") from None
    program = args.program or LABELERS[args.tool].program
    check_program(args.tool, program)
    check_folder(args.out, "--out")
    args.out.mkdir(parents=True, exist_ok=True)
    log.info("%s with %s: its labels are %s", args.tool, model, licence)
    mine = clips[args.rank :: args.world]
    todo = [clip for clip in mine if not (args.out / clip.stem / "clip.json").is_file()]
    failed = 0
    for clip in Progress(todo, unit="clip"):
        if reason := label_clip(clip, args.out, args.tool, program, model, texts, 60 * args.minutes):
            failed += 1
            log.warning("%s: %s", clip, reason)
    print(f"{len(mine) - failed} of {len(mine)} clips are labelled: {args.out}")
    return 1 if failed else 0


main = Command("python -m data_prep.label", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
