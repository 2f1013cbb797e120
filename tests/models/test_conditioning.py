"""Laws of Unified Masked Conditioning (One4D, Eq. 10)."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from one4d_pl.models.conditioning import blank_hidden_frames, encode_condition, fold_frame_mask


@pytest.mark.parametrize("num_frames", [5, 9])
def test_mask_folding_for_every_subset_of_frames(num_frames):
    subsets = torch.tensor(list(itertools.product([False, True], repeat=num_frames)))
    folded = fold_frame_mask(subsets, 4)
    for frame_mask, channels in zip(subsets, folded, strict=True):
        assert channels.shape == (4, (num_frames - 1) // 4 + 1)
        for channel, latent_frame in itertools.product(range(4), range(channels.shape[1])):
            frame = 0 if latent_frame == 0 else 4 * (latent_frame - 1) + 1 + channel
            assert channels[channel, latent_frame] == frame_mask[frame]


def test_mask_folding_refuses_other_lengths():
    with pytest.raises(ValueError, match="4k\\+1"):
        fold_frame_mask(torch.ones(1, 8, dtype=torch.bool), 4)


@pytest.mark.parametrize("given", [[0], [0, 4, 8], [3], list(range(9)), []])
def test_the_condition_does_not_depend_on_hidden_pixels(tiny_base_plain, given):
    encoders = tiny_base_plain.encoders()
    frame_mask = torch.zeros(1, 9, dtype=torch.bool)
    frame_mask[0, given] = True
    frames = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    other = torch.where(frame_mask[:, None, :, None, None], frames, torch.rand_like(frames) * 2 - 1)
    poisoned = torch.where(frame_mask[:, None, :, None, None], frames, float("nan"))
    conditions = [encode_condition(encoders.encode, f, frame_mask, 4) for f in (frames, other, poisoned)]
    assert torch.equal(conditions[0], conditions[1]) and torch.equal(conditions[0], conditions[2])
    if given:
        seen = frames.clone()
        seen[:, :, given[0]] *= -1
        assert not torch.equal(conditions[0], encode_condition(encoders.encode, seen, frame_mask, 4))


def test_no_given_frame_means_literal_zeros_not_an_encoded_grey_video(tiny_base_plain):
    encoders, frame_mask = tiny_base_plain.encoders(), torch.tensor([[False] * 5, [True] + [False] * 4])
    condition = encode_condition(encoders.encode, torch.rand(2, 3, 5, 32, 32), frame_mask, 4)
    assert condition[0].abs().max() == 0
    assert condition[1, :4].sum() > 0 and condition[1, 4:].abs().max() > 0


def test_all_frames_given_is_the_video_itself(tiny_base_plain):
    encoders, frames = tiny_base_plain.encoders(), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    condition = encode_condition(encoders.encode, frames, torch.ones(1, 5, dtype=torch.bool), 4)
    assert torch.equal(condition[:, 4:], encoders.encode(frames)) and bool((condition[:, :4] == 1).all())


def test_hidden_frames_are_mid_grey():
    frames = torch.ones(1, 3, 5, 2, 2)
    blanked = blank_hidden_frames(frames, torch.tensor([[True, False, True, False, False]]))
    assert blanked.amax(dim=(0, 1, 3, 4)).tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("last", [False, True], ids=["first", "first-and-last"])
def test_condition_equals_diffusers_image_to_video(tiny_base_plain, last):
    """The two cases that diffusers knows: its latents, mask layout and statistics are an oracle not written by us."""
    encoders = tiny_base_plain.encoders()
    frames = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_base_plain.path)
    _, expected = pipeline.prepare_latents(
        image=frames[:, :, 0], batch_size=1, num_channels_latents=16, height=32, width=32, num_frames=9,
        dtype=torch.float32, device=torch.device("cpu"), last_image=frames[:, :, -1] if last else None,
    )  # fmt: skip
    frame_mask = torch.zeros(1, 9, dtype=torch.bool)
    frame_mask[0, [0, -1] if last else [0]] = True
    actual = encode_condition(encoders.encode, frames, frame_mask, encoders.temporal_factor)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
