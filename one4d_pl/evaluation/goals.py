"""Targets for adapters of the toy world's `clear` level, and which of them are met.

The world itself has a target too: where the mean pointmap of the training clips is nearly right already, a good
prediction proves nothing. Other levels are measured against the same targets, though these were not set for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from one4d_pl.evaluation.fit_quality import FitQuality


@dataclass(frozen=True)
class Goal:
    """One number and the bounds between which it should lie."""

    about: str  # "world" or a task
    what: str
    value: float  # nan = could not be measured
    beside: str  # what it is made of, or compared with
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""  # "%" and "dB" say how it is printed

    @property
    def verdict(self) -> str:
        """Return "met", "short" or "not measured"."""
        if math.isnan(self.value):
            return "not measured"
        return "met" if self.low <= self.value <= self.high else "short"

    @property
    def target(self) -> str:
        """Return the bounds in words."""
        if self.low > -math.inf and self.high < math.inf:
            return f"{self._print(self.low)} - {self._print(self.high)}"
        return f">= {self._print(self.low)}" if self.high == math.inf else f"<= {self._print(self.high)}"

    @property
    def printed(self) -> str:
        """Return the value with its unit."""
        return self._print(self.value)

    def _print(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.3g} %"
        if self.unit == "dB":
            return f"{value:.1f} dB"
        return f"{value:.3g}"


def goals(quality: FitQuality) -> list[Goal]:
    """List every goal with its number."""
    error = {name: row["rel_error"] for name, row in quality.pointmaps.items()}
    moving = {name: row["rel_error_moving"] for name, row in quality.pointmaps.items()}
    return [
        Goal("world", "mean pointmap's point error", error["mean_pointmap"], "of the training clips", low=0.17),
        *_video_goals(error, moving, quality.geometry),
        *_image_goals(quality),
        _text_goal(quality.colours),
    ]


def _video_goals(
    error: dict[str, float], moving: dict[str, float], geometry: dict[str, dict[str, float]]
) -> list[Goal]:
    ours, ceiling = geometry["video"], geometry["ceiling"]
    found = []
    for what, rows in (("point error", error), ("moving points' error", moving)):
        video, mean = rows["video"], rows["mean_pointmap"]
        found += [
            Goal("video", what, video, f"VAE's ceiling {rows['ceiling']:.3f}", high=0.08),
            Goal("video", f"{what} / mean pointmap's", video / mean, f"mean pointmap {mean:.3f}", high=0.5),
        ]
    other, no_links = error["video_other_clip"], error["video_no_links"]
    return [
        *found,
        Goal("video", "another clip's frames, times worse", other / error["video"], f"error {other:.3f}", low=2),
        Goal("video", "no control links, times worse", no_links / error["video"], f"error {no_links:.3f}", low=3),
        Goal(
            "video", "depth with recovered cameras, AbsRel", ours["abs_rel"], f"VAE's ceiling {ceiling['abs_rel']:.3f}",
            high=0.08,
        ),
        Goal(
            "video", "cameras' ATE / path", ours["ate_share"], f"VAE's ceiling {100 * ceiling['ate_share']:.2g} %",
            high=0.07, unit="%",
        ),
    ]  # fmt: skip


def _image_goals(quality: FitQuality) -> list[Goal]:
    hidden, base = (quality.frames_db[name]["hidden"] for name in ("image", "image_base_alone"))
    own = quality.consistency["image"]
    warped, true = own["photometric_error"], own["photometric_error_truth"]
    return [
        Goal("image", "hidden frames, PSNR", hidden, "target: the plain base's own", low=base, unit="dB"),
        Goal(
            "image", "photometric error / truth's", own["photometric_ratio"], f"{warped:.3f}, truth {true:.3f}", high=3
        ),
        Goal(
            "image", "camera path / training median", own["camera_path_ratio"],
            f"{own['camera_path']:.3f} of {own['camera_path_training']:.3f} distances", low=0.7, high=1.4,
        ),
    ]  # fmt: skip


def _text_goal(colours: dict[str, dict[str, float]]) -> Goal:
    text, truth = colours["text"], colours["truth"]
    ratio = text["named"] / text["other"] if text["other"] else math.inf if text["named"] else math.nan
    shares = [f"{100 * row['named']:.0f} % to {100 * row['other']:.0f} %" for row in (text, truth)]
    return Goal("text", "caption's colours found / another's", ratio, f"{shares[0]}, true frames {shares[1]}", low=2)


def goal_table(found: list[Goal], clips: int, level: str) -> str:
    """Format the goals as aligned text, and how many are met."""
    apart = "" if level == "clear" else f"; these clips are of {level}"
    rows = [(goal.about, goal.what, goal.printed, goal.target, goal.verdict, goal.beside) for goal in found]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"Goals of the level clear, on {clips} held-out clips{apart}:"]
    for about, what, printed, target, verdict, beside in rows:
        cells = (
            about.ljust(widths[0]), what.ljust(widths[1]), printed.rjust(widths[2]), target.ljust(widths[3]),
            verdict.ljust(widths[4]), f"({beside})",
        )  # fmt: skip
        lines.append("  " + "  ".join(cells))
    met = sum(goal.verdict == "met" for goal in found)
    return "\n".join([*lines, f"{met} of {len(found)} goals met."])
