"""Our LoRAs in other programs: the rgb one in plain diffusers is our rgb branch with the links off."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from safetensors.torch import load_file

from one4d_pl.commands import export
from one4d_pl.config import DLCConfig, SamplerConfig
from one4d_pl.models.adapters import PEFT_PREFIX, AdapterCard, save_adapters
from one4d_pl.models.transformer import One4DTransformer


@pytest.fixture(params=[1.0, 0.5], ids=["alpha=rank", "alpha=rank/2"])
def adapter(request, tiny_base, tmp_path):
    """A transformer with random LoRAs and no links, and its exported folder."""
    model = One4DTransformer(tiny_base.transformer(), DLCConfig(rank=4, lora_scale=request.param, num_links=0), seed=0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    card = AdapterCard(
        tiny_base.path,
        "",
        4,
        request.param,
        [],
        ["video"],
        1.0,
        1,
        5,
        32,
        48,
        16,
        "",
        asdict(SamplerConfig()),
        None,
        [],
    )
    (tmp_path / "step").mkdir()
    save_adapters(model, tmp_path / "step", card)
    assert export.main([str(tmp_path / "step"), "--out", str(tmp_path / "out"), "--lora-for", "diffusers", "wan"]) == 0
    return model, tmp_path / "out"


def pipeline(base) -> WanImageToVideoPipeline:
    vae = AutoencoderKLWan.from_pretrained(f"{base.path}/vae")
    return WanImageToVideoPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), transformer=base.transformer())


@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_the_rgb_lora_in_plain_diffusers_is_our_rgb_branch_with_links_off(tiny_base, adapter, layout):
    model, folder = adapter
    inputs = tiny_base.inputs(batch=1)
    theirs = pipeline(tiny_base)
    theirs.load_lora_weights(str(folder), weight_name=f"rgb_lora_{layout}.safetensors")
    plain = inputs.plain()
    rgb = plain["hidden_states"][:1]
    with torch.no_grad():
        ours = model(*inputs.one4d())[:1]
        stacked = theirs.transformer(**(plain | {"hidden_states": torch.cat([rgb, rgb])}))[0][:1]
        single = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in plain.items()}
        alone = theirs.transformer(**single)[0]
        without = tiny_base.transformer()(**plain)[0][:1]
    torch.testing.assert_close(stacked, ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, ours, rtol=0, atol=1e-5)
    assert (without - ours).abs().max() > 1e-2  # the LoRA does something


def test_diffusers_own_converter_reads_wans_names_back_to_the_same_tensors(adapter):
    model, folder = adapter
    stored = load_file(folder / "rgb/adapter_model.safetensors")
    read = WanLoraLoaderMixin.lora_state_dict(str(folder), weight_name="rgb_lora_wan.safetensors")
    expected = {name.replace(PEFT_PREFIX, "transformer.", 1): tensor for name, tensor in stored.items()}
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():  # the converter folds alpha / rank into A
        scale = model.config.lora_scale if ".lora_A." in name else 1.0
        assert torch.equal(read[name], scale * tensor)
