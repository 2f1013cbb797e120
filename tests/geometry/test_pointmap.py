"""Laws of pointmaps and of their normalisation into the cube."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry import pointmap, se3
from one4d_pl.geometry.camera import camera_rays, project, to_camera, to_world
from one4d_pl.types import PointmapScale

HEIGHT, WIDTH, FRAMES = 12, 16, 5
FAR_LIMIT = 8.0
ROUND_TRIP = 1e-6  # of the scale: a dozen float32 roundings


@dataclass(frozen=True)
class Geometry:
    """The arguments of normalise_pointmap."""

    depth: Tensor
    valid: Tensor
    intrinsics: Tensor
    cam2world: Tensor

    def normalise(self, far_limit: float = FAR_LIMIT, z_offset: bool = False) -> pointmap.NormalisedPointmap:
        return pointmap.normalise_pointmap(
            self.depth, self.valid, self.intrinsics, self.cam2world, far_limit=far_limit, z_offset=z_offset
        )

    def points(self) -> Tensor:
        return pointmap.depth_to_pointmap(self.depth, self.intrinsics, self.cam2world)

    def without(self, missing: Tensor, value: float) -> Geometry:
        return replace(self, depth=self.depth.masked_fill(missing, value), valid=self.valid & ~missing)


def make_cameras(seed: int, dtype: torch.dtype, spread: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = se3.so3_exp(0.4 * torch.randn(FRAMES, 3, dtype=torch.float64, generator=generator))
    centres = spread * torch.randn(FRAMES, 3, dtype=torch.float64, generator=generator)
    world_of_the_dataset = se3.so3_exp(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    rotation, centres = world_of_the_dataset @ rotation, centres @ world_of_the_dataset.mT + 3
    return se3.se3_matrix(rotation, centres).to(dtype)


def make_geometry(seed: int = 0, dtype: torch.dtype = torch.float32) -> Geometry:
    """A room three to five units deep, seen by a camera that turns and moves; every pixel is valid."""
    generator = torch.Generator().manual_seed(seed)
    depth = 3 + 2 * torch.rand(FRAMES, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)
    intrinsics = torch.tensor([[14.0, 0, 8.2], [0, 13.0, 5.9], [0, 0, 1]], dtype=dtype).expand(FRAMES, 3, 3)
    valid = torch.ones(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    return Geometry(depth.to(dtype), valid, intrinsics, make_cameras(seed, dtype))


def make_room(seed: int = 0) -> Geometry:
    """The walls of a cube of half-size four or more around camera 0, which cameras within it see all around."""
    geometry = make_geometry(seed)
    cam2cam0 = se3.rebase_to_first(geometry.cam2world)
    rays = camera_rays(HEIGHT, WIDTH, geometry.intrinsics)
    directions = to_world(rays, cam2cam0) - cam2cam0[:, None, None, :3, 3]
    steps = ((4 + 0.37 * seed) * directions.sign() - cam2cam0[:, None, None, :3, 3]) / directions
    return replace(geometry, depth=steps.amin(-1))


def random_pixels(share: float, seed: int = 9) -> Tensor:
    return torch.rand(FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) < share


def make_hard_geometry(seed: int = 0) -> Geometry:
    """Sky, holes, a frame of sky only, a frame of holes only, untrusted depth and points far beyond the limit."""
    geometry = make_geometry(seed)
    geometry = replace(geometry, depth=geometry.depth.where(~random_pixels(0.1, 1), 1e4))
    geometry = geometry.without(random_pixels(0.2, 2), float("inf")).without(random_pixels(0.2, 3), float("nan"))
    frame = torch.arange(FRAMES)[:, None, None].expand(FRAMES, HEIGHT, WIDTH)
    geometry = geometry.without(frame == 2, float("inf")).without(frame == 3, float("nan"))
    return replace(geometry, valid=geometry.valid & ~random_pixels(0.05, 4))


def size(points: Tensor) -> Tensor:
    return points.abs().amax(-1)


# ---- depth <-> pointmap


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pointmap_to_depth_inverts_depth_to_pointmap(lead, dtype):
    geometry = make_geometry(dtype=dtype)
    depth = geometry.depth.expand(*lead, FRAMES, HEIGHT, WIDTH)
    cameras = geometry.cam2world.expand(*lead, FRAMES, 4, 4)
    points = pointmap.depth_to_pointmap(depth, geometry.intrinsics.expand(*lead, FRAMES, 3, 3), cameras)
    assert points.shape == (*lead, FRAMES, HEIGHT, WIDTH, 3)
    atol = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(pointmap.pointmap_to_depth(points, cameras), depth, rtol=0, atol=atol)


def test_pointmap_is_equation_11_written_out():
    geometry = make_geometry(dtype=torch.float64)
    cam2cam0 = torch.linalg.inv(geometry.cam2world[0]) @ geometry.cam2world
    i, row, column = 3, 4, 7
    world2cam = torch.linalg.inv(cam2cam0[i])
    pixel = torch.tensor([column + 0.5, row + 0.5, 1], dtype=torch.float64)
    ray = torch.linalg.inv(geometry.intrinsics[i]) @ pixel
    expected = world2cam[:3, :3].T @ (geometry.depth[i, row, column] * ray) + cam2cam0[i, :3, 3]
    torch.testing.assert_close(geometry.points()[i, row, column], expected)


def test_frame_0_of_a_pointmap_projects_onto_its_own_pixels():
    geometry = make_geometry(dtype=torch.float64)
    pixels, depth = project(geometry.points()[0], geometry.intrinsics[0])
    torch.testing.assert_close(depth, geometry.depth[0])
    torch.testing.assert_close(pixels[2, 5], torch.tensor([5.5, 2.5], dtype=torch.float64))


def test_unknown_depth_gives_points_that_are_not_finite():
    geometry = make_geometry()
    missing = random_pixels(0.3)
    for value in (float("inf"), float("nan")):
        points = geometry.without(missing, value).points()
        assert torch.equal(points.isfinite().any(-1), ~missing)


# ---- the cube


@pytest.mark.parametrize("z_offset", [False, True])
@pytest.mark.parametrize("make", [make_geometry, make_hard_geometry])
@pytest.mark.parametrize("seed", range(4))
def test_valid_points_come_back_and_everything_is_finite_inside_the_cube(make, seed, z_offset):
    geometry = make(seed)
    normalised = geometry.normalise(z_offset=z_offset)
    assert normalised.points.isfinite().all()
    assert size(normalised.points).max() <= 0.97
    assert (size(normalised.points)[normalised.valid] <= 0.90).all()
    assert not (normalised.valid & ~geometry.valid).any()
    back = pointmap.denormalise(normalised.points, normalised.scale)
    error = (back - geometry.points())[normalised.valid].abs().max()
    assert error <= ROUND_TRIP * normalised.scale.scale
    depth = pointmap.pointmap_to_depth(back, geometry.cam2world)
    assert (depth - geometry.depth)[normalised.valid].abs().max() <= 5 * ROUND_TRIP * normalised.scale.scale


@pytest.mark.parametrize("z_offset", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sky_and_only_sky_is_told_after_a_round_trip(seed, z_offset):
    geometry = make_hard_geometry(seed)
    normalised = geometry.normalise(z_offset=z_offset)
    sky = geometry.depth.isposinf()
    assert sky.any() and not normalised.valid[sky].any()
    assert (size(normalised.points)[sky] == torch.tensor(0.97)).all()
    assert torch.equal(pointmap.is_sky(normalised.points), sky)
    again = pointmap.normalise(pointmap.denormalise(normalised.points, normalised.scale), normalised.scale)
    assert torch.equal(pointmap.is_sky(again), sky)
    noise = 0.034 * (2 * torch.rand(again.shape, generator=torch.Generator().manual_seed(seed)) - 1)
    assert torch.equal(pointmap.is_sky(again + noise), sky)  # a decoding error below 0.035 is told right


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("make", [make_geometry, make_hard_geometry])
def test_bent_points_stay_on_their_rays_inside_the_cube_and_come_back(make, power):
    normalised = make().normalise()
    points = normalised.points.double()
    bent, sky = pointmap.bend(points, power), pointmap.is_sky(points)
    assert torch.equal(bent[sky], points[sky]) and torch.equal(pointmap.is_sky(bent), sky)
    assert size(bent)[~sky].max() <= 0.90 + 1e-6
    distance, bent_distance = (x[~sky].norm(dim=-1) for x in (points, bent))
    torch.testing.assert_close(bent_distance, 0.9 * (distance / 0.9) ** power)
    directions = (x[~sky] / d[:, None] for x, d in ((points, distance), (bent, bent_distance)))
    torch.testing.assert_close(*directions)
    torch.testing.assert_close(pointmap.unbend(bent, power), points, rtol=0, atol=1e-6)


def test_bending_gives_near_points_room_and_what_was_decoded_as_geometry_stays_geometry():
    near, far = (torch.tensor([[[0.0, 0.0, z]]]) for z in (0.02, 0.8))
    error = 0.01  # of the VAE, in its own cube
    ahead = torch.tensor([0.0, 0.0, error])
    for point, least in ((near, 2.0), (far, 0.4)):
        bent_error = (pointmap.unbend(pointmap.bend(point, 0.5) + ahead, 0.5) - point).norm()
        assert error / bent_error > least  # 3.2 and 0.5 by the derivative
    decoded = 0.93 * (2 * torch.rand(1000, 1, 1, 3, generator=torch.Generator().manual_seed(0)) - 1)
    assert not pointmap.is_sky(decoded).any() and not pointmap.is_sky(pointmap.unbend(decoded, 0.5)).any()


@pytest.mark.parametrize("z_offset", [False, True])
def test_sky_and_moved_points_stay_on_the_ray_of_their_own_camera(z_offset):
    geometry = make_hard_geometry()
    normalised = geometry.normalise(z_offset=z_offset)
    camera_points = to_camera(
        pointmap.denormalise(normalised.points, normalised.scale), se3.rebase_to_first(geometry.cam2world)
    )
    pixels, depth = project(camera_points, geometry.intrinsics)
    u = torch.arange(WIDTH) + 0.5
    v = torch.arange(HEIGHT)[:, None] + 0.5
    moved = geometry.depth.isposinf() | (geometry.valid & ~normalised.valid)
    assert (depth[moved] > 0).all()
    assert moved.sum() > 100
    torch.testing.assert_close(pixels[..., 0][moved], u.expand_as(depth)[moved], rtol=0, atol=1e-3)
    torch.testing.assert_close(pixels[..., 1][moved], v.expand_as(depth)[moved], rtol=0, atol=1e-3)


@pytest.mark.parametrize("z_offset", [False, True])
def test_points_beyond_the_cube_are_moved_onto_its_surface_and_flagged(z_offset):
    geometry = make_geometry()
    far = random_pixels(0.1)
    geometry = replace(geometry, depth=geometry.depth.where(~far, 1e4))
    normalised = geometry.normalise(z_offset=z_offset)
    assert torch.equal(~normalised.valid, far)
    assert (size(normalised.points)[far] == torch.tensor(0.90)).all()
    assert (pointmap.denormalise(normalised.points, normalised.scale) - geometry.points())[far].abs().max() > 1


@pytest.mark.parametrize("z_offset", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_compact_scene_keeps_every_point(seed, z_offset):
    normalised = make_room(seed).normalise(z_offset=z_offset)
    assert normalised.valid.all()
    if not z_offset:  # and is not smaller than it has to be
        torch.testing.assert_close(size(normalised.points).max(), torch.tensor(0.90), rtol=0, atol=2e-6)


def test_flying_points_do_not_stretch_the_cube():
    geometry = make_geometry()
    calm = geometry.normalise().scale.scale
    flying = replace(geometry, depth=geometry.depth.where(~random_pixels(0.01), 1e3))
    assert flying.normalise(far_limit=1e6).scale.scale <= 1.3 * calm


@pytest.mark.parametrize("far_limit", [1.5, 3.0, 10.0])
def test_far_limit_bounds_the_scale_in_median_distances(far_limit):
    geometry = make_geometry()
    static = geometry.cam2world[:1].expand(FRAMES, 4, 4)  # no camera path that could enlarge the cube
    tail = 50 * torch.rand(FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).pow(4)
    geometry = replace(geometry, depth=geometry.depth + tail, cam2world=static)
    median = size(geometry.points()).median()
    scale = geometry.normalise(far_limit=far_limit).scale.scale
    assert scale <= far_limit * median / 0.90 * (1 + 1e-6)
    if far_limit <= 3:
        torch.testing.assert_close(scale, far_limit * median / 0.90)
    assert geometry.normalise(far_limit=far_limit, z_offset=True).scale.scale <= scale


def test_far_limit_of_one_or_less_is_refused():
    for far_limit in (1.0, -3.0, float("nan")):
        with pytest.raises(ValueError, match="far_limit"):
            make_geometry().normalise(far_limit=far_limit)


@pytest.mark.parametrize("z_offset", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.5, 30.0])
def test_every_camera_centre_lies_within_080(spread, z_offset):
    geometry = replace(make_geometry(), cam2world=make_cameras(0, torch.float32, spread))
    normalised = geometry.without(random_pixels(0.3), float("inf")).normalise(z_offset=z_offset)
    centres = se3.rebase_to_first(geometry.cam2world)[:, None, None, :3, 3]
    assert size(pointmap.normalise(centres, normalised.scale)).max() <= 0.80 + 1e-6
    assert (normalised.scale.offset == 0) == (not z_offset)


def test_the_offset_halves_the_scale_of_a_forward_scene():
    geometry = make_geometry()
    static = replace(geometry, cam2world=geometry.cam2world[:1].expand(FRAMES, 4, 4))
    narrow = replace(static, intrinsics=static.intrinsics * torch.tensor([3.0, 3.0, 1.0])[:, None])
    narrow.intrinsics[..., :2, 2] /= 3
    ratio = narrow.normalise(z_offset=True).scale.scale / narrow.normalise().scale.scale
    torch.testing.assert_close(ratio, torch.tensor(0.90 / 1.70))


def test_the_offset_leaves_equal_room_ahead_and_behind():
    geometry = make_geometry()
    static = replace(geometry, cam2world=geometry.cam2world[:1].expand(FRAMES, 4, 4))
    wide = replace(static, intrinsics=static.intrinsics * torch.tensor([0.5, 0.5, 1.0])[:, None])
    wide.intrinsics[..., :2, 2] *= 2  # a field of view of 100 degrees: sideways decides the scale
    normalised = wide.normalise(z_offset=True)
    ahead = 0.90 - normalised.points[..., 2].max()
    behind = 0.80 - normalised.scale.offset / normalised.scale.scale  # camera 0 lies at z = -offset / scale
    assert ahead > 0.1
    torch.testing.assert_close(ahead, behind, rtol=0, atol=1e-6)


# ---- invariances


@pytest.mark.parametrize("z_offset", [False, True])
@pytest.mark.parametrize("factor", [1e-3, 0.37, 1e4])
def test_the_unit_of_length_does_not_matter(factor, z_offset):
    geometry = make_hard_geometry()
    cam2world = geometry.cam2world.clone()
    cam2world[:, :3, 3] *= factor
    scaled = replace(geometry, depth=geometry.depth * factor, cam2world=cam2world).normalise(z_offset=z_offset)
    normalised = geometry.normalise(z_offset=z_offset)
    torch.testing.assert_close(scaled.points, normalised.points, rtol=0, atol=2e-6)
    torch.testing.assert_close(scaled.scale.scale, factor * normalised.scale.scale, rtol=2e-6, atol=0)
    assert torch.equal(scaled.valid, normalised.valid)


@pytest.mark.parametrize("z_offset", [False, True])
def test_a_rigid_change_of_the_world_does_not_matter(z_offset):
    geometry = make_hard_geometry()
    change = make_cameras(5, torch.float32)[1]
    moved = replace(geometry, cam2world=change @ geometry.cam2world).normalise(z_offset=z_offset)
    torch.testing.assert_close(moved.points, geometry.normalise(z_offset=z_offset).points, rtol=0, atol=5e-6)


def test_a_world_origin_far_away_costs_nothing():
    geometry = make_hard_geometry()
    near, far = geometry.cam2world.clone(), geometry.cam2world.clone()
    near[:, :3, 3] = (near[:, :3, 3] * 64).round() / 64  # so that adding 2^16 is exact in float32
    far[:, :3, 3] = near[:, :3, 3] + 65536
    expected, actual = replace(geometry, cam2world=near).normalise(), replace(geometry, cam2world=far).normalise()
    assert torch.equal(actual.points, expected.points) and torch.equal(actual.valid, expected.valid)


def test_later_frames_keep_their_place_when_their_order_changes():
    geometry = make_hard_geometry()
    order = torch.tensor([0, 3, 1, 4, 2])
    shuffled = Geometry(*(part[order] for part in vars(geometry).values())).normalise()
    normalised = geometry.normalise()
    torch.testing.assert_close(shuffled.points, normalised.points[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(shuffled.scale.scale, normalised.scale.scale, rtol=1e-6, atol=0)


def test_one_similarity_serves_all_frames_and_axes():
    geometry = make_room()
    normalised = geometry.normalise(z_offset=True)
    shift = torch.stack([torch.zeros(()), torch.zeros(()), normalised.scale.offset])
    expected = (geometry.points() - shift) / normalised.scale.scale
    torch.testing.assert_close(normalised.points, expected, rtol=0, atol=1e-6)


def test_a_batch_of_scales_serves_a_batch_of_clips():
    clips = [make_geometry(seed).normalise(z_offset=True) for seed in range(2)]
    scale = PointmapScale(*(torch.stack([getattr(c.scale, name) for c in clips]) for name in ("scale", "offset")))
    together = pointmap.denormalise(torch.stack([c.points for c in clips]), scale)
    for i, clip in enumerate(clips):
        alone = pointmap.denormalise(clip.points, clip.scale)
        torch.testing.assert_close(together[i], alone, rtol=1e-6, atol=1e-6 * float(alone.abs().amax()))


# ---- holes, empty clips, bad input


def brute_force_nearest(valid: Tensor, row: int, column: int) -> int:
    distance = (valid.nonzero() - torch.tensor([row, column])).abs().sum(-1)
    return int(distance.min())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_holes_take_the_depth_of_a_nearest_valid_pixel_of_their_frame(share):
    holes = random_pixels(share)
    holes[:, 3, 3] = False  # no frame is empty
    address = torch.arange(float(FRAMES * HEIGHT * WIDTH)).reshape(FRAMES, HEIGHT, WIDTH) + 1
    filled = pointmap.infill_depth(address.masked_fill(holes, float("nan")), ~holes)
    assert torch.equal(filled[~holes], address[~holes])
    for t, row, column in holes.nonzero().tolist():
        source = int(filled[t, row, column]) - 1
        source_t, source_row, source_column = source // (HEIGHT * WIDTH), source // WIDTH % HEIGHT, source % WIDTH
        assert source_t == t and not holes[t, source_row, source_column]
        assert abs(source_row - row) + abs(source_column - column) == brute_force_nearest(~holes[t], row, column)


def test_a_frame_without_valid_depth_takes_the_median_of_the_clip():
    geometry = make_geometry()
    holes = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    holes[2] = True
    geometry = geometry.without(holes, float("nan"))
    filled = pointmap.infill_depth(geometry.depth, geometry.valid)
    assert filled[2].eq(geometry.depth[geometry.valid].median()).all()


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 0.0, -2.0])
def test_holes_are_flagged_and_never_sky(value):
    geometry = make_geometry()
    holes = random_pixels(0.6)
    geometry = replace(geometry, depth=geometry.depth.masked_fill(holes, value))  # wrongly called valid
    normalised = geometry.normalise()
    assert not normalised.valid[holes].any() and normalised.valid[~holes].all()
    assert not pointmap.is_sky(normalised.points).any()
    assert normalised.points.isfinite().all()


def test_a_clip_without_a_valid_point_is_refused_in_one_line():
    geometry = make_geometry()
    everywhere = torch.ones_like(geometry.valid)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no valid point") as error:
            geometry.without(everywhere, value).normalise()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("z_offset", [False, True])
def test_one_valid_pixel_is_enough(z_offset):
    only = torch.ones(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    only[1, 2, 3] = False
    normalised = make_geometry().without(only, float("nan")).normalise(z_offset=z_offset)
    assert normalised.valid.sum() == 1 and normalised.points.isfinite().all()


@pytest.mark.parametrize("depth", [1e-20, 1e30, 3e38])
def test_absurd_depths_stay_finite_or_are_refused(depth):
    geometry = make_geometry()
    some = replace(geometry, depth=geometry.depth.where(~random_pixels(0.3), depth)).normalise()
    assert some.points.isfinite().all() and size(some.points).max() <= 0.90
    absurd = replace(geometry, depth=torch.full_like(geometry.depth, depth))
    if depth == 3e38:
        with pytest.raises(ValueError, match="finite and positive"):
            absurd.normalise()
    else:
        assert absurd.normalise().points.isfinite().all()


def test_rays_along_an_axis_reach_the_cube():
    geometry = make_geometry()
    intrinsics = geometry.intrinsics.clone()
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 8.5, 5.5  # the centre of pixel (5, 8): its ray is (0, 0, 1) exactly
    static = torch.eye(4).expand(FRAMES, 4, 4)
    sky = torch.zeros_like(geometry.valid)
    sky[:, 5] = True
    normalised = replace(geometry, intrinsics=intrinsics, cam2world=static).without(sky, float("inf")).normalise()
    torch.testing.assert_close(normalised.points[1, 5, 8], torch.tensor([0.0, 0.0, 0.97]), rtol=0, atol=0)
    assert torch.equal(pointmap.is_sky(normalised.points), sky)


def test_the_input_is_left_as_it_was():
    geometry = make_hard_geometry()
    before = [part.clone() for part in vars(geometry).values()]
    geometry.normalise()
    for part, copy in zip(vars(geometry).values(), before, strict=True):
        torch.testing.assert_close(part, copy, rtol=0, atol=0, equal_nan=True)


def test_bf16_autocast_does_not_touch_pointmaps():
    geometry = make_hard_geometry()
    expected = geometry.normalise(z_offset=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = geometry.normalise(z_offset=True)
    assert torch.equal(actual.points, expected.points)
