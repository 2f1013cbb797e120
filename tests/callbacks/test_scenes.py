"""What is sampled while training, measured and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from one4d_pl.callbacks.geometry_eval import GeometryEval
from one4d_pl.callbacks.scene_samples import SceneSamples
from one4d_pl.config import DataConfig, EvalConfig
from one4d_pl.data.decode import Draw, make_sample
from one4d_pl.data.toy_world import render_clip
from one4d_pl.fit import fit
from one4d_pl.inference.panels import COLUMNS, GAP, distance_colours, distance_range, scene_panel
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.types import Batch, collate


@pytest.fixture(scope="module")
def batch() -> Batch:
    given = torch.zeros(17, dtype=torch.bool)
    given[[0, 8]] = True
    config = DataConfig(height=32, width=48)
    return collate(
        [make_sample(render_clip(seed, 17, 32, 48), 0, Draw("sparse", given, False), config, None) for seed in (2, 11)]
    )


def measured(batch: Batch, pointmap: torch.Tensor) -> dict[str, float]:
    evaluation = GeometryEval(SceneSamples(EvalConfig()))
    evaluation.setup(None, None, "fit")
    evaluation._update(batch, GeneratedScene(batch.frames, pointmap))
    depth, points = evaluation.depth.compute(), evaluation.pointmap["sparse"].compute()
    return {"abs_rel": float(depth["abs_rel"]), **{name: float(value) for name, value in points.items()}}


def test_the_truth_has_no_error_whatever_its_scale_and_another_clip_has(batch):
    truth = measured(batch, batch.pointmap)
    assert truth["rel_error"] < 1e-5 and truth["abs_rel"] < 1e-4 and truth["inliers"] == 1
    assert measured(batch, 0.5 * batch.pointmap)["rel_error"] < 1e-5
    swapped = measured(batch, batch.pointmap.flip(0))
    assert swapped["rel_error"] > 0.1 and swapped["abs_rel"] > 0.05 and swapped["rel_error_moving"] > 0.05


def test_a_run_samples_measures_and_draws_every_task_on_its_cadence(run_config):
    config = run_config("eval.every=4", "eval.clips=4", "val.clips=4", "val.every=2", "train.max_steps=6")
    fit(config)
    (file,) = (Path(config.run_dir) / "tensorboard").glob("events*")
    events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Scalars("val/pointmap/rel_error")] == [0, 4]
    assert {"val/pointmap_text/rel_error", "val/pointmap_video/rel_error", "val/depth_true_cameras/abs_rel"} <= set(
        events.Tags()["scalars"]
    )
    for task in ("text", "image", "sparse", "video"):
        assert [e.step for e in events.Images(f"val/scene/{task}")] == [0, 4]


def test_the_panel_shows_given_frames_in_order_and_hidden_ones_grey():
    frames = torch.linspace(-1, 1, 17).view(1, 17, 1, 1).expand(3, 17, 8, 12)
    points = torch.full((3, 17, 8, 12), 0.5)
    panel = scene_panel(torch.zeros_like(frames), frames, points, points)
    assert panel.shape == (5 * (8 + GAP), COLUMNS * (12 + GAP), 3) and panel.dtype == torch.uint8
    assert set(panel[:8, :12].flatten().tolist()) == {128}
    generated = [int(panel[8 + GAP, i * (12 + GAP), 0]) for i in range(COLUMNS)]
    assert generated == sorted(generated) and generated[0] == 0 and generated[-1] == 255


def test_nearer_is_lighter_and_sky_is_told():
    points = torch.zeros(1, 1, 3, 3)
    points[0, 0, :, 2] = torch.tensor([0.05, 0.5, 0.97])
    near, far = distance_range(points)
    colours = distance_colours(points, near, far)[0, 0]
    assert colours[0].mean() > colours[1].mean()
    torch.testing.assert_close(colours[2], torch.tensor([0.62, 0.80, 0.95]))
