"""Laws of long videos: the plan covers every frame, conditions are named per task, joining windows loses nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from one4d_pl.geometry.se3 import relative_se3, so3_exp
from one4d_pl.postopt.recover import RecoveredScene, RecoverOptions, recover_scene
from one4d_pl.postopt.windows import Window, join_windows, plan_windows, window_mask
from tests.postopt.worlds import World, build_world


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 17, 18, 30, 50, 81, 113, 200])
@pytest.mark.parametrize(("window", "overlap"), [(17, 1), (17, 8), (17, 16), (49, 13)])
def test_a_plan_covers_every_frame_with_windows_the_model_can_run(num_frames: int, window: int, overlap: int) -> None:
    plan = plan_windows(num_frames, window, overlap)
    covered = {frame for part in plan for frame in range(part.start, part.stop)}
    assert covered == set(range(num_frames))
    assert plan[0].start == 0 and plan[-1].stop == num_frames
    for part in plan:
        assert part.length % 4 == 1 and 0 <= part.padding < 4 and part.length <= window
        assert part.padding == 0 or len(plan) == 1
    for before, after in pairwise(plan):
        assert before.start < after.start <= before.stop - overlap


def test_the_last_window_is_right_aligned() -> None:
    assert [part.start for part in plan_windows(50, 21, 5)] == [0, 16, 29]
    assert plan_windows(50, 81, 5) == (Window(0, 50, 53),)
    assert [part.start for part in plan_windows(37, 21, 5)] == [0, 16]  # fits without a remainder


@pytest.mark.parametrize(
    ("arguments", "complaint"), [((50, 20, 5), "4k"), ((50, 21, 0), "overlap"), ((0, 21, 5), "video")]
)
def test_impossible_plans_are_refused(arguments: tuple[int, int, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan_windows(*arguments)


@pytest.mark.parametrize(
    ("task", "given", "shown"),  # windows 0..8 and 6..14 of 15 frames
    [
        ("text", [], ([], [0, 1, 2])),
        ("image", [0], ([0], [0, 1, 2])),
        ("sparse", [0, 7, 14], ([0, 7], [0, 1, 2, 8])),
        ("video", list(range(15)), (list(range(9)), list(range(9)))),
    ],
)
def test_each_task_says_what_the_next_window_is_shown(task, given, shown) -> None:
    frame_mask = torch.zeros(15, dtype=torch.bool)
    frame_mask[given] = True
    for index in range(2):
        mask = window_mask(frame_mask, plan_windows(15, 9, 3), index)
        assert mask.nonzero()[:, 0].tolist() == shown[index], task


def test_repeated_frames_carry_the_flag_of_the_last_one() -> None:
    frame_mask = torch.tensor([True, False, True])
    assert window_mask(frame_mask, plan_windows(3, 9, 3), 0).tolist() == [True, False, True, True, True]
    with pytest.raises(ValueError, match="frame_mask"):
        window_mask(frame_mask, plan_windows(4, 9, 3), 0)


# ---- joining


@pytest.fixture(scope="module")
def world() -> World:
    return build_world("hand-held", num_frames=21, height=22, width=39)


def recover_windows(
    world: World, noise: float, spoil: Tensor | None = None
) -> tuple[list[RecoveredScene], tuple[Window, ...]]:
    """Each window as the model gives it: its own first camera is the world, its own unit and noise."""
    plan = plan_windows(len(world.depth), 9, 3)
    generator = torch.Generator().manual_seed(0)
    scenes = []
    for index, part in enumerate(plan):
        frames = slice(part.start, part.stop)
        pointmap, scale = world.pointmap[frames], 0.3 * 2.0**index
        rotation = so3_exp(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64) * index)
        pointmap = pointmap + noise * world.distance * torch.randn(pointmap.shape, generator=generator).double()
        pointmap = scale * pointmap @ rotation.mT + index
        scenes.append(recover_scene(pointmap, world.valid[frames]))
        if spoil is not None and index == 1:
            depth = torch.where(spoil, 10 * scenes[1].depth, scenes[1].depth)
            scenes[1] = replace(scenes[1], depth=depth)
    return scenes, plan


def relative_error(scene: RecoveredScene, world: World) -> float:
    """Largest error of the cameras' centres in median depths, after the first camera and the unit are matched."""
    unit = (scene.depth / world.depth)[0][world.valid[0]].median()
    centres = relative_se3(scene.cam2world[:1], scene.cam2world)[:, :3, 3] / unit
    return float(torch.linalg.vector_norm(centres - world.cam2world[:, :3, 3], dim=-1).amax()) / world.distance


def test_exact_windows_join_exactly(world: World) -> None:
    scenes, plan = recover_windows(world, noise=0.0)
    joined = join_windows(scenes, plan)
    assert len(joined.report.seams) == len(plan) - 1
    assert relative_error(joined, world) <= 1e-5
    ratio = (joined.depth / world.depth)[world.valid]
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(joined.intrinsics, world.intrinsics.float(), rtol=1e-4, atol=0)
    assert all(seam.residual <= 1e-5 and seam.inliers > 0.99 and not seam.flags for seam in joined.report.seams)
    assert len(joined.report.residual) == len(world.depth)


def test_noisy_windows_drift_less_than_their_noise(world: World) -> None:
    scenes, plan = recover_windows(world, noise=0.01)
    assert relative_error(join_windows(scenes, plan), world) <= 0.01


def test_outliers_in_the_shared_frames_do_not_move_the_seam(world: World) -> None:
    spoil = torch.rand(9, 22, 39, generator=torch.Generator().manual_seed(0)) < 0.3
    scenes, plan = recover_windows(world, noise=0.0, spoil=spoil)
    joined = join_windows(scenes, plan)
    assert relative_error(joined, world) <= 1e-4
    assert 0.6 < joined.report.seams[0].inliers < 0.8


def test_one_window_is_returned_as_it_is(world: World) -> None:
    scene = recover_scene(world.pointmap, world.valid, RecoverOptions(focal=25.0))
    joined = join_windows([scene], plan_windows(21, 21, 5))
    assert joined is scene and joined.report.seams == ()


def test_shared_frames_without_a_point_keep_the_unit_and_say_so(world: World) -> None:
    scenes, plan = recover_windows(world, noise=0.0)
    empty = scenes[1].depth.clone()
    empty[:3] = torch.nan
    joined = join_windows([scenes[0], replace(scenes[1], depth=empty)], (plan[0], Window(6, 15, 9)))
    assert joined.report.seams[0].flags and bool(joined.world2cam.isfinite().all())
    assert bool(joined.depth[:9][world.valid[:9]].isfinite().all())  # what one window knows is kept


def test_scenes_that_do_not_fit_the_plan_are_refused(world: World) -> None:
    scenes, plan = recover_windows(world, noise=0.0)
    with pytest.raises(ValueError, match="windows"):
        join_windows(scenes[:-1], plan)
