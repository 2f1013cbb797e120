"""`one4d app`: what runs is `one4d generate`, and a real browser gets a scene of every task by clicks.

ONE4D_SCREENSHOTS=FOLDER keeps what the browser showed.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from one4d_pl.commands import app, generate
from one4d_pl.commands.app_jobs import DOWNLOADS, KEEP_S, MAX_PICTURES, Made, Request, Studio, remove_old
from one4d_pl.config import DEMO_ADAPTERS
from one4d_pl.data.file_lock import locked
from one4d_pl.errors import UserError
from one4d_pl.scene.folder import save_picture, save_video
from one4d_pl.scene.scene import open_scene
from tests.conftest import REPO, free_port
from tests.scene.toy_scene import exact_scene

needs_viser = pytest.mark.skipif(importlib.util.find_spec("viser") is None, reason="needs viser: the `viz` extra")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio: the `app` extra")
UPLOADS = {
    "image": "Frame 0: a picture",
    "frames": "Up to 8 pictures",
    "video": "All frames: a video",
}  # titles of the box
TASK_INDEX = {"text": 0, "image": 1, "frames": 2, "video": 3}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures and a video of a toy scene, and a text that calls itself a picture."""
    folder, scene = tmp_path_factory.mktemp("media"), exact_scene(9, 48, 64)
    for i in (0, 4, 8):
        save_picture(folder / f"{i}.png", scene.frames[i], [])
    save_video(folder / "clip.mp4", scene.frames, scene.fps)
    for name in ("broken.png", "broken.mp4", "notes.txt"):
        (folder / name).write_text("neither a picture nor a video")
    return folder


def requests(media: Path) -> list[Request]:
    """One of each task."""
    return [
        Request("text", "a red ball"),
        Request("image", files=(media / "0.png",), seed=3),
        Request("frames", files=(media / "0.png", media / "8.png"), numbers=(0, 8, 0, 0), steps=2),
        Request("video", "a ball", (media / "clip.mp4",), guidance=1.5, num_frames=5),
    ]


# --- words


def parsed(words: list[str]) -> argparse.Namespace:
    return generate.main.parser().parse_args(words)


def test_a_request_is_the_words_of_generate(media: Path) -> None:
    text, image, frames, video = (parsed(request.words("out")) for request in requests(media))
    assert (text.prompt, text.image, text.frames, text.video) == ("a red ball", None, None, None)
    assert (text.steps, text.guidance, text.num_frames, text.adapters) == (None, None, None, DEMO_ADAPTERS)
    assert (image.image, image.seed) == (media / "0.png", 3)
    assert (frames.frames, frames.steps) == ([f"{media}/0.png@0", f"{media}/8.png@8"], 2)
    assert (video.video, video.prompt, video.guidance, video.num_frames) == (media / "clip.mp4", "a ball", 1.5, 5)


@pytest.mark.parametrize("prompt", ["--out /etc", "-1", "$(rm -rf ~) 'x' \"y\"", "a\nb", "@0", "ä"])
def test_a_prompt_stays_a_prompt_in_words_and_in_a_shell(prompt: str) -> None:
    words = Request("image", prompt, (Path("-odd name;.png"),)).words("out", lambda file: f"./{file.name}")
    assert shlex.split(shlex.join(words)) == words
    args = parsed(words)
    assert (args.prompt, args.image, args.out) == (prompt, Path("./-odd name;.png"), Path("out"))


@pytest.mark.parametrize("count", [0, 2, MAX_PICTURES + 1])
def test_too_many_or_no_files_are_refused(count: int) -> None:
    files = tuple(Path(f"{i}.png") for i in range(count))
    for task in ("image", "video", *(["frames"] if count != 2 else [])):
        with pytest.raises(UserError, match=f"{task}: .*; give"):
            Request(task, files=files).check()
    Request("text", files=files).check()


# --- jobs


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio"), [DEMO_ADAPTERS], ["--device", "cpu"])


@pytest.fixture(scope="module")
def made(studio: Studio, media: Path) -> Made:
    return studio.make(requests(media)[2])


@needs_viser
def test_the_command_that_is_shown_makes_the_same_scene(made: Made, media: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in media.iterdir():
        (tmp_path / file.name).symlink_to(file)
    words = [shlex.split(line) for line in made.commands.splitlines()]
    assert [line[:2] for line in words] == [["one4d", name] for name in ("generate", "view", "export")]
    assert generate.main(words[0][2:]) == 0
    ours, theirs = open_scene(made.scene_folder), open_scene(tmp_path / "scene")
    assert ours.made == theirs.made and ours.given == theirs.given == (0, 8)
    np.testing.assert_array_equal(ours.frames.numpy(), theirs.frames.numpy())
    np.testing.assert_array_equal(ours.pointmap.numpy(), theirs.pointmap.numpy())


@needs_viser
def test_every_export_is_there_to_download_and_written_once(studio: Studio, made: Made) -> None:
    files = studio.pack(made.folder, DOWNLOADS)
    assert [file.name for file in files] == [
        *("scene.zip", "cameras.json", "viewer.html", "ply.zip", "glb.zip", "colmap.zip", "nerfstudio.zip", "tum.zip"),
        "depth16.zip",
    ]
    inside = {name for file in files if file.suffix == ".zip" for name in zipfile.ZipFile(file).namelist()}
    for name in ("scene/rgb.mp4", "scene/frames/000008.png", "ply/merged.ply", "glb/scene.glb", "depth16/depth.json"):
        assert name in inside
    assert {"colmap/sparse/0/cameras.bin", "nerfstudio/transforms.json", "tum/trajectory.txt"} <= inside
    before = [file.stat().st_mtime_ns for file in files]
    assert [file.stat().st_mtime_ns for file in studio.pack(made.folder, DOWNLOADS)] == before
    assert sorted(path.name for path in made.folder.iterdir()) == sorted(
        {file.name for file in files} - {"cameras.json"} | {"scene"}
    )
    with pytest.raises(UserError, match="gone"):
        studio.pack(studio.jobs / "none", ["ply"])


def test_a_refused_request_leaves_nothing(studio: Studio, media: Path) -> None:
    before = sorted(studio.jobs.iterdir())
    bad = [
        Request("image", files=(media / "broken.png",)),
        Request("video", files=(media / "broken.png",)),
        Request("image", files=(media / "none.png",)),
        Request("frames", files=(media / "0.png", media / "8.png"), numbers=(4, 8)),
        Request("frames", files=(media / "0.png", media / "8.png"), numbers=(0, 0)),
        Request("text", " "),
        Request("text", "x", steps=0),
        Request("text", "x", num_frames=10**9),
        Request("text", "x", seed=-1),
        Request("text", "x", guidance=float("nan")),
    ]
    for request in bad:
        with pytest.raises(UserError) as refusal:
            studio.make(request)
        assert len(str(refusal.value).splitlines()) == 1
    assert sorted(studio.jobs.iterdir()) == before


def test_old_files_and_folders_go(tmp_path: Path) -> None:
    now = time.time()
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scene").touch()
        (tmp_path / f"{name}.txt").touch()
        if name == "old":
            for path in (tmp_path / name, tmp_path / "old.txt"):
                os.utime(path, (now - KEEP_S - 1,) * 2)
    remove_old(tmp_path.iterdir(), now - KEEP_S)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.txt"]


def test_the_folder_goes_with_its_app_and_with_the_next_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(app.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(app.tempfile, "tempdir", str(tmp_path))
    killed, running, young = (tmp_path / f"{app.PREFIX}{name}" for name in ("killed", "running", "young"))
    for folder in (killed, running, young):
        (folder / "jobs").mkdir(parents=True)
    for folder in (killed, running):
        os.utime(folder, (time.time() - 2 * app.YOUNG_S,) * 2)
    with locked(running / ".lock", 0, 0):
        os.utime(running, (time.time() - 2 * app.YOUNG_S,) * 2)
        with app.private_folder() as folder:
            assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
            (folder / "jobs").mkdir()
            assert not killed.exists() and running.exists() and young.exists()
    assert not folder.exists()


def test_the_door_says_in_one_line_what_is_missing(refusal, monkeypatch) -> None:
    if importlib.util.find_spec("gradio") is not None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            assert "--port: cannot listen on" in refusal(app.main, "--port", str(taken.getsockname()[1]))
    assert "--port: 0" in refusal(app.main, "--port", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'one4d_pl[app]'" in refusal(app.main)


# --- the page


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real door in a process of its own; at its end SIGTERM must leave nothing behind."""
    folder, port = tmp_path_factory.mktemp("door"), free_port()
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment["http_proxy"] = "http://127.0.0.1:9"  # nobody is there: the app must not ask it for itself
    command = [sys.executable, "-m", "one4d_pl", "app", "--port", str(port)]
    with subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True) as door:
        watch = threading.Timer(240, door.kill)  # a door that says nothing ends, and with it the wait for a line
        watch.start()
        try:
            said = next(line for line in door.stderr if line.startswith("open "))
            watch.cancel()
            rest: list[str] = []
            reader = threading.Thread(target=lambda: rest.extend(door.stderr), daemon=True)
            reader.start()
            yield said.split()[1]
            assert list(folder.glob(f"{app.PREFIX}*/jobs/*/scene/scene.json"))
            door.send_signal(signal.SIGTERM)
            assert door.wait(60) == 130
            reader.join(30)
            assert not list(folder.glob(f"{app.PREFIX}*"))
            said = "".join(rest)  # gradio itself writes down how it refused a kind of file
            assert said.count("Traceback") == said.count('gradio.exceptions.Error: "Invalid file type'), said
        finally:
            watch.cancel()
            door.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("websockets.sync.client", reason="needs websockets: the `viz` extra")
    from tests.scene.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("needs Chromium: make setup-system")
    opened = Browser(tmp_path_factory.mktemp("profile"), 1280, 1300)
    yield opened
    opened.close()


class Page:
    """The app's page in a browser, as a user handles it."""

    def __init__(self, browser, address: str) -> None:
        self.browser = browser
        browser.errors.clear()
        browser.requests.clear()
        self.resize(1280, 1300)
        browser.send("Page.navigate", url=address)
        browser.wait(lambda: browser.run("document.querySelectorAll('input[type=radio]').length") == 4, "the page")

    def choose(self, task: str) -> None:
        self.browser.run(f"document.querySelectorAll('input[type=radio]')[{TASK_INDEX[task]}].click()")
        if task != "text":
            self.wait(UPLOADS[task])

    def upload(self, *files: Path) -> None:
        document = self.browser.send("DOM.getDocument")["root"]["nodeId"]
        box = self.browser.send("DOM.querySelector", nodeId=document, selector="input[type=file]")["nodeId"]
        self.browser.send("DOM.setFileInputFiles", nodeId=box, files=[str(file) for file in files])

    def write(self, text: str) -> None:
        self.browser.run("document.querySelector('textarea').focus()")
        self.browser.send("Input.insertText", text=text)

    def click(self, label: str) -> None:
        find = f"find(b => b.innerText.trim().startsWith({json.dumps(label)}))"
        self.browser.run(f"[...document.querySelectorAll('button')].{find}.click()")

    def says(self, *words: str) -> bool:
        text = str(self.browser.run("document.body.innerText"))
        return all(word in text for word in words)

    def wait(self, *words: str) -> None:
        self.browser.wait(lambda: self.says(*words), f"{words}")

    def tick(self, *labels: str) -> None:
        """Tick boxes until all of them stay ticked: a busy page may take two clicks for the last one alone."""

        def ticked() -> bool:
            for label in labels:
                box = f"[...document.querySelectorAll('label')].find(l => l.innerText.trim() == {json.dumps(label)})"
                if not self.browser.run(f"{box}.querySelector('input').checked"):
                    self.browser.run(f"{box}.click()")
                    time.sleep(1)
                    return False
            return True

        self.browser.wait(ticked, f"{labels}")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.send("Emulation.setDeviceMetricsOverride", **size)

    def leave(self) -> None:
        """Stop what the page draws: it would cost the next test its time."""
        self.browser.send("Page.navigate", url="about:blank")

    def see(self, name: str, folder: Path) -> None:
        """Keep a picture of the page."""
        target = Path(os.environ.get("ONE4D_SCREENSHOTS", folder))
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.browser.picture()).save(target / f"{name}.png")

    def wait_for_scene(self, task: str) -> None:
        """Until frames and depth can be played and the viewer is there."""
        self.wait(f"{task} to 4D: ", "unusual or degenerate")
        videos = "[...document.querySelectorAll('video')].filter(v => v.readyState >= 2 && v.videoWidth > 0).length"
        self.browser.wait(lambda: self.browser.run(videos) == 2, "two videos")
        canvas = "document.querySelector('.view iframe')?.contentDocument?.querySelectorAll('canvas').length > 0"
        self.browser.wait(lambda: self.browser.run(canvas) is True, "the viewer")

    def wait_for_points(self) -> None:
        """Until the viewer shows them; without a GPU that takes a while."""
        sides = "(r => [r.left, r.top, r.right, r.bottom])"
        box = self.browser.run(f"{sides}(document.querySelector('.view iframe').getBoundingClientRect())")
        left, top, right, bottom = map(int, box)
        # right of the browser's notice and above the controls; all is white until the points are drawn
        cloud = slice(top + 20, bottom - 60), slice((left + right) // 2, right - 20)
        self.browser.wait(lambda: float((self.browser.picture()[cloud] < 160).any(-1).mean()) > 0.05, "the points")

    def move(self, name: str, frame: int) -> None:
        """Write the number of a picture's frame beside its slider."""
        box = (
            f"[...document.querySelectorAll('input[type=number]')].find(i => i.ariaLabel.includes({json.dumps(name)}))"
        )
        self.browser.run(f"(i => {{ i.focus(); i.select() }})({box})")
        self.browser.send("Input.insertText", text=str(frame))
        self.browser.run("document.activeElement.blur()")

    def line(self) -> list[str]:
        """The numbers on the time line."""
        return list(self.browser.run("[...document.querySelectorAll('.line figure')].map(f => f.innerText.trim())"))

    def downloaded(self) -> set[str]:
        """Fetch the scene, its glb and its cameras by clicks; the names in them."""
        self.click("Cameras")
        self.wait("z forward")
        self.click("Downloads")
        self.tick("scene", "glb", "cameras")
        self.click("Make the files")
        links = "[...document.querySelectorAll('a[download]')].map(a => a.href).filter(h => /(zip|json)$/.test(h))"
        self.browser.wait(lambda: len(self.browser.run(links)) == 3, "three links")
        names: set[str] = set()
        for link in self.browser.run(links):
            with urllib.request.urlopen(link, timeout=200) as answer:
                content = answer.read()
            zipped = link.endswith("zip")
            names |= set(zipfile.ZipFile(io.BytesIO(content)).namelist() if zipped else json.loads(content))
        return names


@needs_gradio
@needs_viser
@pytest.mark.parametrize("task", ["text", "image", "frames", "video"])
def test_a_click_gives_a_scene_of_every_task(task: str, browser, address: str, media: Path, tmp_path: Path) -> None:
    page = Page(browser, address)
    page.choose(task)
    files = {"text": [], "image": ["0.png"], "frames": ["0.png", "4.png", "8.png"], "video": ["clip.mp4"]}[task]
    if files:
        page.upload(*(media / file for file in files))
        browser.wait(lambda: len(page.line()) == len(files), "thumbnails")
    else:
        page.write("a red ball rolls over grass")  # the others need none
    if task == "frames":
        browser.wait(lambda: page.line() == ["0", "4", "8"], "evenly spaced frames")
        page.move("4.png", 6)
        browser.wait(lambda: page.line() == ["0", "6", "8"], "the moved frame")
    page.click("Make the scene")
    page.wait_for_scene({"frames": "sparse"}.get(task, task))
    assert page.says("one4d generate", "one4d export scene", *files)
    if task == "text":
        assert {"scene/scene.json", "glb/scene.glb", "convention"} <= page.downloaded()
    elif task == "frames":
        assert page.says("0.png@0 4.png@6 8.png@8")
        page.resize(400, 2400)
        assert browser.run("document.documentElement.scrollWidth") <= 400  # nothing to scroll sideways on a phone
    elif task == "video":
        page.wait_for_points()
    page.see(f"app_{task}", tmp_path)
    assert not browser.errors
    asked = [urlsplit(url) for url in browser.requests]
    hosts = {url.netloc for url in asked if url.scheme not in ("data", "blob")}
    assert hosts == {urlsplit(address).netloc}, hosts  # no font, script or count goes to anybody
    page.leave()


@needs_gradio
@needs_viser
def test_a_bad_upload_gives_a_sentence_in_the_page(browser, address: str, media: Path, tmp_path: Path) -> None:
    page = Page(browser, address)
    page.choose("image")
    page.click("Make the scene")
    page.wait("image: no files; give one picture")
    page.upload(media / "broken.png")
    page.wait("broken.png: not a picture that can be read")
    page.click("Make the scene")
    browser.wait(
        lambda: str(browser.run("document.body.innerText")).count("broken.png: not a picture") == 2, "the error"
    )
    page.see("app_bad", tmp_path)
    assert not page.says(app.PREFIX)  # the user's names, not the server's folders
    page.choose("video")
    page.upload(media / "broken.mp4")
    page.wait("broken.mp4: not a video that can be read")
    page.leave()


@needs_gradio
@needs_viser
def test_an_upload_is_bounded_in_size(address: str) -> None:
    url, chunk = urlsplit(address), bytes(1 << 20)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\nContent-Type: video/mp4\r\n\r\n'
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=200)
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(10**9)}
    connection.request("POST", "/gradio_api/upload", iter([head, *[chunk] * 210]), headers)
    assert connection.getresponse().status == 413
    connection.close()


@needs_gradio
@needs_viser
def test_two_users_at_once_both_get_their_scene(browser, address: str, media: Path, tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client")
    page = Page(browser, address)
    page.write("a red ball")
    other = client.Client(address, verbose=False, download_files=False, analytics_enabled=False)
    unset = ("", "", "", "")  # frames, steps, guidance, seed
    picture = [client.handle_file(media / "0.png")]
    page.click("Make the scene")
    job = other.submit("image", "", picture, str(DEMO_ADAPTERS), *unset, *[0] * MAX_PICTURES, api_name="/make")
    assert "image to 4D" in job.result(timeout=200)[0]
    page.wait_for_scene("text")
    folders = [str(browser.run("document.querySelector('.view iframe').src")), str(job.result()[3])]
    assert len({re.search(r"jobs/([0-9a-f]{32})/", folder)[1] for folder in folders}) == 2
    wrong = other.submit(
        "image",
        "",
        [client.handle_file(media / "notes.txt")],
        str(DEMO_ADAPTERS),
        *unset,
        *[0] * MAX_PICTURES,
        api_name="/make",
    )
    with pytest.raises(client.exceptions.AppError, match="Invalid file type"):
        wrong.result(timeout=200)
    page.leave()
