"""Point clouds in TensorBoard: there with open3d, and without it nothing else changes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from one4d_pl.callbacks import visualize
from one4d_pl.callbacks.visualize import Visualize, scene_points
from one4d_pl.config import Config, DataConfig
from one4d_pl.evaluation.toy_clips import render_samples
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.types import Batch, collate


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate(render_samples(Config(data=DataConfig(num_frames=9, height=32, width=48)), range(2, 3), "clips"))


def draw(batch: Batch, folder: Path) -> EventAccumulator:
    """What the callback leaves of one scene at step 7."""
    logger = TensorBoardLogger(str(folder), name="", version="")
    samples = SimpleNamespace(scenes=[(batch, GeneratedScene(batch.frames, batch.pointmap))])
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True, global_step=7)
    visualize.has_open3d_plugin.cache_clear()
    Visualize(samples).on_validation_epoch_end(trainer, None)
    logger.experiment.close()
    (file,) = folder.glob("events*")
    return EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_points_are_the_surface_upright_and_few_enough(batch):
    cloud = scene_points(batch.frames[0], batch.pointmap[0])
    points = batch.pointmap[0].movedim(0, -1)
    surface = points[points.abs().amax(-1) <= 0.935]
    assert torch.equal(cloud["vertex_positions"][0], surface * torch.tensor([1.0, -1.0, -1.0]))
    assert cloud["vertex_colors"].shape == (1, len(surface), 3) and cloud["vertex_colors"].dtype == torch.uint8
    many = scene_points(torch.zeros(3, 5, 100, 100), torch.zeros(3, 5, 100, 100))
    assert many["vertex_positions"].shape == (1, visualize.POINTS, 3)
    sky = scene_points(batch.frames[0], torch.full_like(batch.pointmap[0], 0.97))
    assert sky["vertex_positions"].shape == (1, 1, 3)


def test_without_open3d_there_are_the_panels_alone(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    events = draw(batch, tmp_path)
    assert [event.step for event in events.Images("val/scene/video")] == [7]
    assert events.Tags()["tensors"] == [] and not (tmp_path / "plugins").exists()


def test_a_broken_open3d_is_said_once_and_changes_nothing(batch, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def fail(name: str) -> None:
        raise OSError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    events = draw(batch, tmp_path)
    assert visualize.has_open3d_plugin() is False
    assert caplog.text.count("libGL.so.1") == 1 and events.Tags()["tensors"] == []


def test_with_open3d_its_plugin_finds_the_points(batch, tmp_path):
    pytest.importorskip("open3d.visualization.tensorboard_plugin", reason="needs open3d: the extra of that name")
    events = draw(batch, tmp_path)
    assert [event.step for event in events.Images("val/scene/video")] == [7]
    assert events.Tags()["tensors"] == ["val/points/video"]
    (file,) = (tmp_path / "plugins" / "Open3D").rglob("*.msgpack")
    content = file.read_bytes()
    cloud = scene_points(batch.frames[0], batch.pointmap[0])
    assert np.ascontiguousarray(cloud["vertex_positions"][0].numpy()).tobytes() in content
