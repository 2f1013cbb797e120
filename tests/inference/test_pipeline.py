"""Laws of the only sampler."""

from __future__ import annotations

import pytest
import torch

from one4d_pl.config import DLCConfig, GuidanceConfig, SamplerConfig
from one4d_pl.geometry.pointmap import unbend
from one4d_pl.inference.guidance import GuidedText, guided_velocity
from one4d_pl.inference.pipeline import One4DPipeline, RequestError
from one4d_pl.models.transformer import One4DTransformer


@pytest.fixture
def perturbed(tiny_base):
    model = One4DTransformer(tiny_base.transformer(), DLCConfig(rank=4), seed=0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model


def test_stacked_guidance_equals_two_calls_with_its_own_scale_per_task_and_branch(tiny_base, perturbed):
    inputs = tiny_base.inputs(batch=2)
    negative = torch.randn_like(inputs.prompt_embeds)
    scale_rgb, scale_xyz = torch.tensor([6.0, 4.0]), torch.tensor([2.0, 1.0])
    text = GuidedText(inputs.prompt_embeds, negative, scale_rgb, scale_xyz)
    with torch.no_grad():
        stacked = guided_velocity(
            perturbed, inputs.noisy_latents, inputs.condition, inputs.sigma, text, inputs.image_embeds
        )
        rest = (inputs.noisy_latents, inputs.condition, inputs.sigma)
        conditional = perturbed(*rest, inputs.prompt_embeds, inputs.image_embeds)
        unconditional = perturbed(*rest, negative, inputs.image_embeds)
        apart = guided_velocity(perturbed, *rest, text, inputs.image_embeds, two_calls=True)
    scale = torch.cat([scale_rgb, scale_xyz]).view(4, 1, 1, 1, 1)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(stacked, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 1e-3  # else the law would hold for nothing


def test_guidance_1_is_a_single_conditional_call(tiny_base, perturbed):
    inputs = tiny_base.inputs(batch=1)
    one = torch.ones(1)
    text = GuidedText(inputs.prompt_embeds, torch.full_like(inputs.prompt_embeds, float("nan")), one, one)
    rest = (inputs.noisy_latents, inputs.condition, inputs.sigma)
    with torch.no_grad():
        expected = perturbed(*rest, inputs.prompt_embeds, inputs.image_embeds)
        assert torch.equal(guided_velocity(perturbed, *rest, text, inputs.image_embeds), expected)


def test_a_scene_has_the_size_of_its_frames_and_follows_task_guidance(tiny_base, perturbed):
    encoders = tiny_base.encoders()
    config = SamplerConfig(steps=2, guidance=GuidanceConfig(text=6, image=5, sparse=4, video=3))
    pipeline = One4DPipeline(perturbed, encoders, config, shift=1.0, negative_prompt="bad")
    frames = torch.rand(4, 3, 5, 32, 48) * 2 - 1
    given = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    text = GuidedText.embed(pipeline.encoders, pipeline.config, ["p"] * 4, pipeline.negative_prompt, given)
    assert text.scale_rgb.tolist() == text.scale_xyz.tolist() == [6, 5, 4, 3]
    noise = torch.randn(8, 16, 2, 4, 6)
    scene = pipeline.sample(["p"] * 4, frames, given, noise)
    assert scene.frames.shape == scene.pointmap.shape == frames.shape
    assert scene.frames.abs().max() <= 1
    hidden = torch.where(given[:, None, :, None, None], frames, float("nan"))
    again = pipeline.sample(["p"] * 4, hidden.nan_to_num(7.0), given, noise)
    assert torch.equal(scene.frames, again.frames) and torch.equal(scene.pointmap, again.pointmap)


def test_pointmaps_leave_the_sampler_in_the_encoders_units_and_in_the_plain_cube(tiny_base, perturbed):
    encoders, given = tiny_base.encoders(), torch.ones(1, 5, dtype=torch.bool)
    pipeline = One4DPipeline(perturbed, encoders, SamplerConfig(steps=1), 1.0, "")
    frames, noise = torch.rand(1, 3, 5, 32, 48) * 2 - 1, torch.randn(2, 16, 2, 4, 6)
    decoded, decode = [], encoders.decode
    encoders.decode = lambda latents: decoded.append(latents) or decode(latents)
    plain = pipeline.sample(["p"], frames, given, noise)
    perturbed.codec.set_statistics([0.5] * 16, [0.25] * 16)
    perturbed.codec.power = 0.5
    changed = pipeline.sample(["p"], frames, given, noise)
    assert torch.equal(changed.frames, plain.frames)
    torch.testing.assert_close(decoded[3], decoded[1] * 0.25 + 0.5)
    straight = unbend(decode(decoded[3]).movedim(1, -1), 0.5).movedim(-1, 1)
    torch.testing.assert_close(changed.pointmap, straight, rtol=0, atol=0)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_pipeline_enters_its_precision_itself(tiny_base, perturbed, bfloat16):
    pipeline = One4DPipeline(perturbed, tiny_base.encoders(), SamplerConfig(steps=1), 1.0, "", bfloat16=bfloat16)
    seen: list[bool] = []
    hook = perturbed.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    frames, noise = torch.rand(1, 3, 5, 32, 48) * 2 - 1, torch.randn(2, 16, 2, 4, 6)
    pipeline.sample(["p"], frames, torch.ones(1, 5, dtype=torch.bool), noise)
    pipeline.with_settings(steps=1).sample(["p"], frames, torch.ones(1, 5, dtype=torch.bool), noise)
    hook.remove()
    assert set(seen) == {bfloat16} and not torch.is_autocast_enabled("cpu")


def test_image_tokens_are_zeros_not_absent_where_frame_0_is_hidden(tiny_base):
    encoders, frames = tiny_base.encoders(), torch.rand(2, 3, 5, 32, 32)
    given = torch.tensor([[True] * 5, [False] * 5])
    embeds = encoders.encode_first_frame(frames, given)
    if not tiny_base.image_tokens:
        assert embeds is None
        return
    assert embeds is not None and embeds.shape == (2, 17, 32)
    assert embeds[0].abs().max() > 0 and embeds[1].abs().max() == 0


def test_settings_that_cannot_be_are_refused_and_absent_ones_kept(tiny_base, perturbed):
    pipeline = One4DPipeline(perturbed, tiny_base.encoders(), SamplerConfig(steps=7), 1.0, "bad")
    assert pipeline.with_settings(solver="unipc").config == SamplerConfig(steps=7, solver="unipc")
    for wrong in ({"steps": 0}, {"solver": "heun"}, {"guidance": float("nan")}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            pipeline.with_settings(**wrong)
