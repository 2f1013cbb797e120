"""At step 0 the pipeline is diffusers' own image-to-video pipeline, frame for frame."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from one4d_pl.config import DLCConfig, SamplerConfig
from one4d_pl.inference import pipeline as pipeline_room
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.adapters import AdapterCard
from one4d_pl.models.transformer import One4DTransformer

SHIFT, STEPS, GUIDANCE = 3.0, 3, 5.0


def ours(base, num_frames: int, solver: str) -> One4DPipeline:
    """An adapter that has not been trained."""
    dlc = DLCConfig(rank=4, num_links=2)
    transformer = One4DTransformer(base.transformer(), dlc, seed=0).requires_grad_(False)
    blocks = [int(i) for i in transformer.links]
    config = SamplerConfig(STEPS, solver)
    card = AdapterCard(
        base.path, "", 4, 1.0, blocks, ["image"], SHIFT, 0, num_frames, 32, 48, base.max_text_tokens, "bad",
        asdict(config), None, [],
    )  # fmt: skip
    return One4DPipeline(transformer, base.encoders(), config, SHIFT, "bad", card)


def theirs(base, solver: str) -> WanImageToVideoPipeline:
    """Diffusers' pipeline on the same files; its scheduler is built from our shift and steps along Wan's sigmas."""
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        if solver == "euler"
        else UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    )
    sigmas = np.linspace(1, 0, STEPS + 1)[:STEPS]  # as get_sampling_sigmas of Wan's repository makes them
    set_timesteps = scheduler.set_timesteps
    # the pipeline takes no sigmas
    scheduler.set_timesteps = lambda steps, device: set_timesteps(sigmas=sigmas, device=device)
    return WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(f"{base.path}/tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(f"{base.path}/text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(f"{base.path}/vae"),
        scheduler=scheduler,
        transformer=base.transformer(),
    )


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_both(base, monkeypatch, solver, num_frames, height, width, given: dict[int, int]) -> tuple[Tensor, Tensor]:
    """Frames [T, H, W, 3] in [0, 1] of both pipelines for the same seed, pictures, prompts and scheduler."""
    pipeline = ours(base, num_frames, solver)
    made: list[Tensor] = []
    real = pipeline_room.join_frames
    monkeypatch.setattr(pipeline_room, "join_frames", lambda *parts: made.append(real(*parts)) or made[-1])
    images = {index: picture(height, width, seed) for index, seed in given.items()}
    scene = pipeline(
        "a ball", images, num_frames, height, width, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    assert torch.equal(scene.frames, ((made[0] + 1) / 2 * 255).round().to(torch.uint8))

    encoders = pipeline.encoders
    prompts = encoders.pad_prompt_embeds(encoders.encode_prompts(["a ball", "bad"]))
    pixels = torch.from_numpy(np.array(images[0])).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    shown = torch.ones(1, 1, dtype=torch.bool)
    last = images.get(num_frames - 1) if num_frames > 1 else None
    pipe, image_embeds = theirs(base, solver), encoders.encode_first_frame(pixels, shown)
    # ours squashes pictures to CLIP's square as Fun-InP was trained, theirs crops; it takes no embeddings beside them
    pipe.encode_image = lambda image, device: image_embeds
    result = pipe(
        image=images[0], last_image=last, prompt_embeds=prompts[:1], negative_prompt_embeds=prompts[1:],
        height=height, width=width, num_frames=num_frames,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(7),
        output_type="pt",
    )  # fmt: skip
    return (made[0] + 1) / 2, result.frames[0].movedim(1, -1)


@pytest.mark.parametrize(
    ("solver", "num_frames", "height", "width"),
    [("euler", 5, 32, 48), ("euler", 9, 48, 32), ("unipc", 5, 32, 32), ("euler", 1, 32, 48)],
)
def test_image_to_video_is_diffusers_own(tiny_base, monkeypatch, solver, num_frames, height, width):
    actual, expected = make_both(tiny_base, monkeypatch, solver, num_frames, height, width, {0: 1})
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert actual.std() > 0.01  # a grey video would prove nothing


def test_first_and_last_frame_is_diffusers_own(tiny_base_plain, monkeypatch):
    actual, expected = make_both(tiny_base_plain, monkeypatch, "euler", 5, 32, 48, {0: 1, 4: 2})
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    alone, _ = make_both(tiny_base_plain, monkeypatch, "euler", 5, 32, 48, {0: 1})
    assert (actual - alone).abs().max() > 1e-3  # the last frame is seen
