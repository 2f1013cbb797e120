"""Depth and cameras recovered from pointmaps, measured against the truth and against the frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from one4d_pl.geometry.camera import project, to_camera
from one4d_pl.geometry.pointmap import denormalise, is_sky, pointmap_to_depth
from one4d_pl.metrics.camera import camera_errors, path_length
from one4d_pl.metrics.depth import score_depth
from one4d_pl.postopt.recover import RecoveredScene, RecoverOptions, recover_scene
from one4d_pl.types import Sample

SEEN_TWICE = 0.1  # relative depth difference below which two frames show the same place


def recover_scenes(
    pointmaps: Tensor,  # [N, 3, T, H, W]
    options: RecoverOptions,
    on_clip: Callable[[], object] = lambda: None,
) -> list[RecoveredScene]:
    """Recover cameras and depth of every clip from its points that are not sky.

    `on_clip` is called after each of them.
    """
    scenes = []
    for pointmap in pointmaps:
        points = pointmap.movedim(0, -1)
        scenes.append(recover_scene(points, ~is_sky(points), options))
        on_clip()
    return scenes


def geometry_errors(recovered: list[RecoveredScene], clips: list[Sample]) -> dict[str, float]:
    """Average AbsRel and ATE over the clips.

    Depth is fitted by scale and shift per clip; ATE is a share of the true path's length.
    """
    abs_rel, ate_share = [], []
    for scene, clip in zip(recovered, clips, strict=True):
        target = pointmap_to_depth(denormalise(clip.pointmap.movedim(0, -1), clip.scale), clip.cam2world)
        abs_rel.append(score_depth(scene.depth, target, clip.valid, "scale_shift", fit_valid=scene.known).abs_rel)
        every = torch.ones(len(clip.cam2world), dtype=torch.bool)
        cameras = camera_errors(scene.cam2world, clip.cam2world, every)
        ate_share.append(cameras.ate / cameras.path_length_target)
    return {"abs_rel": float(torch.stack(abs_rel).mean()), "ate_share": float(torch.stack(ate_share).mean())}


def self_consistency(
    videos: Tensor,  # [N, 3, T, H, W] in [-1, 1], generated
    recovered: list[RecoveredScene],  # of the pointmaps that came with them
    clips: list[Sample],
    train_path: float,  # median camera path of the training clips, in median distances
) -> dict[str, float]:
    """Measure generated scenes, which have no truth, against themselves.

    Does the camera move, and do the frames agree with the geometry? Medians over the clips. A scene
    without geometry counts as a path of 0, one that shows nothing twice as an infinite error.
    """
    paths, ours, true = [], [], []
    for video, scene, clip in zip(videos, recovered, clips, strict=True):
        points, frames, solid = scene.pointmap, video.movedim(0, -1), scene.known
        paths.append(camera_path(scene.cam2world, points, solid))
        ours.append(photometric_error(frames, points, scene.intrinsics, scene.cam2world, solid))
        truth, cameras = denormalise(clip.pointmap.movedim(0, -1), clip.scale), clip.cam2world.double()
        true.append(photometric_error(clip.frames.movedim(0, -1), truth, clip.intrinsics, cameras, clip.valid))
    path = float(torch.stack(paths).nan_to_num(0.0).median())
    ours_error = float(torch.stack(ours).nan_to_num(torch.inf).median())
    true_error = float(torch.stack(true).nanmedian())
    return {
        "camera_path": path,
        "camera_path_training": train_path,
        "camera_path_ratio": path / train_path,
        "photometric_error": ours_error,
        "photometric_error_truth": true_error,
        "photometric_ratio": ours_error / true_error,
    }


def camera_path(cam2world: Tensor, points: Tensor, valid: Tensor) -> Tensor:
    """Return the length of a camera path [T, 4, 4], in median distances.

    The median is over the distances of the clip's valid points [T, H, W, 3] from camera 0.
    """
    distance = points[valid].norm(dim=-1).median() if bool(valid.any()) else points.new_tensor(float("nan"))
    return path_length(cam2world).double() / distance.double()


def photometric_error(
    frames: Tensor,  # [T, H, W, 3] in [-1, 1]
    points: Tensor,  # [T, H, W, 3], camera-0 coordinates
    intrinsics: Tensor,  # [T, 3, 3], pixels
    cam2world: Tensor,  # [T, 4, 4] float64, world and unit of the points
    valid: Tensor,  # [T, H, W] bool
) -> Tensor:
    """Return the median colour difference between frame 0's points and the same points later.

    Colours range over 2. Only points that the later frame shows too are compared: its own depth
    there agrees within `SEEN_TWICE`. The median ignores moving things, a minority, which break the
    premise that the world stands still. All frames are compared with frame 0, because between
    neighbours a standing camera would do nearly as well. nan where nothing is seen twice.
    """
    height, width = points.shape[1:3]
    own_depth = to_camera(points.double(), cam2world)[..., 2]
    differences = []
    for t in range(1, len(points)):
        pixels, depth = project(to_camera(points[0].double(), cam2world[t]), intrinsics[t].double())
        column, row = pixels.nan_to_num(-1).floor().unbind(-1)
        inside = (depth > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height) & valid[0]
        column, row = torch.where(inside, column, 0).long(), torch.where(inside, row, 0).long()
        there = own_depth[t][row, column]
        seen = inside & valid[t][row, column] & ((there - depth).abs() < SEEN_TWICE * depth)
        # bilinear at the exact position: an error of half a pixel would hide what is measured
        grid = torch.stack([2 * pixels[..., 0] / width - 1, 2 * pixels[..., 1] / height - 1], -1)[None].float()
        sampled = torch.nn.functional.grid_sample(
            frames[t].movedim(-1, 0)[None].float(), grid.nan_to_num(2), align_corners=False
        )[0].movedim(0, -1)
        differences.append((sampled - frames[0]).abs().mean(-1)[seen])
    found = torch.cat(differences)
    return found.median() if len(found) else found.new_tensor(float("nan"))
