"""The work behind the page of `one4d app`: a request becomes the words of `one4d generate`, and a folder of results.

What runs is `generate.make_scene` on these words, parsed by its own parser; the page shows the same words. A job's
folder holds scene/ (as `one4d generate` leaves it), viewer.html and what was downloaded.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from one4d_pl.commands import generate
from one4d_pl.commands.export import FORMATS
from one4d_pl.commands.view import view
from one4d_pl.config import DEMO_ADAPTERS
from one4d_pl.errors import UserError
from one4d_pl.files import open_whole, temporary
from one4d_pl.inference.hub import fetch_adapters
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.scene.exports import export_scene
from one4d_pl.scene.scene import Scene, is_scene, open_scene

if TYPE_CHECKING:
    import argparse

    from one4d_pl.inference.pipeline import One4DPipeline

TASKS = ("text", "image", "frames", "video")
MAX_PICTURES = 8  # on the time line
KEEP_S = 3600.0  # of uploads and scenes
DOWNLOADS = ("scene", "cameras", "html", *FORMATS)


@dataclass(frozen=True)
class Request:
    """What a user asks for; None leaves a setting to the adapter."""

    task: str  # of TASKS
    prompt: str = ""
    files: tuple[Path, ...] = ()  # one picture, some, or one video, as the task has it
    numbers: tuple[int, ...] = ()  # of the frames that the pictures are
    adapters: Path = DEMO_ADAPTERS
    num_frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise UserError where the files are not what the task takes."""
        count, most = len(self.files), MAX_PICTURES if self.task == "frames" else 1
        if self.task != "text" and not 1 <= count <= most:
            kind = {"image": "one picture", "frames": f"1 to {most} pictures", "video": "one video"}[self.task]
            raise UserError(f"{self.task}: {count or 'no'} files; give {kind}")

    def words(self, out: str, name: Callable[[Path], str] = str) -> list[str]:
        """Return the arguments of `one4d generate` that do this, with the files called by `name`."""
        names = [name(file) for file in self.files]
        given = {
            "text": [],
            "image": ["--image", *names],
            "frames": ["--frames", *(f"{file}@{number}" for file, number in zip(names, self.numbers))],
            "video": ["--video", *names],
        }[self.task]
        # a value that begins with a dash would be taken for an option
        prompt = [f"--prompt={self.prompt}"] if self.prompt.startswith("-") else ["--prompt", self.prompt]
        settings = {"--num-frames": self.num_frames, "--steps": self.steps, "--guidance": self.guidance}
        adapters = [] if self.adapters == DEMO_ADAPTERS else ["--adapters", str(self.adapters)]
        chosen = [str(word) for key, value in settings.items() if value is not None for word in (key, value)]
        return [*(prompt if self.prompt else []), *given, *adapters, *chosen, "--seed", str(self.seed), "--out", out]


@dataclass(frozen=True)
class Made:
    """The result of a request."""

    folder: Path  # of the job
    scene: Scene
    lines: tuple[str, ...]  # what was made and how far to trust it
    commands: str  # that do the same, in a shell

    @property
    def scene_folder(self) -> Path:
        return self.folder / "scene"

    @property
    def html(self) -> Path:
        return self.folder / "viewer.html"


class Studio:
    """The model, which stays open between the jobs, and the folders of the jobs. It does one thing at a time.

    Args:
        folder: for jobs/ and uploads/, whose contents are removed after an hour.
        adapters: to choose from; the first are opened at once.
        options: of the model, as `one4d generate` takes them.
    """

    def __init__(self, folder: Path, adapters: Sequence[Path], options: Sequence[str] = ()) -> None:
        self.cards = {str(path): AdapterCard.read(fetch_adapters(path)) for path in adapters}
        self.jobs, self.uploads, self._options = folder / "jobs", folder / "uploads", list(options)
        for part in (self.jobs, self.uploads):
            part.mkdir()
        self._opened: tuple[Path, One4DPipeline] | None = None
        self._open(self._parse(Request("text", adapters=adapters[0]).words("scene")))

    def make(self, request: Request, on_step: Callable[[int, int], None] = lambda done, total: None) -> Made:
        """Make a scene and the page to turn it in; UserError says in one line what cannot be done."""
        start = time.monotonic()
        request.check()
        folder = self.jobs / secrets.token_hex(16)  # whoever knows the name may read it
        folder.mkdir()
        try:
            scene = generate.make_scene(self._parse(request.words(str(folder / "scene"))), self._open, on_step)
            made = Made(
                folder, scene, tuple(generate.report_lines(scene, time.monotonic() - start)), self._say(request)
            )
            view(made.scene_folder, made.html, port=0, keep_flying_points=False)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        remove_old([*self.jobs.iterdir(), *self.uploads.iterdir()], time.time() - KEEP_S)
        return made

    def pack(self, folder: Path, names: Iterable[str]) -> list[Path]:
        """Write what is asked of DOWNLOADS and return the files; folders become zip files."""
        scene = folder / "scene"
        if not is_scene(scene):
            raise UserError("this scene is gone; make it again")
        here = {"cameras": scene / "cameras.json", "html": folder / "viewer.html"}
        files = {name: here.get(name, folder / f"{name}.zip") for name in DOWNLOADS if name in names}
        missing = [name for name, file in files.items() if not file.exists()]
        formats = tuple(name for name in missing if name in FORMATS)
        with temporary(folder / "exported") as exported:
            if formats:
                export_scene(open_scene(scene), exported, formats)
            for name in missing:
                _zip(scene if name == "scene" else exported / name, files[name])
        return list(files.values())

    def _open(self, args: argparse.Namespace) -> One4DPipeline:
        """Return the model of these adapters; it replaces the one before, for two may not fit."""
        if self._opened is None or self._opened[0] != args.adapters:
            self._opened = None
            self._opened = args.adapters, generate.open_pipeline(args)
        return self._opened[1]

    def _parse(self, words: list[str]) -> argparse.Namespace:
        return generate.main.parser().parse_args([*self._options, *words])

    def _say(self, request: Request) -> str:
        words = request.words("scene", lambda file: f"./{file.name}" if file.name.startswith("-") else file.name)
        formats = " ".join(FORMATS)
        return (
            f"{shlex.join(['one4d', 'generate', *self._options, *words])}\n"
            "one4d view scene --html scene.html\n"
            f"one4d export scene --out exported --formats {formats}"
        )


def remove_old(paths: Iterable[Path], before: float) -> None:
    """Remove files and folders that were last changed before a time in seconds."""
    for path in paths:
        if path.stat().st_mtime < before:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _zip(folder: Path, target: Path) -> None:
    with open_whole(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path(folder.name, path.relative_to(folder)))
