"""Which of the colours that captions name are in the frames: the toy world's palette, told by hue.

In linear light a pixel of a thing is left · light · albedo + (1 - left) · air. How much light falls on it and how much
the air leaves of it move the pixel within the plane of albedo and air only. So its angle about the air's own direction
is its albedo's: this is what hue means here, the same in shade, far away and in a pale generated frame.

A colour is found where at least `SHARE` of all pixels have its hue within `TOLERANCE`, nearer to it than to any other
of the palette, and at least `STRENGTH` of its distance from the axis. White is not asked for: it has next to no hue.
Floors and walls have hues too, so some colours are found that no thing has: what other captions name shows how often.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from one4d_pl.toy.levels import MOTIONS, THING_COLOURS
from one4d_pl.toy.render import AIR

TOLERANCE = math.radians(8)
STRENGTH = 0.15
SHARE = 0.005  # of the pixels of all frames; the smallest thing of the clear level fills some 1 %
MAX_THINGS = 3  # that a caption names; more of them cover one another
HUED = tuple(name for name in THING_COLOURS if name != "white")

_NAMED = re.compile(rf"\b({'|'.join(THING_COLOURS)}) (?:{'|'.join(MOTIONS)})\b")


def named_things(caption: str) -> list[str]:
    """Give the colour of every thing that a caption of the toy world names."""
    return _NAMED.findall(caption)


def found_colours(frames: Tensor) -> set[str]:  # [3, T, H, W] in [-1, 1]
    """Name the colours of `HUED` that are in the frames."""
    hue, strength = _about_air(((frames.movedim(0, -1) + 1) / 2).clamp(0, 1).square())  # [T, H, W] each
    palette_hue, palette_strength = _about_air(torch.tensor([THING_COLOURS[name] for name in HUED]).square())
    apart = torch.remainder(hue[..., None] - palette_hue + math.pi, 2 * math.pi) - math.pi
    nearest = apart.abs().min(-1)
    told = (nearest.values < TOLERANCE) & (strength > STRENGTH * palette_strength[nearest.indices])
    shares = torch.bincount(nearest.indices[told], minlength=len(HUED)) / hue.numel()
    return {name for name, share in zip(HUED, shares.tolist(), strict=True) if share >= SHARE}


def colours_found(frames: Tensor, captions: list[str]) -> dict[str, float]:  # [N, 3, T, H, W] in [-1, 1]
    """Share of the colours found in the frames: those of their caption, and those of every other clip's caption.

    Over the clips whose caption names 1 .. `MAX_THINGS` things, one of them with a hue; `other_alone` leaves out the
    colours that both captions name. nan where there are fewer than two such clips.
    """
    named = [named_things(caption) for caption in captions]
    asked = [set(things) & set(HUED) if len(things) <= MAX_THINGS else set() for things in named]
    clips = [i for i, colours in enumerate(asked) if colours]
    found = {i: found_colours(frames[i]) for i in clips}
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


def _about_air(light: Tensor) -> tuple[Tensor, Tensor]:  # [..., 3] linear -> [...] radians, [...]
    """Angle and distance about the direction of the air's colour."""
    axis = torch.tensor(AIR.tolist())
    axis = axis / axis.norm()
    first = torch.tensor([1.0, 0.0, 0.0])
    first = first - (first @ axis) * axis
    first = first / first.norm()
    x, y = light.float() @ first, light.float() @ torch.linalg.cross(axis, first)
    return torch.atan2(y, x), torch.hypot(x, y)
