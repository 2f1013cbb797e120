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
    """Build the page."""
    cards = {path: (f"{Path(path).name} (step {card.step})", card) for path, card in studio.cards.items()}
    first, (_, card) = next(iter(cards.items()))
    with gr.Blocks(analytics_enabled=False, title="One4D") as page:
        gr.Markdown("# One4D\nA text, an image, a few frames or a video becomes a 4D scene.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                task = gr.Radio([*TASKS], value=TASKS[0], label="From")
                prompt = gr.Textbox(label="Prompt", lines=2, placeholder="a red ball rolls over grass")
                files = gr.File(visible=False, file_count="multiple", file_types=PICTURES + VIDEOS, height=140)
                strip = gr.HTML(visible=False, padding=False)
                places = [gr.Slider(0, 1, 0, step=1, visible=False) for _ in range(MAX_PICTURES)]
                go = gr.Button("Make the scene", variant="primary")
                with gr.Accordion("Settings", open=False):
                    choices = [(name, path) for path, (name, _) in cards.items()]
                    adapters = gr.Dropdown(choices, value=first, label="Adapters")
                    about = gr.Markdown(describe(card))
                    num_frames = gr.Number(
                        None, label="Frames", precision=0, placeholder="the adapter's; a video's own"
                    )
                    steps = gr.Number(None, label="Steps", precision=0, placeholder="the adapter's")
                    guidance = gr.Number(None, label="Guidance on the prompt", placeholder="the adapter's; 1 = off")
                    seed = gr.Number(0, label="Seed", precision=0)
            with gr.Column(scale=3, min_width=300):
                report = gr.Markdown("The scene will be here.")
                with gr.Row():
                    rgb, depth = (
                        gr.Video(label=label, loop=True, autoplay=True, interactive=False, min_width=240, height=260)
                        for label in ("Frames", "Depth, light = near")
                    )
                viewer = gr.HTML(elem_classes="view")
                commands = gr.Code(
                    language="shell",
                    label="The same in a shell",
                    interactive=False,
                    visible=False,
                    wrap_lines=True,
                    elem_classes="shell",
                )
                with gr.Accordion("Cameras", open=False, visible=False) as camera_box:
                    cameras = gr.Dataframe(interactive=False, max_height=300)
                with gr.Accordion("Downloads", open=False, visible=False) as download_box:
                    names = gr.CheckboxGroup([*DOWNLOADS], value=["scene"], label="Files")
                    fetch = gr.Button("Make the files")
                    packed = gr.File(label="Ready", file_count="multiple", interactive=False)
        job, thumbnails = gr.State(), gr.State([])

        def choose_task(chosen: str) -> list[object]:
            label, kinds = UPLOADS[chosen]
            hidden = [gr.update(visible=False)] * MAX_PICTURES
            box = gr.update(value=None, visible=chosen != "text", label=label, file_types=kinds)
            return [box, [], gr.update(value="", visible=False), *hidden]

        def place(chosen: str, uploaded: list[str] | None, frames: int | None, path: str) -> list[object]:
            last = (frames or studio.cards[path].num_frames) - 1
            sliders = [gr.update(visible=False)] * MAX_PICTURES
            try:
                request = Request(chosen, files=paths_of(uploaded))
                if request.files:
                    request.check()
                shown = [thumbnail(first_frame(file, chosen)) for file in request.files]
            except UserError as error:
                return [
                    [],
                    gr.update(value=f'<p class="wrong">{readable(error, paths_of(uploaded))}</p>', visible=True),
                    *sliders,
                ]
            numbers = [round(i * last / max(1, len(shown) - 1)) for i in range(len(shown))]
            if chosen == "frames":
                for i, (file, number) in enumerate(zip(request.files, numbers)):
                    sliders[i] = gr.update(
                        visible=True, maximum=max(1, last), value=number, label=f"{file.name} is frame"
                    )
            return [shown, gr.update(value=time_line(shown, numbers, last), visible=bool(shown)), *sliders]

        def move(shown: list[str], frames: int | None, path: str, *numbers: int) -> str:
            return time_line(shown, numbers, (frames or studio.cards[path].num_frames) - 1)

        def make(
            chosen: str,
            text: str,
            uploaded: list[str] | None,
            path: str,
            frames: int | None,
            count: int | None,
            scale: float | None,
            number: int | None,
            progress: gr.Progress = PROGRESS,  # gradio wants it before the starred ones
            *numbers: int,
        ) -> list[object]:
            given = paths_of(uploaded) if chosen != "text" else ()
            request = Request(
                chosen,
                text.strip(),
                given,
                tuple(int(n) for n in numbers),
                Path(path),
                frames,
                count,
                scale,
                number or 0,
            )
            with telling(given):
                made = studio.make(request, follower(progress))
            scene = made.scene_folder
            frame = f'<iframe title="the points, to turn" src="gradio_api/file={made.html}"></iframe>'
            told = "\n".join(f"- {line}" for line in made.lines)
            there = gr.update(visible=True)
            results = [told, str(scene / "rgb.mp4"), str(scene / "depth.mp4"), frame, camera_table(made.scene)]
            return [*results, gr.update(value=made.commands, visible=True), there, there, None, str(made.folder)]

        def pack(folder: str | None, wanted: list[str]) -> list[str]:
            with telling(()):
                return [str(path) for path in studio.pack(Path(folder or ""), wanted)]

        # quick ones beside the model, which one user at a time has
        task.change(choose_task, task, [files, thumbnails, strip, *places], api_visibility="private")
        placed = {"inputs": [task, files, num_frames, adapters], "outputs": [thumbnails, strip, *places]}
        gr.on([files.change, num_frames.change, adapters.change], place, **placed, api_visibility="private")
        for slider in places:
            moved = [thumbnails, num_frames, adapters, *places]
            slider.release(move, moved, strip, show_progress="hidden", api_visibility="private")
        adapters.change(lambda path: describe(studio.cards[path]), adapters, about, api_visibility="private")
        go.click(
            make,
            [task, prompt, files, adapters, num_frames, steps, guidance, seed, *places],
            [report, rgb, depth, viewer, cameras, commands, camera_box, download_box, packed, job],
            show_progress_on=report,
            concurrency_id="model",
            api_name="make",
        )
        fetch.click(pack, [job, names], packed, concurrency_id="model", api_visibility="private")
    return page


def describe(card: AdapterCard) -> str:
    """Say what settings an adapter has."""
    sampler = card.sampler_config
    return f"Its own settings: {card.num_frames} frames of {card.height}x{card.width}, {sampler.steps} steps."


def follower(progress: gr.Progress) -> Callable[[int, int], None]:
    """Return what shows finished steps, and how long the others may take."""
    start = time.monotonic()

    def on_step(done: int, total: int) -> None:
        left = (time.monotonic() - start) / max(1, done) * (total - done)
        words = f"sampling, about {left:.0f} s left" if done else "sampling"
        progress(
            (done, total) if total else 0,
            words if done < total or not total else "cameras, depth and files",
            unit="steps",
        )

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
    """Show a user's error in the page until it is closed."""
    try:
        yield
    except UserError as error:
        raise gr.Error(readable(error, files), duration=None, print_exception=False) from None
