"""Pictures of every kind come in upright and in 8 bits, or are refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from one4d_pl.scene import media
from one4d_pl.scene.media import MediaError, load_image

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


def test_frames_reach_the_network_in_minus_one_to_one():
    frames = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert media.to_network(frames).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])
