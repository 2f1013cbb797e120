"""The closed form of a step's memory against what real tensors hold, and against the models' own counts."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from one4d_pl.config import CHECKPOINTING, DLCConfig
from one4d_pl.costs.flops import BatchShape, TransformerShape
from one4d_pl.costs.memory import Layout, count_parameters, step_activations, step_memory
from one4d_pl.models.base_files import RELEASED
from one4d_pl.models.transformer import One4DTransformer

SIZES = {  # three sizes: width of 1, 2, 3 heads; feed-forward 2.7 x as the 14B's, 5.8 x as the 1.3B's
    "14B's proportions": ({"num_attention_heads": 2, "ffn_dim": 692, "num_layers": 4}, (5, 16, 24), False),
    "1.3B's proportions": ({"num_attention_heads": 1, "ffn_dim": 746, "num_layers": 6}, (3, 20, 28), False),
    "image tokens": ({"num_attention_heads": 3, "ffn_dim": 1037, "num_layers": 3}, (5, 12, 20), True),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, and their peak."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()
        for tensor in held:
            self.track(tensor)

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.track(tensor)
        return result


class OneKernelNorm(torch.autograd.Function):
    """RMSNorm that keeps what CUDA's one kernel keeps: its input. A CPU's, made of several, keeps float32 copies."""

    @staticmethod
    def forward(ctx, hidden, normalized_shape, weight, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight)
        ctx.how = normalized_shape, eps
        return torch.rms_norm(hidden, normalized_shape, weight, eps)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        hidden, weight = ctx.saved_tensors
        shape, eps = ctx.how
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            normed = torch.rms_norm(hidden, shape, weight, eps)
        return *torch.autograd.grad(normed, hidden, gradient), None, None, None


def wan(size: dict[str, int], image: bool) -> dict[str, object]:
    return size | {
        "attention_head_dim": 128, "in_channels": 36, "out_channels": 16, "text_dim": 64, "freq_dim": 64,
        "patch_size": [1, 2, 2], "image_dim": 80 if image else None,
    }  # fmt: skip


def measured(settings: dict[str, object], batch: BatchShape, checkpointing: str, bfloat16: bool) -> dict[str, int]:
    """Bytes by part of a real step on the CPU, its gradients there already."""
    width = 128 * int(str(settings["num_attention_heads"]))
    added = {"added_kv_proj_dim": width} if settings["image_dim"] else {}
    base = WanTransformer3DModel(**settings, **added)
    if bfloat16:
        kept = base._keep_in_fp32_modules or []
        for name, parameter in base.named_parameters():
            if not any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.bfloat16()
    model = One4DTransformer(base, DLCConfig(rank=8, num_links=1), seed=0)
    model.set_activation_checkpointing(checkpointing)
    trainables = [parameter for _, parameter in model.trainable_parameters()]
    optimizer = torch.optim.AdamW(trainables)
    for parameter in trainables:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    clips, grid = batch.clips, batch.latent_grid
    inputs = [
        torch.randn(2 * clips, 16, *grid), torch.randn(clips, 20, *grid), torch.rand(clips).repeat(2),
        torch.randn(clips, batch.text_tokens, 64),
        torch.randn(clips, batch.image_tokens, 80) if settings["image_dim"] else None,
    ]  # fmt: skip
    states = [state[m] for state in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
    parts = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trainables if p.grad is not None),
        "optimizer": sum(state.nbytes for state in states),
    }
    held = [p.data for p in model.parameters()] + [p.grad for p in trainables if p.grad is not None] + states
    live = LiveBytes(held)
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(*inputs).float().square().mean()
        loss.backward()
    return parts | {"activations": live.peak - sum(parts.values()), "total": live.peak}


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bf16-mixed"])
# offload: tests/rehearsal, where host and GPU are told apart
@pytest.mark.parametrize("checkpointing", [mode for mode in CHECKPOINTING if mode != "offload"])
@pytest.mark.parametrize("name", SIZES)
def test_live_tensor_bytes_are_within_five_percent(name, checkpointing, bfloat16, record_property, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "rms_norm", OneKernelNorm.apply)
    size, grid, image = SIZES[name]
    settings = wan(size, image)
    batch = BatchShape(1, grid, 512 if image else 96, 17 if image else 0)
    found = measured(settings, batch, checkpointing, bfloat16)
    shape = TransformerShape.of(settings, DLCConfig(rank=8, num_links=1))
    layout = Layout(1, 0, checkpointing, False, bfloat16, bfloat16, 0.0, 0.0, 0)
    memory = step_memory(shape, batch, layout)
    kept, rest, _ = step_activations(shape, batch, layout)
    ours = {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
        "activations": kept + rest,
    }  # fmt: skip
    ours["total"] = sum(ours.values())
    table = {part: f"{found[part] / 2**20:.1f} measured, {ours[part] / 2**20:.1f} planned" for part in found}
    record_property("MiB", json.dumps(table))
    print(name, checkpointing, bfloat16, table, f"{ours['total'] / found['total'] - 1:+.1%}")
    for part in ("weights", "gradients", "optimizer"):
        assert ours[part] == found[part], part
    assert ours["activations"] == pytest.approx(found["activations"], rel=0.05), table
    assert ours["total"] == pytest.approx(found["total"], rel=0.05), table


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_the_released_models_are_counted_exactly(name):
    shape = TransformerShape.of(RELEASED[name], DLCConfig())
    with init_empty_weights():
        base = WanTransformer3DModel.from_config(RELEASED[name])
    frozen = sum(p.numel() for p in base.parameters())
    kept = base._keep_in_fp32_modules or []
    float32 = sum(p.numel() for name, p in base.named_parameters() if any(k in name.split(".") for k in kept))
    with torch.device("meta"):
        counts = One4DTransformer(WanTransformer3DModel.from_config(RELEASED[name]), DLCConfig(), 0).parameter_counts()
    ours = count_parameters(shape)
    assert (ours.frozen, ours.float32) == (frozen, float32)
    assert (ours.lora, ours.links, ours.patch_embedding) == tuple(counts.values())


def test_the_papers_numbers_are_the_planners():
    n = count_parameters(TransformerShape.of(RELEASED["14B"], DLCConfig()))
    mega = 2**20
    assert f"{n.lora / mega:.1f} {(n.trainable - n.lora) / mega:.1f} {n.trainable / mega:.1f}" == "685.0 250.7 935.7"


PAPER = BatchShape(1, (21, 44, 78), 512, 257)


def plan(**changes: object) -> float:
    shape = TransformerShape.of(RELEASED["14B"], DLCConfig())
    layout = Layout(64, 2, "full", False, True, True, 13e9, 11e9, 96)
    return step_memory(shape, PAPER, replace(layout, **changes)).total


def test_what_is_shared_or_moved_away_costs_less():
    stages = [plan(zero_stage=stage) for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    assert plan(zero_stage=3, world=8) > plan(zero_stage=3, world=64)
    assert plan(offload=True) < plan() and plan(zero_stage=3, offload=True) < plan(zero_stage=3)
    assert plan(checkpointing="none") > 10 * 2**30 + plan(checkpointing="selective") > 20 * 2**30 + plan()
    layout = Layout(64, 3, "full", True, True, True, 13e9, 11e9, 96)
    moved = step_memory(TransformerShape.of(RELEASED["14B"], DLCConfig()), PAPER, layout).host
    assert moved > 13e9 + 0.5e9


def test_what_waits_on_the_host_or_is_quantised_is_counted_once():
    shape = TransformerShape.of(RELEASED["14B"], DLCConfig())
    layout = Layout(1, 0, "full", False, True, True, 0.0, 0.0, 0)

    def of(**changes: object) -> tuple[float, float]:
        memory = step_memory(shape, PAPER, replace(layout, **changes))
        return memory.tensors, memory.host

    n = count_parameters(shape)
    (plain, none), (int8, _), (away, on_host) = of(), of(quantised=True), of(visiting=True)
    assert none == 0 and plain - int8 == pytest.approx(n.products - 4 * n.outputs, rel=1e-3)
    assert on_host == 2 * n.products and plain - away == pytest.approx(on_host * 38 / 40)
    waiting, inputs = of(checkpointing="offload")
    assert inputs == 40 * 2 * 18018 * 5120 * 2 and plain - waiting == pytest.approx(inputs * 38 / 40)


def test_an_average_lies_where_the_weights_lie():
    """One more float32 copy of the trainables: whole below stage 3, a share at it, offloaded with the weights."""
    n = count_parameters(TransformerShape.of(RELEASED["14B"], DLCConfig())).trainable
    assert (plan(average=True) - plan()) / 1.05 == pytest.approx(4 * n)  # with its share of fragmentation
    assert (plan(average=True, zero_stage=3) - plan(zero_stage=3)) / 1.05 == pytest.approx(4 * n / 64)
    assert (plan(average=True, offload=True) - plan(offload=True)) / 1.05 == pytest.approx(4 * n)
    offloaded = {"zero_stage": 3, "offload": True}
    assert plan(average=True, **offloaded) == plan(**offloaded)
    shape = TransformerShape.of(RELEASED["14B"], DLCConfig())
    layout = Layout(64, 3, "full", True, True, True, 13e9, 11e9, 96)
    host = [step_memory(shape, PAPER, replace(layout, average=average)).host for average in (True, False)]
    assert host[0] - host[1] == pytest.approx(4 * n / 64)


def test_encoders_visit_before_the_step_and_cost_only_where_they_are_larger_than_it():
    """They never lie beside a block's activations; on the host they lie whole."""
    assert plan() == plan(largest_encoder_bytes=0.0, vae_base_dim=0)
    assert plan(largest_encoder_bytes=40e9) > plan() + 10e9
