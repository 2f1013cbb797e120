"""Videos of any length: what the sampler made of overlapping windows becomes one scene.

1. Windows of the trained length 4k+1 overlap; a last frame is repeated to fill a window and cut again.
2. Given frames condition the window they lie in; later windows also see what the one before made of shared frames.
3. Each window's pointmaps become cameras and depth (`postopt`); shared frames tie the windows' worlds together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from one4d_pl.geometry.pointmap import is_sky
from one4d_pl.postopt.recover import RecoverOptions, recover_scene
from one4d_pl.postopt.windows import JoinedScene, Window, join_windows


@dataclass(frozen=True)
class JoinedVideo:
    """One scene over all windows, in the first window's world and unit."""

    joined: JoinedScene
    pointmap: Tensor  # [T, h, w, 3] float32, as generated; in shared frames it passes from one window to the next
    valid: Tensor  # [T, h, w] bool: no sky, in shared frames by both windows' word, and in front of the camera

    @property
    def flags(self) -> tuple[str, ...]:
        """What is degenerate, in words, seams included."""
        return self.joined.scene.report.flags + tuple(flag for seam in self.joined.seams for flag in seam.flags)


def recover_video(
    windows: tuple[Window, ...],
    points: tuple[Tensor, ...],  # [t, h, w, 3] each, normalised
    options: RecoverOptions,
    valid: tuple[Tensor, ...] | None = None,  # [t, h, w] bool each; None = all but the sky
) -> JoinedVideo:
    """Cameras and depth of every window, and the windows joined; sky has no say."""
    seen = tuple(~is_sky(p) for p in points) if valid is None else valid
    joined = join_windows([recover_scene(p, v, options) for p, v in zip(points, seen, strict=True)], windows)
    pointmap, known = points[0], seen[0]
    for window, seam, part, mask in zip(windows[1:], joined.seams, points[1:], seen[1:], strict=True):
        moved = seam.similarity.apply(part.double().flatten(0, 2)).view(part.shape).to(part.dtype)
        pointmap = join_shared(pointmap, moved, len(pointmap) - window.start)
        shared = len(known) - window.start
        known = torch.cat([known[: window.start], known[window.start :] & mask[:shared], mask[shared:]])
    return JoinedVideo(joined, pointmap, known & (joined.scene.depth > 0))


def join_shared(
    first: Tensor, second: Tensor, shared: int
) -> Tensor:  # [T1, ...], [T2, ...] -> [T1 + T2 - shared, ...]
    """Two stretches of video; in the shared frames the second's part grows evenly, strictly between none and all."""
    share = (torch.arange(shared) + 1.0) / (shared + 1)
    share = share.view(-1, *[1] * (first.ndim - 1)).to(first.dtype)
    middle = torch.lerp(first[-shared:], second[:shared], share)
    return torch.cat([first[:-shared], middle, second[shared:]])


def join_frames(windows: tuple[Window, ...], parts: tuple[Tensor, ...]) -> Tensor:  # [t, h, w, 3] each -> [T, h, w, 3]
    """Join the windows' frames; shared ones pass from one window to the next."""
    frames = parts[0]
    for window, part in zip(windows[1:], parts[1:], strict=True):
        frames = join_shared(frames, part, len(frames) - window.start)
    return frames


def fill_window(frames: Tensor, window: Window) -> Tensor:  # [C, t, h, w] -> [C, length, h, w]
    """Repeat the last frame to the window's 4k+1."""
    return torch.cat([frames, *[frames[:, -1:]] * window.padding], dim=1)
