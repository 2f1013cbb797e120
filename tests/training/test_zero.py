"""Real DeepSpeed engines on gloo: every stage trains what one process trains, and nothing is lost in silence.

Faults that train wrongly without an error, and what would show them here: a lost zero start (the check at start, and
every comparison), accumulation divided twice (the gradients' norm under clipping), adapters switched under activation
checkpointing and reentrant checkpointing (checkpointed cases), silent casts to bfloat16 (the float32 and the bfloat16
cases), a second shuffling (losses at every step), random state that is restored wrongly, and moments that the engine
links to its first parameter group only (the elastic run).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from one4d_pl.config import load_config, to_yaml
from one4d_pl.fit import fit
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.training.checkpoint import refuse_started_adapter
from one4d_pl.training.checkpoint_files import checkpoint_folder
from one4d_pl.training.zero import whole_parameter
from tests.conftest import REPO, free_port, small_run_config
from tests.training.test_resume import curve, curve_points

STEPS = 20
LAUNCH_TIMEOUT_S = 280
FILES = ("links.safetensors", "rgb/adapter_model.safetensors", "xyz/adapter_model.safetensors",
         "xyz_patch_embedding.safetensors")  # fmt: skip
ZERO = ("train.strategy=deepspeed",)
CHECKPOINTED = "train.activation_checkpointing=full"
SELECTIVE = "train.activation_checkpointing=selective"
# always clipped, so that a gradient scaled wrongly would show in the norm, a clipped one in the weights
CLIP, NO_CLIP = "optim.grad_clip=0.05", "optim.grad_clip=0"
INT8 = "base.quantisation=int8"
LIGHT = (CLIP, INT8, "base.offload=true", "train.activation_checkpointing=offload")
MATRIX = {  # by launch, each short enough to be one test's set-up
    "two": {
        "ddp": ("train.strategy=ddp", CLIP),
        "zero1": (*ZERO, "train.zero_stage=1", CLIP),
    },
    "two_zero2": {
        "zero2": (*ZERO, "train.zero_stage=2", CLIP, CHECKPOINTED),
        "zero2-offload": (*ZERO, "train.zero_stage=2", "train.offload=true", CLIP),
    },
    "two_zero3": {"zero3": (*ZERO, "train.zero_stage=3", CLIP, CHECKPOINTED, "eval.every=20", "eval.clips=3")},
    "two_sharded": {
        "zero3-free": (*ZERO, "train.zero_stage=3", NO_CLIP, SELECTIVE, "train.micro_batch_size=2"),
        "zero3-offload": (*ZERO, "train.zero_stage=3", "train.offload=true", CLIP),
    },
    "two_light": {
        "ddp": ("train.strategy=ddp", *LIGHT),
        "zero1": (*ZERO, "train.zero_stage=1", *LIGHT),
        "zero2-offload": (*ZERO, "train.zero_stage=2", "train.offload=true", *LIGHT),
    },
    "four": {
        "ddp": ("train.strategy=ddp", NO_CLIP),
        "zero1": (*ZERO, "train.zero_stage=1", NO_CLIP),
        "zero2": (*ZERO, "train.zero_stage=2", NO_CLIP),
    },
    "four_zero3": {"zero3": (*ZERO, "train.zero_stage=3", CLIP)},
}
BF16 = (CLIP, "base.dtype=bfloat16", "train.precision=bf16-mixed")
BF16_STEPS = 10
CASES = [(group, name) for group, cases in MATRIX.items() for name in cases]
ELASTIC = ((1, ("train.strategy=single",)), (4, (*ZERO, "train.zero_stage=3")), (2, (*ZERO, "train.zero_stage=2")),
           (3, ("train.strategy=ddp",)))  # fmt: skip
ELASTIC_STEPS = 2  # of each part


@dataclass(frozen=True)
class Runs:
    """Finished runs by name."""

    folder: Path

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        folder = checkpoint_folder(str(self.folder / name), step)
        return {f"{file}:{key}": t for file in FILES for key, t in load_file(folder / file).items()}

    def losses(self, name: str, modality: str) -> list[float]:
        return curve(self.folder / name, f"train/loss/{modality}")


def launch(world: int, folder: Path, words: list[str]) -> None:
    """Run the words' runs on `world` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}",
               f"--master_port={free_port()}", str(REPO / "tests" / "training" / "run_cases.py"), *words]  # fmt: skip
    log = folder / f"launch{world}.log"
    ours = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
    with log.open("a") as file:
        done = subprocess.run(command, env={**os.environ, **ours}, stdout=file, stderr=file, timeout=LAUNCH_TIMEOUT_S)
    assert done.returncode == 0, log.read_text()[-5000:]


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_base_plain, toy_root):
    folder = tmp_path_factory.mktemp("zero")
    config = small_run_config(folder, tiny_base_plain, toy_root)

    def prepare(name: str, *overrides: str) -> str:
        path = folder / f"{name}.yaml"
        steps = (f"train.max_steps={STEPS}", "train.save_every=1000", "val.every=10", "val.clips=4", "optim.lr=1e-3",
                 "dlc.standardise_xyz=true")  # fmt: skip
        path.write_text(to_yaml(config(f"run_dir={folder}/{name}", *steps, "train.micro_batch_size=1", *overrides)))
        return str(path)

    return folder, prepare


def fit_here(path: str) -> None:
    fit(load_config([path], []))


@pytest.fixture(scope="module")
def references(make) -> Runs:
    """The same runs in one process."""
    folder, prepare = make
    fit_here(prepare("one-clip", CLIP))
    fit_here(prepare("one-free", NO_CLIP))
    fit_here(prepare("one-int8", CLIP, INT8))
    fit_here(prepare("one-bf16", *BF16, f"train.max_steps={BF16_STEPS}"))
    return Runs(folder)


@pytest.fixture(scope="module")
def launched(make, references) -> Callable[[str], Runs]:
    """The runs of a group of MATRIX, launched when they are first asked for."""
    folder, prepare = make

    @cache
    def launch_group(group: str) -> Runs:
        world = 2 if group.startswith("two") else 4
        cases = MATRIX[group].items()
        launch(world, folder, [prepare(f"{group}-{name}", f"train.devices={world}", *o) for name, o in cases])
        return Runs(folder)

    return launch_group


def test_an_int8_base_learns_what_the_plain_one_learns(references):
    for modality in ("rgb", "xyz"):
        int8, plain = (references.losses(name, modality) for name in ("one-int8", "one-clip"))
        assert int8 != plain and int8 == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(("group", "name"), CASES)
def test_every_strategy_trains_what_one_process_trains(group, name, references, launched):
    """20 steps of AdamW in float32 at the same global batch: losses, gradient norms and trained weights."""
    runs = launched(group)
    overrides, run = MATRIX[group][name], f"{group}-{name}"
    reference = "one-int8" if INT8 in overrides else "one-clip" if CLIP in overrides else "one-free"
    for modality in ("rgb", "xyz"):
        losses, expected = runs.losses(run, modality), references.losses(reference, modality)
        assert len(losses) == STEPS
        assert losses == pytest.approx(expected, abs=1e-6, rel=1e-6)
    expected = references.weights(reference, STEPS)
    for key, tensor in runs.weights(run, STEPS).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=5e-5, msg=key)
    validation = [curve(runs.folder / r, "val/loss/xyz") for r in (run, reference)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)


@pytest.mark.parametrize(
    ("group", "name"), [("two", "zero1"), ("two_zero2", "zero2"), ("two_zero3", "zero3"), ("four_zero3", "zero3")]
)
def test_the_gradients_norm_is_that_of_one_process(group, name, references, launched):
    """Accumulation divides once, not by Lightning and again by the engine; Adam would hide it."""
    runs = launched(group)
    parts = [curve(references.folder / "one-clip", f"train/grad_norm/{p}")
             for p in ("lora", "links", "xyz_patch_embedding")]  # fmt: skip
    expected = [sum(n**2 for n in step) ** 0.5 for step in zip(*parts, strict=True)]
    assert min(expected) > 0.05  # every step is clipped
    assert curve(runs.folder / f"{group}-{name}", "train/grad_norm/all") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_base_and_float32_trainables_at_every_stage_as_on_cuda(world, make, references):
    """The same autocast run as in one process, but for the order of bf16 sums: the engine neither casts the trainables
    nor switches the autocast off, as it would on CUDA were it not told of it."""
    folder, prepare = make
    names = {stage: f"bf16-{world}-zero{stage}" for stage in (1, 2, 3)}
    more = (*BF16, f"train.max_steps={BF16_STEPS}", f"train.devices={world}", "val.every=1000", "val.clips=2")
    paths = [prepare(name, *ZERO, f"train.zero_stage={stage}", *more) for stage, name in names.items()]
    launch(world, folder, [f"cuda-autocast:{path}" for path in paths])
    for modality in ("rgb", "xyz"):
        expected = references.losses("one-bf16", modality)
        assert len(expected) == BF16_STEPS
        assert expected != pytest.approx(references.losses("one-clip", modality)[:BF16_STEPS], rel=1e-6)  # it is bf16
        for name in names.values():
            assert references.losses(name, modality) == pytest.approx(expected, abs=1e-3), (name, modality)
    for name in names.values():
        for key, tensor in references.weights(name, BF16_STEPS).items():
            assert tensor.dtype == torch.float32, (name, key)


def test_every_frozen_weight_is_gathered_once_for_both_branches(make):
    folder, prepare = make
    path = prepare("gathers", *ZERO, "train.zero_stage=3", "train.devices=2")
    launch(2, folder, [f"gathers:{path}:{folder / 'gathers.json'}"])
    shares = json.loads((folder / "gathers.json").read_text())
    print(f"gathered over frozen bytes: stacked {shares['stacked']:.2f}, separate passes {shares['separate']:.2f}")
    assert shares["stacked"] <= 2.0  # forward, and once more for recomputation and backward
    assert shares["stacked"] <= 0.55 * shares["separate"]


def test_checkpoints_of_sharded_runs_hold_whole_trainables_and_moments_only(launched):
    two, _ = launched("two_zero2"), launched("two_zero3")
    names = ("one-clip", "two_zero3-zero3", "two_zero2-zero2")
    folders = [checkpoint_folder(str(two.folder / name), STEPS) for name in names]
    sizes = [{key: t.shape for key, t in load_file(f / "optimizer.safetensors").items()} for f in folders]
    assert sizes[0] == sizes[1] == sizes[2]
    trainables = sum(t.numel() for t in two.weights("two_zero3-zero3", STEPS).values())
    tensors = len(sizes[1]) * 3 // 2
    total = sum(f.stat().st_size for f in folders[1].rglob("*.safetensors"))
    assert total <= 1.02 * 14 * trainables + 1024 * tensors


@pytest.mark.parametrize("first", ["links.0.xyz_to_rgb.weight", "lora_B"])
def test_training_refuses_to_start_where_zeros_were_lost(tiny_base_plain, run_config, first):
    transformer = One4DTransformer(tiny_base_plain.transformer(), run_config().dlc, seed=0)
    refuse_started_adapter(transformer)
    name, parameter = next((n, p) for n, p in transformer.trainable_parameters() if first in n)
    with torch.no_grad():
        parameter.view(-1)[-1] = 1e-3
    assert whole_parameter(parameter).any()
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        refuse_started_adapter(transformer)


@pytest.fixture(scope="module")
def go_on(make):
    """One process's run to the end, and what runs a part of the same run on some processes."""
    folder, prepare = make
    # the average is what the checkpoints' adapter is, and takes the weights' place in every validation
    batch = ("train.global_batch_size=12", "val.every=1", "data.block_shards=1", "optim.ema_decay=0.5")
    fit_here(prepare("whole", *batch, f"train.max_steps={ELASTIC_STEPS * len(ELASTIC)}"))

    def part(number: int) -> None:
        world, overrides = ELASTIC[number]
        steps = f"train.max_steps={ELASTIC_STEPS * (number + 1)}"
        path = prepare("elastic", *batch, steps, f"train.devices={world}", *overrides)
        if world == 1:
            fit_here(path)
        else:
            launch(world, folder, [path])

    return Runs(folder), part


@pytest.mark.parametrize("parts", [(0, 1), (2, 3)], ids=["one-to-four", "then-two-then-three"])
def test_a_run_goes_on_with_any_number_of_processes_and_any_strategy(go_on, parts):
    """1 -> 4 (ZeRO-3) -> 2 (ZeRO-2) -> 3 (ddp) ranks, mid-epoch: every step's losses are those of one process.

    So are those of the averaged weights at every validation, and the averages themselves at the end.
    """
    runs, part = go_on
    for number in parts:
        part(number)
    steps = ELASTIC_STEPS * (parts[-1] + 1)
    for modality in ("rgb", "xyz"):
        losses = runs.losses("elastic", modality)
        assert len(losses) == steps
        assert losses == pytest.approx(runs.losses("whole", modality)[:steps], abs=1e-6, rel=1e-6)
        validated = [curve_points(runs.folder / n, f"val/loss/{modality}") for n in ("elastic", "whole")]
        assert validated[0] == pytest.approx({k: validated[1][k] for k in range(steps + 1)}, abs=1e-5, rel=1e-5)
    if parts[-1] + 1 == len(ELASTIC):
        expected = runs.weights("whole", steps)
        for key, tensor in runs.weights("elastic", steps).items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=5e-5, msg=key)
