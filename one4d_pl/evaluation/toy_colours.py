"""Which of the colours that captions name are in the frames: the toy world's palette by hue.

In linear light a pixel of a thing is t · light · albedo + (1 - t) · air, where t is the share that
the air lets through. Light and t move the pixel only within the plane of albedo and air. So its
angle about the axis of the air's colour is that of its albedo. This is what hue means here: it is
the same in shade, far away and in a pale generated frame. Chroma is the distance from that axis.

A colour is visible where at least `SHARE` of all pixels have its hue within `TOLERANCE`, nearer to it than to any other
of the palette, and at least `MIN_CHROMA` of its chroma. White is left out: it has next to no hue. Floors and walls have
hues too, so some colours are found that no thing has: the shares for other clips' captions show how often.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from one4d_pl.toy.levels import MOTIONS, THING_COLOURS
from one4d_pl.toy.render import AIR

TOLERANCE = math.radians(8)
MIN_CHROMA = 0.15
SHARE = 0.005  # of the pixels of all frames; the smallest thing of the clear level fills some 1 %
MAX_THINGS = 3  # captions that name more are left out: the things cover one another
CHROMATIC = tuple(name for name in THING_COLOURS if name != "white")

_NAMED = re.compile(rf"\b({'|'.join(THING_COLOURS)}) (?:{'|'.join(MOTIONS)})\b")


def named_things(caption: str) -> list[str]:
    """List the colour of every thing that a caption of the toy world names."""
    return _NAMED.findall(caption)


def visible_colours(frames: Tensor) -> set[str]:  # [3, T, H, W] in [-1, 1]
    """Return the colours of `CHROMATIC` that are visible in the frames."""
    hue, chroma = _hue_and_chroma(((frames.movedim(0, -1) + 1) / 2).clamp(0, 1).square())  # [T, H, W] each
    palette_hue, palette_chroma = _hue_and_chroma(torch.tensor([THING_COLOURS[name] for name in CHROMATIC]).square())
    apart = torch.remainder(hue[..., None] - palette_hue + math.pi, 2 * math.pi) - math.pi
    nearest = apart.abs().min(-1)
    matched = (nearest.values < TOLERANCE) & (chroma > MIN_CHROMA * palette_chroma[nearest.indices])
    shares = torch.bincount(nearest.indices[matched], minlength=len(CHROMATIC)) / hue.numel()
    return {name for name, share in zip(CHROMATIC, shares.tolist(), strict=True) if share >= SHARE}


def caption_colours(frames: Tensor, captions: list[str]) -> dict[str, float]:  # [N, 3, T, H, W] in [-1, 1]
    """Return the share of captions' colours that are visible in the frames.

    `named` counts those of the clip's own caption, `other` those of every other clip's caption;
    `other_alone` leaves out the colours that both captions name. Over the clips whose caption names
    1 .. `MAX_THINGS` things, one of them with a hue. nan where there are fewer than two such clips.
    """
    named = [named_things(caption) for caption in captions]
    asked = [set(things) & set(CHROMATIC) if len(things) <= MAX_THINGS else set() for things in named]
    clips = [i for i, colours in enumerate(asked) if colours]
    found = {i: visible_colours(frames[i]) for i in clips}
    pairs = [(i, j) for i in clips for j in clips if i != j]

    def share(wanted: list[tuple[int, set[str]]]) -> float:
        count = sum(len(colours) for _, colours in wanted)
        return sum(len(colours & found[i]) for i, colours in wanted) / count if pairs and count else math.nan

    return {
        "clips": len(clips),
        "named": share([(i, asked[i]) for i in clips]),
        "other": share([(i, asked[j]) for i, j in pairs]),
        "other_alone": share([(i, asked[j] - asked[i]) for i, j in pairs]),
    }


def _hue_and_chroma(light: Tensor) -> tuple[Tensor, Tensor]:  # [..., 3] linear -> [...] radians, [...]
    """Return angle and distance about the axis of the air's colour."""
    axis = torch.tensor(AIR.tolist())
    axis = axis / axis.norm()
    first = torch.tensor([1.0, 0.0, 0.0])
    first = first - (first @ axis) * axis
    first = first / first.norm()
    x, y = light.float() @ first, light.float() @ torch.linalg.cross(axis, first)
    return torch.atan2(y, x), torch.hypot(x, y)
