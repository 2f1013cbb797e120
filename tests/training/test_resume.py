"""Checkpoints: exact resume, whatever the instant of death; refusals; what is on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from one4d_pl.commands import export
from one4d_pl.config import ConfigError, load_config, to_yaml
from one4d_pl.data.shards import ShardSet
from one4d_pl.fit import fit
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.models.open_model import open_model
from one4d_pl.training.checkpoint import BackgroundWriter, refuse_other_run
from one4d_pl.training.checkpoint_files import checkpoint_folder, newest_checkpoint, superfluous, write_score
from tests.training.chaos import chaos, final_hashes

KILLS = 10


def test_a_stopped_and_resumed_run_is_bitwise_the_undisturbed_one(run_config, tmp_path):
    undisturbed = run_config(f"run_dir={tmp_path}/a")
    fit(undisturbed)
    for max_steps in (2, 4, 6):
        fit(run_config(f"run_dir={tmp_path}/b", f"train.max_steps={max_steps}"))
    assert final_hashes(undisturbed) == final_hashes(run_config(f"run_dir={tmp_path}/b"))
    other_seed = run_config(f"run_dir={tmp_path}/c", "train.seed=1")
    fit(other_seed)
    assert final_hashes(other_seed) != final_hashes(undisturbed)


def test_loader_workers_micro_batches_and_checkpointing_leave_the_losses_alone(run_config, tmp_path):
    """Other layouts of the same global batch: float32 sums in another order, nothing else."""
    weights = []
    for name, overrides in {
        "a": ["train.micro_batch_size=4"],
        "b": ["train.micro_batch_size=1", "data.num_workers=2", "train.activation_checkpointing=selective"],
    }.items():
        config = run_config(f"run_dir={tmp_path}/{name}", *overrides)
        fit(config)
        weights.append(load_file(checkpoint_folder(config.run_dir, 6) / "links.safetensors"))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=5e-5)


def test_two_ranks_killed_at_random_instants_and_resumed_are_bitwise_undisturbed(run_config, tmp_path):
    """SIGKILL, no warning: steps, saves, renames and start-up are all hit; `make chaos` kills more often."""
    outcome = chaos(KILLS, 0, run_config, tmp_path)
    assert outcome.kills == KILLS
    assert outcome.in_save_window >= 0.2 * KILLS
    assert len(outcome.steps_at_death) >= KILLS // 3  # deaths were spread over the runs, not all at one place


def test_a_source_that_lost_clips_is_not_resumed_in_another_order(run_config, toy_root, tmp_path):
    data = [f"data.sources=[{{path: {tmp_path}/set}}]", f"data.val_sources=[{{path: {toy_root}/val}}]"]
    shards = ShardSet.open(shutil.copytree(toy_root / "train_real", tmp_path / "set"))
    fit(run_config(*data, "train.max_steps=2"))
    listed = tmp_path / "set/check/exclude.txt"
    listed.parent.mkdir()
    listed.write_text(f"{shards.key(0)}  # camera jumps\n")
    told = rf"had {len(shards)} clips to train on at step 2, now {len(shards) - 1}; put its check/exclude\.txt back"
    with pytest.raises(ConfigError, match=told):
        fit(run_config(*data))
    listed.unlink()
    assert fit(run_config(*data, "train.max_steps=3")) == 0


def test_a_damaged_checkpoint_is_passed_over_and_named(run_config, tmp_path, caplog):
    config = run_config("train.save_every=3")
    fit(config)
    newest = checkpoint_folder(config.run_dir, 6)
    expected = final_hashes(config)
    content = bytearray((newest / "links.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "links.safetensors").write_bytes(content)
    assert newest_checkpoint(config.run_dir) == checkpoint_folder(config.run_dir, 3)
    assert "links.safetensors" in caplog.text and newest.name in caplog.text
    fit(config)  # from step 3, and over the damaged folder
    assert final_hashes(config) == expected and newest_checkpoint(config.run_dir) == newest


def test_resume_refuses_another_config_naming_the_keys(run_config):
    fit(run_config("train.max_steps=2"))
    with pytest.raises(ConfigError, match=r"optim\.lr .*flow\.shift|flow\.shift .*optim\.lr"):
        fit(run_config("optim.lr=5e-4", "flow.shift=2.0"))
    fit(run_config("train.max_steps=3", "train.log_every=5", "train.micro_batch_size=1"))  # free to change


def test_a_knob_younger_than_the_checkpoint_counts_as_its_default(run_config):
    fit(run_config("train.max_steps=2"))
    path = checkpoint_folder(run_config().run_dir, 2) / "trainer.json"
    state = json.loads(path.read_text())
    del state["config"]["dlc"]["coupling"], state["config"]["flow"]["caption_dropout"]
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"flow\.caption_dropout \(0\.1 -> 0\.2\)"):
        refuse_other_run(path.parent, run_config("flow.caption_dropout=0.2"))
    refuse_other_run(path.parent, run_config())


def test_a_run_with_a_knob_that_is_gone_goes_on_where_it_held_the_value_that_is_left(run_config):
    """Its config.yaml and its adapter's card open, too."""
    config = run_config("train.max_steps=2")
    fit(config)
    folder, yaml_path = checkpoint_folder(config.run_dir, 2), Path(config.run_dir) / "config.yaml"
    state, card = (json.loads((folder / name).read_text()) for name in ("trainer.json", "card.json"))
    older = "  link_blocks: null\n  link_direction: {}\n  xyz_patch_embedding: true\n"
    for direction in ("both", "rgb_to_xyz"):
        state["config"]["dlc"] |= {"link_blocks": None, "link_direction": direction, "xyz_patch_embedding": True}
        state["config"]["flow"]["separate_sigma"] = False
        (folder / "trainer.json").write_text(json.dumps(state))
        card |= {"link_direction": direction, "xyz_patch_embedding": True}
        (folder / "card.json").write_text(json.dumps(card))
        yaml_path.write_text(to_yaml(config).replace("dlc:\n", "dlc:\n" + older.format(direction)))
        if direction == "both":
            refuse_other_run(folder, config)
            assert AdapterCard.read(folder).rank == config.dlc.rank
            assert load_config([str(yaml_path)], []) == config
        else:
            with pytest.raises(ConfigError, match=r"dlc\.link_direction \(rgb_to_xyz -> None\)"):
                refuse_other_run(folder, config)
            with pytest.raises(ConfigError, match=r"card\.json: link_direction = rgb_to_xyz: this knob is gone"):
                AdapterCard.read(folder)
            with pytest.raises(ConfigError, match=r"dlc\.link_direction=rgb_to_xyz: this knob is gone"):
                load_config([str(yaml_path)], [])


@pytest.mark.parametrize("kind", ["channel", "width"])
def test_other_couplings_resume_and_export_as_decoupled_lora_control_does(run_config, tmp_path, kind, capsys):
    coupled = [f"dlc.coupling={kind}", "dlc.num_links=0"]
    undisturbed = run_config(*coupled, "train.max_steps=4", f"run_dir={tmp_path}/whole")
    fit(undisturbed)
    for steps in (2, 4):
        fit(run_config(*coupled, f"train.max_steps={steps}"))
    assert final_hashes(run_config(*coupled, "train.max_steps=4")) == final_hashes(undisturbed)
    out = tmp_path / "adapter"
    assert export.main([undisturbed.run_dir, "--out", str(out), "--lora-for", "diffusers"]) == 2
    assert "no LoRA of the frames alone" in capsys.readouterr().err and not out.exists()
    assert export.main([undisturbed.run_dir, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["card.json", "coupled.safetensors"]


def test_bent_and_standardised_pointmaps_resume_with_the_statistics_they_began_with(run_config, tmp_path):
    other = ["dlc.standardise_xyz=true", "data.pointmap_power=0.5"]
    undisturbed = run_config(*other, f"run_dir={tmp_path}/whole")
    fit(undisturbed)
    for steps in (3, 6):
        fit(run_config(*other, f"train.max_steps={steps}"))
    assert final_hashes(run_config(*other)) == final_hashes(undisturbed)
    card = json.loads((checkpoint_folder(undisturbed.run_dir, 6) / "card.json").read_text())
    assert card["pointmap_power"] == 0.5
    assert card["xyz_statistics"]["mean"] == pytest.approx(card["latent_statistics"]["xyz_mean"])
    with pytest.raises(ConfigError, match=r"no training clip is encoded ahead.*data\.cache_latents=true"):
        fit(run_config(*other, "data.cache_latents=false", f"run_dir={tmp_path}/unmeasured"))


def test_a_run_on_less_memory_resumes_with_or_without_it_and_its_adapter_opens_on_the_plain_base(
    run_config, tmp_path, caplog
):
    light = ["base.quantisation=int8", "base.offload=true", "train.activation_checkpointing=offload"]
    undisturbed = run_config(*light, f"run_dir={tmp_path}/whole")
    fit(undisturbed)
    fit(run_config(*light, "train.max_steps=2"))
    fit(run_config("base.quantisation=int8", "train.max_steps=4"))  # where things lie may change, the base's bytes not
    fit(run_config(*light))
    assert final_hashes(run_config(*light)) == final_hashes(undisturbed)
    with pytest.raises(ConfigError, match=r"base\.quantisation"):
        fit(run_config("train.max_steps=8"))
    assert export.main([undisturbed.run_dir, "--out", str(tmp_path / "adapter")]) == 0
    assert AdapterCard.read(tmp_path / "adapter").base_quantisation == "int8"
    with caplog.at_level("INFO", logger="one4d_pl"):
        open_model(run_config(), tmp_path / "adapter")
    assert f"{tmp_path / 'adapter'}: trained on a base with quantisation int8; this one has none" in caplog.text
    with pytest.raises(ConfigError, match=r"base\.offload: .*activation_checkpointing=full"):
        fit(run_config("base.offload=true", f"run_dir={tmp_path}/none"))


def test_a_cooldown_is_decided_before_it_begins_and_not_after(run_config):
    fit(run_config("train.max_steps=3"))
    with pytest.raises(ConfigError, match=r"optim\.cooldown_steps: 5 .*raise train\.max_steps"):
        fit(run_config("train.max_steps=6", "optim.cooldown_steps=5"))  # the third step would have been lowered
    fit(run_config("train.max_steps=6", "optim.cooldown_steps=3"))
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        fit(run_config("train.max_steps=8", "optim.cooldown_steps=3"))


def test_a_checkpoint_holds_trainables_and_moments_only(run_config):
    config = run_config()
    fit(config)
    folder = checkpoint_folder(config.run_dir, 6)
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert set(files) == {
        "rgb/adapter_model.safetensors", "rgb/adapter_config.json", "xyz/adapter_model.safetensors",
        "xyz/adapter_config.json", "links.safetensors", "xyz_patch_embedding.safetensors", "card.json",
        "optimizer.safetensors", "trainer.json", "rgb/README.md", "xyz/README.md",
    } - {n for n in ("rgb/README.md", "xyz/README.md") if n not in files}  # fmt: skip
    tensors = [t for n, p in files.items() if n.endswith("model.safetensors") or n.startswith(("links", "xyz_patch"))
               for t in load_file(p).values()]  # fmt: skip
    moments = load_file(files["optimizer.safetensors"])
    assert sum(t.numel() for t in moments.values()) == 2 * sum(t.numel() for t in tensors)
    assert len(moments) == 2 * len(tensors)
    kept = sorted(f.name for f in folder.parent.iterdir())
    # keep_last, the scores that decide on the best, and no leftover of a staging folder
    assert kept == ["step-00000004", "step-00000006", "validation.json"]
    card = json.loads(files["card.json"].read_text())
    assert card["data_sources"][0]["licence"] == "CC0-1.0"
    assert len(card["latent_statistics"]["xyz_mean"]) == 16 and card["latent_statistics"]["clips"] > 4


def test_init_from_starts_from_the_adapter_with_a_fresh_optimiser(run_config, tmp_path):
    first = run_config(f"run_dir={tmp_path}/a")
    fit(first)
    source = checkpoint_folder(first.run_dir, 6)
    second = run_config(f"run_dir={tmp_path}/b", f"train.init_from={source}", "train.max_steps=1", "optim.lr=1e-12")
    fit(second)
    folder = checkpoint_folder(second.run_dir, 1)
    for name, tensor in load_file(folder / "links.safetensors").items():
        torch.testing.assert_close(tensor, load_file(source / "links.safetensors")[name], rtol=0, atol=1e-9)


def test_two_processes_equal_one_and_resume(run_config, fit_command, fit_environment, tmp_path):
    """DDP on gloo from the command line: the same global batch, the same weights, also across a resume."""
    single = run_config(f"run_dir={tmp_path}/single")
    fit(single)
    ddp = ["train.strategy=ddp", "train.devices=2", f"run_dir={tmp_path}/ddp"]
    for max_steps in (4, 6):
        command = fit_command(*ddp, f"train.max_steps={max_steps}")
        done = subprocess.run(command, env=fit_environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("links.safetensors", "rgb/adapter_model.safetensors", "xyz/adapter_model.safetensors"):
        expected = load_file(checkpoint_folder(single.run_dir, 6) / name)
        for key, tensor in load_file(checkpoint_folder(f"{tmp_path}/ddp", 6) / name).items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=5e-5, msg=key)
    assert curve(tmp_path / "ddp", "train/loss/xyz") == pytest.approx(
        curve(tmp_path / "single", "train/loss/xyz"), abs=1e-6
    )
    assert curve(tmp_path / "ddp", "val/loss/xyz")[-1] == pytest.approx(
        curve(tmp_path / "single", "val/loss/xyz")[-1], abs=1e-5
    )


def curve(run_dir: str | Path, tag: str) -> list[float]:
    """The last value logged for every step, in their order."""
    values = curve_points(run_dir, tag)
    return [values[step] for step in sorted(values)]


def curve_points(run_dir: str | Path, tag: str) -> dict[int, float]:
    """The last value logged for every step, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[int, float] = {}
    for file in sorted((Path(run_dir) / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        if tag in events.Tags()["scalars"]:
            values |= {e.step: e.value for e in events.Scalars(tag)}
    return values


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6, 8):
        (folder / f"step-{step:08d}").mkdir(parents=True)
    for step, loss in ((2, 0.9), (4, 0.3), (5, 0.1), (6, 0.5), (8, 0.7)):  # no checkpoint was taken at step 5
        write_score(str(tmp_path), step, loss)
    names = [int(f.name[-1]) for f in superfluous(str(tmp_path), keep_last=1, keep_best=1, saved_step=8)]
    assert names == [2, 6]
    assert [int(f.name[-1]) for f in superfluous(str(tmp_path), 1, 2, 8)] == [2]
    assert [int(f.name[-1]) for f in superfluous(str(tmp_path), 2, 0, 8)] == [2, 4]


def test_a_save_costs_training_no_wait_and_a_failed_one_is_raised_at_the_next():
    writer, release, written = BackgroundWriter(), threading.Event(), []

    def slow() -> None:
        assert release.wait(30)
        written.append(1)

    writer.submit(slow)
    assert not written  # training goes on while the job waits
    threading.Timer(0.05, release.set).start()
    writer.submit(lambda: written.append(2))  # at most one snapshot in memory: waits for the first
    writer.wait()
    assert written == [1, 2]
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
