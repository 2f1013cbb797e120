"""Laws of pinhole cameras and of resizing frames together with their intrinsics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry import camera, se3

LEADS = [(), (2,), (2, 3)]
DTYPES = [torch.float32, torch.float64]
ATOL = {torch.float32: 1e-5, torch.float64: 1e-13}  # units of depth, points within 10 of the camera
SMALL_SIZES = [(12, 20, 8, 8), (13, 17, 8, 24), (9, 7, 18, 14), (49, 30, 3, 3), (8, 24, 8, 24), (5, 40, 7, 9)]
SIZES = [*SMALL_SIZES, (1080, 1920, 352, 624)]  # height, width -> height, width


def make_intrinsics(height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    fx, fy, cx, cy = 0.9 * width, 0.8 * width, 0.52 * width, 0.47 * height
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=dtype)


def random_cam2world(lead: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(*lead, 3, dtype=dtype, generator=generator)
    return se3.se3_matrix(se3.so3_exp(vector), torch.randn(*lead, 3, dtype=dtype, generator=generator))


def plane_depth(height: int, width: int, intrinsics: Tensor, normal: Tensor) -> Tensor:  # plane normal · x = 1
    return 1 / (camera.camera_rays(height, width, intrinsics) * normal).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
def test_project_inverts_unproject_at_pixel_centres(lead, dtype):
    intrinsics = make_intrinsics(5, 7, dtype).expand(*lead, 3, 3)
    depth = 1 + 9 * torch.rand(*lead, 5, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
    points = camera.unproject(depth, intrinsics)
    pixels, depth_again = camera.project(points, intrinsics)
    grid = torch.stack(camera.pixel_grid(5, 7, depth), dim=-1).expand_as(pixels)
    torch.testing.assert_close(pixels, grid, rtol=0, atol=ATOL[dtype])
    torch.testing.assert_close(depth_again, depth, rtol=0, atol=0)
    assert grid[..., 0, 0, :].eq(0.5).all()
    assert grid[..., 4, 6, :].flatten()[:2].tolist() == [6.5, 4.5]  # u along the width, then v


def test_unproject_is_the_inverse_camera_matrix():
    intrinsics = make_intrinsics(3, 4)
    points = camera.unproject(torch.full((3, 4), 2.0, dtype=torch.float64), intrinsics)
    expected = 2 * torch.linalg.inv(intrinsics) @ torch.tensor([3.5, 1.5, 1], dtype=torch.float64)
    torch.testing.assert_close(points[1, 3], expected)
    assert points[..., 2].eq(2).all()  # depth is z, not the length of the ray


def test_each_image_of_a_batch_uses_its_own_camera():
    intrinsics = torch.stack([make_intrinsics(5, 7), make_intrinsics(9, 11)])
    depth = torch.ones(2, 5, 7, dtype=torch.float64)
    together = camera.unproject(depth, intrinsics)
    for i in range(2):
        torch.testing.assert_close(together[i], camera.unproject(depth[i], intrinsics[i]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", LEADS)
def test_world_and_camera_are_inverse_and_follow_the_matrices(lead, dtype):
    cam2world = random_cam2world(lead, dtype)
    points = torch.randn(*lead, 4, 5, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    world = camera.to_world(points, cam2world)
    torch.testing.assert_close(camera.to_camera(world, cam2world), points, rtol=0, atol=ATOL[dtype])
    world2cam = se3.invert_se3(cam2world)
    torch.testing.assert_close(camera.to_world(world, world2cam), points, rtol=0, atol=ATOL[dtype])
    centre = camera.to_world(torch.zeros(*lead, 1, 1, 3, dtype=dtype), cam2world)[..., 0, 0, :]
    torch.testing.assert_close(centre, cam2world[..., :3, 3], rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_covers_with_the_smallest_scale_and_crops_the_centre(size):
    from_height, from_width, height, width = size
    plan = camera.resize_crop_plan(*size)
    exact = max(height / from_height, width / from_width)
    assert exact <= plan.scale <= exact * (1 + 1e-12)
    for cut, whole, part in ((plan.top, from_height, height), (plan.left, from_width, width)):
        rest = int(whole * plan.scale) - part - cut
        assert cut >= 0 and rest - cut in (0, 1)


def test_no_size_loses_a_pixel_to_rounding():
    for whole in range(1, 120):
        for part in range(1, 120, 7):
            plan = camera.resize_crop_plan(whole, 2 * whole, part, 1)
            assert int(whole * plan.scale) >= part
            assert plan.scale <= max(part / whole, 1 / (2 * whole)) * (1 + 1e-12)


def test_a_size_below_one_pixel_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        camera.resize_crop_plan(10, 10, 0, 5)


@pytest.mark.parametrize("size", SIZES)
def test_points_land_at_corresponding_resized_pixels(size):
    from_height, from_width, height, width = size
    intrinsics = make_intrinsics(from_height, from_width).expand(2, 3, 3)
    frames = torch.zeros(2, from_height, from_width, 3, dtype=torch.uint8)
    new_intrinsics = camera.resize_crop_intrinsics(intrinsics, (from_height, from_width), (height, width))
    assert camera.resize_frames(frames, height, width).shape == (2, height, width, 3)
    points = torch.rand(2, 1, 50, 3, dtype=torch.float64) + torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    before, after = camera.project(points, intrinsics)[0], camera.project(points, new_intrinsics)[0]
    plan = camera.resize_crop_plan(*size)
    expected = before * plan.scale - torch.tensor([plan.left, plan.top], dtype=torch.float64)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)
    ratio = intrinsics[..., 0, 0] / intrinsics[..., 1, 1]
    torch.testing.assert_close(new_intrinsics[..., 0, 0] / new_intrinsics[..., 1, 1], ratio)  # square stays square


def ramp_over_rays(height: int, width: int, intrinsics: Tensor) -> Tensor:  # [H, W, 3], grey levels
    x, y, one = camera.camera_rays(height, width, intrinsics).unbind(-1)
    return torch.stack([128 + 60 * x, 128 + 60 * y, 77 * one], dim=-1)


@pytest.mark.parametrize("size", SMALL_SIZES)
def test_the_content_of_frames_moves_with_their_intrinsics(size):
    from_height, from_width, height, width = size
    # Brightness is a ramp over the camera's rays, so every pixel must show the ray that its intrinsics claim.
    intrinsics = make_intrinsics(from_height, from_width)
    ramp = ramp_over_rays(from_height, from_width, intrinsics)
    frames = camera.resize_frames(ramp.round().to(torch.uint8)[None], height, width)
    new_intrinsics = camera.resize_crop_intrinsics(intrinsics, (from_height, from_width), (height, width))
    expected = ramp_over_rays(height, width, new_intrinsics)
    # Off by the rounding of grey levels, and at the image's border by a kernel that is cut on one side.
    source_pixel = 60 / intrinsics[0, 0].item()
    border = 1 + source_pixel * (1 + 0.5 * max(1, from_height / height))
    error = (frames[0].double() - expected).abs()
    assert error.max() <= border
    assert error.mean() <= 0.75
    assert error[..., 2].max() == 0


def test_resizing_to_the_same_size_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 6, 10, 3), dtype=torch.uint8, generator=generator)
    intrinsics, depth = make_intrinsics(6, 10), torch.rand(2, 6, 10, generator=generator)
    assert torch.equal(camera.resize_frames(frames, 6, 10), frames)
    assert torch.equal(camera.resize_crop_intrinsics(intrinsics, (6, 10), (6, 10)), intrinsics)
    assert torch.equal(camera.resize_nearest_valid(depth, 6, 10), depth)


def test_shrinking_frames_does_not_alias():
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    interior = camera.resize_frames(stripes, 20, 20)[:, 2:-2, 2:-2].float()
    assert (interior - 127.5).abs().max() < 20  # without a low-pass the stripes beat between 0 and 255


def test_float_frames_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        camera.resize_frames(torch.zeros(1, 4, 4, 3), 2, 2)


@pytest.mark.parametrize("size", SMALL_SIZES)
def test_nearest_takes_the_source_pixel_whose_centre_is_nearest(size):
    from_height, from_width, height, width = size
    u, v = camera.pixel_grid(from_height, from_width, torch.zeros(1))
    index = torch.arange(from_height * from_width).reshape(from_height, from_width)
    taken = camera.resize_nearest_valid(index, height, width)
    plan = camera.resize_crop_plan(*size)
    target_u, target_v = camera.pixel_grid(height, width, torch.zeros(1, dtype=torch.float64))
    source_u, source_v = (target_u + plan.left) / plan.scale, (target_v + plan.top) / plan.scale
    distance = (source_u[..., None] - u.flatten()).square() + (source_v[..., None] - v.flatten()).square()
    chosen = distance.gather(-1, taken[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-9)


def test_nearest_never_mixes_values_and_keeps_dtype():
    depth = torch.tensor([[1.0, float("inf"), 5.0], [float("nan"), 2.0, 9.0]]).repeat(3, 4, 1)  # [3, 8, 3]
    shrunk = camera.resize_nearest_valid(depth, 5, 2)
    finite = shrunk[shrunk.isfinite()]
    assert torch.isin(finite, torch.tensor([1.0, 2.0, 5.0, 9.0])).all()
    assert shrunk.isinf().any() or shrunk.isnan().any()
    assert camera.resize_nearest_valid(depth > 2, 5, 2).dtype == torch.bool


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normal", [(0.0, 0.0, 0.25), (0.1, -0.15, 0.3)])
def test_a_plane_stays_a_plane_up_to_half_a_source_pixel(size, normal):
    from_height, from_width, height, width = size
    plane = torch.tensor(normal, dtype=torch.float64)
    intrinsics = make_intrinsics(from_height, from_width)
    depth = plane_depth(from_height, from_width, intrinsics, plane)
    new_intrinsics = camera.resize_crop_intrinsics(intrinsics, (from_height, from_width), (height, width))
    taken = camera.resize_nearest_valid(depth, height, width)
    exact = plane_depth(height, width, new_intrinsics, plane)
    # On the plane 1 / depth is linear: half a source pixel per axis shifts it by the half gradient of normal · ray.
    half_pixel = 0.5 * (plane[0].abs() / intrinsics[0, 0] + plane[1].abs() / intrinsics[1, 1])
    assert ((1 / taken - 1 / exact).abs() <= half_pixel + 1e-12).all()
