"""bfloat16 where the processor computes it, float32 where it would only imitate it; one run may use both."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch._inductor import config as inductor

from one4d_pl.config import load_config
from one4d_pl.fit import fit
from one4d_pl.models import precision
from one4d_pl.models.coupling import couple
from one4d_pl.models.wan import load_transformer
from tests.conftest import REPO

CPU = torch.device("cpu")
LAPTOP = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX512_WITHOUT_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}


@pytest.mark.parametrize("variables", [LAPTOP, AVX512_WITHOUT_BFLOAT16], ids=["avx2", "avx512-without-bf16"])
def test_a_processor_without_bfloat16_is_recognised(variables):
    code = "import torch; from one4d_pl.models.precision import *; print(computes_bfloat16(torch.device('cpu')))"
    environment = {**os.environ, "PYTHONPATH": str(REPO), **variables}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("overrides", "native", "expected"),
    [
        (["train.precision=bf16-mixed"], True, "bf16-mixed"),
        (["train.precision=bf16-mixed"], False, "float32 (this processor has no bfloat16 arithmetic)"),
        (["train.precision=32-true"], True, "float32"),
        (["train.precision=32-true"], False, "float32"),
        # its weights are bfloat16, so without autocast nothing would run
        (["train.precision=bf16-mixed", "base.dtype=bfloat16"], False, "bf16-mixed"),
    ],
)
def test_one_rule_decides(monkeypatch, overrides, native, expected):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: native)
    config = load_config([str(REPO / "configs" / "dlc.yaml")], overrides)
    assert precision.describe_precision(config, CPU) == expected
    assert precision.uses_bfloat16(config, CPU) == (expected == "bf16-mixed")


@pytest.mark.parametrize(
    ("device", "native", "overrides", "expected"),
    [
        ("cpu", True, [], "_native_math"),
        ("cpu", False, [], "native"),  # in float32 torch's fused kernels are as fast
        ("cpu", True, ["train.activation_checkpointing=selective"], "native"),
        ("cpu", True, ["data.num_frames=81", "data.height=480", "data.width=640"], "native"),  # would need its square
        ("cpu", True, ["base.attention=_native_flash"], "_native_flash"),
        ("cuda", True, [], "native"),
    ],
)
def test_short_clips_in_bfloat16_attend_by_plain_products_on_a_cpu(monkeypatch, device, native, overrides, expected):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: native)
    config = load_config([str(REPO / "configs" / "dlc.yaml")], overrides)
    assert precision.training_attention(config, torch.device(device)) == expected


def test_plain_products_in_bfloat16_are_as_near_to_float32_as_the_fused_kernels():
    """On the shipped base: within 1e-3 in the loss, outputs and gradients no farther from float32's."""
    config = load_config([str(REPO / "configs" / "dlc.yaml")], [])
    generator = torch.Generator().manual_seed(0)
    latents, condition, text, target = (
        torch.randn(size, generator=generator)
        for size in ((2, 16, 3, 12, 16), (1, 20, 3, 12, 16), (1, 192, 96), (2, 16, 3, 12, 16))
    )
    model = couple(load_transformer(config.base.path, config.base.dtype), config.dlc, seed=0)
    for name, parameter in model.trainable_parameters():
        if ".lora_B." in name or name.startswith("links."):
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    found = []
    for kernels, bfloat16 in (("_native_flash", False), ("_native_flash", True), ("_native_math", True)):
        model.set_attention(kernels)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            velocity = model(latents, condition, torch.full((2,), 0.6), text, None).float()
        loss = (velocity - target).square().mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for _, p in model.trainable_parameters() if p.grad is not None])
        found.append((loss.detach(), velocity.detach(), gradient))
    exact, fused, plain = found
    assert plain[0].item() == pytest.approx(fused[0].item(), rel=1e-3)
    for i in (1, 2):
        assert (plain[i] - exact[i]).norm() < 1.25 * (fused[i] - exact[i]).norm() < 0.02 * exact[i].norm()


def test_without_a_compiler_blocks_run_as_they_are_and_it_is_said_once(run_config, monkeypatch, caplog):
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    assert not precision.can_compile(CPU) and precision.can_compile(torch.device("cuda"))
    fit(run_config("train.compile=true", "train.max_steps=1"))
    assert caplog.text.count("train.compile: no C++ compiler") == 1


def test_a_gpu_always_computes_bfloat16():
    assert precision.computes_bfloat16(torch.device("cuda"))


@pytest.mark.parametrize("first", [True, False], ids=["from-bf16-to-float32", "from-float32-to-bf16"])
def test_a_run_goes_on_on_a_machine_of_the_other_kind(run_config, monkeypatch, caplog, first):
    steps = {}
    for native, max_steps in ((first, 2), (not first, 4)):
        monkeypatch.setattr(precision, "computes_bfloat16", lambda device, native=native: native)
        config = run_config("train.precision=bf16-mixed", f"train.max_steps={max_steps}", "val.every=2")
        with caplog.at_level(logging.INFO, logger="one4d_pl"):
            assert fit(config) == 0
        steps[native] = caplog.text
        caplog.clear()
    assert "scale tiny in bf16-mixed" in steps[True]
    assert "scale tiny in float32 (this processor has no bfloat16 arithmetic)" in steps[False]
    assert "at step 2 of 4" in steps[not first]
