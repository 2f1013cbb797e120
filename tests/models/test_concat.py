"""Laws of what Decoupled LoRA Control is compared with: frames and pointmaps joined along channels or width."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import WanTransformer3DModel

from one4d_pl.config import ConfigError, DLCConfig, SamplerConfig, load_config
from one4d_pl.models.adapters import AdapterCard, adapter_tensors, load_adapters, save_adapters
from one4d_pl.models.concat import ChannelTransformer, ConcatTransformer, WidthTransformer
from one4d_pl.models.coupling import couple
from one4d_pl.models.transformer import One4DTransformer

RANK = 4
both = pytest.mark.parametrize("kind", ["channel", "width"])


def build(base: WanTransformer3DModel, kind: str, seed: int = 0) -> ConcatTransformer:
    model = couple(base, DLCConfig(rank=RANK, num_links=0, coupling=kind), seed)
    assert isinstance(model, ConcatTransformer)
    return model


def perturb(model: ConcatTransformer, part: str = "") -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if part in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=g)


def one_sigma(inputs):  # joined, both have one noise level
    return dataclasses.replace(inputs, sigma=inputs.sigma.chunk(2)[0].repeat(2))


def test_the_knob_chooses(tiny_base):
    kinds = {"decoupled": One4DTransformer, "channel": ChannelTransformer, "width": WidthTransformer}
    for name, kind in kinds.items():
        assert type(couple(tiny_base.transformer(), DLCConfig(rank=2, num_links=1, coupling=name), 0)) is kind
    for wrong in ("dlc.coupling=depth", "train.strategy=deepspeed"):
        with pytest.raises(ConfigError, match=r"dlc\.coupling"):
            load_config(["configs/dlc.yaml"], ["dlc.coupling=width", wrong])


def test_joined_along_channels_the_frames_are_the_base_s_at_step_0(tiny_base):
    plain, inputs = tiny_base.transformer(), one_sigma(tiny_base.inputs(batch=2))
    model = build(copy.deepcopy(plain), "channel")
    rgb, xyz = model(*inputs.one4d()).chunk(2)
    expected = {k: v.chunk(2)[0] if isinstance(v, torch.Tensor) else v for k, v in inputs.plain().items()}
    torch.testing.assert_close(rgb, plain(**expected)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(xyz, rgb, rtol=0, atol=0)  # the output layer's copy
    perturb(model, "patch_embedding.xyz")
    noisy = inputs.noisy_latents.clone()
    noisy[2:] += 1  # pointmaps reach the frames through their weights alone
    assert (model(noisy, *inputs.one4d()[1:]) - model(*inputs.one4d())).chunk(2)[0].abs().max() > 1e-4


def test_joined_along_the_width_both_halves_have_the_positions_of_one_video(tiny_base):
    """At step 0 nothing but the condition tells left from right: swapped halves give swapped outputs."""
    model, inputs = build(tiny_base.transformer(), "width"), one_sigma(tiny_base.inputs(batch=2))
    alike = dataclasses.replace(inputs, condition=torch.zeros_like(inputs.condition))
    swapped = dataclasses.replace(alike, noisy_latents=torch.cat(alike.noisy_latents.chunk(2)[::-1]))
    rgb, xyz = model(*alike.one4d()).chunk(2)
    torch.testing.assert_close(model(*swapped.one4d()), torch.cat([xyz, rgb]), rtol=0, atol=1e-5)
    perturb(model, "sides")
    assert (model(*swapped.one4d()) - torch.cat(model(*alike.one4d()).chunk(2)[::-1])).abs().max() > 1e-3
    other = alike.noisy_latents.clone()
    other[2:] += 1  # every token attends to both halves, whatever is trained
    assert (model(other, *alike.one4d()[1:]) - model(*alike.one4d())).chunk(2)[0].abs().max() > 1e-3


@both
def test_the_base_never_moves_and_every_trainable_does(tiny_base, kind):
    model, inputs = build(tiny_base.transformer(), kind), one_sigma(tiny_base.inputs(batch=2))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    started = {n: p.clone() for n, p in model.trainable_parameters()}
    optimizer = torch.optim.AdamW((p for _, p in model.trainable_parameters()), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(*inputs.one4d()) - torch.ones(())).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not [n for n, p in model.trainable_parameters() if torch.equal(p, started[n])]


@both
def test_what_is_saved_is_read_back(tiny_base, kind, tmp_path):
    model, inputs = build(tiny_base.transformer(), kind), one_sigma(tiny_base.inputs(batch=2))
    perturb(model)
    expected = model(*inputs.one4d())
    card = AdapterCard(
        base_path="a base", base_fingerprint="print", rank=RANK, lora_scale=1.0, link_blocks=[],
        tasks=["video"], shift=1.0, step=0, num_frames=9, height=16, width=16,
        max_text_tokens=8, negative_prompt="", sampler=dataclasses.asdict(SamplerConfig()), latent_statistics=None,
        data_sources=[], coupling=kind,
    )  # fmt: skip
    save_adapters(model.requires_grad_(False), tmp_path, card)
    fresh = couple(tiny_base.transformer(), AdapterCard.read(tmp_path).dlc, seed=7)
    assert not torch.equal(fresh(*inputs.one4d()), expected)
    load_adapters(fresh, tmp_path, "print")
    assert torch.equal(fresh(*inputs.one4d()), expected)
    saved = [id(p) for tensors in adapter_tensors(model).values() for p in tensors.values()]
    assert sorted(saved) == sorted(id(p) for n, p in model.named_parameters() if n in model.adapter_names)
    with pytest.raises(ConfigError, match=f"coupling = {kind}"):
        load_adapters(couple(tiny_base.transformer(), DLCConfig(rank=RANK, num_links=0), 0), tmp_path, "print")
