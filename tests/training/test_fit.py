"""Training does what it is for: it overfits a clip, it learns from real files, it stops on broken data."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep import write_shards as write_shards_door
from one4d_pl import fit as fit_door
from one4d_pl.config import ToyConfig, to_yaml
from one4d_pl.data.datamodule import write_toy_world
from one4d_pl.data.shards import ShardSet
from one4d_pl.fit import fit
from tests.training.test_resume import curve

TARTANAIR = Path(__file__).parents[3] / "shared" / "data" / "tartanair"


EMBEDDED = ("base.path=embedded", "base.max_text_tokens=192", "dlc.rank=32")


def test_one_clip_can_be_overfitted(run_config):
    """The xyz loss at fixed sigmas and noise falls tenfold: adapter, links and optimiser can learn what they must.

    Video to 4D alone: from a prompt only, a random base would have to tell positions apart by relative RoPE, which
    takes ten times as long.
    """
    config = run_config(
        *EMBEDDED, "base.max_text_tokens=32",
        "train.overfit_clips=1", "train.max_steps=200", "val.every=200", "optim.cooldown_steps=80",
        "masking.video_prob=1", "masking.text_prob=0", "masking.image_prob=0", "masking.sparse_prob=0",
        "val.clips=4", "val.sigmas=[0.1,0.3,0.5,0.7,0.9]", "optim.lr=2e-3", "data.num_frames=9", "data.height=16",
        "data.width=32", "train.global_batch_size=4", "train.micro_batch_size=4", "train.save_every=200",
        "train.log_every=50",
    )  # fmt: skip
    fit(config)
    losses = curve(config.run_dir, "val/loss/xyz")
    assert losses[-1] <= losses[0] / 10, losses


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not TARTANAIR.is_dir(), reason="shared/data/tartanair is not here")
def test_real_tartanair_files_become_a_shard_and_train(run_config, tmp_path):
    shards = tmp_path / "tartanair"
    arguments = ["--source", "tartanair", "--root", str(TARTANAIR), "--out", str(shards), "--num-frames", "17"]
    assert write_shards_door.main([*arguments, "--height", "64", "--width", "96"]) == 0
    assert len(ShardSet.open(shards)) == 1
    config = run_config(
        *EMBEDDED, f"data.sources=[{{path: {shards}}}]", f"data.val_sources=[{{path: {shards}}}]",
        "train.max_steps=50", "val.every=50", "val.clips=1", "train.save_every=50",
        "data.height=48", "data.width=64",
    )  # fmt: skip
    fit(config)
    for modality in ("rgb", "xyz"):
        losses = curve(config.run_dir, f"val/loss/{modality}")
        assert losses[-1] <= 0.9 * losses[0], (modality, losses)


def test_curves_of_a_run(run_config):
    config = run_config("train.max_steps=4")
    fit(config)
    (file,) = (Path(config.run_dir) / "tensorboard").glob("events*")
    tags = set(EventAccumulator(str(file)).Reload().Tags()["scalars"])
    assert {"train/loss/rgb", "train/loss/xyz", "val/loss/rgb", "val/loss/xyz", "train/time/step_s",
            "train/time/data_wait", "data/skipped", "train/grad_norm/lora", "train/grad_norm/links",
            "train/link_ratio/block_2"} <= tags  # fmt: skip
    per_task = {tag.split("/")[1] for tag in tags if tag.startswith("train/loss_")}
    assert per_task and per_task <= {"loss_text", "loss_image", "loss_sparse", "loss_video"}
    assert all(value > 0 for value in curve(config.run_dir, "train/loss/xyz"))
    assert (Path(config.run_dir) / "config.yaml").read_text() == to_yaml(config)


def test_logged_training_losses_are_means_over_samples_tasks_and_micro_batches(run_config, tmp_path):
    curves = []
    for size in (1, 4):
        config = run_config(f"run_dir={tmp_path}/{size}", f"train.micro_batch_size={size}", "train.max_steps=2")
        fit(config)
        curves.append(curve(config.run_dir, "train/loss/rgb"))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5) and len(curves[0]) == 2
    config = run_config(f"run_dir={tmp_path}/2", "train.log_every=2", "train.max_steps=2")
    fit(config)
    assert curve(config.run_dir, "train/loss/rgb") == pytest.approx([sum(curves[0]) / 2], abs=1e-5)


@pytest.fixture
def broken_shards(tmp_path) -> Path:
    """Two of eight clips have flipped bytes in the middle of their members."""
    write_toy_world(ToyConfig(str(tmp_path / "toy"), train_synthetic=8, train_real=0, val=0), 17, 32, 48)
    folder = tmp_path / "toy" / "train_synthetic"
    (shard,) = ShardSet.open(folder).manifest.shards
    content = bytearray((folder / shard.name).read_bytes())
    for sample in shard.samples[2:4]:
        content[sample.offset + sample.size // 2] ^= 255
    (folder / shard.name).write_bytes(content)
    return folder


def test_broken_samples_are_skipped_named_counted_and_replaced_the_same_way(
    run_config, broken_shards, tmp_path, caplog
):
    losses = []
    for name, workers in (("a", 0), ("b", 1)):
        config = run_config(
            f"run_dir={tmp_path}/{name}", f"data.sources=[{{path: {broken_shards}}}]", "data.max_skip_share=0.9",
            f"data.num_workers={workers}",
        )  # fmt: skip
        with caplog.at_level(logging.WARNING):
            fit(config)
        losses.append(curve(config.run_dir, "train/loss/xyz"))
        assert curve(config.run_dir, "data/skipped")[-1] > 0
    assert losses[0] == losses[1]
    keys = [s.key for s in ShardSet.open(broken_shards).manifest.shards[0].samples[2:4]]
    assert all(key in caplog.text for key in keys)


@pytest.mark.parametrize(
    ("lost", "overrides", "words"),
    [
        (False, ("data.max_skip_share=0.05", "train.max_steps=50"), ("data.max_skip_share", "toy_synthetic")),
        (True, ("data.cache_latents=false", "data.num_workers=1"), ("shard-000000.tar", "missing")),
    ],
    ids=["more skipped than its share", "a lost shard"],
)
def test_a_run_on_broken_shards_stops_with_one_line(fit_command, broken_shards, capsys, lost, overrides, words):
    if lost:
        (broken_shards / "shard-000000.tar").unlink()
    assert fit_door.main(fit_command(f"data.sources=[{{path: {broken_shards}}}]", *overrides)[3:]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words)


def test_another_toy_world_at_the_same_place_is_refused(tmp_path):
    world = ToyConfig(str(tmp_path), train_synthetic=2, train_real=0, val=1)
    write_toy_world(world, 17, 16, 32)
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.tar"))
    write_toy_world(world, 17, 16, 32)  # kept
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.tar")) == before
    for other, height in ((replace(world, seed=1), 16), (world, 32), (replace(world, val=2), 16)):
        with pytest.raises(ValueError, match=r"data\.toy"):
            write_toy_world(other, 17, height, 32)
    shutil.rmtree(tmp_path / "val")
    write_toy_world(world, 17, 16, 32)
    assert len(ShardSet.open(tmp_path / "val")) == 1
