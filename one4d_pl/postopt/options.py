"""Options of the camera recovery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RecoverOptions:
    """What is known of the camera, and the weight of smoothness (One4D, Eq. 12, with alpha1 = 1).

    None assumes one focal length, square pixels and a principal point at the image centre until the points contradict
    that clearly. "solve" accepts a weaker contradiction. A given value is kept, and a contradiction becomes a flag.
    """

    alpha2: float = 0.01  # mean smoothness of the trajectory, less if `credible_alpha2` says so (MonST3R 0.01); 0 = off
    shared_focal: bool | None = None  # True: one focal length; False: one per frame; None = one, if that fits
    focal: float | None = None  # known fx in pixels; None = solved for
    aspect: float | Literal["solve"] | None = None  # known fy / fx; None = 1 (square pixels), if that fits
    principal_point: tuple[float, float] | Literal["solve"] | None = None  # known, pixels; None = centre, if that fits
    pixels_per_frame: int = 14000  # of the last steps: 88 x 156 whole, every fourth row and column of 352 x 624

    def __post_init__(self) -> None:
        for name in ("aspect", "pixels_per_frame"):
            if (value := getattr(self, name)) not in (None, "solve") and not (math.isfinite(value) and value > 0):
                raise ValueError(f"postopt.{name}: {value}, need a finite number > 0")
        if not self.alpha2 >= 0:
            raise ValueError(f"postopt.alpha2: {self.alpha2}, need 0 (off) or more")
        if self.focal is not None and not (math.isfinite(self.focal) and self.focal > 0):
            raise ValueError(
                f"postopt.focal: {self.focal}, need a finite number of pixels > 0, or null to solve for it"
            )
        point = self.principal_point
        if isinstance(point, tuple) and not (len(point) == 2 and all(math.isfinite(value) for value in point)):
            raise ValueError(f"postopt.principal_point: {point}, need two finite numbers of pixels, x and y")
