"""Pictures and videos of every kind come in upright, in 8 bits, at their right moments, or are refused in one line."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.scene import media
from one4d_pl.scene.media import MediaError, VideoReader, load_image

RAMP = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
COLOURS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_undone(tmp_path, orientation):
    stored = Image.fromarray(COLOURS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    turned = {  # how the stored picture has to be moved to stand upright (EXIF 2.32, 4.6.5)
        1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2), 6: np.rot90(COLOURS, -1), 7: COLOURS.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(COLOURS, 1),
    }[orientation]  # fmt: skip
    assert np.array_equal(load_image(tmp_path / "a.png").numpy(), turned)


def test_every_kind_of_pixel_becomes_three_channels_of_eight_bits(tmp_path):
    def saved(image: Image.Image, name: str = "a.png") -> np.ndarray:
        image.save(tmp_path / name)
        return load_image(tmp_path / name).numpy()

    grey = np.repeat(RAMP[..., None], 3, axis=2)
    assert np.array_equal(saved(Image.fromarray(COLOURS)), COLOURS)
    assert np.array_equal(saved(Image.fromarray(RAMP)), grey)
    assert np.array_equal(saved(Image.fromarray(RAMP.astype(np.uint16) * 257)), grey)  # 16 bits
    assert np.array_equal(saved(Image.fromarray(RAMP > 100)), np.where(RAMP > 100, 255, 0)[..., None].repeat(3, 2))
    alpha = np.where(RAMP > 100, 255, 0).astype(np.uint8)
    over_white = np.where(RAMP[..., None] > 100, COLOURS, 255)
    assert np.array_equal(saved(Image.fromarray(np.dstack([COLOURS, alpha]))), over_white)
    assert np.abs(saved(Image.fromarray(COLOURS).convert("CMYK"), "a.tiff").astype(int) - COLOURS).max() <= 2
    palette = Image.fromarray(np.where(RAMP[..., None] > 100, [255, 0, 0], [0, 0, 255]).astype(np.uint8)).quantize(2)
    assert set(map(tuple, saved(palette).reshape(-1, 3).tolist())) == {(255, 0, 0), (0, 0, 255)}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.png", None, "no such file"),
        ("empty.png", b"", "not a picture"),
        ("text.png", b"hello", "not a picture"),
        ("pickle.png", b"\x80\x04\x95\x00\x00.", "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=words) as caught:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_beyond_use_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (90, 10)).save(tmp_path / "narrow.png")
    with pytest.raises(MediaError, match="narrower than"):
        load_image(tmp_path / "narrow.png")
    Image.new("F", (10, 10)).save(tmp_path / "float.tiff")
    with pytest.raises(MediaError, match="floating-point"):
        load_image(tmp_path / "float.tiff")
    monkeypatch.setattr(media, "MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "huge.png")
    with pytest.raises(MediaError, match="10x10 pixels, at most"):
        load_image(tmp_path / "huge.png")


def write_video(path: Path, greys: list[int], times: list[Fraction] | None = None, rate: int = 10) -> None:
    """One flat grey per frame, shown from its time on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.options = {"crf": "0", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), grey, np.uint8), format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = int(1000 * (Fraction(i, rate) if times is None else times[i]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shown(reader: VideoReader) -> list[int]:
    """The nearest ten of each frame's grey."""
    return [round(float(frame.float().mean()) / 10) * 10 for frame in reader]


def test_a_video_of_constant_rate_comes_frame_by_frame(tmp_path):
    write_video(tmp_path / "a.mp4", [20, 60, 100, 140, 180])
    reader = VideoReader(tmp_path / "a.mp4")
    assert shown(reader) == [20, 60, 100, 140, 180] and reader.fps == pytest.approx(10)
    assert shown(VideoReader(tmp_path / "a.mp4", fps=5)) == [20, 100, 180]
    assert shown(VideoReader(tmp_path / "a.mp4", fps=20)) == [20, 20, 60, 60, 100, 100, 140, 140, 180]


def test_a_video_of_variable_rate_shows_each_moment_what_was_on_screen(tmp_path):
    times = [Fraction(0), Fraction(1, 10), Fraction(5, 10), Fraction(6, 10)]
    write_video(tmp_path / "a.mp4", [20, 60, 100, 140], times)
    assert shown(VideoReader(tmp_path / "a.mp4", fps=10)) == [20, 60, 60, 60, 60, 100, 140]


def test_rounded_time_stamps_neither_double_nor_drop_a_frame(tmp_path):
    greys = [20 + 10 * (i % 20) for i in range(40)]
    write_video(tmp_path / "a.mp4", greys, [Fraction(round(1000 * i / 30), 1000) for i in range(40)], rate=30)
    assert shown(VideoReader(tmp_path / "a.mp4", fps=30)) == greys


def test_a_turned_video_stands_upright(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :32] = 255  # the left half is white
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    plain = next(iter(VideoReader(path)))
    assert plain.shape == (32, 64, 3) and plain[:, :30].float().mean() > 200
    content = path.read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30
    )  # as phones held upright write
    track = content.index(identity, content.index(b"tkhd"))
    path.write_bytes(content[:track] + clockwise + content[track + len(identity) :])
    turned = next(iter(VideoReader(path)))
    assert turned.shape == (64, 32, 3)
    assert turned[:30].float().mean() > 200 and turned[34:].float().mean() < 50  # left has become top


def test_what_is_no_video_is_refused_by_name(tmp_path):
    for name, content in {"empty.mp4": b"", "text.mp4": b"hello" * 100, "cut.mp4": None}.items():
        path = tmp_path / name
        if content is None:
            write_video(path, [20, 60])
            content = path.read_bytes()[:200]
        path.write_bytes(content)
        with pytest.raises(MediaError, match="not a video") as caught:
            list(VideoReader(path))
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="no such file"):
        VideoReader(tmp_path / "none.mp4")


def test_frames_reach_the_network_in_minus_one_to_one():
    frames = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert media.to_network(frames).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])
