"""Videos longer than the model's window: plan the windows, condition each, and join their scenes.

Every window has its own world (its first camera) and unit. The frames that two windows share align
them: the ratio of their depths gives the scale, their cameras the rotation, their points the shift,
and reweighted least squares (Umeyama) over points and cameras the final similarity. In shared
frames the result is blended linearly from one window to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from one4d_pl.geometry.alignment import Similarity, align_sim3
from one4d_pl.geometry.camera import to_world, unproject
from one4d_pl.geometry.se3 import invert_se3, matrix_product, rotate, se3_matrix, so3_exp, so3_log, split_se3
from one4d_pl.postopt.recover import RecoveredScene, RecoverReport, Seam

_SEAM_POINTS = 2000  # per shared frame
_ROUNDS = 20
_GATE = 5.0  # noise deviations
_ROUNDING = 1e-6  # of the distance: depth is float32


@dataclass(frozen=True)
class Window:
    """Frames start .. stop - 1 of a video, filled to `length` = 4k+1 by repeating the last one."""

    start: int
    stop: int
    length: int

    @property
    def padding(self) -> int:
        """Return how often the last frame is repeated."""
        return self.length - (self.stop - self.start)


def plan_windows(num_frames: int, window: int, overlap: int) -> tuple[Window, ...]:
    """Cover a video by windows of `window` = 4k+1 frames, neighbours sharing at least `overlap`.

    The last window ends with the video. A video that fits into one window gets the smallest 4k+1
    that holds it. ValueError for lengths that cannot work.
    """
    if num_frames < 1:
        raise ValueError(f"windows: a video of {num_frames} frames, need at least 1")
    if window < 1 or window % 4 != 1:
        raise ValueError(f"windows: {window} frames per window, need 4k+1 (Wan VAE)")
    if num_frames <= window:
        return (Window(0, num_frames, num_frames + -(num_frames - 1) % 4),)
    if not 1 <= overlap < window:
        raise ValueError(f"windows: overlap {overlap}, need 1 .. {window - 1} frames of the window's {window}")
    starts = [*range(0, num_frames - window, window - overlap), num_frames - window]
    return tuple(Window(start, start + window, window) for start in starts)


def window_mask(
    frame_mask: Tensor,  # [num_frames] bool, 1 = given by the user
    windows: tuple[Window, ...],
    index: int,
) -> Tensor:  # [length] bool, 1 = shown
    """Decide what window `index` is shown: given frames, and those that the one before has made.

    text: window 0 nothing, later ones the shared frames. image: window 0 frame 0, later ones the
    shared frames. sparse: the given frames, later windows also the shared ones. video: all frames
    are given, nothing is carried. So every window after the first begins with a shown frame, which
    defines its world. The frames that pad a short video are flagged like the last one.
    """
    if len(frame_mask) != windows[-1].stop:
        raise ValueError(f"windows: frame_mask of {len(frame_mask)} frames, the windows cover {windows[-1].stop}")
    window = windows[index]
    shown = frame_mask[window.start : window.stop].clone()
    if index > 0:
        shown[: windows[index - 1].stop - window.start] = True
    return torch.cat([shown, shown[-1:].expand(window.padding)])


def join_windows(
    scenes: list[RecoveredScene],  # one per window, padded frames already cut
    windows: tuple[Window, ...],
) -> RecoveredScene:
    """Join the windows' scenes, first to last, into one in the first window's world and unit.

    In shared frames points, depth and cameras are blended evenly from one window to the next, and a
    point is known where both windows know it. ValueError where scenes and windows do not match.
    """
    if [len(scene.depth) for scene in scenes] != [window.stop - window.start for window in windows]:
        raise ValueError(
            f"windows: scenes of {[len(scene.depth) for scene in scenes]} frames, the plan says "
            f"{[window.stop - window.start for window in windows]}; cut the repeated frames first"
        )
    joined = scenes[0]
    seams: tuple[Seam, ...] = ()
    for scene, window in zip(scenes[1:], windows[1:]):
        shared = len(joined.depth) - window.start
        seam = _align(_frames(joined, slice(window.start, None)), _frames(scene, slice(shared)))
        seams += (seam,)
        joined = _blend(joined, _transform(scene, seam.similarity), shared)
    return replace(joined, report=replace(joined.report, seams=seams)) if seams else joined


def join_shared(
    first: Tensor, second: Tensor, shared: int
) -> Tensor:  # [T1, ...], [T2, ...] -> [T1 + T2 - shared, ...]
    """Join two parts of a video; over the shared frames the second's weight grows evenly."""
    share = (torch.arange(shared) + 1.0) / (shared + 1)
    share = share.view(-1, *[1] * (first.ndim - 1)).to(first.dtype)
    middle = torch.lerp(first[-shared:], second[:shared], share)
    return torch.cat([first[:-shared], middle, second[shared:]])


def _align(fixed: RecoveredScene, moving: RecoveredScene) -> Seam:
    """Align one scene's world with the other's by a robust similarity on the frames of both."""
    height, width = fixed.depth.shape[1:]
    step = 1
    while -(-height // step) * -(-width // step) > _SEAM_POINTS:
        step += 1
    grid = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
    depths = fixed.depth[grid].double(), moving.depth[grid].double()
    seen = (depths[0] > 0) & (depths[1] > 0) & depths[0].isfinite() & depths[1].isfinite()
    if not bool(seen.any()):
        return _align_by_cameras(fixed, moving)
    target, source = (
        to_world(unproject(scene.depth.double(), scene.intrinsics.double()), scene.cam2world)[grid][seen]
        for scene in (fixed, moving)
    )
    # 1. Start from medians of depth ratios, rotations and shifts, which outliers hardly move.
    scale = (depths[0][seen] / depths[1][seen]).median()
    start = _with_median_shift(scale, _median_rotation(fixed, moving), source, target)
    # 2. Refine on points and cameras, each group of the same total weight: otherwise the many
    # points, which may be far, would decide the shift alone.
    distance = depths[0][seen].median()
    target_axes, source_axes = _camera_axes(fixed, distance), _camera_axes(moving, distance / scale)
    both = torch.cat([source, source_axes]), torch.cat([target, target_axes])
    share = torch.cat([source.new_full((len(part),), 1 / len(part)) for part in (source, source_axes)])
    similarity = start
    flags: tuple[str, ...] = ()
    try:
        for _ in range(_ROUNDS):
            error = torch.linalg.vector_norm(similarity.apply(both[0]) - both[1], dim=-1)
            noise = (error[: len(source)].median() / 1.54).clamp_min(_ROUNDING * distance)  # 3-D Gaussian
            weights = share * (1 - (error / (_GATE * noise)).square()).clamp_min(0).square()
            similarity = align_sim3(both[0], both[1], weights)
    except ValueError:  # the shared points lie on a line or at one place: keep the start
        similarity, flags = start, ("seam from medians: shared points are degenerate",)
    error = torch.linalg.vector_norm(similarity.apply(source) - target, dim=-1)
    residual = error.median()
    inliers = float((error <= _GATE / 1.54 * residual.clamp_min(_ROUNDING * distance)).double().mean())
    return Seam(similarity, float(residual / distance), inliers, flags)


def _align_by_cameras(fixed: RecoveredScene, moving: RecoveredScene) -> Seam:
    """Align the cameras alone and keep the unit: no point is shared."""
    centres = [split_se3(scene.cam2world)[1] for scene in (moving, fixed)]
    similarity = _with_median_shift(centres[0].new_ones(()), _median_rotation(fixed, moving), *centres)
    return Seam(similarity, float("inf"), 0.0, ("no shared point: scale unknown, taken as 1",))


def _with_median_shift(scale: Tensor, rotation: Tensor, source: Tensor, target: Tensor) -> Similarity:
    return Similarity(scale, rotation, (target - scale * rotate(rotation, source)).median(0).values)


def _median_rotation(fixed: RecoveredScene, moving: RecoveredScene) -> Tensor:  # -> [3, 3]
    """Return the shared frames' rotation between the worlds that is nearest to all others."""
    turns = matrix_product(fixed.cam2world[:, :3, :3], moving.world2cam[:, :3, :3])
    apart = (turns[:, None] - turns[None]).square().sum((-2, -1)).sqrt().sum(1)
    return turns[apart.argmin()]


def _camera_axes(scene: RecoveredScene, distance: Tensor) -> Tensor:  # -> [4 T, 3]
    """Return each camera as its centre and the points at `distance` along its axes.

    Position and orientation thus have one unit.
    """
    rotation, centre = split_se3(scene.cam2world)
    axes = centre[:, None] + distance * rotation.mT
    return torch.cat([centre[:, None], axes], dim=1).flatten(0, 1)


def _transform(scene: RecoveredScene, similarity: Similarity) -> RecoveredScene:
    """Move the scene into another world, with depth and the report's lengths in its unit."""
    rotation, centre = split_se3(scene.cam2world)
    moved = se3_matrix(matrix_product(similarity.rotation, rotation), similarity.apply(centre))
    scale, report = similarity.scale, scene.report
    report = replace(report, residual=report.residual * scale, noise=report.noise * scale)
    depth = scene.depth * scale.to(scene.depth.dtype)
    points = similarity.apply(scene.pointmap.double().flatten(0, 2)).view(scene.pointmap.shape).to(scene.pointmap.dtype)
    return RecoveredScene(points, scene.known, scene.intrinsics, invert_se3(moved), depth, report)


def _frames(scene: RecoveredScene, frames: slice) -> RecoveredScene:
    """Return some frames of a scene; the report stays whole."""
    geometry = scene.pointmap[frames], scene.known[frames], scene.intrinsics[frames], scene.world2cam[frames]
    return RecoveredScene(*geometry, scene.depth[frames], scene.report)


def _blend(first: RecoveredScene, second: RecoveredScene, shared: int) -> RecoveredScene:
    """Join all frames of both; over the shared ones the second's weight grows evenly."""
    share = (torch.arange(shared, device=first.depth.device) + 1.0).double() / (shared + 1)
    old, new = first.cam2world[-shared:], second.cam2world[:shared]
    turn = so3_log(matrix_product(new[:, :3, :3], old[:, :3, :3].mT))
    rotation = matrix_product(so3_exp(share[:, None] * turn), old[:, :3, :3])
    centre = torch.lerp(old[:, :3, 3], new[:, :3, 3], share[:, None])
    share = share.to(first.depth.dtype)[:, None, None]
    depths = first.depth[-shared:], second.depth[:shared]
    depth = torch.lerp(*depths, share)
    depth = torch.where(depths[0] > 0, torch.where(depths[1] > 0, depth, depths[0]), depths[1])  # nan > 0 is False
    intrinsics = torch.lerp(first.intrinsics[-shared:], second.intrinsics[:shared], share)
    world2cam = invert_se3(se3_matrix(rotation, centre))
    known = first.known[-shared:] & second.known[:shared]

    def join(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
        return torch.cat([before[:-shared], middle, after[shared:]])

    return RecoveredScene(
        join_shared(first.pointmap, second.pointmap, shared),
        join(first.known, known, second.known),
        join(first.intrinsics, intrinsics, second.intrinsics),
        join(first.world2cam, world2cam, second.world2cam),
        join(first.depth, depth, second.depth),
        _join_reports(first.report, second.report, shared),
    )


def _join_reports(first: RecoverReport, second: RecoverReport, shared: int) -> RecoverReport:
    """Join two reports: the first's values for shared frames, of single numbers the worse."""
    return RecoverReport(
        residual=torch.cat([first.residual, second.residual[shared:]]),
        noise=torch.cat([first.noise, second.noise[shared:]]),
        inliers=torch.cat([first.inliers, second.inliers[shared:]]),
        solved=torch.cat([first.solved, second.solved[shared:]]),
        behind=torch.cat([first.behind, second.behind[shared:]]),
        iterations=first.iterations + second.iterations,
        converged=first.converged and second.converged,
        alpha2=min(first.alpha2, second.alpha2),
        focal_condition=min(first.focal_condition, second.focal_condition),
        focal_deviation=max(first.focal_deviation, second.focal_deviation),
        flags=tuple(dict.fromkeys(first.flags + second.flags)),
    )
