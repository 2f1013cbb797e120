"""Laws of the model's frame: square pixels, equal tokens, and the way back to the image."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from one4d_pl.geometry.camera import pixel_grid, resize_crop_intrinsics
from one4d_pl.scene.framing import frame_images, nearest_size, to_image

SIZES = [(436, 1024), (480, 640), (48, 64), (720, 405)]


@pytest.mark.parametrize("size", SIZES)
def test_no_squash_keeps_shape_and_tokens(size):
    framing = frame_images(*size, 352, 624, "no_squash")
    assert framing.height % 16 == framing.width % 16 == 0
    assert abs(framing.height * framing.width / (352 * 624) - 1) < 0.06
    lost = 1 - framing.height * framing.width / (framing.placement.scale**2 * size[0] * size[1])
    assert 0 <= lost < 0.05  # what hangs over and is cut
    assert (framing.inner_height, framing.inner_width) == (framing.height, framing.width)


def test_sintel_at_the_paper_s_token_count():
    assert nearest_size(436 / 1024, 22 * 39) == (304, 720)
    assert nearest_size(352 / 624, 22 * 39) == (352, 624)  # the model's own shape stays


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", ["no_squash", "letterbox"])
def test_a_map_comes_back_to_the_pixels_it_was_seen_at(size, shape):
    framing = frame_images(*size, 352, 624, shape)
    frames = torch.zeros(1, *size, 3, dtype=torch.uint8)
    intrinsics = torch.tensor([[500.0, 0, size[1] / 2], [0, 500.0, size[0] / 2], [0, 0, 1.0]])[None]
    assert framing.place_frames(frames).shape == (1, framing.height, framing.width, 3)
    inner_intrinsics = resize_crop_intrinsics(intrinsics, size, (framing.inner_height, framing.inner_width))
    # a ramp in the image's coordinates, seen through the inner camera, must return at the image's own pixels
    u, v = pixel_grid(framing.inner_height, framing.inner_width, intrinsics)
    fx, fy, cx, cy = inner_intrinsics[0, [0, 1, 0, 1], [0, 1, 2, 2]]
    back = to_image((500 * ((u - cx) / fx - (v - cy) / fy))[None], *size, framing.placement)[0]
    u, v = pixel_grid(*size, intrinsics)
    error = (back - (u - size[1] / 2 - v + size[0] / 2)).abs()  # in image pixels, of both axes
    assert error[12:-12, 12:-12].max() < 0.3 * max(1, 1 / framing.placement.scale)  # this cubic bends ramps by as much
    assert error[12:-12, 12:-12].mean() < 0.15 * max(1, 1 / framing.placement.scale)
    assert error.max() < 40  # the edge is repeated beyond the map


def test_letterbox_shows_the_whole_image_between_black_bars():
    framing = frame_images(436, 1024, 352, 624, "letterbox")
    assert (framing.height, framing.width, framing.inner_width) == (352, 624, 624)
    assert framing.inner_height == 266  # 436 * 624 / 1024 = 265.7
    placed = framing.place_frames(torch.full((1, 436, 1024, 3), 200, dtype=torch.uint8))
    assert (placed[0, 43:-43] == 200).all() and (placed[0, :43] == 0).all() and (placed[0, -43:] == 0).all()
    assert (framing.cut(placed[0, ..., 0]) == 200).all()


@pytest.mark.parametrize("size", [(9, 14), (40, 31)])
def test_a_whole_image_prediction_is_resized_as_torch_and_opencv_do(size):
    maps = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = interpolate(maps[None], size, mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(to_image(maps, *size, None), expected, rtol=0, atol=1e-5)


def test_a_hole_stays_a_hole_and_spoils_nothing_else():
    maps = torch.ones(1, 8, 8)
    maps[0, 2, 3] = torch.nan
    back = to_image(maps, 16, 16, None)
    assert back[0].isnan().nonzero().tolist() == [[4, 6], [4, 7], [5, 6], [5, 7]]


@pytest.mark.parametrize("size", [(16, 16), (31, 17), (5, 7), (9, 9), (8, 8)])
@pytest.mark.parametrize(
    "hole", [(slice(3, 5), slice(3, 5)), (slice(0, 3), slice(6, 8)), (slice(0, 8, 2), slice(1, 8, 3))]
)
def test_around_a_hole_a_plane_keeps_its_values(size, hole):
    maps = torch.full((1, 8, 8), 2.0)
    maps[0][hole] = torch.nan
    back = to_image(maps, *size, None)
    torch.testing.assert_close(back[back.isfinite()], torch.full((int(back.isfinite().sum()),), 2.0))
    ramp = torch.arange(8.0).expand(1, 8, 8).clone()
    whole = to_image(ramp, *size, None)
    ramp[0][hole] = torch.nan
    seen = to_image(ramp, *size, None)
    known = seen.isfinite()
    assert torch.equal(known, back.isfinite()) and float((seen - whole)[known].abs().max()) < 1  # a pixel of the map
