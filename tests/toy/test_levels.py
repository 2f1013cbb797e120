"""Laws of the toy world's levels: `clear` is easy in the ways it says, `hard` stays what it was."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from one4d_pl.config import TOY_LEVELS, ConfigError, ToyConfig
from one4d_pl.data.datamodule import write_toy_world
from one4d_pl.data.shards import ShardSet
from one4d_pl.toy.draw import build_scene
from one4d_pl.toy.levels import GROUND_COLOURS, LEVELS, MOTIONS, THING_COLOURS, WALL_COLOURS
from one4d_pl.toy.render import AIR, _edges, render
from one4d_pl.toy.things import solids_at, views_at
from one4d_pl.toy.world import clip_key, exact_clip, render_clip
from one4d_pl.types import DOMAINS, Clip

# seed, domain, depth at PIXELS, camera of frame 8, its focal, moving share, CRC-32 of the caption; before there were
# levels, this was the toy world
HARD = [
    (0, "synthetic", [2.9912, 4.9187, 2.2868], [-1.8434, -1.7111, -1.2589], 35.856, 0.0604, 3073102822),
    (0, "real", [1.1554, 2.2838, 0.8993], [-0.5802, -0.2647, 0.6648], 78.891, 0.2244, 4001327692),
    (7, "synthetic", [0.8767, 1.4868, 0.8158], [-2.6347, -0.25, -2.1919], 103.109, 0.1946, 186564699),
    (7, "real", [2.0683, 3.202, 1.6081], [1.8861, -1.1132, 1.0275], 41.814, 0.1728, 347600207),
]  # fmt: skip
PIXELS = ((0, 40, 10), (4, 30, 32), (8, 44, 60))


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [exact_clip(seed, 9, 24, 32, domain, "clear") for seed in range(24) for domain in DOMAINS]


@pytest.mark.parametrize(("seed", "domain", "depths", "place", "focal", "moving", "caption"), HARD)
def test_hard_is_the_world_that_it_was(seed, domain, depths, place, focal, moving, caption):
    clip = exact_clip(seed, 9, 48, 64, domain)
    torch.testing.assert_close([clip.depth[pixel].item() for pixel in PIXELS], depths, rtol=1e-4, atol=0)
    torch.testing.assert_close(clip.cam2world[8, :3, 3].tolist(), place, rtol=0, atol=1e-3)
    assert clip.intrinsics[8, 0, 0].item() == pytest.approx(focal, rel=1e-4)
    assert clip.moving.float().mean().item() == pytest.approx(moving, abs=1e-3)
    assert zlib.crc32(clip.caption.encode()) == caption


def test_the_levels_of_the_config_are_those_of_the_world():
    assert set(TOY_LEVELS) == set(LEVELS) and ToyConfig().level == "hard"
    with pytest.raises(ConfigError, match=r"data\.toy\.level.*clear"):
        ToyConfig(level="easy")


def test_clear_depth_ranges_are_narrow(clips):
    for clip in clips:
        low, high = torch.quantile(clip.depth[clip.valid], torch.tensor([0.02, 0.98])).tolist()
        assert 2 < high / low < 8  # drawn from 2.5 .. 6 and met to about 12 %


def test_clear_has_one_lens_and_no_zoom(clips):
    assert {round(f, 4) for clip in clips for f in clip.intrinsics[:, 0, 0].tolist()} == {32.0}
    assert not any("zoom" in clip.caption for clip in clips)


def test_clear_has_few_things_which_stand_on_the_ground_and_are_large(clips):
    shares = []
    for clip, (seed, domain) in zip(clips, ((s, d) for s in range(24) for d in DOMAINS), strict=True):
        scene = build_scene(seed, domain, "clear")
        assert 1 <= len(scene.things) <= 3
        for thing in scene.things:
            assert thing.motion == "stands still" or thing.motion in LEVELS["clear"].motions[thing.noun]
            solids = solids_at(thing, torch.linspace(0, 3, 7).double().numpy())
            lowest = max((s.centre[:, 1] + _down(s)).max() for s in solids)
            assert abs(lowest) < 1e-6 * thing.size.max() or (thing.noun == "figure" and lowest < 1e-6)
        shares.append(clip.moving.float().mean().item())
    assert sum(share > 0.05 for share in shares) > len(shares) / 2


def _down(solid) -> torch.Tensor:  # [T] how far it reaches below its centre
    down = abs(solid.rotation[:, 1])  # world y of the local axes
    if solid.shape == "box":
        return (down * solid.size).sum(-1)
    if solid.shape == "ellipsoid":
        return ((down * solid.size) ** 2).sum(-1) ** 0.5
    return solid.size[:, 0] + down[:, 1] * solid.size[:, 1]


def test_a_clear_caption_names_colours_of_the_palette_that_are_there(clips):
    for clip in clips:
        things = re.findall(rf"(\w+) (?:{'|'.join(MOTIONS)})\b", clip.caption)
        assert things and set(things) <= set(THING_COLOURS) and len(set(things)) == len(things)
        for word, palette in (("floor", GROUND_COLOURS), ("walls", WALL_COLOURS)):
            if word in clip.caption:
                assert any(f"{colour} {word}" in clip.caption for colour in palette)


def test_air_blends_towards_pale_blue_with_depth_and_leaves_geometry_alone():
    scene = build_scene(1, "synthetic", "clear")
    solids = [solid for thing in scene.things for solid in solids_at(thing, np.zeros(1))]
    views = views_at(scene.path, np.zeros(1), 24, 32)
    airy, depth, code = render(scene.room, solids, views, 24, 32)
    bare, bare_depth, bare_code = render(replace(scene.room, air=0.0), solids, views, 24, 32)
    assert np.array_equal(depth, bare_depth) and np.array_equal(code, bare_code)
    far = 1.5 / scene.room.air
    assert np.quantile(depth, 0.98) < 2 * far  # air is told in distances of the far wall
    left = np.exp(-1.5 * depth / far)[..., None]
    inside = ~_edges(code) & np.isfinite(depth) & (bare < 0.99).all(-1)  # nothing clipped, nothing antialiased
    np.testing.assert_allclose((airy**2)[inside], (AIR + left * (bare**2 - AIR))[inside], atol=2e-3)


def test_levels_have_their_own_keys_and_no_folder_holds_both(tmp_path):
    assert clip_key(3, "real") == "toy_real_00000003" and clip_key(3, "real", "clear") == "toy_clear_real_00000003"
    assert render_clip(0, 1, 8, 8, level="clear").key == clip_key(0, "synthetic", "clear")
    world = ToyConfig(str(tmp_path), level="clear", train_synthetic=1, train_real=1, val=1)
    write_toy_world(world, 9, 16, 32)
    write_toy_world(world, 9, 16, 32)
    assert ShardSet.open(tmp_path / "val").read(0).key.startswith("toy_clear_")
    with pytest.raises(ConfigError, match=r"data\.toy.*another toy world"):
        write_toy_world(ToyConfig(str(tmp_path), train_synthetic=1, train_real=1, val=1), 9, 16, 32)
