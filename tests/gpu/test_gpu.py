"""Laws on a true GPU, in bfloat16 under autocast as a run has it; `python -m experiments.gpu_proof` runs them."""

from __future__ import annotations

import copy

import pytest
import torch

from experiments import bench_gpu
from one4d_pl.config import CHECKPOINTING, DLCConfig, OptimConfig
from one4d_pl.costs.flops import BatchShape
from one4d_pl.models.attention_norms import norm_without_autocast
from one4d_pl.models.base_files import RELEASED
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.training.optim import build_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda")
SHALLOW = {**RELEASED["1.3B"], "num_layers": 4}
CLIP = BatchShape(clips=1, latent_grid=(5, 44, 78), text_tokens=512, image_tokens=257)


def case(checkpointing: str) -> bench_gpu.Case:
    return bench_gpu.Case("1.3B", checkpointing, "native", False, SHALLOW, DLCConfig(num_links=1), CLIP)


def test_at_step_0_the_frames_are_plain_wans_bit_for_bit():
    plain = bench_gpu.random_base(SHALLOW, CUDA)
    norm_without_autocast(plain)  # which Wan's own inference has; autocast would run these norms in float32
    model = One4DTransformer(copy.deepcopy(plain), DLCConfig(num_links=1), seed=0)
    inputs = bench_gpu.random_inputs(case("none"), CUDA)
    condition = torch.cat([inputs.condition, torch.zeros_like(inputs.condition)])
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        actual = model(inputs.latents, inputs.condition, inputs.sigma, inputs.prompt_embeds, inputs.image_embeds)
        (expected,) = plain(
            hidden_states=torch.cat([inputs.latents, condition], dim=1),
            timestep=1000 * inputs.sigma,
            encoder_hidden_states=inputs.prompt_embeds.repeat(2, 1, 1),
            encoder_hidden_states_image=inputs.image_embeds.repeat(2, 1, 1),
            return_dict=False,
        )
    assert torch.equal(actual.chunk(2)[0], expected.chunk(2)[0])


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_step_takes_the_memory_that_is_planned(checkpointing):
    """Of tensors, by the allocator, within 5 %."""
    now = case(checkpointing)
    transformer = One4DTransformer(bench_gpu.random_base(now.settings, CUDA), now.dlc, seed=0)
    transformer.set_activation_checkpointing(checkpointing)
    optimizer, inputs = build_optimizer(transformer, OptimConfig()), bench_gpu.random_inputs(now, CUDA)
    bench_gpu.training_step(transformer, optimizer, inputs)  # AdamW's moments
    for _, parameter in transformer.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = bench_gpu.training_step(transformer, optimizer, inputs)
    assert loss.isfinite()
    elsewhere = before - _held(transformer, optimizer)
    assert torch.cuda.max_memory_allocated() - elsewhere == pytest.approx(now.memory.tensors, rel=0.05)


def _held(transformer: One4DTransformer, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and moments."""
    tensors = [*transformer.parameters(), *(p.grad for p in transformer.parameters() if p.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
