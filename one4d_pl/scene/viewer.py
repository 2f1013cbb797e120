"""Show a scene in the browser with viser (the `viz` extra): live, or recorded in one html file."""

from __future__ import annotations

import contextlib
import io
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from one4d_pl.files import write_text
from one4d_pl.geometry.se3 import matrix_to_wxyz
from one4d_pl.scene.exports import shown_pixels
from one4d_pl.scene.panels import near_to_far, to_bytes
from one4d_pl.scene.point_cloud import frustum_depth, static_pixels
from one4d_pl.scene.scene import Scene, depth_pictures

if TYPE_CHECKING:
    from viser import CameraFrustumHandle, PointCloudHandle, ViserServer

HTML_BYTES = 25_000_000
POINT_BYTES = 9  # three float16 and a colour
LIVE_POINTS = 100_000  # of a frame, at most, at the stride that the viewer starts with
MAX_STRIDE = 16
BACKGROUND_POINTS = 200_000
THUMBNAIL = 96  # pixels, the larger side of a picture in a camera
CAMERA_SIZE = 0.06  # of the median distance
PANEL = 480  # pixels, the larger side of a side panel
OVERLAP = 1.5  # edge of a drawn point, in the pixel distances between points: no gaps on slanted surfaces


@dataclass(frozen=True)
class Cloud:
    """Coloured points, as viser draws them."""

    points: NDArray[np.float32]  # [N, 3]
    colours: NDArray[np.uint8]  # [N, 3]


@dataclass(frozen=True)
class Stage:
    """A scene, and what the live viewer and the recording share."""

    scene: Scene
    shown: Tensor  # [T, H, W] bool
    middle: float  # median distance, the scene's unit

    @classmethod
    def of(cls, scene: Scene, keep_flying_points: bool) -> Stage:
        """Decide which points are drawn, and measure the scene."""
        # `frustum_depth` is a tenth of the median.
        return cls(scene, shown_pixels(scene, keep_flying_points), 10 * frustum_depth(scene.depth, scene.valid))

    def cloud(self, frame: int, stride: int) -> Cloud:
        """Return the points of every `stride`-th pixel of a frame in both directions."""
        keep = self.shown[frame, ::stride, ::stride]
        points = self.scene.pointmap[frame, ::stride, ::stride][keep]
        return Cloud(points.numpy(), self.scene.frames[frame, ::stride, ::stride][keep].numpy())

    def background(self, limit: int = BACKGROUND_POINTS) -> Cloud:
        """Collect the static points of all frames, evenly thinned to `limit`."""
        scene = self.scene
        stride = max(1, math.isqrt(scene.frames[..., 0].numel() // (4 * limit)))
        points = scene.pointmap[:, ::stride, ::stride]
        static = static_pixels(points, scene.valid, self.shown, scene.depth, scene.intrinsics, scene.cam2world)
        chosen = (static & self.shown[:, ::stride, ::stride]).nonzero()
        chosen = chosen[torch.arange(min(limit, len(chosen))) * len(chosen) // max(1, min(limit, len(chosen)))]
        t, row, column = chosen.unbind(-1)
        colours = scene.frames[:, ::stride, ::stride][t, row, column]
        return Cloud(points[t, row, column].numpy(), colours.numpy())

    def point_size(self, stride: int) -> float:
        """Return the edge of a point that leaves no gaps at the median distance."""
        return OVERLAP * stride * self.middle / float(self.scene.intrinsics[:, 0, 0].median())

    def set_up(self, server: ViserServer) -> None:
        """Set the up direction and the first view.

        Up is the mean of the cameras' up. The view is from behind the first camera, above it and to its right.
        """
        cam2world = self.scene.cam2world
        up = -cam2world[:, :3, 1].mean(0)
        up = up / up.norm() if float(up.norm()) > 1e-3 else -cam2world[0, :3, 1]
        server.scene.set_up_direction(tuple(up.tolist()))
        centre, right, forward = cam2world[0, :3, 3], cam2world[0, :3, 0], cam2world[0, :3, 2]
        camera = server.initial_camera
        camera.position = (centre + self.middle * (0.3 * up + 0.25 * right - 0.4 * forward)).numpy()
        camera.look_at = (centre + self.middle * forward).numpy()
        camera.up = up.numpy()
        camera.fov = self._field_of_view(0)
        camera.near, camera.far = 0.005 * self.middle, 200 * self.middle

    def add_camera(self, server: ViserServer, frame: int, visible: bool) -> CameraFrustumHandle:
        """Add the camera of a frame as a pyramid that shows the frame, coloured by time."""
        scene = self.scene
        height, width = scene.frames.shape[1:3]
        focal = scene.intrinsics[frame, [0, 1], [0, 1]].tolist()
        return server.scene.add_camera_frustum(
            f"/cameras/{frame:06d}",
            fov=self._field_of_view(frame),
            aspect=width / focal[0] * focal[1] / height,
            scale=CAMERA_SIZE * self.middle,
            thickness=1.5,
            thickness_units="screen",
            color=_time_colours(scene.num_frames)[frame],
            image=_sized(scene.frames[frame], THUMBNAIL),
            wxyz=matrix_to_wxyz(scene.cam2world[frame, :3, :3]).numpy(),
            position=scene.cam2world[frame, :3, 3].numpy(),
            visible=visible,
            cast_shadow=False,
        )

    def add_path(self, server: ViserServer, visible: bool) -> None:
        """Add the path of the camera, coloured by time."""
        centres, colours = self.scene.cam2world[:, :3, 3].float().numpy(), _time_colours(self.scene.num_frames)
        if len(centres) < 2:
            return
        ends = np.stack([centres[:-1], centres[1:]], axis=1)
        server.scene.add_line_segments(
            "/path", ends, np.stack([colours[:-1], colours[1:]], 1), thickness=2.0, thickness_units="screen",
            visible=visible,
        )  # fmt: skip

    def _field_of_view(self, frame: int) -> float:  # vertical, radians
        return 2 * math.atan(0.5 * self.scene.frames.shape[1] / float(self.scene.intrinsics[frame, 1, 1]))


class Viewer:
    """The live viewer: this process sends the browser one frame's points at a time."""

    def __init__(self, scene: Scene, port: int, keep_flying_points: bool) -> None:
        self._stage = Stage.of(scene, keep_flying_points)
        self._pictures = depth_pictures(scene.depth, scene.valid)
        self._drawing = threading.Lock()  # viser calls back from many threads
        self._server = open_server(port)
        self._stage.set_up(self._server)
        self._background: PointCloudHandle | None = None
        height, width = scene.frames.shape[1:3]
        stride = min(MAX_STRIDE, max(1, math.ceil(math.sqrt(height * width / LIVE_POINTS))))
        gui = self._server.gui
        gui.configure_theme(show_share_button=False)  # sharing would go through a server elsewhere
        self.time = gui.add_slider("time", 0, max(1, scene.num_frames - 1), 1, 0, disabled=scene.num_frames == 1)
        self._play = gui.add_checkbox("play", False)
        self._stride = gui.add_slider("stride", 1, MAX_STRIDE, 1, stride, hint="every n-th pixel in both directions")
        self._size = gui.add_slider("point size", 0.1, 4.0, 0.1, 1.0, hint="1 = no gaps at the median distance")
        self._still = gui.add_checkbox("static background", False, hint="points of all frames that nothing contradicts")
        self._cameras = gui.add_dropdown("cameras", ("of this time", "all", "none"))
        self._rgb = gui.add_image(_sized(scene.frames[0], PANEL), label="frame")
        self._depth = gui.add_image(_sized(self._pictures[0], PANEL), label="depth (light = near)")
        cloud, size = self._stage.cloud(0, stride), self._stage.point_size(stride)
        self._cloud = _add_cloud(self._server, "/points", cloud, size, visible=True)
        self._stage.add_path(self._server, visible=True)
        self._frusta = [self._stage.add_camera(self._server, i, visible=i == 0) for i in range(scene.num_frames)]
        for control in (self.time, self._stride, self._size, self._still, self._cameras):
            control.on_update(lambda _: self._draw())

    @property
    def address(self) -> str:
        """Return the address for the browser; its port is the first free one from `port` on."""
        return f"http://{self._server.get_host()}:{self._server.get_port()}"

    def play_forever(self) -> None:
        """Advance the time while `play` is ticked, until KeyboardInterrupt."""
        while True:
            time.sleep(1 / self._stage.scene.fps)
            if self._play.value:
                self.time.value = (self.time.value + 1) % self._stage.scene.num_frames  # its callback draws

    def close(self) -> None:
        """Stop serving."""
        _stop(self._server)

    def _draw(self) -> None:
        """Send the browser what the controls ask for."""
        with self._drawing, self._server.atomic():
            frame, stride = min(self.time.value, self._stage.scene.num_frames - 1), self._stride.value
            size = self._size.value * self._stage.point_size(stride)
            self._cloud = _add_cloud(self._server, "/points", self._stage.cloud(frame, stride), size, visible=True)
            if self._still.value and self._background is None:
                self._background = _add_cloud(
                    self._server, "/background", self._stage.background(), size, visible=False
                )
            if self._background is not None:
                self._background.visible = self._still.value
                self._background.point_size = size
            for i, frustum in enumerate(self._frusta):
                frustum.visible = self._cameras.value == "all" or (self._cameras.value != "none" and i == frame)
            self._rgb.image = _sized(self._stage.scene.frames[frame], PANEL)
            self._depth.image = _sized(self._pictures[frame], PANEL)


def write_html(path: Path, scene: Scene, keep_flying_points: bool, limit: int = HTML_BYTES) -> int:
    """Record a scene in one offline file of at most `limit` bytes, with a time slider.

    Returns the stride of its points. ValueError where no stride is coarse enough.
    """
    stage = Stage.of(scene, keep_flying_points)
    background = stage.background(BACKGROUND_POINTS // 2)
    strides = range(1, MAX_STRIDE + 1)
    counts = {s: int(stage.shown[:, ::s, ::s].sum()) + len(background.points) for s in strides}
    # Base64 makes four bytes of three. Start at the first stride whose points alone would fit.
    stride = next((s for s in strides if counts[s] * POINT_BYTES * 4 / 3 <= limit), MAX_STRIDE)
    while len((html := _record(stage, background, stride)).encode()) > limit:
        if stride == MAX_STRIDE:
            raise ValueError(f"{limit} bytes do not hold this scene at stride {stride}")
        stride += 1
    while stride > 1 and len(html) / counts[stride] * counts[stride - 1] <= limit:  # compressed, a finer one may fit
        finer = _record(stage, background, stride - 1)
        if len(finer.encode()) > limit:
            break
        html, stride = finer, stride - 1
    write_text(path, html)
    return stride


def _record(stage: Stage, background: Cloud, stride: int) -> str:
    """Record a scene: everything is sent hidden first, then shown in turn.

    A player that loops or seeks then replays only what is shown and hidden.
    """
    server, scene = open_server(0), stage.scene
    try:
        stage.set_up(server)
        size = stage.point_size(stride)
        still = _add_cloud(server, "/background", background, size, visible=False)
        clouds = [
            _add_cloud(server, f"/points/{i:06d}", stage.cloud(i, stride), size, visible=False)
            for i in range(scene.num_frames)
        ]
        frusta = [stage.add_camera(server, i, visible=False) for i in range(scene.num_frames)]
        stage.add_path(server, visible=True)
        recording = server.get_scene_serializer()
        still.visible = False
        for i in range(scene.num_frames):
            for handle in (clouds[i], frusta[i]):
                handle.visible = True
            if i > 0:
                for handle in (clouds[i - 1], frusta[i - 1]):
                    handle.visible = False
            recording.insert_sleep(1 / scene.fps)
        return recording.as_html()
    finally:
        _stop(server)


def open_server(port: int) -> ViserServer:
    """Open a viser server that only this machine reaches, without viser's banner; port 0 = any."""
    import viser

    with contextlib.redirect_stdout(io.StringIO()):
        return viser.ViserServer(host="127.0.0.1", port=port, label="one4d_pl", verbose=False)


def _stop(server: ViserServer) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        server.stop()


def _add_cloud(server: ViserServer, name: str, cloud: Cloud, size: float, visible: bool) -> PointCloudHandle:
    if len(cloud.points) == 0:  # an error for viser's client, which gets one point of size 0 instead
        cloud, size = Cloud(np.zeros((1, 3), np.float32), np.full((1, 3), 255, np.uint8)), 0.0
    return server.scene.add_point_cloud(
        name, cloud.points, cloud.colours, point_size=size, point_shading="flat", visible=visible
    )


def _time_colours(count: int) -> NDArray[np.uint8]:  # [T, 3]
    return to_bytes(near_to_far(torch.linspace(0.2, 0.8, count))).numpy()


def _sized(picture: Tensor, side: int) -> NDArray[np.uint8]:  # [H, W, 3] uint8 -> [h, w, 3]
    """Shrink a picture to fit `side`, or enlarge it by a whole number to keep its pixels sharp."""
    image = Image.fromarray(picture.numpy())
    zoom = side // max(image.size)
    if zoom > 1:
        return np.asarray(image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST))
    image.thumbnail((side, side))
    return np.asarray(image)
