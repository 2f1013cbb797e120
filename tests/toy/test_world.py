"""Laws of the toy world: the oracle must be exact, deterministic, truthful and not easy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from one4d_pl.config import TOY_LEVELS
from one4d_pl.toy.draw import build_scene
from one4d_pl.toy.levels import MOTIONS, THING_COLOURS
from one4d_pl.toy.things import solids_at
from one4d_pl.toy.world import FPS, exact_clip, render_clip
from one4d_pl.types import DOMAINS, Clip

VERBS = {verb for verbs in MOTIONS.values() for verb in verbs}


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [render_clip(seed, 17, 24, 36) for seed in range(48)]


@pytest.fixture(scope="module")
def real_clips() -> list[tuple[Clip, Clip]]:
    return [(render_clip(seed, 9, 32, 48, "real"), exact_clip(seed, 9, 32, 48, "real")) for seed in range(6)]


def lift(clip: Clip) -> Tensor:  # [T, H, W, 3] float64, world
    depth, intrinsics, cam2world = clip.depth.double(), clip.intrinsics.double(), clip.cam2world.double()
    _, height, width = depth.shape
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).double()
    camera = torch.einsum("tij,hwj->thwi", torch.linalg.inv(intrinsics), pixels) * depth[..., None]
    return torch.einsum("tij,thwj->thwi", cam2world[:, :3, :3], camera) + cam2world[:, None, None, :3, 3]


def assert_same_clip(actual: Clip, expected: Clip) -> None:
    for name in ("frames", "depth", "intrinsics", "cam2world", "valid", "moving"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    assert (actual.key, actual.caption) == (expected.key, expected.caption)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_clip_is_a_pure_function_of_its_arguments(domain):
    torch.manual_seed(1)  # the global states must not matter
    np.random.seed(1)
    expected = render_clip(3, 3, 16, 24, domain)
    torch.manual_seed(2)
    np.random.seed(2)
    assert_same_clip(render_clip(3, 3, 16, 24, domain), expected)
    assert not torch.equal(render_clip(4, 3, 16, 24, domain).frames, expected.frames)


def test_domains_have_their_own_scenes():
    assert exact_clip(5, 2, 16, 24, "real").caption != exact_clip(5, 2, 16, 24, "synthetic").caption


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 7, 5), (4, 33, 17), (1, 8, 40)])
def test_any_size_gives_a_clip_that_keeps_the_schema(domain, size):
    clip = render_clip(1, *size, domain)
    num_frames, height, width = size
    assert clip.frames.shape == (*size, 3) and clip.frames.dtype == torch.uint8
    assert clip.depth.shape == clip.valid.shape == clip.moving.shape == size
    assert clip.depth.dtype == clip.intrinsics.dtype == clip.cam2world.dtype == torch.float32
    assert clip.valid.dtype == clip.moving.dtype == torch.bool
    assert torch.equal(clip.valid, clip.depth.isfinite()) and (clip.depth[clip.valid] > 0).all()
    assert clip.intrinsics.shape == (num_frames, 3, 3) and clip.cam2world.shape == (num_frames, 4, 4)
    assert torch.equal(clip.intrinsics[:, 0, 0], clip.intrinsics[:, 1, 1])
    assert (clip.intrinsics[:, 0, 2] == width / 2).all() and (clip.intrinsics[:, 1, 2] == height / 2).all()
    rotation = clip.cam2world[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), rtol=0, atol=1e-5)
    assert (torch.linalg.det(rotation) > 0).all()
    assert (clip.key, clip.source, clip.domain) == (f"toy_{domain}_00000001", "toy", domain)
    assert (clip.fps, clip.licence) == (FPS, "CC0-1.0")


def test_a_longer_clip_continues_a_shorter_one():
    short, long = render_clip(2, 3, 16, 24), render_clip(2, 30, 16, 24)
    torch.testing.assert_close(long.depth[:3], short.depth, rtol=1e-6, atol=0)
    torch.testing.assert_close(long.cam2world[:3], short.cam2world, rtol=0, atol=1e-6)
    assert (long.frames[:3].int() - short.frames.int()).abs().max() <= 1


@pytest.mark.parametrize("level", TOY_LEVELS)
@pytest.mark.parametrize("seed", range(6))
def test_three_times_the_size_is_the_same_scene(seed, level):
    """The middle pixel of 3 x 3 small ones has the same centre; the mean of the nine is the antialiased colour."""
    coarse, fine = render_clip(seed, 3, 40, 60, level=level), render_clip(seed, 3, 120, 180, level=level)
    torch.testing.assert_close(fine.cam2world, coarse.cam2world, rtol=0, atol=0)
    scaled = coarse.intrinsics * torch.tensor([3.0, 3.0, 1.0])[:, None]
    torch.testing.assert_close(fine.intrinsics, scaled, rtol=1e-6, atol=0)
    same = (fine.depth[:, 1::3, 1::3] - coarse.depth).abs() <= 1e-5 * coarse.depth
    same |= coarse.depth.isinf() & fine.depth[:, 1::3, 1::3].isinf()
    assert same.float().mean() > 0.999  # but for rays that graze an edge
    assert (fine.moving[:, 1::3, 1::3] == coarse.moving).float().mean() > 0.999
    mean = avg_pool2d(fine.frames.float().permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1)
    error = (mean - coarse.frames.float()).abs()
    assert error.mean() < 2.5 and error.quantile(0.99) < 25  # of 255: no aliasing of textures or edges


@pytest.mark.parametrize("level", TOY_LEVELS)
@pytest.mark.parametrize("seed", range(6))
def test_static_points_have_the_same_depth_from_every_frame(seed, level):
    clip = render_clip(seed, 17, 64, 96, level=level)
    world, last = lift(clip)[0], 16
    known = clip.valid[0] & ~clip.moving[0]
    camera = (
        torch.linalg.inv(clip.cam2world[last].double())
        @ torch.cat([world[known], torch.ones(int(known.sum()), 1)], dim=-1).mT
    ).mT[:, :3]  # [N, 3]
    image = (clip.intrinsics[last].double() @ camera.mT).mT
    where = image[:, :2] / image[:, 2:] / torch.tensor([96.0, 64.0]) * 2 - 1  # grid_sample's centres lie at +0.5 too
    inside = (camera[:, 2] > 0) & (where.abs() < 0.97).all(-1)
    # disparity, not depth, is linear over the pixels of a plane
    shown = torch.stack([1 / clip.depth[last].double(), clip.moving[last].double()])[None]
    disparity, covered = grid_sample(shown, where[None, None, inside], align_corners=False)[0, :, 0]
    error = 1 / disparity / camera[inside, 2] - 1
    visible = (covered == 0) & (error > -0.05)  # else something stands in between
    assert visible.sum() > 300
    assert error[visible].abs().median() < 1e-4
    assert (error[visible].abs() < 1e-3).double().mean() > 0.75  # the rest is edges and curved surfaces


def distance_to_scene(points: np.ndarray, seed: int, level: str, time: float) -> np.ndarray:  # [N, 3] -> [N]
    """Distance of world points to the nearest surface of the scene at `time` s, to first order."""
    scene = build_scene(seed, "synthetic", level)
    bounds = np.stack([scene.room.lower, scene.room.upper])  # [2, 3]
    nearest = np.abs(points[:, None] - bounds).min((1, 2))
    for solid in (solid for thing in scene.things for solid in solids_at(thing, np.array([time]))):
        local, size = np.abs((points - solid.centre[0]) @ solid.rotation[0]), solid.size[0]
        if solid.shape == "box":
            distance = (local - size).max(-1)
        elif solid.shape == "capsule":
            beyond = local - [0, 1, 0] * np.minimum(local, size)
            distance = np.linalg.norm(beyond, axis=-1) - size[0]
        else:
            level = np.linalg.norm(local / size, axis=-1)
            distance = (level - 1) * level / np.linalg.norm(local / size**2, axis=-1)
        nearest = np.minimum(nearest, np.abs(distance))
    return nearest


@pytest.mark.parametrize("level", TOY_LEVELS)
@pytest.mark.parametrize("seed", range(6))
def test_every_valid_pixel_lies_on_a_surface_of_the_scene_at_its_time(seed, level):
    clip = render_clip(seed, 9, 24, 36, level=level)
    for frame in (0, 5, 8):
        points = lift(clip)[frame][clip.valid[frame]].numpy()
        assert (distance_to_scene(points, seed, level, frame / FPS) < 1e-5 * clip.depth[clip.valid].max().item()).all()


def test_the_caption_says_sky_if_and_only_if_depth_is_infinite(clips):
    for clip in clips:
        assert ("sky" in clip.caption) == bool(clip.depth.isinf().any())


def test_the_caption_names_things_and_motions_of_the_scene(clips):
    for seed, clip in enumerate(clips[:20]):
        things = build_scene(seed, "synthetic").things
        true = {f"{t.colour} {t.noun}": t.motion for t in things}
        words = clip.caption.lower()
        named = {name for name in (f"{c} {n}" for c in THING_COLOURS for n in MOTIONS) if name in words}
        assert named and named <= set(true)
        assert all((f"{name} {true[name]}" in words) == (true[name] in VERBS) for name in named)
        if clip.moving.float().mean() > 0.02:
            assert any(verb in words for verb in VERBS)
        if not clip.moving.any():
            assert not any(verb in words for verb in VERBS)


def test_the_caption_tells_how_the_camera_moves(clips):
    for clip in clips:
        to_first = torch.linalg.inv(clip.cam2world[0])
        right, down, ahead = (to_first @ clip.cam2world[-1])[:3, 3].tolist()
        signs = {
            "moves to the left": -right,
            "moves to the right": right,
            "circles to the left": -right,
            "circles to the right": right,
            "moves forward": ahead,
            "moves backward": -ahead,
            "rises": -down,
            "sinks": down,
        }
        told = [sign for phrase, sign in signs.items() if f"camera {phrase}" in clip.caption]
        assert len(told) == 1 and told[0] > 0.5 * math.hypot(right, down, ahead)
        zoom = (clip.intrinsics[-1, 0, 0] / clip.intrinsics[0, 0, 0]).item()
        assert ("zooms in" in clip.caption) == (zoom > 1.05) and ("zooms out" in clip.caption) == (zoom < 0.95)


def test_depth_ranges_spread_from_flat_to_deep(clips):
    ratio = []
    for clip in clips:
        low, high = torch.quantile(clip.depth[clip.valid], torch.tensor([0.02, 0.98])).tolist()
        ratio.append(high / low)
    low, quarter, half, three_quarters, high = np.quantile(ratio, [0, 0.25, 0.5, 0.75, 1])
    assert 2.2 < low < 5 and 30 < high < 65
    # a log-uniform spread over 3..50 has its quartiles at 6.1, 12.2 and 24.7
    assert 4.5 < quarter < 9 and 8.5 < half < 17.5 and 17.5 < three_quarters < 33


def test_clips_are_not_easy(clips):
    moving = [clip.moving.float().mean().item() for clip in clips]
    assert np.mean(np.array(moving) >= 0.1) >= 0.5
    focal = [clip.intrinsics[0, 0, 0].item() for clip in clips]
    assert max(focal) / min(focal) >= 2
    travelled = [
        clip.cam2world[:, :3, 3].diff(dim=0).norm(dim=-1).sum().item() / clip.depth[clip.valid].median().item()
        for clip in clips
    ]
    assert np.mean(np.array(travelled) >= 0.1) >= 0.6
    assert 0.2 <= np.mean([bool(clip.depth.isinf().any()) for clip in clips]) <= 0.45


def test_nothing_is_too_near_and_no_frame_is_of_one_colour(clips):
    for clip in clips:
        assert clip.depth.min() >= 0.3
        assert (clip.frames.float().std(dim=(1, 2)).mean(-1) > 10).all()  # of 255


def test_real_depth_has_holes_and_errors_of_a_few_per_cent_in_an_unknown_unit(real_clips):
    units = []
    for real, exact in real_clips:
        holes = real.depth.isnan()
        assert 0.005 < holes.float().mean() < 0.4
        assert not real.valid[holes].any() and not holes[exact.depth.isinf()].any()
        ratio = real.depth[real.valid] / exact.depth[real.valid]
        units.append(ratio.median().item())
        error = (ratio / units[-1] - 1).abs()
        assert 0.005 < error.mean() < 0.08
    assert max(units) / min(units) > 2


def test_real_cameras_are_near_the_truth_but_not_it(real_clips):
    for real, exact in real_clips:
        focal_error = (real.intrinsics[:, 0, 0] / exact.intrinsics[:, 0, 0]).log().abs()
        assert (focal_error > 1e-4).all() and (focal_error < 0.15).all()
        turned = torch.linalg.inv(exact.cam2world[:, :3, :3]) @ real.cam2world[:, :3, :3] - torch.eye(3)
        assert 1e-4 < turned.norm(dim=(1, 2)).max() < 0.05
        unit = (real.depth[real.valid] / exact.depth[real.valid]).median()
        off = (real.cam2world[:, :3, 3] / unit - exact.cam2world[:, :3, 3]).norm(dim=-1)
        assert 1e-4 < off.max() < 0.05 * exact.cam2world[:, :3, 3].norm(dim=-1).max() + 0.1


def test_real_frames_are_noisy_pictures_of_the_same_scene(real_clips):
    for real, exact in real_clips:
        mse = (real.frames.float() / 255 - exact.frames.float() / 255).square().mean().item()
        assert 12 < -10 * math.log10(mse) < 36  # dB
        both = torch.stack([real.frames.float().flatten(), exact.frames.float().flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.75
        assert torch.equal(real.moving, exact.moving) and real.caption == exact.caption


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 2, 8, 8, "lidar"), "lidar"),
        ((0, 2, 8, 8, "real", "easy"), "easy.*hard.*clear"),
        ((-1, 2, 8, 8, "real"), "seed"),
        ((0, 0, 8, 8, "real"), "frames"),
    ],
)
def test_impossible_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        render_clip(*arguments)
