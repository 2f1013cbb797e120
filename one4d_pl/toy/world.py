"""The toy world: moving scenes whose frames, depth, cameras, motion and captions are all exact.

1. `draw.build_scene` turns a seed into a scene of known difficulty.
2. `things` evaluates it at any time; a longer clip continues a shorter one, frame for frame.
3. `render.render` casts rays; `describe` builds the caption from what they hit.
4. `render_clip` returns the exact clip ("synthetic"), or what a phone and a reconstruction would make of it ("real").
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv1d, interpolate, pad

from one4d_pl.toy.draw import build_scene
from one4d_pl.toy.render import FIRST_SOLID, GROUND, SKY, Floats, Ints, render
from one4d_pl.toy.things import Scene, moving_codes, solids_at, views_at
from one4d_pl.types import Clip

FPS = 12.0
_NAMED_SHARE = 0.002  # a surface that covers less of the clip is not named
_WALLS = (0, 1, 4, 5)
_SENSOR_STREAM = (1, 1000)  # a random stream of its own: draw.py uses (domain, attempt), with few attempts


def clip_key(seed: int, domain: str, level: str = "hard") -> str:
    """Return the key that `render_clip` gives its clip."""
    return f"toy_{'' if level == 'hard' else f'{level}_'}{domain}_{seed:08d}"


def render_clip(
    seed: int, num_frames: int, height: int, width: int, domain: str = "synthetic", level: str = "hard"
) -> Clip:
    """Render one clip, a pure function of its arguments.

    The scene of (seed, domain, level) is the same at every size. "synthetic" is exact: depth (z, scene units) belongs
    to pixel centres, `valid` is where it is finite (+inf = sky). "real" is what a phone and a reconstruction would make
    of the scene: blurred, noisy frames; noisy depth with holes (nan) and pseudo cameras with jitter and a focal error,
    all in an unknown unit; `moving` and caption stay true. ValueError for an unknown domain or level (levels.py), a
    negative seed, or a size below 1.
    """
    scene = build_scene(seed, domain, level)
    exact = _exact_clip(scene, clip_key(seed, domain, level), num_frames, height, width, domain)
    if domain == "synthetic":
        return exact
    rng = np.random.default_rng([seed, *_SENSOR_STREAM])
    noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return _with_pseudo_geometry(replace(exact, frames=_sensor_frames(scene, exact, rng, noise)), rng, noise)


def exact_clip(seed: int, num_frames: int, height: int, width: int, domain: str, level: str = "hard") -> Clip:
    """Render the truth behind `render_clip` for either domain: ideal camera, exact geometry."""
    scene = build_scene(seed, domain, level)
    return _exact_clip(scene, clip_key(seed, domain, level), num_frames, height, width, domain)


def _exact_clip(scene: Scene, key: str, num_frames: int, height: int, width: int, domain: str) -> Clip:
    if min(num_frames, height, width) < 1:
        raise ValueError(f"toy world: cannot render {num_frames} frames of {height} x {width}, use 1 or more of each")
    times = np.arange(num_frames) / FPS
    views = views_at(scene.path, times, height, width)
    colour, depth, code = _render_at(scene, times, height, width)
    moving = moving_codes([solid for thing in scene.things for solid in solids_at(thing, times[:1])])
    return Clip(
        key=key,
        frames=_to_bytes(torch.from_numpy(colour)),
        depth=torch.from_numpy(depth.astype(np.float32)),
        intrinsics=torch.from_numpy(views.intrinsics.astype(np.float32)),
        cam2world=torch.from_numpy(views.cam2world.astype(np.float32)),
        valid=torch.from_numpy(np.isfinite(depth)),
        moving=torch.from_numpy(moving[code]),
        caption=describe(scene, code),
        source="toy",
        domain=domain,
        fps=FPS,
        licence="CC0-1.0",
    )


def _render_at(scene: Scene, times: Floats, height: int, width: int) -> tuple[NDArray[np.float32], Floats, Ints]:
    solids = [solid for thing in scene.things for solid in solids_at(thing, times)]
    return render(scene.room, solids, views_at(scene.path, times, height, width), height, width)


def _to_bytes(colour: Tensor) -> Tensor:  # [T, H, W, 3] in [0, 1] -> uint8
    return (colour.clamp(0, 1) * 255).round().to(torch.uint8)


def describe(scene: Scene, code: Ints) -> str:
    """Caption what is seen in code [T, H, W]: things by size, their motion, the place, the camera.

    Only things that cover at least 0.2 % of the clip are named; "sky" occurs if and only if a pixel shows it.
    """
    share = np.bincount(code.reshape(-1), minlength=FIRST_SOLID) / code.size
    named: list[tuple[float, str]] = []
    first = FIRST_SOLID
    for thing in scene.things:
        last = first + len(solids_at(thing, np.zeros(1)))
        covered = float(share[first:last].sum())
        if covered >= _NAMED_SHARE:
            article = "an" if thing.colour[0] in "aeiou" else "a"
            motion = f" {thing.motion}" if thing.moving and len(code) > 1 else ""
            named.append((covered, f"{article} {thing.colour} {thing.noun}{motion}"))
        first = last
    phrases = [phrase for _, phrase in sorted(named, reverse=True)] or ["an empty place"]
    text = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    if share[GROUND] >= _NAMED_SHARE:
        text += f" on a {scene.ground_name}"
    if share[list(_WALLS)].sum() >= _NAMED_SHARE:
        text += f", with {scene.wall_name}"
    text += ", under the sky." if share[SKY] > 0 else ", indoors." if not scene.room.open_sky else "."
    return text[0].upper() + text[1:] + (_describe_camera(scene, len(code)) if len(code) > 1 else "")


def _describe_camera(scene: Scene, num_frames: int) -> str:
    path = scene.path
    text = f" The camera {path.kind}"
    if path.zoom != 1:
        text += " and zooms in" if path.zoom > 1 else " and zooms out"
    swept = path.rate * (num_frames - 1) / FPS  # the camera turns back after 150 degrees
    return text + (", then goes back." if swept > math.radians(170) else ".")


def _sensor_frames(scene: Scene, exact: Clip, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
    """Film the scene with a small sensor: frames [T, H, W, 3] uint8.

    It has an open shutter, defocus, drifting exposure, a colour cast and noise.
    """
    num_frames, height, width = exact.depth.shape
    times, shutter = np.arange(num_frames) / FPS, rng.uniform(0.1, 0.5) / FPS
    shots = [torch.from_numpy(_render_at(scene, times + part * shutter, height, width)[0]) for part in (-0.4, 0.4)]
    shots.append(exact.frames / 255)
    light = torch.stack(shots).square().mean(0)  # blur averages light, not display values
    light = _defocus(light, sigma=rng.uniform(0, 0.008) * max(height, width))
    drift = 0.3 * np.sin(rng.uniform(1, 4) * times + rng.uniform(0, 2 * math.pi))
    gain = torch.from_numpy(np.exp(drift)[:, None] * rng.uniform(0.9, 1.1, 3)).float()  # [T, 3]
    colour = (light * gain[:, None, None]).clamp(0, 1).sqrt()
    grain = torch.randn(colour.shape, generator=noise) * rng.uniform(0.008, 0.03)
    return _to_bytes(colour + grain)


def _defocus(light: Tensor, sigma: float) -> Tensor:  # [T, H, W, 3], pixels
    radius = max(1, math.ceil(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    for _ in range(2):  # along W, then along H
        lines = light.movedim(2, -1)  # [T, A, 3, L]
        blurred = conv1d(pad(lines.flatten(0, 2)[:, None], (radius, radius), mode="replicate"), kernel)
        light = blurred.view(lines.shape).permute(0, 3, 1, 2)  # [T, L, A, 3]
    return light


def _with_pseudo_geometry(exact: Clip, rng: np.random.Generator, noise: torch.Generator) -> Clip:
    """Give the clip a reconstruction's geometry: errors of a few per cent, holes, its own scale."""
    num_frames, height, width = exact.depth.shape

    def smooth_noise() -> Tensor:  # [T, H, W], about unit variance, the same field at any size
        grid = torch.randn((1, 1, num_frames // 6 + 2, 6, 8), generator=noise)
        size = (num_frames, height, width)
        return 1.5 * interpolate(grid, size=size, mode="trilinear", align_corners=True)[0, 0]

    unit = float(np.exp(rng.uniform(math.log(0.3), math.log(3))))
    flicker = 0.01 * torch.randn((num_frames, 1, 1), generator=noise)
    grain = 0.005 * torch.randn(exact.depth.shape, generator=noise)
    depth = exact.depth * unit * torch.exp(0.025 * smooth_noise() + flicker + grain)
    chance = torch.rand(exact.depth.shape, generator=noise)
    holes = (smooth_noise() > 2.0) | (_depth_edges(exact.depth) & (chance < 0.5)) | (chance < 0.003)
    depth[holes & exact.valid] = math.nan

    tremble = torch.randn((num_frames, 6), generator=noise)
    distance = float(exact.depth[exact.valid].median()) if exact.valid.any() else 1.0
    cam2world = exact.cam2world @ _small_motion(0.003 * tremble[:, :3], 0.004 * distance * tremble[:, 3:])
    cam2world[:, :3, 3] *= unit
    intrinsics = exact.intrinsics.clone()
    intrinsics[:, :2, :2] *= float(np.exp(0.03 * rng.standard_normal()))
    return replace(exact, depth=depth, valid=depth.isfinite(), cam2world=cam2world, intrinsics=intrinsics)


def _depth_edges(depth: Tensor) -> Tensor:  # [T, H, W] -> [T, H, W] bool
    """Mark pixels where disparity bends by more than 10 %. On any plane, however slanted, it is linear."""
    disparity = pad(1 / depth[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]  # 0 = sky
    here = disparity[:, 1:-1, 1:-1]
    bend_u = (disparity[:, 1:-1, 2:] + disparity[:, 1:-1, :-2] - 2 * here).abs()
    bend_v = (disparity[:, 2:, 1:-1] + disparity[:, :-2, 1:-1] - 2 * here).abs()
    return torch.maximum(bend_u, bend_v) > 0.1 * here


def _small_motion(angles: Tensor, shift: Tensor) -> Tensor:  # [T, 3] rad, [T, 3] -> [T, 4, 4]
    """Return rigid motions from small rotation vectors."""
    motion = torch.zeros(len(angles), 4, 4, dtype=angles.dtype)
    x, y, z = angles.unbind(-1)
    motion[:, 0, 1], motion[:, 0, 2], motion[:, 1, 2] = -z, y, -x
    motion[:, 1, 0], motion[:, 2, 0], motion[:, 2, 1] = z, -y, x
    motion = torch.linalg.matrix_exp(motion)
    motion[:, :3, 3] = shift
    return motion
