"""The page of `one4d app`, in gradio (the `app` extra): its inputs, its results, and what its buttons call."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
from PIL import Image
from torch import Tensor

from one4d_pl.commands.app_jobs import DOWNLOADS, MAX_PICTURES, TASKS, Request, Studio
from one4d_pl.errors import UserError
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.scene.media import load_image, open_video
from one4d_pl.scene.scene import Scene

MAX_UPLOAD = "200mb"  # of one file
MAX_WAITING = 32  # users in the queue
SHOWN_S = 30.0  # of an error, unless it is closed
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"]
VIDEOS = [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".gif"]
UPLOADS: dict[str, tuple[str, list[str]]] = {  # the box's title, and what it takes
    "text": ("", PICTURES),
    "image": ("Frame 0: a picture", PICTURES),
    "frames": (f"Up to {MAX_PICTURES} pictures", PICTURES),
    "video": ("All frames: a video", VIDEOS),
}
THUMBNAIL = 72  # pixels
SYSTEM, MONOSPACE = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # no font comes from elsewhere
CSS = f"""
.line {{ position: relative; height: {THUMBNAIL + 22}px; border-bottom: 3px solid var(--color-accent); }}
.line figure {{ position: absolute; bottom: 0; width: {THUMBNAIL}px; margin: 0; text-align: center; font-size: 12px; }}
.line img {{ display: block; width: 100%; height: {THUMBNAIL}px; object-fit: contain; object-position: bottom; }}
.shell {{ flex-grow: 0 !important; }}
.shell .cm-scroller {{ min-height: 0 !important; }}
.view iframe {{ width: 100%; height: 480px; border: 0; }}
.wrong {{ color: var(--error-text-color); }}
"""
PROGRESS = gr.Progress()


def launch(studio: Studio, host: str, port: int, share: bool) -> str:
    """Serve the page in threads of this process and return its address; OSError where the port is taken."""
    gr.set_static_paths([studio.jobs])  # results are served from where they lie, the viewer as a page
    page = build(studio)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=MAX_UPLOAD,
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(
            font=[gr.themes.Font(name) for name in SYSTEM], font_mono=[gr.themes.Font(name) for name in MONOSPACE]
        ),
        css=CSS,
    )
    return str(address)


def build(studio: Studio) -> gr.Blocks:
    """Build the page: what is given on the left, what is made on the right, and what the one does to the other."""
    act = Actions(studio)
    with gr.Blocks(analytics_enabled=False, title="One4D") as page:
        gr.Markdown("# One4D\nA text, an image, a few frames or a video becomes a 4D scene.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                given = Inputs(studio)
            with gr.Column(scale=3, min_width=300):
                made = Results()
        job, thumbnails = gr.State(), gr.State([])

        line = [thumbnails, given.strip, *given.places]
        given.task.change(act.choose_task, given.task, [given.files, *line], api_visibility="private")
        changes = [given.files.change, given.num_frames.blur, given.adapters.change]
        placing = [given.task, given.files, given.num_frames, given.adapters]
        gr.on(changes, act.place, placing, line, api_visibility="private")
        moving = [thumbnails, given.num_frames, given.adapters, *given.places]
        for place in given.places:
            place.input(act.move, moving, given.strip, show_progress="hidden", api_visibility="private")
        given.adapters.change(act.describe, given.adapters, given.about, api_visibility="private")
        # these two take the model's turn: one user at a time
        given.go.click(
            act.make,
            [given.task, given.prompt, given.files, *given.settings, *given.places],
            [*made.shown, job],
            show_progress_on=made.rgb,
            concurrency_id="model",
            api_name="make",
        )
        made.fetch.click(act.pack, [job, made.names], made.packed, concurrency_id="model", api_visibility="private")
    return page


class Inputs:
    """The left column."""

    def __init__(self, studio: Studio) -> None:
        choices = [(f"{Path(path).name} (step {card.step})", path) for path, card in studio.cards.items()]
        self.task = gr.Radio([*TASKS], value=TASKS[0], label="From")
        self.prompt = gr.Textbox(label="Prompt", lines=2, placeholder="a red ball rolls over grass")
        self.files = gr.File(visible=False, file_count="multiple", file_types=PICTURES + VIDEOS, height=140)
        self.strip = gr.HTML(visible=False, padding=False)
        self.places = [gr.Slider(0, 1, 0, step=1, visible=False, buttons=[]) for _ in range(MAX_PICTURES)]
        self.go = gr.Button("Make the scene", variant="primary")
        with gr.Accordion("Settings", open=False):
            self.adapters = gr.Dropdown(choices, value=choices[0][1], label="Adapters")
            self.about = gr.Markdown(describe(studio.cards[choices[0][1]]))
            # text, since gradio's box for numbers turns an empty one into 0 when it comes into view
            self.num_frames = gr.Textbox(label="Frames", placeholder="the adapter's; a video's own")
            self.steps = gr.Textbox(label="Steps", placeholder="the adapter's")
            self.guidance = gr.Textbox(label="Guidance on the prompt, 1 = off", placeholder="the adapter's")
            self.seed = gr.Textbox(label="Seed", placeholder="0")
        self.settings = [self.adapters, self.num_frames, self.steps, self.guidance, self.seed]


class Results:
    """The right column."""

    def __init__(self) -> None:
        self.report = gr.Markdown("The scene will be here.")
        with gr.Row():
            self.rgb, self.depth = (
                gr.Video(label=label, loop=True, autoplay=True, interactive=False, min_width=240, height=260)
                for label in ("Frames", "Depth, light = near")
            )
        self.viewer = gr.HTML(elem_classes="view")
        label, look = "The same in a shell", {"wrap_lines": True, "elem_classes": "shell"}
        self.commands = gr.Code(language="shell", label=label, interactive=False, visible=False, **look)
        with gr.Accordion("Cameras", open=False, visible=False) as self.camera_box:
            self.cameras = gr.Dataframe(interactive=False, max_height=300)
        with gr.Accordion("Downloads", open=False, visible=False) as self.download_box:
            self.names = gr.CheckboxGroup([*DOWNLOADS], value=["scene"], label="Files")
            self.fetch = gr.Button("Make the files")
            self.packed = gr.File(label="Ready", file_count="multiple", interactive=False)
        boxes = [self.camera_box, self.download_box]
        self.shown = [self.report, self.rgb, self.depth, self.viewer, self.cameras, self.commands, *boxes, self.packed]


class Actions:
    """What the page does when something is chosen, uploaded, moved or clicked; it returns the new contents."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def describe(self, adapters: str) -> str:
        """Return what is known of the adapters."""
        return describe(self._studio.cards[adapters])

    def choose_task(self, task: str) -> list[object]:  # box, thumbnails, strip, a slider per picture
        """Ask for the files of a task, and forget those of another."""
        label, kinds = UPLOADS[task]
        box = gr.update(value=None, visible=task != "text", label=label, file_types=kinds)
        return [box, [], gr.update(value="", visible=False), *[gr.update(visible=False)] * MAX_PICTURES]

    def place(self, task: str, uploaded: list[str] | None, num_frames: str | None, adapters: str) -> list[object]:
        """Show the uploaded files, pictures evenly on the time line, or say what is wrong with one."""
        files, sliders = paths_of(uploaded), [gr.update(visible=False)] * MAX_PICTURES
        try:
            if files:
                Request(task, files=files).check()
            last = self._last(num_frames, adapters)
            shown = [thumbnail(first_frame(file, task)) for file in files]
        except UserError as error:
            return [[], gr.update(value=f'<p class="wrong">{readable(error, files)}</p>', visible=True), *sliders]
        numbers = [round(i * last / max(1, len(shown) - 1)) for i in range(len(shown))]
        for i, file in enumerate(files if task == "frames" else ()):
            name = f"{file.name} is frame"
            sliders[i] = gr.update(visible=True, maximum=max(1, last), value=numbers[i], label=name)
        return [shown, gr.update(value=time_line(shown, numbers, last), visible=bool(shown)), *sliders]

    def move(self, thumbnails: list[str], num_frames: str | None, adapters: str, *numbers: int) -> str:
        """Draw the time line again."""
        return time_line(thumbnails, numbers, self._last(num_frames, adapters))

    def make(
        self,
        task: str,
        prompt: str | None,
        uploaded: list[str] | None,
        adapters: str,
        num_frames: str | None,  # None = never touched
        steps: str | None,
        guidance: str | None,
        seed: str | None,
        progress: gr.Progress = PROGRESS,  # gradio wants it before the starred ones
        *numbers: int,
    ) -> list[object]:
        """Make the scene."""
        files = paths_of(uploaded) if task != "text" else ()
        with telling(files):
            request = Request(
                task=task,
                prompt=(prompt or "").strip(),
                files=files,
                numbers=tuple(map(int, numbers)),
                adapters=Path(adapters),
                num_frames=whole("Frames", num_frames),
                steps=whole("Steps", steps),
                guidance=number("Guidance", guidance),
                seed=whole("Seed", seed) or 0,
            )
            made = self._studio.make(request, follower(progress))
        report = "\n".join(f"- {line}" for line in made.lines)
        videos = [str(made.scene_folder / name) for name in ("rgb.mp4", "depth.mp4")]
        viewer = f'<iframe title="the points, to turn" src="gradio_api/file={made.html}"></iframe>'
        commands, there = gr.update(value=made.commands, visible=True), gr.update(visible=True)
        return [report, *videos, viewer, camera_table(made.scene), commands, there, there, None, str(made.folder)]

    def pack(self, folder: str | None, names: list[str]) -> list[str]:
        """Write the chosen files of the last scene."""
        with telling(()):
            return [str(path) for path in self._studio.pack(Path(folder or ""), names)]

    def _last(self, num_frames: str | None, adapters: str) -> int:
        return (whole("Frames", num_frames) or self._studio.cards[adapters].num_frames) - 1


def number(label: str, text: str | None) -> float | None:
    """Read a number; None where nothing is written."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        raise UserError(f"{label}: {text!r} is no number") from None


def whole(label: str, text: str | None) -> int | None:
    """Read a whole number; None where nothing is written."""
    try:
        return int(text) if text and text.strip() else None
    except ValueError:
        raise UserError(f"{label}: {text!r} is no whole number") from None


def describe(card: AdapterCard) -> str:
    """Say what settings an adapter has."""
    sampler = card.sampler_config
    return f"Its own settings: {card.num_frames} frames of {card.height}x{card.width}, {sampler.steps} steps."


def follower(progress: gr.Progress) -> Callable[[int, int], None]:
    """Return what shows finished steps, and how long the others may take."""
    start = time.monotonic()

    def on_step(done: int, total: int) -> None:
        left = (time.monotonic() - start) / max(1, done) * (total - done)
        if done == 0:
            progress(0, "sampling")
        elif done < total:
            progress((done, total), f"sampling, about {left:.0f} s left", unit="steps")
        else:
            progress((done, total), "cameras, depth and points", unit="steps")

    return on_step


def camera_table(scene: Scene) -> dict[str, object]:
    """Return, per frame, where the camera is in the first one's axes, and its focal length in pixels."""
    rows = [
        [i, *(round(value, 4) for value in cam2world[:3, 3].tolist()), round(float(intrinsics[0, 0]), 2)]
        for i, (cam2world, intrinsics) in enumerate(zip(scene.cam2world, scene.intrinsics))
    ]
    return {"headers": ["frame", "x right", "y down", "z forward", "focal"], "data": rows}


def first_frame(file: Path, task: str) -> Tensor:  # [H, W, 3] uint8
    """Read a picture, or the first frame of a video, as the model gets it."""
    if task != "video":
        return load_image(file)
    for frame in open_video(file, None, 1.0):
        return frame
    raise UserError(f"{file}: holds no frames")


def thumbnail(picture: Tensor) -> str:  # [H, W, 3] uint8 -> a data URI
    """Return a small copy for the page."""
    image, data = Image.fromarray(picture.numpy()), io.BytesIO()
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    image.save(data, "jpeg")
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def time_line(pictures: list[str], numbers: list[int] | tuple[int, ...], last: int) -> str:
    """Draw the pictures where their frames are in time, from 0 to the last frame."""
    figures = (
        f'<figure style="left:calc({number / max(1, last):.4f} * (100% - {THUMBNAIL}px))">'
        f'<img src="{picture}" alt="">{number:g}</figure>'
        for picture, number in zip(pictures, numbers)
    )
    return f'<div class="line">{"".join(figures)}</div>'


def paths_of(uploaded: list[str] | None) -> tuple[Path, ...]:
    """Return the uploaded files."""
    return tuple(Path(file) for file in uploaded or [])


def readable(error: UserError, files: tuple[Path, ...]) -> str:
    """Return an error's line as html, in which a file has the user's name for it."""
    text = str(error)
    for file in files:
        text = text.replace(str(file), file.name)
    return html.escape(text)


@contextlib.contextmanager
def telling(files: tuple[Path, ...]) -> Iterator[None]:
    """Show a user's error in the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(readable(error, files), duration=SHOWN_S, print_exception=False) from None
