"""Laws of flow matching in Wan's sign."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from one4d_pl.diffusion.flow_matching import interpolate, mse_per_sample, shift_sigma
from one4d_pl.diffusion.sampler import integrate


def test_velocity_is_the_derivative_of_the_path_and_both_ends_are_exact():
    latents, noise = torch.randn(4, 3, 2, 2, 2).double(), torch.randn(4, 3, 2, 2, 2).double()
    sigma = torch.tensor([0.0, 0.3, 0.7, 1.0]).double()
    noisy, velocity = interpolate(latents, noise, sigma)
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[3], noise[3])
    later, _ = interpolate(latents, noise, sigma + 1e-3)
    torch.testing.assert_close((later - noisy) / 1e-3, velocity, rtol=1e-9, atol=1e-9)
    # the paper's t = 1 - sigma and v = latents - noise (One4D, Eq. 1-2)
    torch.testing.assert_close(noisy, (1 - sigma).view(-1, 1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1, 1) * noise)
    assert torch.equal(-velocity, latents - noise)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shift_equals_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    uniform = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(shift_sigma(uniform, shift), scheduler.sigmas, rtol=0, atol=1e-6)


def test_losses_are_means_per_sample_and_branch():
    prediction, target = torch.zeros(4, 2, 1, 2, 2), torch.zeros(4, 2, 1, 2, 2)
    for i in range(4):
        target[i] = i + 1
    rgb, xyz = mse_per_sample(prediction, target)
    assert rgb.tolist() == [1, 4] and xyz.tolist() == [9, 16]


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_every_solver_with_the_true_velocity_returns_the_latents(steps, shift, solver):
    latents, noise = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3)
    seen: list[int] = []
    sampled = integrate(lambda noisy, sigma: noise - latents, noise, steps, shift, solver, seen.append)
    torch.testing.assert_close(sampled, latents, rtol=0, atol=1e-5)
    assert seen == list(range(1, steps + 1))


def test_the_sampler_hands_over_the_sigma_of_the_noisy_latents():
    latents, noise = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3)

    def velocity(noisy, sigma):
        expected, _ = interpolate(latents, noise, sigma)
        torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-5)
        return noise - latents

    integrate(velocity, noise, 10, 5.0, "euler", lambda step: None)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 3.0), (4, 5.0), (50, 1.0)])
def test_the_schedule_is_wans_and_no_step_is_wasted(solver, steps, shift):
    """Wan's `get_sampling_sigmas`: a shifted linspace over n sigmas, and 0 after it."""
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:steps]
    expected = shift * uniform / (1 + (shift - 1) * uniform)
    asked: list[float] = []

    def velocity(noisy, sigma):
        asked.append(float(sigma[0]))
        return torch.zeros_like(noisy)

    integrate(velocity, torch.randn(2, 4, 1, 2, 2), steps, shift, solver, lambda step: None)
    # UniPC cuts its timesteps to whole numbers: up to 1 / 1000 less, and what float32 adds
    torch.testing.assert_close(torch.tensor(asked).double(), expected, rtol=0, atol=1e-6 + (solver == "unipc") * 1e-3)
    assert asked[-1] >= 0.9 / steps  # the last step goes the whole way: diffusers' default leaves 0.001 of it


def test_n_steps_of_euler_are_n_steps():
    """On a curved path every further step comes nearer: 2 steps are not 1 step's result."""

    def miss(steps: int) -> float:
        start = torch.ones(2, 1, 1, 1, 1, dtype=torch.float64)
        # d latents / d sigma = latents, from sigma 1 to 0: exactly e^-1
        end = integrate(lambda noisy, sigma: noisy, start, steps, 1.0, "euler", lambda step: None)
        return abs(float(end[0]) - math.exp(-1))

    misses = [miss(steps) for steps in (1, 2, 3, 5, 10)]
    assert misses == sorted(misses, reverse=True) and misses[1] < 0.5 * misses[0]
