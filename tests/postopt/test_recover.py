"""Laws of the recovery: exact pointmaps give exact cameras, similarities carry through, degenerate input is named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry.camera import to_world, unproject
from one4d_pl.geometry.pointmap import depth_to_pointmap
from one4d_pl.geometry.se3 import rebase_to_first, se3_matrix, so3_exp
from one4d_pl.metrics.camera import path_length
from one4d_pl.postopt.recover import RecoveredScene, RecoverOptions, project_depth, recover_scene
from one4d_pl.toy.world import exact_clip
from tests.postopt.worlds import PATHS, World, accuracy, build_world, disturb

EXACT = RecoverOptions(alpha2=0)


@pytest.fixture(scope="module", params=PATHS)
def world(request: pytest.FixtureRequest) -> World:
    return build_world(request.param, num_frames=9, height=22, width=39)


@pytest.fixture(scope="module")
def hand_held() -> World:
    return build_world("hand-held", num_frames=9, height=22, width=39)


def centre_error(scene: RecoveredScene, cam2world: Tensor) -> float:
    """Root mean square, no alignment."""
    return float((scene.cam2world - cam2world)[:, :3, 3].square().sum(-1).mean().sqrt())


def assert_no_nan(scene: RecoveredScene, pointmap: Tensor) -> None:
    assert bool(scene.intrinsics.isfinite().all() & scene.world2cam.isfinite().all())
    assert bool((scene.intrinsics.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert torch.equal(scene.depth.isfinite(), pointmap.isfinite().all(-1))
    assert bool((scene.depth[scene.depth.isfinite()] >= 0).all())
    rotation = scene.world2cam[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand_as(rotation), rtol=0, atol=1e-9)


# ---- exact input


@pytest.mark.parametrize("options", [EXACT, RecoverOptions()], ids=["no smoothing", "default"])
def test_exact_pointmaps_give_exact_focal_cameras_and_depth(world: World, options: RecoverOptions) -> None:
    scene = recover_scene(world.pointmap.float(), world.valid, options)
    limit = 1e-5 if options.alpha2 == 0 else 1e-3
    torch.testing.assert_close(scene.intrinsics, world.intrinsics.float(), rtol=1e-4, atol=0)
    path = path_length(world.cam2world) or world.distance  # a camera at rest has no path to measure by
    assert centre_error(scene, world.cam2world) <= limit * path
    relative = (scene.depth / world.depth - 1)[world.valid].abs()
    assert float(relative.max()) <= 1e-4
    assert scene.report.converged and bool(scene.report.solved.all())


@pytest.mark.parametrize("seed", range(4))
def test_scenes_with_moving_things_and_zoom_are_exact_with_a_focal_per_frame(seed: int) -> None:
    clip = exact_clip(seed, 9, 24, 32, "synthetic")
    pointmap = depth_to_pointmap(clip.depth, clip.intrinsics, clip.cam2world)
    scene = recover_scene(pointmap, clip.valid, replace(EXACT, shared_focal=False))
    truth = rebase_to_first(clip.cam2world.double())
    torch.testing.assert_close(scene.intrinsics, clip.intrinsics, rtol=1e-4, atol=0)
    assert centre_error(scene, truth) <= 1e-5 * path_length(truth)


def test_the_result_turns_shifts_and_scales_with_the_pointmap(hand_held: World) -> None:
    pointmap = disturb(hand_held, noise=0.02, outliers=0.1).double()
    rotation = so3_exp(torch.tensor([0.4, -1.2, 2.0], dtype=torch.float64))
    shift, scale = torch.tensor([3.0, -7.0, 11.0], dtype=torch.float64), 0.02
    plain = recover_scene(pointmap, hand_held.valid)
    moved = recover_scene(scale * pointmap @ rotation.mT + shift, hand_held.valid)
    expected = se3_matrix(
        rotation @ plain.cam2world[:, :3, :3], scale * plain.cam2world[:, :3, 3] @ rotation.mT + shift
    )
    # The start takes medians axis by axis, so another frame ends elsewhere within the tolerance of the last step.
    torch.testing.assert_close(moved.cam2world, expected, rtol=0, atol=2e-3 * scale * hand_held.distance)
    torch.testing.assert_close(moved.intrinsics, plain.intrinsics, rtol=1e-3, atol=0)
    torch.testing.assert_close(moved.depth, scale * plain.depth, rtol=2e-2, atol=2e-3 * scale * hand_held.distance)
    torch.testing.assert_close(moved.report.noise, scale * plain.report.noise, rtol=2e-2, atol=0)


def test_depth_is_the_exact_minimum_per_pixel(hand_held: World) -> None:
    pointmap = disturb(hand_held, noise=0.05, outliers=0.2).double()
    scene = recover_scene(pointmap, hand_held.valid)

    def distance(depth: Tensor) -> Tensor:
        points = to_world(unproject(depth.double(), scene.intrinsics.double()), scene.cam2world)
        return torch.linalg.vector_norm(points - pointmap, dim=-1)

    best, step = distance(scene.depth), 1e-3 * hand_held.distance
    assert bool((best <= distance(scene.depth + step) + 1e-9).all())
    assert bool((best <= distance((scene.depth - step).clamp_min(0)) + 1e-9).all())


@pytest.mark.parametrize(
    ("path", "kept"), [("static", True), ("forward", True), ("orbit", False), ("hand-held", False)]
)
def test_smoothing_is_kept_where_it_helps_and_dropped_where_it_would_cost(path: str, kept: bool) -> None:
    world = build_world(path, num_frames=9, height=22, width=39)
    pointmap = disturb(world, noise=0.01, outliers=0.0)
    scene, plain = (recover_scene(pointmap, world.valid, options) for options in (RecoverOptions(), EXACT))
    assert scene.report.alpha2 == (0.01 if kept else 0) and plain.report.alpha2 == 0
    smoothed, plain_error = (centre_error(result, world.cam2world) for result in (scene, plain))
    if kept:
        assert smoothed <= 0.9 * plain_error
    else:  # the same objective, but its first sums are taken sort by sort of tiles: equal but for rounding
        assert smoothed == pytest.approx(plain_error, rel=1e-9)


# ---- what is known


def test_a_known_focal_is_kept_to_the_bit(hand_held: World) -> None:
    pointmap = disturb(hand_held, noise=0.05, outliers=0.0)
    scene = recover_scene(pointmap, hand_held.valid, RecoverOptions(focal=31.25))
    assert bool((scene.intrinsics[:, 0, 0] == 31.25).all() & (scene.intrinsics[:, 1, 1] == 31.25).all())
    assert scene.report.focal_deviation == 0 and "focal from prior" not in scene.report.flags


def test_a_known_aspect_gives_pixels_that_are_not_square(hand_held: World) -> None:
    intrinsics = hand_held.intrinsics.clone()
    intrinsics[:, 1, 1] *= 1.3
    pointmap = depth_to_pointmap(torch.where(hand_held.valid, hand_held.depth, 1), intrinsics, hand_held.cam2world)
    scene = recover_scene(pointmap, hand_held.valid, replace(EXACT, aspect=1.3))
    torch.testing.assert_close(scene.intrinsics.double(), intrinsics, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha2", -1.0), ("aspect", 0.0), ("focal", math.nan), ("principal_point", (math.nan, 1.0))],
)
def test_impossible_options_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"postopt.{name}"):
        RecoverOptions(**{name: value})


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="pointmap"):
        recover_scene(torch.zeros(4, 5, 3))
    with pytest.raises(ValueError, match="valid"):
        recover_scene(torch.zeros(2, 4, 5, 3), torch.ones(2, 4, 4))


# ---- what is wrong with the points


def test_unflagged_outliers_do_not_move_exact_cameras(world: World) -> None:
    scene = recover_scene(disturb(world, noise=0.0, outliers=0.3), world.valid)
    assert accuracy(world, scene.intrinsics[:, 0, 0], scene.cam2world, scene.depth).centre <= 1e-4
    share = scene.report.inliers
    assert bool((share > 0.6).all() & (share < 0.8).all())


@pytest.mark.parametrize("kind", ["far to one side", "a moved quarter", "a moved third"])
def test_outliers_that_agree_with_each_other_do_not_win(hand_held: World, kind: str) -> None:
    pointmap = disturb(hand_held, noise=0.01, outliers=0.0)
    if kind == "far to one side":
        flying = torch.rand(pointmap.shape[:3], generator=torch.Generator().manual_seed(0)) < 0.3
        pointmap = torch.where(flying[..., None], 30 * pointmap + 50, pointmap)
    else:
        rows, columns = (22, 10) if kind == "a moved quarter" else (12, 22)
        pointmap[:, -rows:, -columns:] += 0.3 * hand_held.distance * torch.tensor([1.0, 0.5, -0.5])
    scene = recover_scene(pointmap, hand_held.valid)
    clean = recover_scene(disturb(hand_held, noise=0.01, outliers=0.0), hand_held.valid)
    assert centre_error(scene, hand_held.cam2world) <= 3 * centre_error(clean, hand_held.cam2world)


@pytest.mark.parametrize("filler", [math.nan, math.inf, 1e6])
def test_invalid_pixels_count_for_nothing(hand_held: World, filler: float) -> None:
    valid = hand_held.valid.clone()
    valid[:, :9] = False
    reference = recover_scene(hand_held.pointmap, valid)
    spoilt = torch.where(valid[..., None], hand_held.pointmap, filler)
    scene = recover_scene(spoilt, valid)
    assert torch.equal(scene.world2cam, reference.world2cam) and torch.equal(scene.intrinsics, reference.intrinsics)
    assert_no_nan(scene, spoilt)


def test_weights_of_zero_equal_invalid(hand_held: World) -> None:
    weights = hand_held.valid.float() * 0.5
    half, whole = recover_scene(hand_held.pointmap, weights), recover_scene(hand_held.pointmap, hand_held.valid)
    torch.testing.assert_close(half.world2cam, whole.world2cam, rtol=0, atol=1e-7)


# ---- degenerate geometry: defined, named, never nan


def test_a_resting_and_a_turning_camera_are_named() -> None:
    still = build_world("static", 5, 22, 39)
    scene = recover_scene(still.pointmap, still.valid)
    assert "static camera" in scene.report.flags
    turn = so3_exp(torch.linspace(0, 0.3, 5, dtype=torch.float64)[:, None] * torch.tensor([0.0, 1, 0]).double())
    points = still.depth.nan_to_num(posinf=1)[..., None] * 0 + still.pointmap  # the same view, in a turned world
    turned = torch.einsum("tij,thwj->thwi", turn, points)
    scene = recover_scene(turned, still.valid)
    assert "pure rotation" in scene.report.flags and "static camera" not in scene.report.flags
    torch.testing.assert_close(scene.cam2world[:, :3, :3], turn, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_a_wall_seen_straight_on_hides_the_focal_and_the_prior_is_named(noise: float) -> None:
    depth = torch.full((5, 24, 32), 4.0, dtype=torch.float64)
    intrinsics = torch.tensor([[50.0, 0, 16], [0, 50, 12], [0, 0, 1]], dtype=torch.float64).expand(5, 3, 3)
    wall = unproject(depth, intrinsics)
    wall = wall + noise * 4 * torch.randn(wall.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scene = recover_scene(wall)
    assert "focal from prior" in scene.report.flags
    assert_no_nan(scene, wall)
    torch.testing.assert_close(scene.intrinsics[:, 0, 0], torch.full((5,), 16 / math.tan(math.radians(30))))
    assert float(scene.report.residual.max()) <= 2 * noise * 4 + 1e-6  # the cameras still explain the points


def test_a_slanted_wall_shows_the_focal() -> None:
    intrinsics = torch.tensor([[50.0, 0, 16], [0, 50, 12], [0, 0, 1]], dtype=torch.float64).expand(3, 3, 3)
    depth = 1 / torch.linspace(0.3, 0.15, 32, dtype=torch.float64).expand(3, 24, 32)  # 1 / z is linear on a plane
    scene = recover_scene(unproject(depth, intrinsics), options=EXACT)
    assert "focal from prior" not in scene.report.flags
    torch.testing.assert_close(scene.intrinsics.double(), intrinsics, rtol=1e-4, atol=0)


def test_a_field_of_view_too_narrow_for_its_relief_falls_back_to_the_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    depth = 100 + 0.05 * torch.rand(3, 24, 32, generator=generator, dtype=torch.float64)
    intrinsics = torch.tensor([[1500.0, 0, 16], [0, 1500, 12], [0, 0, 1]], dtype=torch.float64).expand(3, 3, 3)
    points = unproject(depth, intrinsics)
    points = points + 1e-3 * torch.randn(points.shape, generator=generator, dtype=torch.float64)
    scene = recover_scene(points)
    assert "focal from prior" in scene.report.flags
    assert_no_nan(scene, points)


def test_one_frame_is_enough(hand_held: World) -> None:
    scene = recover_scene(hand_held.pointmap[:1], hand_held.valid[:1])
    torch.testing.assert_close(scene.world2cam[0], torch.eye(4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(scene.intrinsics.double(), hand_held.intrinsics[:1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("filler", [math.nan, 0.0])
def test_a_frame_without_points_lies_between_its_neighbours(filler: float) -> None:
    world = build_world("orbit", 5, 22, 39)
    valid, pointmap = world.valid.clone(), world.pointmap.clone()
    valid[2], valid[4] = False, False
    pointmap[[2, 4]] = filler
    scene = recover_scene(pointmap, valid)
    assert "interpolated poses" in scene.report.flags
    assert scene.report.solved.tolist() == [True, True, False, True, False]
    assert_no_nan(scene, pointmap)
    rotation, centre = scene.cam2world[:, :3, :3], scene.cam2world[:, :3, 3]
    torch.testing.assert_close(centre[2], (centre[1] + centre[3]) / 2)
    torch.testing.assert_close(rotation[2] @ rotation[1].mT, rotation[3] @ rotation[2].mT)
    torch.testing.assert_close(scene.world2cam[4], scene.world2cam[3])
    assert centre_error(scene, world.cam2world) > 1e-3  # the last frame is a guess, not knowledge


@pytest.mark.parametrize(
    "pointmap",
    [
        torch.full((3, 8, 12, 3), 2.0),
        torch.zeros(3, 8, 12, 3),
        torch.full((3, 8, 12, 3), torch.nan),
        torch.linspace(0, 1, 12)[:, None].expand(3, 8, 12, 3).clone(),  # all on one line
        torch.zeros(1, 1, 1, 3),
    ],
    ids=["constant", "zero", "nan", "line", "one pixel"],
)
def test_a_pointmap_without_geometry_has_a_defined_answer(pointmap: Tensor) -> None:
    scene = recover_scene(pointmap)
    assert "no geometry" in scene.report.flags and not bool(scene.report.solved.any())
    torch.testing.assert_close(scene.world2cam, torch.eye(4).double().expand_as(scene.world2cam))
    assert_no_nan(scene, pointmap)


def test_points_behind_the_camera_have_depth_zero_and_are_counted(hand_held: World) -> None:
    pointmap = hand_held.pointmap.clone()
    behind = to_world(unproject(-hand_held.depth.nan_to_num(posinf=1), hand_held.intrinsics), hand_held.cam2world)
    pointmap[:, :5] = behind[:, :5]
    scene = recover_scene(pointmap, hand_held.valid)
    share = hand_held.valid[:, :5].float().flatten(1).sum(1) / hand_held.depth[0].numel()
    assert bool((scene.depth[:, :5][hand_held.valid[:, :5]] == 0).all())
    assert bool((scene.report.behind >= share - 1e-6).all())
    assert_no_nan(scene, pointmap)


def test_a_mirrored_pointmap_is_named(hand_held: World) -> None:
    scene = recover_scene(-hand_held.pointmap, hand_held.valid)
    assert "points behind the camera" in scene.report.flags
    assert_no_nan(scene, hand_held.pointmap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_works(hand_held: World, dtype: torch.dtype) -> None:
    scene = recover_scene(hand_held.pointmap.to(dtype), hand_held.valid)
    error = accuracy(hand_held, scene.intrinsics[:, 0, 0], scene.cam2world, scene.depth)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # intrinsics are float32
    assert error.focal <= eps and error.centre <= eps
    assert scene.depth.dtype == torch.float32


def test_the_depth_of_a_known_camera_is_its_z(hand_held: World) -> None:
    world2cam = torch.linalg.inv(hand_held.cam2world)
    depth, behind = project_depth(hand_held.pointmap, hand_held.intrinsics, world2cam)
    torch.testing.assert_close(depth[hand_held.valid].double(), hand_held.depth[hand_held.valid], rtol=1e-6, atol=0)
    assert float(behind.max()) < 0.6  # pixels that are not valid sit at the origin, in or behind the camera
