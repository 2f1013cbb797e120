"""Images and videos of any kind as 8-bit sRGB frames of one size, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from one4d_pl.data.frame_order import numbered_files
from one4d_pl.geometry.camera import resize_frames

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 100_000_000  # a larger picture costs more memory to open than a scene to make
MAX_ASPECT = 8.0
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class MediaError(ValueError):
    """A picture or video cannot be used; one line that names the file and what would work."""


def load_image(path: Path) -> Tensor:  # [H, W, 3] uint8
    """A picture upright as its EXIF says, alpha over white, grey as three channels, 16 bits brought to 8.

    Of an animation the first frame. MediaError where the file is missing, broken, too large or no picture.
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
        reason = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        raise MediaError(
            f"{path}: not a picture that can be read ({reason}); need {', '.join(IMAGE_FORMATS)}"
        ) from None


def check_size(path: Path, height: int, width: int) -> None:
    """MediaError for pictures that are empty, huge or narrow beyond use."""
    if height * width > MAX_PIXELS:
        raise MediaError(f"{path}: {width}x{height} pixels, at most {MAX_PIXELS / 1e6:.0f} million; make it smaller")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(f"{path}: {width}x{height} is narrower than 1:{MAX_ASPECT:.0f}; crop it")


class FrameFolder:
    """The pictures of a folder as a video, in the order of their numbers.

    MediaError where there is none, or their order is in doubt.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
        try:
            self._files = numbered_files(path, suffixes)
        except ValueError as error:
            raise MediaError(str(error)) from None
        if not self._files:
            raise MediaError(f"{path}: a folder without pictures ({', '.join(suffixes)})")

    def __iter__(self) -> Iterator[Tensor]:  # [H, W, 3] uint8 each
        return map(load_image, self._files)

    def close(self) -> None:
        """Nothing is open."""


class VideoReader:
    """The frames of a video at a constant rate, upright, one at a time: memory for one.

    Args:
        path: anything that FFmpeg reads; its first video stream.
        fps: frames per second to deliver; None = the stream's own average. A frame is repeated or left out where the
            stream's rate differs or varies: each moment shows the frame that was on screen then.

    Raises MediaError where there is no video, or it breaks.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise MediaError(f"{path}: no such file")
        try:
            self._container = av.open(str(path), metadata_errors="ignore")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._fault(error) from None
        if not self._container.streams.video:
            self._container.close()
            raise MediaError(f"{path}: holds no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(24)
        self.fps = fps or min(float(rate), 120.0)

    def __iter__(self) -> Iterator[Tensor]:  # [H, W, 3] uint8 each
        shown: Tensor | None = None
        count = 0  # frames delivered
        for seconds, frame in self._decoded():
            # what was on screen until now fills the moments before this frame's; a quarter of a frame is rounding
            while shown is not None and count / self.fps < seconds - 0.25 / self.fps:
                yield shown
                count += 1
            shown = frame
        if shown is not None:
            yield shown

    def close(self) -> None:
        self._container.close()

    def _decoded(self) -> Iterator[tuple[float, Tensor]]:
        """Seconds since the first frame, and the frame."""
        first: float | None = None
        last = -1.0
        try:
            for number, frame in enumerate(self._container.decode(self._stream)):
                check_size(self.path, frame.height, frame.width)
                seconds = number / self.fps if frame.time is None else float(frame.time)
                first = seconds if first is None else first
                if seconds - first <= last:
                    continue  # a frame out of order was on screen for no time
                last = seconds - first
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                turns = round(frame.rotation / 90) % 4
                yield last, torch.rot90(pixels, turns).contiguous() if turns else pixels
        except (av.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> MediaError:
        reason = " ".join(str(error).replace(str(self.path), "").replace("''", "").split())
        return MediaError(f"{self.path}: not a video that can be read ({reason})")


def open_video(path: Path, fps: float | None, folder_fps: float) -> VideoReader | FrameFolder:
    """A video file at `fps` (None: its own), or a folder of frames at `fps` (None: folder_fps)."""
    return FrameFolder(path, fps or folder_fps) if path.is_dir() else VideoReader(path, fps)


def to_size(frames: Tensor, height: int, width: int) -> Tensor:  # [T, H, W, 3] uint8 -> [T, height, width, 3]
    """Covered, cropped in the middle and antialiased, as in training."""
    return resize_frames(frames, torch.eye(3).expand(len(frames), 3, 3), height, width)[0]


def to_network(frames: Tensor) -> Tensor:  # [T, H, W, 3] uint8 -> [3, T, H, W] in [-1, 1]
    return frames.movedim(-1, 0).float() / 127.5 - 1
