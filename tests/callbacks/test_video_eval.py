"""The Fréchet distance while training: its name, its clips, the truth, and any number of ranks."""

from __future__ import annotations

import importlib.util
import math
import subprocess
from pathlib import Path

import pytest
import torch

from one4d_pl.config import ConfigError, ToyConfig, check_paths
from one4d_pl.data.datamodule import write_toy_world
from one4d_pl.fit import fit
from one4d_pl.inference.pipeline import GeneratedScene
from one4d_pl.metrics.perceptual import PACKAGE
from one4d_pl.training.module import One4DModule
from one4d_pl.types import Batch
from tests.conftest import scalars
from tests.metrics.videos import TinyI3D, saved

# TorchScript is the format of the shared I3D file, whatever torch recommends for new ones
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:fvd:UserWarning", "ignore:fd_vae:UserWarning"
)
ONCE = ("train.max_steps=1", "val.every=1000", "val.clips=1", "eval.video_every=1000")


@pytest.fixture
def i3d(tmp_path: Path) -> Path:
    return saved(TinyI3D(), tmp_path)


def first_values(run_dir: Path) -> dict[str, float]:
    """Every validation value at step 0."""
    return {tag: values[0] for tag, values in scalars(run_dir).items() if tag.startswith("val/")}


@pytest.mark.parametrize("name", ["fvd", "fd_vae"])
def test_true_videos_have_no_distance_and_grey_ones_do(name, run_config, i3d, tmp_path, monkeypatch):
    seen: list[Batch] = []

    def truth(module: One4DModule, batch: Batch, steps: int) -> GeneratedScene:
        seen.append(batch)
        return GeneratedScene(batch.frames, batch.pointmap)

    def grey(module: One4DModule, batch: Batch, steps: int) -> GeneratedScene:
        return GeneratedScene(torch.zeros_like(batch.frames), batch.pointmap)

    overrides = [*ONCE, "eval.video_clips=3", *([f"eval.i3d={i3d}"] if name == "fvd" else [])]
    distances = []
    for sample in (truth, grey):
        monkeypatch.setattr(One4DModule, "sample", sample)
        run_dir = tmp_path / sample.__name__
        fit(run_config(*overrides, f"run_dir={run_dir}"))
        values = {tag: value for tag, value in first_values(run_dir).items() if tag.startswith("val/video/")}
        assert values.keys() - {"val/video/st_lpips"} == {f"val/video/{name}", "val/video/psnr"}
        assert ("val/video/st_lpips" in values) == (importlib.util.find_spec(PACKAGE) is not None)
        distances.append(values[f"val/video/{name}"])
        if sample is truth:
            assert values["val/video/psnr"] == math.inf and values.get("val/video/st_lpips", 0) < 1e-6
        else:
            assert 0 < values["val/video/psnr"] < 20 and values.get("val/video/st_lpips", 1) > 0.01
    # three videos leave hundreds of eigenvalues 0 but for rounding, whose roots add up
    assert abs(distances[0]) < 1e-3 * distances[1]
    # three clips, though validation has one, each from its first frame alone
    assert len({key for batch in seen for key in batch.keys}) == len(seen) == 3
    assert all(batch.frame_mask.sum() == 1 and batch.frame_mask[0, 0] and batch.tasks == ("image",) for batch in seen)


def test_two_ranks_log_what_one_logs(run_config, fit_command, fit_environment, tmp_path):
    """Uneven shares: a validation clip is shown again, a rank has no scene to measure, one has one of three videos."""
    clips = ["val.clips=3", "eval.clips=1", "eval.video_clips=3", "data.num_frames=9", "train.global_batch_size=2"]
    overrides = [*ONCE, "eval.every=1000", *clips, "train.micro_batch_size=1"]
    fit(run_config(*overrides, f"run_dir={tmp_path}/one"))
    ranks = ["train.strategy=ddp", "train.devices=2", f"run_dir={tmp_path}/two"]
    command = fit_command(*overrides, *ranks)
    done = subprocess.run(command, env=fit_environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = first_values(tmp_path / "one"), first_values(tmp_path / "two")
    assert (
        {"val/loss/rgb", "val/depth/abs_rel", "val/camera/ate", "val/video/fd_vae", "val/video/psnr"}
        <= one.keys()
        == two.keys()
    )
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_what_cannot_be_measured_is_one_line(run_config, i3d, tmp_path):
    missing = run_config(*ONCE, "eval.i3d=nowhere/i3d.pt")
    short = run_config(*ONCE, f"eval.i3d={i3d}", "data.num_frames=9")
    with pytest.raises(ConfigError, match=r"eval\.i3d: no I3D TorchScript file at nowhere/i3d\.pt"):
        check_paths(missing)
    with pytest.raises(ConfigError, match=r"eval\.i3d: I3D needs 10 frames, data\.num_frames is 9"):
        fit(short)
    write_toy_world(ToyConfig(str(tmp_path / "toy"), train_synthetic=0, train_real=0, val=1), 17, 32, 48)
    alone = run_config(*ONCE, f"data.val_sources=[{{path: {tmp_path}/toy/val}}]")
    with pytest.raises(ConfigError, match=r"needs 2 validation clips, data\.val_sources hold 1"):
        fit(alone)
