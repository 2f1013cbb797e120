"""How hard the toy world is, and what a caption can name in it.

`hard` has what real video has: a depth range of up to 50, wide and long lenses, zooms, things in the air. Camera
recovery and evaluation are tested on it. `clear` is what a tiny model learns in an hour on one core: a narrow depth
range, one lens, a few large things on the ground, and air that makes far things paler. Both have exact ground truth.
"""

from __future__ import annotations

from dataclasses import dataclass

# display colours; things differ clearly from the room, so that a caption can name them
THING_COLOURS = {
    "red": (0.86, 0.20, 0.18), "orange": (0.96, 0.55, 0.14), "yellow": (0.97, 0.83, 0.22),
    "green": (0.22, 0.66, 0.30), "teal": (0.08, 0.66, 0.68), "blue": (0.20, 0.38, 0.87),
    "purple": (0.56, 0.28, 0.74), "pink": (0.95, 0.52, 0.72), "white": (0.94, 0.94, 0.92),
}  # fmt: skip
GROUND_COLOURS = {
    "grey": (0.56, 0.57, 0.58), "sandy": (0.79, 0.70, 0.53), "brown": (0.50, 0.37, 0.28),
    "mossy": (0.44, 0.53, 0.33), "slate": (0.38, 0.45, 0.57), "terracotta": (0.71, 0.45, 0.36),
}  # fmt: skip
WALL_COLOURS = {
    "cream": (0.90, 0.85, 0.74), "pale grey": (0.76, 0.78, 0.81), "pale blue": (0.66, 0.76, 0.87),
    "brick": (0.66, 0.42, 0.35), "mint": (0.69, 0.82, 0.73), "lilac": (0.77, 0.71, 0.85),
}  # fmt: skip
PATTERNS = ("plain", "striped", "checked")
MOTIONS: dict[str, tuple[str, ...]] = {
    "box": ("slides back and forth", "spins", "tumbles in the air", "moves in a circle"),
    "ball": ("rolls back and forth", "bounces", "moves in a circle"),
    "egg": ("spins", "tumbles in the air"),
    "post": ("slides back and forth", "tumbles in the air"),
    "blob": ("pulsates",),
    "figure": ("walks",),
}


@dataclass(frozen=True)
class Level:
    """The ranges and choices that scenes of a level are drawn from.

    Shares are of the picture's half width at the thing's distance.
    """

    depth_ratios: tuple[float, float]  # p98 / p2 of finite depth
    focals: tuple[float, float]  # in units of the longer side
    zooms: tuple[float, ...]  # focal length at the end of a sweep over that at its start
    # ranges [from, below) of quiet and lively clips; in lively ones at least 13 % of pixels move
    things: tuple[tuple[int, int], tuple[int, int]]
    movers: tuple[tuple[int, int], tuple[int, int]]
    mover_shares: tuple[float, float]  # half width of a mover of a lively clip
    other_shares: tuple[float, float]
    first_nouns: tuple[str, ...]  # of the first thing; `nouns` are those of the others
    nouns: tuple[str, ...]
    motions: dict[str, tuple[str, ...]]
    min_solids: int  # solids in view, at least
    contrast: float  # of a texture's two colours, 1 = strong
    crispness: float  # of stripes and checks; the mottling is weaker by the same factor
    gloss: float  # of things: a highlight, and darker near the ground; 0 = matt
    air: float  # optical depth of the air between the camera and the far wall; 0 = none


LEVELS = {
    "hard": Level(
        depth_ratios=(3, 50),
        focals=(0.62, 1.75),  # fields of view from 78 to 32 degrees
        zooms=(0.75, 1.0, 1.0, 1.35),
        things=((4, 8), (6, 10)),
        movers=((2, 3), (3, 6)),
        mover_shares=(0.14, 0.3),
        other_shares=(0.08, 0.2),
        first_nouns=("figure", "blob"),
        nouns=("box", "ball", "egg", "post", "box", "figure"),
        motions=MOTIONS,
        min_solids=3,
        contrast=1.0,
        crispness=1.0,
        gloss=0.0,
        air=0.0,
    ),
    "clear": Level(
        depth_ratios=(2.5, 6),
        focals=(1.0, 1.0),  # 53 degrees
        zooms=(1.0,),
        things=((2, 4), (2, 4)),
        movers=((1, 2), (2, 3)),
        mover_shares=(0.22, 0.36),
        other_shares=(0.16, 0.3),
        first_nouns=("figure", "box", "ball"),
        nouns=("box", "ball", "egg", "post", "figure"),
        motions={
            "box": ("slides back and forth", "spins", "moves in a circle"),
            "ball": ("rolls back and forth", "moves in a circle"),
            "egg": ("spins",),
            "post": ("slides back and forth",),
            "figure": ("walks",),
        },
        min_solids=2,
        contrast=0.55,
        crispness=3.0,
        gloss=1.0,
        air=1.5,
    ),
}
