"""Videos of any length: join the sampler's overlapping windows to one scene.

1. Windows of the trained length 4k+1 overlap. The last frame is repeated to fill a window, and the copies are cut off
   again.
2. Given frames condition the window they lie in. Later windows also see the shared frames that the window before has
   generated.
3. Each window's pointmaps become cameras and depth (`postopt`); the shared frames align the windows' worlds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from one4d_pl.geometry.pointmap import is_sky
from one4d_pl.postopt.recover import RecoveredScene, RecoverOptions, recover_scene
from one4d_pl.postopt.windows import Window, join_shared, join_windows


def recover_video(
    windows: tuple[Window, ...],
    points: tuple[Tensor, ...],  # [t, h, w, 3] each, normalised
    options: RecoverOptions,
    valid: tuple[Tensor, ...] | None = None,  # [t, h, w] bool each; None = all but the sky
) -> RecoveredScene:
    """Recover cameras and depth of every window, without the sky, and join the windows."""
    masks = tuple(~is_sky(p) for p in points) if valid is None else valid
    return join_windows([recover_scene(p, v, options) for p, v in zip(points, masks, strict=True)], windows)


def join_frames(windows: tuple[Window, ...], parts: tuple[Tensor, ...]) -> Tensor:  # [t, h, w, 3] each -> [T, h, w, 3]
    """Join the windows' frames; shared ones are blended from one window to the next."""
    frames = parts[0]
    for window, part in zip(windows[1:], parts[1:], strict=True):
        frames = join_shared(frames, part, len(frames) - window.start)
    return frames


def fill_window(frames: Tensor, window: Window) -> Tensor:  # [C, t, h, w] -> [C, length, h, w]
    """Repeat the last frame to the window's 4k+1."""
    return torch.cat([frames, *[frames[:, -1:]] * window.padding], dim=1)
