"""What a GPU would have refused, rehearsed: the real Trainer, module, sampler and metrics on fake CUDA tensors.

Rehearsals run once, in processes of their own (cases.py): torch must not be imported before its device is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from one4d_pl.config import CHECKPOINTING

REPO = Path(__file__).parents[2]
PAPER = [f"--config=configs/{name}.yaml" for name in ("dlc", "scale/wan_14b", "data/one4d_mix")]
# bytes of a 14B block's step, fully checkpointed: elementwise, all; before issue 19
TRAFFIC_BEFORE = (289.7e9, 357.1e9)
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPO, capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


STEPS = (*CHECKPOINTING, "visiting")


def rehearsed(folder: Path, *names: str) -> dict[str, object]:
    """What the cases of these names saw."""
    done = python("-m", "tests.rehearsal.cases", str(folder / "seen.json"), *names)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "seen.json").read_text())
    faults = [case["error"] for case in found.values() if isinstance(case, dict) and "error" in case]
    assert not faults, "\n".join(faults)
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, object]:
    return rehearsed(tmp_path_factory.mktemp("steps"), *(f"step_{mode}" for mode in STEPS))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, object]:
    return rehearsed(tmp_path_factory.mktemp("scenes"), "sampling", "scene")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, object]:
    faults = ("generator_fault", "device_fault", "dtype_fault")
    return rehearsed(tmp_path_factory.mktemp("rest"), "callbacks", "metrics", *faults)


@pytest.mark.parametrize("mode", STEPS)
def test_a_step_of_the_14b_needs_the_planners_memory(steps, mode):
    step = steps[f"step_{mode}"]
    planned = step["planned"] + step["pixels"]
    assert planned == pytest.approx(step["peak"], rel=0.02)
    # and so what is computed, which the weights do not dilute
    assert planned - step["fixed"] == pytest.approx(step["peak"] - step["fixed"], rel=0.05)


def test_a_scene_of_the_14b_needs_the_planners_memory_in_its_largest_phase(scenes):
    peaks, planned = scenes["scene"]["peaks"], scenes["scene"]["planned"]
    assert max(peaks, key=peaks.get) == "transformer"
    assert planned == pytest.approx(max(peaks.values()), rel=0.05)


@pytest.mark.parametrize("mode", STEPS)
def test_the_transformers_step_never_waits_for_the_gpu(steps, mode):
    waits = steps[f"step_{mode}"]["waits"]
    assert waits["forward"] == waits["backward"] == waits["optimizer"] == 0


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_float32_of_tokens_times_width_is_only_in_norms_modulation_and_residual_sums(steps, mode):
    """Those are diffusers' own: a block's own code and its FP32LayerNorms; no attention, linear, LoRA or link."""
    assert steps[f"step_{mode}"]["wide"] == ["FP32LayerNorm", "WanTransformerBlock"]


def test_a_block_moves_fewer_bytes(steps):
    step = steps["step_full"]
    assert step["elementwise"] <= 0.65 * TRAFFIC_BEFORE[0] and step["traffic"] <= 0.75 * TRAFFIC_BEFORE[1]


def test_the_step_holds_each_part_in_its_dtype_on_the_device(steps):
    tensors = steps["step_full"]["tensors"]
    assert " on cpu" not in tensors["transformer"]
    # encoders wait on the host, and this step reads encodings
    assert not [part for part, words in tensors.items() if part != "transformer" and " on cuda" in words]
    assert "trained float32" in tensors["transformer"] and "trained bfloat16" not in tensors["transformer"]


def test_the_sampler_guides_in_one_call_or_two_and_encoders_visit(scenes):
    ways = scenes["sampling"]
    assert ways["stacked"]["calls"] == [4, 4] and ways["two calls"]["calls"] == [2, 2, 2, 2]
    for way in ways.values():
        assert way["devices"] == ["cuda:0"] and way["shape"] == [1, 3, 9, 64, 96]
        assert way["encoders"] == ["cpu"]  # they were on the GPU while they worked, and wait on the host again


def test_first_steps_log_and_leave_a_whole_checkpoint_on_the_cpu(seen):
    found = seen["callbacks"]
    assert found["groups"] == ["lora", "links", "xyz_patch_embedding"]
    assert found["snapshot"] == ["torch.float32 cpu"] and found["saved"] == found["trained"]
    moments = {words for words in found["moments"] if "exp_avg" in words}
    assert moments == {"exp_avg torch.float32 cuda:0", "exp_avg_sq torch.float32 cuda:0"}


def test_metrics_stay_on_the_device(seen):
    assert seen["metrics"] and set(seen["metrics"].values()) == {"cuda:0"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("generator_fault", ("models/lora.py", "generator", "cpu")),
        ("device_fault", ("models/control_links.py", "transformer.links.0", "cpu")),
        ("dtype_fault", ("models/lora.py", "transformer.base.patch_embedding.base", "BFloat16")),
    ],
)
def test_a_fault_put_back_is_one_line_with_module_and_file(seen, fault, words):
    told = seen[fault]
    assert "\n" not in told
    for word in words:
        assert word in told, told


def test_the_door_tells_what_it_saw():
    done = python(
        "-m", "one4d_pl", "rehearse", *PAPER, "--blocks", "1", "data.num_frames=9", "data.height=64", "data.width=64"
    )
    assert done.returncode == 0, done.stderr
    for words in ("1 blocks", "backward", "sampling: transformer", "the planner says", "GB a block", "no fault"):
        assert words in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--blocks", "41"], {}, "--blocks: 41, need 1 to 40"),
        (["base.path=weights/Unknown"], {}, "weights/Unknown"),
        (["train.nothing=1"], {}, "unknown key train.nothing"),
        ([], {"PATH": "/nowhere"}, "no g++"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, environment, words):
    done = python("-m", "one4d_pl", "rehearse", *PAPER, *arguments, **environment)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line
