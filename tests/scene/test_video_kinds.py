"""One reader of videos for every door: turns, rates, depths of colour, alpha and containers, as files really come."""

from __future__ import annotations

import json
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.sources import registry
from data_prep.sources.decoding import read_video
from one4d_pl.scene.media import MediaError, VideoReader, frame_count, frame_rate, upright_frames
from tests.data_prep import raw_layouts as raw

HEIGHT, WIDTH = 32, 64


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:  # [H, W, 3], no symmetry
    shown = np.full((height, width, 3), 60, np.uint8)
    shown[: height // 2, :, 0] = 200
    shown[:, : width // 2, 1] = 180
    return shown


def save(
    path: Path,
    frames: list[np.ndarray],  # [H, W, 3 or 4] uint8
    codec: str = "libx264",
    pixels: str = "yuv420p",
    container: str | None = None,
    times: list[int] | None = None,  # milliseconds
    rate: int = 16,
    muxer: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> Path:
    quality = {"libx264": {"crf": "1"}, "libvpx": {"crf": "4", "b": "4M", "auto-alt-ref": "0"}}
    with av.open(str(path), "w", format=container, options=muxer or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=quality.get(codec.split("-")[0], {}))
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        stream.metadata.update(tags or {})
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixel in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixel, format="rgba" if pixel.shape[2] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            file.mux(stream.encode(frame.reformat(format=pixels)))
        file.mux(stream.encode())
    return path


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """What a phone writes into the track's header: (x, y) is shown at (a x + c y, b x + d y)."""
    content = path.read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    track = content.index(identity, content.index(b"tkhd"))
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:track] + matrix + content[track + len(identity) :])
    return path


def forget_the_rate(path: Path) -> Path:
    """A browser writes no DefaultDuration: the element becomes a Void one."""
    content = bytearray(path.read_bytes())
    start = content.index(b"\x23\xe3\x83")
    length = 4 + (content[start + 3] & 127)
    content[start : start + length] = b"\xec" + bytes([128 | (length - 2)]) + bytes(length - 2)
    path.write_bytes(content)
    return path


def flat(greys: list[int]) -> list[np.ndarray]:
    return [np.full((16, 32, 3), grey, np.uint8) for grey in greys]


def shown(path: Path, fps: float | None = None) -> list[int]:
    """The nearest ten of each frame's grey."""
    return [round(float(frame.float().mean()) / 10) * 10 for frame in VideoReader(path, fps)]


# --- turns

TURNS = {  # matrix -> how the stored picture must be moved
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: p[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_are_turned_and_mirrored_as_the_file_says_in_every_door(tmp_path, matrix):
    path = set_matrix(save(tmp_path / "a.mp4", [picture()] * 3), *matrix)
    expected = TURNS[matrix](picture()).astype(int)
    for frame in (next(iter(VideoReader(path))), read_video(path, [1])[0]):
        assert frame.shape == expected.shape and np.abs(frame.numpy() - expected).mean() < 3


@pytest.mark.parametrize(("tag", "turns"), [("90", -1), ("180", 2), ("270", 1), ("-90", 1), ("sideways", 0)])
def test_a_tag_of_degrees_turns_too(tmp_path, tag, turns):
    path = save(tmp_path / "a.mkv", [picture()] * 3, tags={"rotate": tag})
    expected = np.rot90(picture(), turns)
    frame = next(iter(VideoReader(path)))
    assert frame.shape == expected.shape and np.abs(frame.numpy() - expected.astype(int)).mean() < 3


def test_a_phone_video_becomes_an_upright_clip(tmp_path):
    shot = raw.film(height=64, width=48)
    root = raw.write_generic_folder(tmp_path, shot)
    shutil.rmtree(root / "scene_one" / "frames")
    lying = [np.ascontiguousarray(np.rot90(frame, 1)) for frame in shot.frames]
    set_matrix(save(root / "scene_one" / "frames.mp4", lying), 0, 1, -1, 0)
    (clip,) = registry.iter_clips("generic", root, 9)
    assert clip.frames.shape == (9, 64, 48, 3) and np.abs(clip.frames.numpy() - shot.frames.astype(int)).mean() < 6


def test_pictures_of_a_clip_are_turned_and_laid_over_white_as_for_generate(tmp_path):
    shot = raw.film()
    root = raw.write_generic_folder(tmp_path, shot)
    names = sorted((root / "scene_one" / "frames").iterdir())
    exif = raw.Image.Exif()
    exif[0x0112] = 6  # stored lying, shown a quarter clockwise
    raw.Image.fromarray(np.ascontiguousarray(np.rot90(shot.frames[0], 1))).save(names[0], exif=exif)
    see_through = np.dstack([shot.frames[1], np.where(np.arange(64) < 32, 0, 255) * np.ones((48, 1))]).astype(np.uint8)
    raw.Image.fromarray(see_through).save(names[1])
    grey = shot.frames[2, :, :, 0].astype(np.uint16) * 257
    raw.Image.fromarray(grey).save(names[2])
    (clip,) = registry.iter_clips("generic", root, 9)
    np.testing.assert_array_equal(clip.frames[0], shot.frames[0])
    assert (clip.frames[1, :, :32] == 255).all()
    np.testing.assert_array_equal(clip.frames[1, :, 32:], shot.frames[1, :, 32:])
    np.testing.assert_array_equal(clip.frames[2, :, :, 1], shot.frames[2, :, :, 0])


# --- rates


def test_a_video_of_constant_rate_comes_frame_by_frame(tmp_path):
    path = save(tmp_path / "a.mp4", flat([20, 60, 100, 140, 180]), rate=10)
    assert shown(path) == [20, 60, 100, 140, 180] and VideoReader(path).fps == pytest.approx(10)
    assert shown(path, fps=5) == [20, 100, 180]
    assert shown(path, fps=20) == [20, 20, 60, 60, 100, 100, 140, 140, 180]


def test_rounded_time_stamps_neither_double_nor_drop_a_frame(tmp_path):
    greys = [20 + 10 * (k % 20) for k in range(40)]
    assert shown(save(tmp_path / "a.mp4", flat(greys), times=[round(1000 * k / 30) for k in range(40)]), 30) == greys


@pytest.mark.parametrize("rate", [12, 30, 60])
def test_a_browser_recording_has_the_rate_of_its_time_stamps(tmp_path, rate):
    rng = np.random.default_rng(rate)
    jitter = rng.integers(-2, 3, 40)
    times = [round(1000 * k / rate) + int(jitter[k]) if k else 0 for k in range(40)]
    frames = flat([20 + 10 * (k % 20) for k in range(40)])
    path = forget_the_rate(save(tmp_path / "a.webm", frames, "libvpx", times=times))
    assert VideoReader(path).fps == pytest.approx(rate, rel=0.01)
    assert abs(len(shown(path)) - 40) <= 1
    assert frame_count(path) == 40


def test_a_rate_that_varies_is_the_mean_and_each_moment_shows_what_was_on_screen(tmp_path):
    times, frames = [0, 100, 500, 600, 1000], flat([20, 60, 100, 140, 180])
    for name, codec, muxer in (
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ):
        path = save(tmp_path / name, frames, codec, times=times, muxer=muxer)
        assert frame_rate(path) == pytest.approx(4, rel=0.01)
        assert shown(path, 10) == [20, 60, 60, 60, 60, 100, 140, 140, 140, 140, 180]


def test_a_rate_beyond_120_is_cut_where_it_is_true(tmp_path):
    path = save(tmp_path / "a.mp4", flat([100] * 60), times=[4 * k for k in range(60)])
    assert frame_rate(path) == pytest.approx(250, rel=0.02) and VideoReader(path).fps == 120
    assert len(shown(path)) == pytest.approx(29, abs=1)


# --- colour


@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuv444p10le", "yuv422p10le"])
def test_ten_bits_are_brought_to_eight_without_a_shift(tmp_path, pixels):
    path = save(tmp_path / "a.mp4", [picture()] * 2, pixels=pixels)
    error = np.abs(next(iter(VideoReader(path))).numpy() - picture().astype(int))
    assert error[4:12, 4:12].max() <= 1 and error.mean() < 3


ALPHA = {
    "vp8.webm": ("libvpx", "yuva420p"),
    "vp9.webm": ("libvpx-vp9", "yuva420p"),
    "lossless.mkv": ("ffv1", "yuva420p"),
    "animation.mov": ("qtrle", "argb"),
    "pictures.mov": ("png", "rgba"),
    "deep.mov": ("prores_ks", "yuva444p10le"),
}


@pytest.mark.parametrize("name", ALPHA)
def test_what_is_transparent_is_white_in_every_door(tmp_path, name):
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, WIDTH // 2 :] = 0
    colours = np.dstack([picture() * (alpha > 0), alpha])  # black where nothing is seen, as programs write it
    codec, pixels = ALPHA[name]
    path = save(tmp_path / name, [colours] * 3, codec, pixels)
    for frame in (next(iter(VideoReader(path))), read_video(path, [1])[0]):
        assert frame[:, WIDTH // 2 + 8 :].float().mean() > 250
        assert np.abs(frame[:12, :24].numpy() - picture()[:12, :24].astype(int)).mean() < 8


# --- containers

CONTAINERS = {
    "mp4 with an index": ("frames.mp4", "libx264", "mp4", {}),
    "mp4 in fragments": ("frames.mp4", "libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "matroska that is called mp4": ("frames.mp4", "libx264", "matroska", {}),
    "webm": ("frames.webm", "libvpx", "webm", {}),
    "transport stream that is called mp4": ("frames.mp4", "libx264", "mpegts", {}),
    "avi": ("frames.avi", "libx264", "avi", {}),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_generic_clip_reads_any_container_with_or_without_an_index(tmp_path, kind, caplog):
    shot = raw.film()
    root = raw.write_generic_folder(tmp_path, shot)
    folder = root / "scene_one"
    shutil.rmtree(folder / "frames")
    name, codec, container, muxer = CONTAINERS[kind]
    path = save(folder / name, list(shot.frames), codec, container=container, muxer=muxer)
    assert frame_count(path) == frame_count(path, decode=True) == len(list(upright_frames(path))) == 9
    (clip,) = registry.iter_clips("generic", root, 9)
    assert np.abs(clip.frames.numpy() - shot.frames.astype(int)).mean() < 8
    save(folder / name, list(shot.frames[:7]), codec, container=container, muxer=muxer)
    assert list(registry.iter_clips("generic", root, 9)) == [] and "7 frames, but geometry of 9" in caplog.text


def test_what_is_no_video_is_refused_by_name(tmp_path):
    cut = save(tmp_path / "whole.mp4", flat([20, 60])).read_bytes()[:200]
    for name, content in {"empty.mp4": b"", "text.mp4": b"hello" * 100, "cut.mp4": cut}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match="not a video") as caught:
            list(VideoReader(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="no such file"):
        VideoReader(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile secret.mp4\n", json.dumps({})],
)
def test_a_playlist_is_no_video_in_any_door(tmp_path, text):
    save(tmp_path / "secret.mp4", [picture()] * 2)
    (tmp_path / "a.mp4").write_text(text)
    with pytest.raises(MediaError, match="not a video") as caught:
        VideoReader(tmp_path / "a.mp4")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a video"):
        read_video(tmp_path / "a.mp4", [0])
