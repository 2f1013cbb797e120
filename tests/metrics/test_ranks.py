"""Every metric says the same on 1, 2 and 3 ranks of a real process group, one of them without any sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torchmetrics import Metric

from one4d_pl.geometry.se3 import se3_matrix, so3_exp
from one4d_pl.metrics.camera import CameraError
from one4d_pl.metrics.depth import VideoDepthError
from one4d_pl.metrics.pointmap import PointmapError
from one4d_pl.metrics.video import FrechetVideoDistance, VaeFeatures

SAMPLES = 5  # no number of ranks divides them
CASES = ((3, 3), (2, 2), (2, 1))  # ranks, and how many of them get any sample


def pooled(videos: Tensor) -> Tensor:
    return videos[:, :2]


def metrics() -> dict[str, Metric]:
    return {
        "depth": VideoDepthError("scale_shift"),
        "pointmap": PointmapError(),
        "camera": CameraError(),
        "video": FrechetVideoDistance(VaeFeatures(pooled, num_channels=2)),
    }


def update(group: dict[str, Metric], index: int) -> None:
    """Add sample `index`; sequences differ in length, one is empty, one camera stands still."""
    generator = torch.Generator().manual_seed(index)
    frames = 3 + index
    draw = torch.randn(frames, 6, generator=generator)
    cam2world = se3_matrix(so3_exp(0.1 * draw[:, :3]), 0.1 * draw[:, 3:])
    target = torch.rand(frames, 6, 8, 3, generator=generator) + torch.tensor([-0.5, -0.5, 4.0])
    preds = target + 0.1 * torch.randn(target.shape, generator=generator)
    valid = torch.rand(frames, 6, 8, generator=generator) < (0.8 if index != 1 else 0)
    moving = torch.rand(frames, 6, 8, generator=generator) < 0.2
    preds_cam2world = cam2world[:1].repeat(frames, 1, 1) if index == 2 else cam2world.roll(1, 0)

    group["depth"].update(preds[..., 2], target[..., 2], valid)
    group["pointmap"].update(preds[None], target[None], valid[None], moving[None])
    group["camera"].update(preds_cam2world, cam2world, torch.ones(frames, dtype=torch.bool))
    videos = torch.rand(2, 3, 5, 4, 4, generator=generator)
    group["video"].update(videos, real=True)
    group["video"].update(videos.square(), real=False)


def results(group: dict[str, Metric]) -> dict[str, Tensor]:
    flat = {}
    for name, metric in group.items():
        values = metric.compute()
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{name}/{key}"] = value
    return flat


def score_shares(rank: int, folder: str) -> None:
    """What one process does: its share in every case of (ranks, ranks that have samples)."""
    torch.set_num_threads(1)
    for ranks, working in CASES:
        if rank >= ranks:
            continue
        name = f"{folder}/{ranks}_{working}"
        distributed.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=ranks)
        group = metrics()
        for index in range(rank, SAMPLES, working) if rank < working else ():
            update(group, index)
        torch.save(results(group), f"{name}_{rank}.pt")
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:fd_vae")
def test_every_metric_is_the_same_on_any_number_of_ranks(tmp_path: Path):
    alone = metrics()
    for index in range(SAMPLES):
        update(alone, index)
    expected = results(alone)
    assert all(bool(value.isfinite().all()) for value in expected.values())
    multiprocessing.spawn(score_shares, (str(tmp_path),), nprocs=3)  # once: a process takes seconds to import torch
    for ranks, working in CASES:
        for rank in range(ranks):
            actual = torch.load(tmp_path / f"{ranks}_{working}_{rank}.pt", weights_only=True)
            assert actual.keys() == expected.keys() and len(actual) > 25
            for name, value in expected.items():
                torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=f"{name}: {ranks} ranks")
