"""Read images and videos of any kind as 8-bit sRGB frames; refuse others in one line."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from PIL import Image, ImageOps
from torch import Tensor

from one4d_pl.data.frame_order import numbered_files
from one4d_pl.errors import UserError, fault_of

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 100_000_000  # a larger picture costs more memory to open than a scene to make
MAX_ASPECT = 8.0
MAX_FPS = 120.0  # of a video as it is read
# FFmpeg's names of formats that hold a video themselves. Without the list FFmpeg would also accept
# playlists and open the files that they name.
CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "mxf", "nut", "ivf", "obu", "h264", "hevc"),
    *("m4v", "mpegvideo", "gif", "apng", "yuv4mpegpipe", "dv", "rm", "wtv"),
)
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class MediaError(UserError):
    """A picture or video cannot be used; one line that names the file and what would work."""


def load_image(path: Path) -> Tensor:  # [H, W, 3] uint8
    """Load a picture: upright as its EXIF says, alpha over white, grey as RGB, 16 bits as 8.

    Of an animation this is the first frame. MediaError where the file is missing, broken, too large or no picture.
    """
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            check_size(path, *reversed(image.size))
            if image.mode == "F":
                raise ValueError("floating-point picture; convert it to 8 or 16 bits")
            upright = ImageOps.exif_transpose(image)
            if upright.mode in SIXTEEN_BITS:
                values = np.asarray(upright, np.int64)
                if values.max() > 65535 or values.min() < 0:
                    raise ValueError("32-bit picture; convert it to 8 or 16 bits")
                return torch.from_numpy(np.repeat((values[..., None] / 257).round().astype(np.uint8), 3, axis=2))
            if upright.has_transparency_data:
                over = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
            return torch.from_numpy(np.array(upright.convert("RGB")))
    except MediaError:
        raise
    except (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
        reason = fault_of(path, error).replace(str(path), "").strip()
        raise MediaError(
            f"{path}: not a picture that can be read ({reason}); need {', '.join(IMAGE_FORMATS)}"
        ) from error


def check_size(path: Path, height: int, width: int) -> None:
    """Raise MediaError for pictures that are empty, huge or too narrow."""
    if height * width > MAX_PIXELS:
        raise MediaError(f"{path}: {width}x{height} pixels, at most {MAX_PIXELS / 1e6:.0f} million; make it smaller")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(f"{path}: {width}x{height} is narrower than 1:{MAX_ASPECT:.0f}; crop it")


class FrameFolder:
    """The pictures of a folder as a video, in the order of their numbers.

    UserError where there are none, or their order is ambiguous.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
        self._files = numbered_files(path, suffixes)
        if not self._files:
            raise MediaError(f"{path}: a folder without pictures ({', '.join(suffixes)})")

    def __iter__(self) -> Iterator[Tensor]:  # [H, W, 3] uint8 each
        return map(load_image, self._files)


class VideoReader:
    """The frames of a video at a constant rate, upright; one at a time is held in memory.

    Args:
        path: see `upright_frames`.
        fps: frames per second to deliver; None = see `frame_rate`, at most 120. A frame is repeated or left out where
            the video's rate differs or varies: each moment shows the frame that was on screen then.

    Raises MediaError where there is no video, or it is broken.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path = path
        own = frame_rate(path)  # opens the file, and so refuses what is no video
        self.fps = fps or min(own, MAX_FPS)

    def __iter__(self) -> Iterator[Tensor]:  # [H, W, 3] uint8 each
        shown: Tensor | None = None
        first, last = 0.0, -1.0  # seconds: of the first frame, and of the newest since then
        count = 0  # frames delivered
        for number, (stamp, frame) in enumerate(upright_frames(self.path)):
            seconds = number / self.fps if stamp is None else stamp
            first = seconds if number == 0 else first
            if seconds - first <= last:
                continue  # a frame out of order was on screen for no time
            last = seconds - first
            # The last frame was on screen until now and fills the moments before this one. A
            # quarter of a frame counts as rounding.
            while shown is not None and count / self.fps < last - 0.25 / self.fps:
                yield shown
                count += 1
            shown = frame
        if shown is not None:
            yield shown


def upright_frames(path: Path, threads: str = "AUTO") -> Iterator[tuple[float | None, Tensor]]:
    """Yield each frame of a video's first stream: seconds, and pixels [H, W, 3] uint8 sRGB.

    The time is None where the file has no time stamp. Frames are turned and mirrored as the file
    says (its display matrix, or a `rotate` tag), alpha lies over white, more than 8 bits become 8.
    `threads` is FFmpeg's; "NONE" where videos are read in parallel. Only files that hold a video
    themselves are opened, no playlists. Raises MediaError where there is none, or it is broken.
    """
    with _opened(path) as (container, stream):
        stream.thread_type = threads
        try:
            for frame in _decoded(container, stream):
                check_size(path, frame.height, frame.width)
                pixels = _turned(_over_white(frame), frame, stream)
                yield None if frame.time is None else float(frame.time), torch.from_numpy(np.ascontiguousarray(pixels))
        except (av.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            raise _video_fault(path, error) from error


def frame_rate(path: Path) -> float:
    """Return the frames per second of a video: from its index, or else from its time stamps.

    Containers without an index (a browser's recording) state no rate, or a guess. Without index and
    time stamps the guess is returned if it is 120 or less, and 24 otherwise. MediaError as above.
    """
    with _opened(path) as (container, stream):
        stated = float(stream.average_rate or stream.guessed_rate or 0)
        if stream.frames and stream.average_rate and stated <= MAX_FPS:
            return stated
        try:
            stamps = {packet.pts for packet in container.demux(stream) if packet.pts is not None}
        except (av.FFmpegError, OSError, ValueError):
            stamps = set()  # a broken file: the decoder will say where
        if len(stamps) > 1 and stream.time_base:
            return (len(stamps) - 1) / float((max(stamps) - min(stamps)) * stream.time_base)
        return stated if 0 < stated <= MAX_FPS else 24.0


def frame_count(path: Path, decode: bool = False) -> int:
    """Count a video's frames: by its index, or by decoding it if asked or without an index."""
    if not decode:
        with _opened(path) as (_, stream):
            if stream.frames > 0:
                return stream.frames
    return sum(1 for _ in upright_frames(path, "NONE"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    try:
        container = av.open(str(path), metadata_errors="ignore", options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _video_fault(path, error) from error
    with container:
        if not container.streams.video:
            raise MediaError(f"{path}: holds no video stream")
        yield container, container.streams.video[0]


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Decode frames, VP8 and VP9 with alpha by libvpx: FFmpeg's own decoders drop the alpha."""
    if stream.metadata.get("alpha_mode") != "1" or stream.codec_context.name not in ALPHA_DECODERS:
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create(ALPHA_DECODERS[stream.codec_context.name], "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.extradata = stream.codec_context.extradata
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _over_white(frame: av.VideoFrame) -> np.ndarray:  # [H, W, 3] uint8
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    deep = any(component.bits > 8 for component in frame.format.components)
    kind = ("rgba64le" if has_alpha else "rgb48le") if deep else ("rgba" if has_alpha else "rgb24")
    pixels: np.ndarray = frame.to_ndarray(format=kind)
    if has_alpha:
        full = 65535 if deep else 255
        share = pixels[..., 3:].astype(np.float32) / full
        pixels = pixels[..., :3] * share + full * (1 - share)
    if deep:
        pixels = pixels / np.float32(257)
    return pixels if pixels.dtype == np.uint8 else pixels.round().astype(np.uint8)


def _turned(pixels: np.ndarray, frame: av.VideoFrame, stream: VideoStream) -> np.ndarray:
    """Turn and mirror a picture as the file asks, by the nearest of the eight orientations."""
    side_data: object = frame.side_data  # PyAV's stubs call it a dictionary
    assert isinstance(side_data, SideDataContainer)
    matrices = (data for data in side_data if data.type == SideDataType.DISPLAYMATRIX)
    matrix = next(map(bytes, matrices), None)
    if matrix is None:  # old files, and Matroska's, have a tag: degrees clockwise
        tag = next((value for name, value in stream.metadata.items() if name.lower() == "rotate"), "0")
        turns = round(float(tag) / 90) % 4 if re.fullmatch(r"-?[0-9]{1,4}(\.[0-9]*)?", tag) else 0
        return np.rot90(pixels, -turns)
    a, b, _, c, d, *_ = struct.unpack("<9i", matrix)  # a pixel at (x, y) is shown at (a x + c y, b x + d y)
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _video_fault(path: Path, error: Exception) -> MediaError:
    reason = fault_of(path, error).replace(str(path), "").replace("''", "").strip()
    return MediaError(f"{path}: not a video that can be read ({reason})")


def open_video(path: Path, fps: float | None, folder_fps: float) -> VideoReader | FrameFolder:
    """Open a video file (fps None: its own) or a folder of frames (fps None: folder_fps)."""
    return FrameFolder(path, fps or folder_fps) if path.is_dir() else VideoReader(path, fps)


def to_network(frames: Tensor) -> Tensor:  # [T, H, W, 3] uint8 -> [3, T, H, W] in [-1, 1]
    return frames.movedim(-1, 0).float() / 127.5 - 1
