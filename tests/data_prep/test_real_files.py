"""Real files through our readers: static points of frame i land on frame j (test_tartanair.py has TartanAir's)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from data_prep.sources import registry
from data_prep.sources.decoding import read_video
from data_prep.sources.spatialvid import read_cameras, video_frames_of_rows
from one4d_pl.types import Clip
from tests.data_prep.real_clips import REAL, median_error, pointodyssey_clip

pytestmark = [pytest.mark.realdata, pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")]


def errors(clip: Clip, pairs: list[tuple[int, int]]) -> list[float]:  # metres
    return [median_error(clip, i, j) for i, j in pairs]


def test_tum_desk():
    (clip,) = registry.iter_clips("rgbd", REAL / "tum", 9, stride=1, units=["rgbd_dataset_freiburg1_desk"])
    assert max(errors(clip, [(0, 1), (3, 5), (0, 8)])) <= 0.012


def test_bonn_under_the_published_camera_rule(monkeypatch):
    (clip,) = registry.iter_clips("rgbd", REAL / "bonn", 8, stride=1)
    found = errors(clip, [(0, 7), (1, 6)])
    monkeypatch.setattr("one4d_pl.data.rgbd_folder.bonn_cam2world", lambda groundtruth: groundtruth)
    (raw,) = registry.iter_clips("rgbd", REAL / "bonn", 8, stride=1)
    assert max(found) <= 0.10
    assert all(right < 0.5 * wrong for right, wrong in zip(found, errors(raw, [(0, 7), (1, 6)])))


def test_pointodyssey_content_through_the_generic_source(tmp_path):
    clip = pointodyssey_clip(tmp_path)
    assert max(errors(clip, [(0, 1), (10, 14), (0, 20), (0, 36)])) <= 0.01


def test_spatialvid_matches_lie_on_their_epipolar_lines():
    root = REAL / "spatialvid" / "SpatialVID" / "SpatialVid" / "HQ"
    (unit,) = registry.list_units("spatialvid", root)
    intrinsics, cam2world = read_cameras(root / "annotations" / unit, 720, 1280)
    numbers = video_frames_of_rows(root / "annotations" / unit, 30000 / 1001, len(cam2world))
    i, j = 40, 43
    first, second = read_video(root / "videos" / f"{unit}.mp4", [numbers[i], numbers[j]]).float().mean(-1).numpy()
    a, b = matches(first, second)
    assert len(a) >= 100
    distance = epipolar_distance(a, b, intrinsics[[i, j]].double().numpy(), cam2world[[i, j]].numpy())
    assert np.median(distance) <= 1.0  # pixels
    wrong = epipolar_distance(a, b, intrinsics[[i, j]].double().numpy(), np.linalg.inv(cam2world[[i, j]].numpy()))
    assert np.median(wrong) > 1.5 * np.median(distance)  # read as camera to world they are worse


def test_spatialvid_without_depth_is_skipped_by_name(caplog):
    root = REAL / "spatialvid" / "SpatialVID" / "SpatialVid" / "HQ"
    assert list(registry.iter_clips("spatialvid", root, 9)) == []
    assert (
        "skipped group_0001/" in caplog.text and "need SpatialVID's depth or a folder of pseudo geometry" in caplog.text
    )


def matches(first: np.ndarray, second: np.ndarray, patch: int = 10, reach: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the first picture and where they are in the second, both [N, 2] (u, v), to about 0.2 pixels."""
    smooth = ndimage.gaussian_filter(first, 1.5)
    gy, gx = np.gradient(smooth)
    xx, yy, xy = (ndimage.gaussian_filter(p, 4) for p in (gx * gx, gy * gy, gx * gy))
    corner = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)  # the smaller eigenvalue
    peak = (corner == ndimage.maximum_filter(corner, 25)) & (corner > np.quantile(corner, 0.7))
    found = []
    for v, u in np.argwhere(peak):
        side = patch + reach
        if not (side <= v < first.shape[0] - side and side <= u < first.shape[1] - side):
            continue
        template = first[v - patch : v + patch + 1, u - patch : u + patch + 1]
        area = second[v - side : v + side + 1, u - side : u + side + 1]
        windows = np.lib.stride_tricks.sliding_window_view(area, template.shape)
        centred = windows - windows.mean((2, 3), keepdims=True)
        t = template - template.mean()
        score = (centred * t).sum((2, 3)) / np.sqrt(np.square(centred).sum((2, 3)) * np.square(t).sum() + 1e-9)
        y, x = np.unravel_index(score.argmax(), score.shape)
        if score[y, x] < 0.9 or not (0 < y < 2 * reach and 0 < x < 2 * reach):
            continue
        dx, dy = (
            0.5 * (low - high) / (low - 2 * score[y, x] + high)
            for low, high in ((score[y, x - 1], score[y, x + 1]), (score[y - 1, x], score[y + 1, x]))
        )
        found.append([u + 0.5, v + 0.5, u + 0.5 + x - reach + dx, v + 0.5 + y - reach + dy])
    pairs = np.array(found).reshape(-1, 4)
    return pairs[:, :2], pairs[:, 2:]


def epipolar_distance(a: np.ndarray, b: np.ndarray, intrinsics: np.ndarray, cam2world: np.ndarray) -> np.ndarray:
    """Pixels between each point of the second picture and the epipolar line of its match in the first."""
    motion = np.linalg.inv(cam2world[1]) @ cam2world[0]
    x, y, z = motion[:3, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ motion[:3, :3]
    inverse = np.linalg.inv(intrinsics)
    lines = np.concatenate([a, np.ones((len(a), 1))], 1) @ (inverse[1].T @ essential @ inverse[0]).T
    return np.abs((lines[:, :2] * b).sum(1) + lines[:, 2]) / np.linalg.norm(lines[:, :2], axis=1)
