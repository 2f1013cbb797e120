"""Laws of Decoupled LoRA Control, on a real Wan at toy size, with and without image tokens and checkpointing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from one4d_pl.config import CHECKPOINTING, ConfigError, DLCConfig, SamplerConfig
from one4d_pl.errors import UserError
from one4d_pl.models.adapters import AdapterCard, adapter_tensors, load_adapters, save_adapters
from one4d_pl.models.control_links import link_positions
from one4d_pl.models.transformer import One4DTransformer, adapter_part, describe_sizes
from one4d_pl.types import MODALITIES
from tests.conftest import TinyBase

RANK = 4
checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


def build(base: WanTransformer3DModel, checkpointing: str = "none", **changes: object) -> One4DTransformer:
    model = One4DTransformer(base, DLCConfig(rank=RANK, **changes), seed=0)  # type: ignore[arg-type]
    model.set_activation_checkpointing(checkpointing)
    return model


def perturb(model: One4DTransformer, choose: Callable[[str], bool] = lambda name: True, scale: float = 0.1) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if choose(name):
                parameter += scale * torch.randn(parameter.shape, generator=g)


@checkpointing
def test_at_step_0_both_halves_are_plain_wan(tiny_base, checkpointing):
    plain, inputs = tiny_base.transformer(), tiny_base.inputs(batch=2)
    model = build(copy.deepcopy(plain), checkpointing)
    expected = plain(**inputs.plain())[0]
    actual = model(*inputs.one4d())
    assert torch.equal(actual, expected)  # rgb: Wan on [noisy, mask, condition]; xyz: Wan on [noisy, 0, 0]


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_lora_changes_its_own_half_only(tiny_base, modality):
    inputs, model = tiny_base.inputs(batch=2), build(tiny_base.transformer())
    before = dict(zip(MODALITIES, model(*inputs.one4d()).chunk(2), strict=True))
    perturb(model, lambda name: f"lora_B.{modality}" in name)
    after = dict(zip(MODALITIES, model(*inputs.one4d()).chunk(2), strict=True))
    other = MODALITIES[1 - MODALITIES.index(modality)]
    assert torch.equal(after[other], before[other])
    assert (after[modality] - before[modality]).abs().max() > 1e-3


@pytest.mark.parametrize(("direction", "changed"), [("xyz_to_rgb", "rgb"), ("rgb_to_xyz", "xyz")])
def test_a_link_in_the_last_block_changes_the_half_it_leads_to(tiny_base, direction, changed):
    inputs, model = tiny_base.inputs(batch=2), build(tiny_base.transformer())
    before = dict(zip(MODALITIES, model(*inputs.one4d()).chunk(2), strict=True))
    perturb(model, lambda name: name == f"links.4.{direction}.weight")
    after = dict(zip(MODALITIES, model(*inputs.one4d()).chunk(2), strict=True))
    other = MODALITIES[1 - MODALITIES.index(changed)]
    assert torch.equal(after[other], before[other])
    assert (after[changed] - before[changed]).abs().max() > 1e-3


def test_links_use_the_values_before_the_exchange(tiny_base):
    model, width = build(tiny_base.transformer()), 24
    link = model.links["2"]
    perturb(model, lambda name: name.startswith("links.2."))
    hidden = torch.randn(4, 7, width)
    rgb, xyz = hidden.chunk(2)
    to_rgb, to_xyz = link.xyz_to_rgb.weight, link.rgb_to_xyz.weight
    expected = torch.cat([rgb + xyz @ to_rgb.T, xyz + rgb @ to_xyz.T])
    torch.testing.assert_close(link(hidden), expected, rtol=0, atol=1e-6)
    added = (expected - hidden).norm() / hidden.norm()
    torch.testing.assert_close(link.ratio, added, rtol=1e-4, atol=0)


def test_the_condition_reaches_xyz_through_the_links_alone(tiny_base):
    inputs, model = tiny_base.inputs(batch=1), build(tiny_base.transformer())
    perturb(model, lambda name: not name.startswith("links."))
    other = copy.copy(inputs)
    object.__setattr__(other, "condition", torch.randn_like(inputs.condition))
    xyz, xyz_other = (model(*i.one4d()).chunk(2)[1] for i in (inputs, other))
    assert torch.equal(xyz, xyz_other)
    perturb(model, lambda name: name.startswith("links."))
    xyz, xyz_other = (model(*i.one4d()).chunk(2)[1] for i in (inputs, other))
    assert (xyz - xyz_other).abs().max() > 1e-3


@checkpointing
def test_base_never_moves_and_every_trainable_does(tiny_base, checkpointing):
    model, inputs = build(tiny_base.transformer(), checkpointing), tiny_base.inputs(batch=2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    target = torch.randn_like(inputs.noisy_latents)
    optimizer = torch.optim.AdamW((p for _, p in model.trainable_parameters()), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        (model(*inputs.one4d()) - target).square().mean().backward()
        if step == 1:  # at step 0 the zero B hides A from the gradient
            _assert_every_trainable_has_a_gradient(model)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None and torch.equal(parameter, frozen[name]), name


def _assert_every_trainable_has_a_gradient(model: One4DTransformer) -> None:
    for name, parameter in model.trainable_parameters():
        assert parameter.grad is not None, name
        if name.endswith("patch_embedding.xyz.weight"):
            fed, zero_fed = parameter.grad[:, :16], parameter.grad[:, 16:]
            assert fed.abs().amax(dim=(0, 2, 3, 4)).min() > 0 and zero_fed.abs().max() == 0
        else:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bf16-mixed"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_changes_no_gradient(tiny_base, mode, bfloat16):
    expected, actual = (gradients(build(tiny_base.transformer(), m), tiny_base, bfloat16) for m in ("none", mode))
    for name, gradient in expected.items():
        assert torch.equal(gradient, actual[name]), name


def gradients(model: One4DTransformer, base: TinyBase, bfloat16: bool = False) -> dict[str, Tensor]:
    """Of every trainable, all of them moved from their start."""
    perturb(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        velocity = model(*base.inputs(batch=2).one4d())
    velocity.float().square().mean().backward()
    return {name: p.grad for name, p in model.trainable_parameters() if p.grad is not None}


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("full", 2), ("selective", 1)])
def test_selective_checkpointing_attends_to_the_clip_once(tiny_base, mode, times):
    """And to the text twice, which is cheap."""
    model, counter = build(tiny_base.transformer(), mode), SelfAttentions(2 * 2 * 3)
    with counter:
        gradients(model, tiny_base)
    assert counter.found == times * len(model.base.blocks)


class SelfAttentions(TorchDispatchMode):
    """Counts forward passes of self-attention over so many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.found = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "_scaled_dot_product" in str(func) and "backward" not in str(func):
            self.found += args[0].shape[-2] == args[1].shape[-2] == self.tokens
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["_native_flash", "_native_math"])
def test_an_attention_backend_computes_the_same(tiny_base, backend):
    expected = gradients(build(tiny_base.transformer()), tiny_base)
    model = build(tiny_base.transformer())
    model.set_attention(backend)
    for name, gradient in gradients(model, tiny_base).items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    assert build(tiny_base.transformer()).base.blocks[0].attn1.processor._attention_backend is None
    with SelfAttentions(2 * 2 * 3) as counter:  # another model's kernels stay torch's choice
        build(tiny_base.transformer())(*tiny_base.inputs(batch=1).one4d())
    assert counter.found == 5


def test_an_attention_backend_that_is_not_installed_is_named(tiny_base):
    with pytest.raises(ConfigError, match=r"base\.attention: .*_flash_3"):
        build(tiny_base.transformer()).set_attention("_flash_3")


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_blocks_have_the_same_gradients_and_links(tiny_base, mode):
    expected = gradients(build(tiny_base.transformer()), tiny_base)
    model = build(tiny_base.transformer(), mode)
    model.compile_blocks("aot_eager")  # traces forward and backward as inductor does, but needs no C++ compiler
    torch._dynamo.utils.counters.clear()
    for name, gradient in gradients(model, tiny_base).items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
    counters = torch._dynamo.utils.counters
    # one graph serves all blocks, another all links
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    assert all(link.ratio > 0 for link in model.links.values())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_selective_checkpointing_attends_to_the_clip_once(tiny_base_plain, backend):
    """And to the text twice: counted where the kernels run, for the compiler looks through no mode."""
    plain, model = build(tiny_base_plain.transformer()), build(tiny_base_plain.transformer(), "selective")
    torch._dynamo.reset()
    model.compile_blocks(backend)
    for one in (plain, model):  # compiles
        gradients(one, tiny_base_plain)
    expected = gradients(plain, tiny_base_plain)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = gradients(model, tiny_base_plain)
    kernels = [e.count for e in profile.key_averages() if e.key == "aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert sum(kernels) == 3 * len(model.base.blocks)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@checkpointing
def test_stacked_equals_two_passes_with_two_plain_lora_models(tiny_base, tmp_path, checkpointing):
    """Without links and with patch embeddings alike, the branches are two PEFT models read from our files."""
    model = build(tiny_base.transformer(), checkpointing, num_links=0, lora_scale=0.5)
    inputs = tiny_base.inputs(batch=2)
    perturb(model, lambda name: ".lora_" in name)
    save_adapters(model, tmp_path, card_of(model))
    stacked = model(*inputs.one4d())
    stacked.square().sum().backward()
    plain_inputs = inputs.plain()
    for i, modality in enumerate(MODALITIES):
        branch = peft.PeftModel.from_pretrained(tiny_base.transformer(), str(tmp_path / modality), is_trainable=True)
        half = {k: v.chunk(2)[i] if isinstance(v, Tensor) else v for k, v in plain_inputs.items()}
        expected = branch(**half)[0]
        torch.testing.assert_close(stacked.chunk(2)[i], expected, rtol=0, atol=1e-5)
        expected.square().sum().backward()
        theirs = {n.replace(".default", ""): p.grad for n, p in branch.named_parameters() if p.requires_grad}
        ours = adapter_tensors(model)[f"{modality}/adapter_model.safetensors"]
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            difference = (parameter.grad - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)
            assert difference < 1e-4, name


def test_save_load_gives_identical_outputs_after_every_trainable_moved(tiny_base, tmp_path):
    model, inputs = build(tiny_base.transformer()), tiny_base.inputs(batch=2)
    perturb(model)
    expected = model(*inputs.one4d())
    save_adapters(model, tmp_path, card_of(model))
    fresh = One4DTransformer(tiny_base.transformer(), model.config, seed=7)
    assert not torch.equal(fresh(*inputs.one4d()), expected)
    card = load_adapters(fresh, tmp_path, "a base")
    assert torch.equal(fresh(*inputs.one4d()), expected) and card == card_of(model)


def test_every_trainable_is_saved_exactly_once(tiny_base):
    model = build(tiny_base.transformer())
    saved = [id(p) for tensors in adapter_tensors(model).values() for p in tensors.values()]
    assert sorted(saved) == sorted(id(p) for _, p in model.trainable_parameters())


def test_loading_refuses_another_base_shape_or_file(tiny_base, tmp_path):
    model = build(tiny_base.transformer())
    save_adapters(model, tmp_path, card_of(model))
    with pytest.raises(ConfigError, match="another base"):
        load_adapters(model, tmp_path, "not that base")
    with pytest.raises(ConfigError, match="rank = 4, the config asks for 2"):
        load_adapters(One4DTransformer(tiny_base.transformer(), DLCConfig(rank=2), 0), tmp_path, "a base")
    (tmp_path / "links.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"links\.safetensors"):
        load_adapters(model, tmp_path, "a base")
    with pytest.raises(UserError, match=r"card\.json"):
        load_adapters(model, tmp_path / "nowhere", "a base")


def test_standardised_pointmaps_come_back_and_frames_are_left_alone(tiny_base):
    model, latents = build(tiny_base.transformer()), torch.randn(4, 16, 2, 4, 6)
    assert torch.equal(model.codec.standardise(latents), latents) and torch.equal(model.codec.restore(latents), latents)
    (rgb, xyz), dims = latents.chunk(2), (0, 2, 3, 4)
    model.codec.set_statistics(xyz.mean(dims).tolist(), xyz.std(dims).tolist())
    kept, changed = model.codec.standardise(latents).chunk(2)
    assert torch.equal(kept, rgb)
    torch.testing.assert_close(changed.mean(dims), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(changed.std(dims), torch.ones(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.codec.restore(model.codec.standardise(latents)), latents, rtol=0, atol=1e-6)


def test_statistics_travel_with_the_adapter(tiny_base, tmp_path):
    model = build(tiny_base.transformer(), standardise_xyz=True)
    model.codec.set_statistics([0.5] * 16, [0.25] * 16)
    stored = {"mean": [0.5] * 16, "std": [0.25] * 16}
    save_adapters(model, tmp_path, replace(card_of(model), xyz_statistics=stored, pointmap_power=0.5))
    assert model.codec.statistics == stored
    fresh = One4DTransformer(tiny_base.transformer(), AdapterCard.read(tmp_path).dlc, 7, pointmap_power=0.5)
    load_adapters(fresh, tmp_path, "a base")
    assert torch.equal(fresh.codec.mean, model.codec.mean) and torch.equal(fresh.codec.std, model.codec.std)
    with pytest.raises(ConfigError, match=r"pointmap_power = 0\.5, the config asks for 1\.0"):
        load_adapters(build(tiny_base.transformer(), standardise_xyz=True), tmp_path, "a base")
    with pytest.raises(ConfigError, match="standardise_xyz = True, the config asks for False"):
        load_adapters(build(tiny_base.transformer()), tmp_path, "a base")
    card = json.loads((tmp_path / "card.json").read_text())
    for wrong in ({"mean": [0.0] * 16}, {"mean": [0.0] * 4, "std": [1.0] * 4}, {"mean": [0.0] * 16, "std": [0.0] * 16}):
        (tmp_path / "card.json").write_text(json.dumps(card | {"xyz_statistics": wrong}))
        with pytest.raises(ConfigError, match=r"xyz.statistics: need"):
            load_adapters(fresh, tmp_path, "a base")


def test_lora_scale_is_alpha_over_rank_and_is_stored(tiny_base, tmp_path):
    model = build(tiny_base.transformer(), lora_scale=0.5)
    save_adapters(model, tmp_path, card_of(model))
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "rgb"))
    assert (config.lora_alpha, config.r) == (2, 4)


@pytest.mark.parametrize(
    ("num_blocks", "num_links", "expected"),
    [(40, 5, [3, 11, 19, 27, 35]), (30, 5, [2, 8, 14, 20, 26]), (10, 5, [0, 2, 4, 6, 8]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_links_sit_in_the_centre_of_equal_spans(num_blocks, num_links, expected):
    assert link_positions(num_blocks, num_links) == expected


def test_more_links_than_blocks_are_refused():
    with pytest.raises(ConfigError, match="num_links"):
        link_positions(4, 5)


@pytest.mark.parametrize(("rank", "printed"), [(64, "685.0 / 250.7 / 935.7"), (32, "342.5 / 250.7 / 593.2")])
def test_oracle_of_sizes_at_14b(rank, printed):
    """Wan2.1-Fun-V1.1-14B-InP on the meta device against the paper's printed sizes."""
    with torch.device("meta"):
        base = WanTransformer3DModel(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
        counts = One4DTransformer(base, DLCConfig(rank=rank), seed=0).parameter_counts()
    assert counts == {"lora": 718_274_560 * rank // 64, "links": 262_144_000, "xyz_patch_embedding": 742_400}
    assert describe_sizes(counts).startswith(printed)


def card_of(model: One4DTransformer) -> AdapterCard:
    return AdapterCard(
        base_path="tiny",
        base_fingerprint="a base",
        rank=model.config.rank,
        lora_scale=model.config.lora_scale,
        link_blocks=[int(i) for i in model.links],
        tasks=["video"],
        shift=1.0,
        step=0,
        num_frames=5,
        height=32,
        width=48,
        max_text_tokens=16,
        negative_prompt="",
        sampler=asdict(SamplerConfig()),
        latent_statistics=None,
        data_sources=[],
    )


def test_parts_of_the_adapter_are_told_by_name(tiny_base):
    model = build(tiny_base.transformer())
    parts = {adapter_part(name) for name, _ in model.trainable_parameters()}
    assert parts == {"lora", "links", "xyz_patch_embedding"}
