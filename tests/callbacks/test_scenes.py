"""What is sampled while training, measured and drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from one4d_pl.callbacks.cadence import Cadence
from one4d_pl.callbacks.geometry_eval import GeometryEval
from one4d_pl.callbacks.scene_samples import SceneSamples
from one4d_pl.callbacks.video_eval import VideoEval
from one4d_pl.config import DataConfig, EvalConfig
from one4d_pl.data.datamodule import validation_batches
from one4d_pl.data.decode import Draw, make_sample
from one4d_pl.fit import fit, scene_callbacks
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.metrics.camera import path_length
from one4d_pl.scene.panels import COLUMNS, GAP, distance_colours, distance_range, scene_panel
from one4d_pl.toy.world import render_clip
from one4d_pl.training.module import One4DModule
from one4d_pl.types import Batch, PointmapScale, collate

LOGGED = {
    "val/pointmap_text/rel_error", "val/pointmap_video/rel_error", "val/depth_true_cameras/abs_rel",
    "val/depth/abs_rel", "val/depth/delta_1", "val/camera/ate", "val/camera/rpe_trans", "val/camera/rpe_rot",
    "val/camera/auc_30", "val/camera/path_length_ratio", "val/camera/total_rotation",
    "val/camera/total_rotation_target", "val/camera/degenerate",
}  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two clips: one camera moves freely, one (of seed 5) on a line; neither zooms."""
    given = torch.zeros(9, dtype=torch.bool)
    given[[0, 8]] = True
    config = DataConfig(num_frames=9, height=32, width=48)
    return collate(
        [make_sample(render_clip(seed, 9, 32, 48), 0, Draw("sparse", given, False), config, None) for seed in (2, 5)]
    )


def measured(batch: Batch, pointmap: torch.Tensor) -> dict[str, float]:
    evaluation = GeometryEval(SceneSamples(EvalConfig()))
    evaluation.setup(None, None, "fit")
    evaluation._update(batch, GeneratedScene(batch.frames, pointmap))
    return {name.removeprefix("val/"): value for name, value in evaluation._compute().items()}


def test_the_truth_has_no_error_whatever_its_scale_and_another_clip_has(batch):
    truth = measured(batch, batch.pointmap)
    smaller = measured(first_clips(batch, 1), 0.5 * batch.pointmap[:1])
    path = path_length(batch.cam2world).mean()
    for values in (truth, smaller):
        assert values["pointmap/rel_error"] < 1e-5 and values["pointmap_sparse/inliers"] == 1
        assert values["depth/abs_rel"] < 1e-4 and values["depth/delta_1"] == 1
        assert values["camera/ate"] < 1e-4 * path and values["camera/rpe_trans"] < 1e-4 * path
        assert values["camera/rpe_rot"] < 1e-2 and values["camera/auc_30"] > 0.999
        assert values["camera/path_length_ratio"] == pytest.approx(1, abs=1e-4)
    assert truth["depth_true_cameras/abs_rel"] < 1e-4
    swapped = measured(batch, batch.pointmap.flip(0))
    assert swapped["pointmap/rel_error"] > 0.1 and swapped["pointmap/rel_error_moving"] > 0.05
    assert swapped["depth_true_cameras/abs_rel"] > 0.05 and swapped["depth/abs_rel"] > 0.05
    # what a similarity leaves of a short smooth path is small whatever its shape: the relative errors tell more
    assert swapped["camera/ate"] > 10 * 1e-4 * path and swapped["camera/rpe_trans"] > 0.05 * path
    assert swapped["camera/rpe_rot"] > 0.1 and swapped["camera/auc_30"] < 0.5


def test_a_standing_camera_is_counted_and_stays_in_the_plain_means(batch):
    preds = batch.pointmap.clone()
    preds[1] = preds[1, :, :1]  # the second scene stands still
    one, two = (measured(first_clips(batch, n), preds[:n]) for n in (1, 2))
    assert (one["camera/degenerate"], two["camera/degenerate"]) == (0, 1)
    assert two["camera/ate_regular"] == pytest.approx(one["camera/ate"], abs=1e-9)
    true_paths = path_length(batch.cam2world)
    assert two["camera/ate"] > 1e-3 * true_paths[1]
    assert two["camera/path_length_ratio"] == pytest.approx(float(true_paths[0] / true_paths.sum()), rel=1e-3)
    assert two["camera/total_rotation"] < 0.9 * two["camera/total_rotation_target"]


def first_clips(batch: Batch, count: int) -> Batch:
    """The first `count` clips."""
    kept = {
        name: getattr(batch, name)[:count]
        for name in ("frames", "pointmap", "valid", "moving", "cam2world", "frame_mask", "tasks", "keys")
    }
    scale = PointmapScale(batch.scale.scale[:count], batch.scale.offset[:count])
    return replace(batch, scale=scale, **kept)


def test_a_pointmap_that_is_no_number_leaves_finite_scores(batch):
    values = measured(batch, torch.full_like(batch.pointmap, torch.nan))
    assert values["depth/delta_1"] == 0 and all(math.isfinite(value) for value in values.values())


def test_a_cadence_is_due_once_per_multiple():
    cadence = Cadence(4)
    cadence.start(0)
    # the first validation at or after 0, 4, 8, 12, ...
    assert [step for step in range(0, 31, 3) if cadence.due(step)] == [0, 6, 9, 12, 18, 21, 24, 30]


def test_a_resumed_run_keeps_the_cadence():
    for resumed_at in range(1, 14):
        cadence = Cadence(4)
        cadence.start(resumed_at)
        validations = sorted({resumed_at, *range(0, 31, 2)})  # a resumed run validates before its first step
        due = [step for step in validations if step >= resumed_at and cadence.due(step)]
        assert due == [step for step in range(0, 31, 4) if step >= resumed_at]


@pytest.mark.parametrize(("clips", "shown"), [(1, 1), (3, 4), (4, 4), (8, 5)])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_samples_equally_often_and_every_scene_is_kept_once(world, clips, shown, batch, monkeypatch):
    """Under ZeRO-3 a rank that samples once less than the others leaves them waiting for ever."""
    calls, kept = [0] * world, []
    for rank in range(world):

        def sample(*args: object, rank: int = rank) -> None:
            calls[rank] += 1

        monkeypatch.setattr(One4DModule, "sample", sample)
        samples = SceneSamples(EvalConfig(clips=clips))
        trainer = SimpleNamespace(world_size=world, global_rank=rank, global_step=0)
        samples.on_validation_epoch_start(trainer, One4DModule.__new__(One4DModule))
        for n, (position,) in enumerate(validation_batches(shown, rank, world)):
            one = replace(
                first_clips(batch, 1), position=torch.tensor([position]), counted=torch.tensor([position < shown])
            )
            samples.on_validation_batch_end(trainer, One4DModule.__new__(One4DModule), None, one, n)
        kept += [int(one.position) for one, _ in samples.scenes]
    assert len(set(calls)) == 1
    assert sorted(kept) == list(range(min(clips, shown)))


@pytest.mark.filterwarnings("ignore:fd_vae")
def test_a_run_samples_measures_and_draws_every_task_on_its_cadence(run_config):
    """With a base in bfloat16, as the large ones are: sampling must do in a callback what a training step may."""
    config = run_config(
        "eval.every=4", "eval.clips=4", "eval.video_every=6", "eval.video_clips=3",
        "val.clips=4", "val.every=2", "train.max_steps=6", "data.num_frames=9",
        "base.dtype=bfloat16", "train.precision=bf16-mixed",
    )  # fmt: skip
    fit(config)
    (file,) = (Path(config.run_dir) / "tensorboard").glob("events*")
    events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
    for name in ("val/pointmap/rel_error", "val/depth/abs_rel", "val/camera/ate"):
        assert [e.step for e in events.Scalars(name)] == [0, 4]
    assert set(events.Tags()["scalars"]) >= LOGGED
    assert [e.step for e in events.Scalars("val/video/fd_vae")] == [0, 6]
    for task in ("text", "image", "sparse", "video"):
        assert [e.step for e in events.Images(f"val/scene/{task}")] == [0, 4]


def test_a_cadence_of_0_is_off():
    assert scene_callbacks(EvalConfig(every=0, video_every=0)) == []
    (video,) = scene_callbacks(EvalConfig(every=0))
    assert isinstance(video, VideoEval)
    assert not [c for c in scene_callbacks(EvalConfig(video_every=0)) if isinstance(c, VideoEval)]


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
