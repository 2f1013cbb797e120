"""The viewer and its offline file: what is sent is the scene, upright, within its size, and a real browser shows it.

ONE4D_SCREENSHOTS=FOLDER keeps what the browser showed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.commands import view
from one4d_pl.geometry.camera import to_world, unproject
from one4d_pl.geometry.se3 import se3_matrix, so3_exp
from one4d_pl.scene import viewer
from one4d_pl.scene.exports import shown_pixels
from one4d_pl.scene.point_cloud import static_pixels
from one4d_pl.scene.scene import save_scene
from one4d_pl.toy.world import render_clip
from tests.scene.toy_scene import SEED, exact_scene

REPO = Path(__file__).parents[2]
needs_viser = pytest.mark.skipif(importlib.util.find_spec("viser") is None, reason="needs viser: the `viz` extra")


@pytest.fixture(scope="module")
def scene():
    return exact_scene(5, 48, 64)


def test_a_thing_that_leaves_is_seen_through_and_a_hidden_wall_stays():
    intrinsics = torch.tensor([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]]).double().expand(3, 3, 3)
    depth = torch.full((3, 24, 32), 4.0)
    thing = torch.zeros(3, 24, 32, dtype=torch.bool)
    for t, column in enumerate((2, 12, 22)):  # a near square that walks to the right, before a wall
        thing[t, 8:16, column : column + 6] = True
    depth[thing] = 2.0
    valid = torch.ones_like(thing)
    cam2world = torch.eye(4).double().expand(3, 4, 4)
    points = unproject(depth, intrinsics.float())
    assert torch.equal(static_pixels(points, valid, valid, depth, intrinsics, cam2world), ~thing)
    sky = valid & thing  # the wall is gone: the thing is seen against the sky, through which one looks as well
    assert not bool(static_pixels(points, sky, sky, depth, intrinsics, cam2world)[thing].any())
    unknown = torch.zeros_like(valid)  # flying points all over: nothing is known, so nothing is contradicted
    assert bool(static_pixels(points, valid, unknown, depth, intrinsics, cam2world).all())


@pytest.mark.parametrize("degrees", [70, 180])
def test_what_another_frame_does_not_see_it_does_not_contradict(degrees):
    intrinsics = torch.tensor([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]]).double().expand(2, 3, 3)
    turn = so3_exp(torch.tensor([[0.0, 0.0, 0.0], [0.0, math.radians(degrees), 0.0]]).double())
    cam2world = se3_matrix(turn, torch.zeros(2, 3).double())
    depth, valid = torch.full((2, 24, 32), 4.0), torch.ones(2, 24, 32, dtype=torch.bool)
    depth[1] = 100.0  # far behind, but elsewhere
    points = to_world(unproject(depth, intrinsics.float()), cam2world.float())
    assert bool(static_pixels(points, valid, valid, depth, intrinsics, cam2world).all())


def test_the_exact_world_is_static_where_nothing_moves(scene):
    shown, moving = shown_pixels(scene, keep_flying_points=False), render_clip(SEED, 5, 48, 64).moving
    static = static_pixels(scene.pointmap, scene.valid, shown, scene.depth, scene.intrinsics, scene.cam2world)
    assert float(static[shown & ~moving].float().mean()) > 0.98  # at grazing angles a pixel's neighbour is farther


@needs_viser
def test_up_is_against_gravity_for_a_tilted_first_camera(scene):
    tilt = se3_matrix(so3_exp(torch.tensor([0.0, 0.0, 0.5]).double()), torch.zeros(3).double())
    cam2world = scene.cam2world.clone()
    cam2world[1:] = tilt @ cam2world[1:]
    server = viewer.open_server(0)
    try:
        viewer.Stage.of(replace(scene, cam2world=cam2world), False).set_up(server)
        up = -cam2world[:, :3, 1].mean(0)
        np.testing.assert_allclose(server.initial_camera.up, (up / up.norm()).numpy(), atol=1e-9)
        assert float(torch.as_tensor(server.initial_camera.up) @ -cam2world[0, :3, 1]) > 0
    finally:
        server.stop()


@needs_viser
def test_the_viewer_is_reached_from_this_machine_alone(scene):
    live = viewer.Viewer(scene, 0, keep_flying_points=False)
    try:
        host, port = live.address.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        socket.create_connection((host, int(port)), timeout=10).close()
        with pytest.raises(OSError):  # another address of the same machine
            socket.create_connection(("127.0.0.2", int(port)), timeout=10)
    finally:
        live.close()


@needs_viser
def test_the_file_takes_the_finest_stride_that_fits_and_says_it(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "BACKGROUND_POINTS", 2)
    free = viewer.write_html(tmp_path / "free.html", scene, False)
    size = (tmp_path / "free.html").stat().st_size
    assert free == 1 and size < viewer.HTML_BYTES
    limit = size - 30_000
    tight = viewer.write_html(tmp_path / "tight.html", scene, False, limit)
    assert tight == 2 and (tmp_path / "tight.html").stat().st_size <= limit
    with monkeypatch.context() as patch:
        patch.setattr(viewer, "POINT_BYTES", 10_000)  # a far too careful guess is followed by what compression allows
        assert viewer.write_html(tmp_path / "free.html", scene, False) == 1
    with pytest.raises(ValueError, match="100000 bytes do not hold"):
        viewer.write_html(tmp_path / "none.html", scene, False, 100_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free.html", "tight.html"]


def test_the_door_says_in_one_line_what_is_missing(scene, tmp_path, refusal, monkeypatch):
    folder = tmp_path / "scene"
    save_scene(folder, scene)
    assert "--port: 70000" in refusal(view.main, folder, "--port", "70000")
    if importlib.util.find_spec("viser") is not None:
        assert "no scene.json" in refusal(view.main, tmp_path)
        assert "no such folder" in refusal(view.main, tmp_path / "none")
        assert "cannot write" in refusal(view.main, folder, "--html", folder / "scene.json" / "x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'one4d_pl[viz]'" in refusal(view.main, folder)


@needs_viser
def test_the_door_serves_until_it_is_interrupted(scene, tmp_path):
    save_scene(tmp_path / "scene", scene)
    # a shell that runs the tests in the background makes them, and so the door, deaf to SIGINT
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_module('one4d_pl', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program, "view", str(tmp_path / "scene"), "--port", "0"]
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) as door:
        watch = threading.Timer(120, door.kill)  # a door that says nothing ends, and with it the wait for a line
        watch.start()
        try:
            said = next(line for line in door.stderr if line.startswith("open "))
            with urllib.request.urlopen(said.split()[1], timeout=30) as page:
                assert b"<title>" in page.read()
            door.send_signal(signal.SIGINT)
            assert door.wait(30) == 130 and "Traceback" not in door.stderr.read()
        finally:
            watch.cancel()
            door.kill()


def see(browser, name, folder):  # -> the part of the page without panels and notices
    picture = browser.picture()
    target = Path(os.environ.get("ONE4D_SCREENSHOTS", folder))
    target.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(target / f"{name}.png")
    return picture[200:580, :540].astype(np.int16)


def settled(browser, name, folder, seconds=60):
    """The picture once it is drawn and stands still."""
    end, before = time.monotonic() + seconds, None
    while time.monotonic() < end:
        time.sleep(0.8)
        now = see(browser, name, folder)
        if before is not None and float((now < 240).any(-1).mean()) > 0.05 and np.abs(now - before).mean() < 0.2:
            return now
        before = now
    raise AssertionError(f"{name}: blank or never still; errors: {browser.errors}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("websockets.sync.client", reason="needs websockets: the `viz` extra")
    from tests.scene.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("needs Chromium: make setup-system")
    opened = Browser(tmp_path_factory.mktemp("profile"), 900, 640)
    yield opened
    opened.close()


@needs_viser
def test_a_browser_shows_the_viewer_and_time_changes_the_picture(scene, browser, tmp_path):
    live = viewer.Viewer(scene, 0, keep_flying_points=False)
    try:
        browser.errors.clear()
        browser.send("Page.navigate", url=live.address)
        first = settled(browser, "viewer_first", tmp_path)
        browser.slide(0, 0.99)
        browser.wait(lambda: live.time.value == 4, "the slider")
        last = settled(browser, "viewer_last", tmp_path)
        browser.slide(0, 0.01)
        browser.wait(lambda: live.time.value == 0, "the slider")
        again = settled(browser, "viewer_again", tmp_path)
        changed, same = np.abs(last - first).mean(), np.abs(again - first).mean()
        assert changed > 1.0 and same < changed / 4
        assert not browser.errors
    finally:
        browser.send("Page.navigate", url="about:blank")  # before its server goes
        live.close()


@needs_viser
def test_a_browser_shows_the_file_offline_and_time_changes_the_picture(scene, browser, tmp_path):
    valid = scene.valid.clone()
    valid[2] = False  # a frame of sky alone
    save_scene(tmp_path / "scene", replace(scene, valid=valid))
    assert view.main([str(tmp_path / "scene"), "--html", str(tmp_path / "scene.html")]) == 0
    browser.errors.clear()
    browser.requests.clear()
    browser.send("Page.navigate", url=(tmp_path / "scene.html").as_uri())
    browser.wait(lambda: browser.run("document.querySelectorAll('[role=slider]').length") == 1, "the time slider")
    browser.slide(0, 0.5)  # pauses it, a tick later
    settled(browser, "html_paused", tmp_path)
    pictures = []
    for name, position in (("html_first", 0.05), ("html_last", 0.95), ("html_again", 0.05)):
        browser.slide(0, position)
        pictures.append(settled(browser, name, tmp_path))
    changed, same = (np.abs(picture - pictures[0]).mean() for picture in pictures[1:])
    assert changed > 1.0 and same < changed / 4  # not 0: viser adapts its resolution to the machine's speed
    assert not browser.errors
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data", "blob"}  # nothing from elsewhere
