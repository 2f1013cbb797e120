"""The colours that captions name are told in true frames, whatever light and air do to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from one4d_pl.evaluation.toy_colours import CHROMATIC, caption_colours, named_things, visible_colours
from one4d_pl.toy.levels import THING_COLOURS, WALL_COLOURS
from one4d_pl.toy.render import AIR
from one4d_pl.toy.world import render_clip

GREY = (0.5, 0.5, 0.5)


def painted(*spots: tuple[tuple[float, ...], float], light: float = 1.0, left: float = 1.0) -> Tensor:
    """Frames [3, 5, 20, 20] of grey with spots of (display colour, share), lit and seen through air."""
    albedo = torch.tensor(GREY).square().expand(5, 20, 20, 3).clone()
    first = 0
    for colour, share in spots:
        last = first + round(share * 400)
        albedo.view(5, 400, 3)[:, first:last] = torch.tensor(colour).square()
        first = last
    seen = left * light * albedo + (1 - left) * torch.tensor(AIR.tolist())
    return (2 * seen.sqrt() - 1).movedim(-1, 0)


@pytest.mark.parametrize("name", CHROMATIC)
@pytest.mark.parametrize(("light", "left"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.4), (0.6, 0.5)])
def test_a_painted_colour_is_told_in_any_light_and_through_air(name, light, left):
    assert visible_colours(painted((THING_COLOURS[name], 0.03), light=light, left=left)) == {name}


def test_a_speck_is_not_enough_and_greys_have_no_colour():
    assert visible_colours(painted((THING_COLOURS["red"], 0.0025))) == set()
    for colour in (GREY, WALL_COLOURS["pale grey"]):
        assert visible_colours(painted((colour, 0.5))) == set()


def test_two_colours_are_two():
    spots = [(THING_COLOURS[name], 0.05) for name in ("blue", "yellow")]
    assert visible_colours(painted(*spots)) == {"blue", "yellow"}


def test_the_things_of_a_caption_are_told_from_its_place():
    caption = (
        "A white ball rolls back and forth, a teal post and an orange figure walks on a checked sandy floor, with "
        "striped pale blue walls, under the sky. The camera moves to the right."
    )
    assert named_things(caption) == ["white", "teal", "orange"]
    assert named_things("An empty place on a plain grey floor, indoors.") == []


def test_shares_count_every_colour_of_every_caption():
    frames = torch.stack([painted((THING_COLOURS["red"], 0.1)), painted((THING_COLOURS["blue"], 0.1))])
    captions = ["A red ball and a green box.", "A blue egg and a red post."]
    found = caption_colours(frames, captions)
    # red of red, green; blue of blue, red. Of the other caption's: red of blue, red; none of red, green
    assert found == {"clips": 2, "named": 0.5, "other": 0.25, "other_alone": 0.0}
    crowded = "A red ball, a green ball, a blue ball and a pink ball."
    left_out = caption_colours(frames, [crowded, captions[1]])
    assert left_out["clips"] == 1 and math.isnan(left_out["named"])


def test_true_frames_show_what_their_caption_names_far_more_often_than_what_others_name():
    clips = [render_clip(seed, 5, 48, 64, level="clear") for seed in range(5_000_000, 5_000_032)]
    frames = torch.stack([clip.frames.movedim(-1, 0).float() / 127.5 - 1 for clip in clips])
    captions = [clip.caption for clip in clips]
    true = caption_colours(frames, captions)
    assert true["clips"] == 32 and true["named"] > 0.85
    assert true["named"] > 2.4 * true["other"] and true["other_alone"] < 0.2
    mixed = caption_colours(frames.roll(1, 0), captions)  # frames that know nothing of their caption
    assert mixed["named"] < 1.6 * mixed["other"]
