"""bfloat16 where the processor computes it, float32 where it would only imitate it; one run may use both."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from one4d_pl.config import load_config
from one4d_pl.fit import fit
from one4d_pl.models import precision
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
