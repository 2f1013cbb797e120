"""Laws of the quantised base: rounded once, gradients of what it holds, one byte per weight kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from one4d_pl.config import EMBEDDED_BASE, ConfigError, DLCConfig, base_folder, load_config
from one4d_pl.models.quantisation import QuantisedLinear, dequantise, quantise, quantise_linears
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.models.wan import load_transformer
from tests.conftest import REPO

ZERO3 = ("train.strategy=deepspeed", "train.zero_stage=3")
KINDS = ("int8", "fp8")
kinds = pytest.mark.parametrize("kind", KINDS)
# Relative error of a product. Rounding uniform weights gives 0.0039 (a step is the largest weight / 127.5, its rounding
# error is a step over the square root of 12) and 0.025 (three bits of mantissa); half as much again is allowed.
PRODUCT_ERROR = {"int8": 0.006, "fp8": 0.036}


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm().detach() / expected.double().norm().detach())


def frozen_linear(dtype: torch.dtype = torch.float32, outputs: int = 96) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(64, outputs, dtype=dtype).requires_grad_(False)


def quantised(linear: nn.Linear, kind: str) -> QuantisedLinear:
    return QuantisedLinear(copy.deepcopy(linear), kind)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_rounded_to_the_nearest_byte_of_its_outputs_scale(kind, dtype):
    weight = frozen_linear(dtype).weight.clone()
    weight[3] = 0
    weight[4] *= 1e-4  # its own scale, not that of its neighbours
    held, scale = quantise(weight, kind)
    assert held.element_size() == 1 and scale.shape == (96, 1) and scale.dtype == torch.float32
    error = (dequantise(held, scale, torch.float32) - weight.float()).abs()
    if kind == "int8":
        assert bool((error <= 0.5001 * scale).all())
    else:  # three bits of mantissa, down to steps of 2^-9
        assert bool((error <= torch.maximum(weight.float().abs() / 16, scale * 2**-10) * 1.0001).all())
    assert not dequantise(held, scale, dtype)[3].any()
    assert relative(dequantise(held, scale, dtype)[4], weight[4]) < 1.2 * PRODUCT_ERROR[kind]


@kinds
def test_products_and_gradients_are_those_of_the_weight_that_is_held(kind):
    linear = frozen_linear()
    ours, exact = quantised(linear, kind), copy.deepcopy(linear)
    exact.weight.data = dequantise(ours.quantised, ours.scale, torch.float32)
    inputs = [torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    results = [layer(given) for layer, given in zip((ours, exact), inputs, strict=True)]
    assert torch.equal(*results)
    assert relative(results[0], linear(inputs[0])) < PRODUCT_ERROR[kind]
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ours(inputs[0]), results[0])


@kinds
def test_autograd_keeps_bytes_and_no_weight_of_floats(kind):
    kept: list[Tensor] = []
    layer = quantised(frozen_linear(), kind)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        layer(torch.ones(1, 64, requires_grad=True))
    assert sorted(tensor.numel() * tensor.element_size() for tensor in kept) == [4 * 96, 96 * 64]


@kinds
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_precision_with_gradients_and_without(kind, base):
    layer, hidden = quantised(frozen_linear(base), kind), torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        with_gradient, without = layer(hidden.clone().requires_grad_()), layer(hidden)
    assert with_gradient.dtype == without.dtype == torch.bfloat16
    torch.testing.assert_close(with_gradient, without, rtol=0, atol=0)


def test_linears_alone_are_quantised_and_keep_their_bias():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ModuleDict({"inner": nn.Linear(8, 4, bias=False)}))
    bias = model[0].bias
    quantise_linears(model, "int8")
    assert [type(module).__name__ for module in (model[0], model[1], model[2]["inner"])] == [
        "QuantisedLinear", "LayerNorm", "QuantisedLinear",
    ]  # fmt: skip
    assert model[0].bias is bias and model[2]["inner"].bias is None
    assert not [name for name, _ in model.named_parameters() if name.endswith("weight") and "1." not in name]


@kinds
def test_at_step_0_both_halves_are_the_quantised_wan_and_near_the_plain_one(tiny_base, kind):
    inputs = tiny_base.inputs(batch=2)
    plain = tiny_base.transformer()
    bare = load_transformer(tiny_base.path, "float32", quantisation=kind)
    expected = bare(**inputs.plain())[0]
    model = One4DTransformer(bare, DLCConfig(rank=4), seed=0)
    assert torch.equal(model(*inputs.one4d()), expected)
    assert relative(expected, plain(**inputs.plain())[0]) < {"int8": 0.005, "fp8": 0.03}[kind]


def test_of_the_base_only_the_blocks_linears_are_quantised():
    base = load_transformer(str(base_folder(EMBEDDED_BASE)), "float32", quantisation="int8")
    found = {name for name, module in base.named_modules() if isinstance(module, QuantisedLinear)}
    linears = {name for name, module in base.blocks.named_modules(prefix="blocks") if isinstance(module, nn.Linear)}
    assert found == linears and len(found) == 10 * len(base.blocks)
    assert not isinstance(base.proj_out, QuantisedLinear)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["base.quantisation=int4"], "base.quantisation: 'int4' is not one of none, int8, fp8"),
        (["base.quantisation=int8", "dlc.coupling=width"], "base.quantisation: only dlc.coupling=decoupled"),
        (["base.quantisation=int8", *ZERO3], "base.quantisation: ZeRO stage 3"),
        (["base.offload=true", *ZERO3], "base.offload: ZeRO stage 3"),
        (["base.offload=true", "train.compile=true"], "train.compile: "),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config([str(REPO / "configs/dlc.yaml")], overrides)
