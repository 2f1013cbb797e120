"""Laws of what waits on the host: the same numbers to the bit, two blocks at most, each block fetched twice a step."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor

from one4d_pl.config import DLCConfig
from one4d_pl.models import host_memory
from one4d_pl.models.host_memory import Copies, VisitingBlocks
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.models.wan import load_transformer
from tests.models.test_transformer import perturb

BLOCKS = 5  # of the tiny base


def build(path: str, checkpointing: str, **base: object) -> One4DTransformer:
    model = One4DTransformer(load_transformer(path, "float32", **base), DLCConfig(rank=4), seed=0)  # type: ignore[arg-type]
    model.set_activation_checkpointing(checkpointing)
    perturb(model)
    return model


def step(model: One4DTransformer, inputs: tuple) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and every gradient of two accumulated passes."""
    for parameter in model.parameters():
        parameter.grad = None
    for _ in range(2):
        output = model(*inputs)
        output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.trainable_parameters() if p.grad is not None}


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[VisitingBlocks]:
    """Every VisitingBlocks that is made."""
    made: list[VisitingBlocks] = []
    plain = VisitingBlocks.__init__
    monkeypatch.setattr(VisitingBlocks, "__init__", lambda self, device: (plain(self, device), made.append(self))[0])
    return made


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that is copied to the host or from it."""
    tensors: list[Tensor] = []
    plain = Copies.start
    monkeypatch.setattr(
        Copies, "start", lambda self, given, device: (tensors.extend(given), plain(self, given, device))[1]
    )
    return tensors


@pytest.mark.parametrize("quantisation", ["none", "int8"])
@pytest.mark.parametrize("checkpointing", ["full", "selective", "offload"])
def test_visiting_blocks_and_waiting_inputs_change_no_bit(tiny_base, checkpointing, quantisation):
    inputs = tiny_base.inputs(batch=2).one4d()
    expected = step(build(tiny_base.path, "none", quantisation=quantisation), inputs)
    for offload in (False, True):
        actual = step(build(tiny_base.path, checkpointing, quantisation=quantisation, offload=offload), inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_step_fetches_every_block_twice_but_the_last_and_holds_two(tiny_base_plain, visits, copied, monkeypatch):
    model = build(tiny_base_plain.path, "full", offload=True)
    (blocks,), held = visits, []
    plain = VisitingBlocks._before
    monkeypatch.setattr(VisitingBlocks, "_before", lambda *args: (plain(*args), held.append(len(blocks._moving)))[0])
    for i, block in enumerate(model.base.blocks):  # the hooks that are there already call the plain one
        block._forward_pre_hooks[next(iter(block._forward_pre_hooks))] = (
            lambda module, inputs, i=i: blocks._before(i, module, inputs)  # type: ignore[misc]
        )
    size = sum(weight.nbytes for weight in blocks._hosts[0])
    inputs = tiny_base_plain.inputs(batch=1).one4d()
    copied.clear()  # parking them is behind
    for done in (1, 2):
        model(*inputs).square().mean().backward()
        assert sum(weight.nbytes for weight in copied) == done * (2 * BLOCKS - 1) * size
        assert not blocks._moving and not blocks._present  # nothing stays on the device
    assert max(held) == 2 and len(held) == 2 * 2 * BLOCKS


def test_a_sampled_scene_fetches_every_block_once_a_call(tiny_base_plain, visits, copied):
    model = build(tiny_base_plain.path, "none", offload=True)
    (blocks,) = visits
    copied.clear()
    with torch.no_grad():
        for done in (1, 2):
            model(*tiny_base_plain.inputs(batch=1).one4d())
            size = sum(weight.nbytes for host in blocks._hosts for weight in host)
            assert sum(weight.nbytes for weight in copied) == done * size
    assert not blocks._moving


def test_a_block_that_is_away_has_no_weight_and_no_parameter_that_others_might_find(tiny_base_plain):
    model = build(tiny_base_plain.path, "none", offload=True)
    frozen = {name for name, p in model.base.blocks.named_parameters() if not p.requires_grad}
    assert frozen and not [name for name in frozen if name.endswith(("base.weight", "proj.weight"))]
    model.to("cpu")
    copy.deepcopy(model.base.blocks[0].state_dict())


def test_a_validation_between_two_steps_disturbs_nothing(tiny_base_plain):
    inputs = tiny_base_plain.inputs(batch=2).one4d()
    model = build(tiny_base_plain.path, "offload", offload=True)
    expected = step(model, inputs)
    output = model(*inputs)  # a forward pass whose backward pass never comes
    del output
    with torch.no_grad():
        model(*inputs)
    torch.testing.assert_close(step(model, inputs), expected, rtol=0, atol=0)


def test_only_the_blocks_inputs_wait_on_the_host_and_are_gone_after_the_step(tiny_base_plain, copied):
    model = build(tiny_base_plain.path, "offload")
    model(*tiny_base_plain.inputs(batch=1).one4d()).square().mean().backward()
    hidden = (2, 12, 24)  # both branches, 2 x 2 x 3 tokens, width
    assert [tuple(tensor.shape) for tensor in copied] == [hidden] * (2 * BLOCKS)  # to the host and back
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is host_memory._Waiting]
