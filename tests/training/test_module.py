"""Laws of the training step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import AcceleratorRegistry

from one4d_pl.config import TrainConfig
from one4d_pl.models.conditioning import encode_condition
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.training.module import One4DModule
from one4d_pl.training.optim import build_optimizer, lr_share, set_learning_rates
from one4d_pl.training.strategy import training_data
from one4d_pl.training.zero import ZeroStrategy
from one4d_pl.types import Batch, Encoded, Sample, collate


@pytest.fixture
def module(run_config) -> One4DModule:
    module = One4DModule(run_config(), adapters=None)
    module.configure_model()
    with torch.no_grad():
        for _, parameter in module.transformer.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return module


def stream(module: One4DModule, positions: range) -> list[Sample]:
    datamodule = training_data(module.config)
    datamodule.encoder = lambda device: FrozenSampleEncoder(module.encoders, module.transformer.codec)
    datamodule.prepare_data()
    datamodule.setup("fit")
    clips = datamodule.train_dataloader().dataset
    return [clips[p] for p in positions]


def losses(module: One4DModule, batch: Batch) -> torch.Tensor:  # [2, B]
    with torch.no_grad():
        step = module.training_step(batch, 0)
    return torch.stack([step["rgb"], step["xyz"]])


def test_cached_and_fresh_encodings_give_the_same_loss(module):
    samples = stream(module, range(8))
    assert all(isinstance(s.encoded, Encoded) for s in samples) and len({s.task for s in samples}) >= 3
    cached = losses(module, collate(samples))
    fresh = losses(module, collate([replace(s, encoded=None) for s in samples]))
    torch.testing.assert_close(cached, fresh, rtol=0, atol=1e-5)


def test_a_samples_loss_does_not_depend_on_its_neighbours(module):
    samples = stream(module, range(6))
    together = losses(module, collate(samples))
    alone = torch.cat([losses(module, collate([s])) for s in samples], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_noise_and_sigma_derive_from_the_position_alone(module):
    first, second = stream(module, range(2))
    torch.manual_seed(123)
    before = losses(module, collate([first]))
    torch.rand(7)
    assert torch.equal(losses(module, collate([first])), before)
    moved = replace(first, position=second.position)
    assert not torch.equal(losses(module, collate([moved])), before)
    rgb, xyz = module.draw_noise(collate([first]), "noise").chunk(2)
    assert not torch.equal(rgb, xyz)  # each branch has its own noise (One4D, Eq. 1)
    drawn = [
        module.draw_noise(collate([s]), purpose) for s in (first, moved) for purpose in ("noise", "sampling noise")
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_both_branches_have_one_noise_level(module, monkeypatch):
    seen = []
    monkeypatch.setattr(module.transformer, "forward", lambda noisy, _, sigma, *rest: seen.append(sigma) or noisy)
    batch = collate(stream(module, range(4)))
    losses(module, batch)
    rgb, xyz = seen[0].chunk(2)
    assert torch.equal(rgb, xyz) and len(set(rgb.tolist())) == 4 and bool(((rgb > 0) & (rgb < 1)).all())


def test_standardised_pointmaps_are_what_is_noised_and_predicted(module):
    """At sigma 1 the network sees noise alone: only the target can tell; the frames' branch knows nothing of it."""
    batch, whole = collate(stream(module, range(2))), torch.ones(4)
    noise = module.draw_noise(batch, "noise")
    with torch.no_grad():
        rgb, xyz = module.losses(batch, whole, noise)
        module.transformer.codec.set_statistics([0.5] * 16, [0.25] * 16)
        rgb_again, xyz_again = module.losses(batch, whole, noise)
        latents = module.encode(batch)[0]
        module.transformer.codec.set_statistics([0.0] * 16, [1.0] * 16)
        halves = latents.clone()
        halves[2:] = (latents[2:] - 0.5) / 0.25
        module.encode = lambda _: (halves, *type(module).encode(module, batch)[1:])
        _, expected = module.losses(batch, whole, noise)
    assert torch.equal(rgb, rgb_again) and not torch.allclose(xyz, xyz_again, rtol=0.1)
    torch.testing.assert_close(xyz_again, expected, rtol=1e-5, atol=0)


def test_the_condition_of_every_task_is_the_plain_one(module):
    samples = stream(module, range(12))
    batch = collate(samples)
    assert {s.task for s in samples} == {"text", "image", "sparse", "video"}
    latents, _, _ = module.encode(batch)
    plain = encode_condition(module.encoders.encode, batch.frames, batch.frame_mask, 4)
    spared = encode_condition(module.encoders.encode, batch.frames, batch.frame_mask, 4, latents[: len(batch)])
    torch.testing.assert_close(spared, plain, rtol=0, atol=1e-5)


@pytest.fixture
def with_image_tokens(run_config, tiny_base) -> One4DModule:
    if not tiny_base.image_tokens:
        pytest.skip("the base has no image tokens")
    module = One4DModule(run_config(f"base.path={tiny_base.path}", "base.max_text_tokens=512"), adapters=None)
    module.configure_model()
    return module


def test_image_tokens_reach_the_step(with_image_tokens):
    module, samples = with_image_tokens, stream(with_image_tokens, range(6))
    batch, fresh = collate(samples), collate([replace(s, encoded=None) for s in samples])
    _, _, cached_tokens = module.encode(batch)
    expected = module.encoders.encode_first_frame(batch.frames, batch.frame_mask)
    torch.testing.assert_close(cached_tokens, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(losses(module, batch), losses(module, fresh), rtol=0, atol=1e-5)


def test_a_step_without_frame_0_gets_zero_image_tokens_cached_or_not(with_image_tokens):
    image, text = stream(with_image_tokens, range(2))
    given = torch.zeros_like(image.frame_mask)
    given[0] = True
    samples = [replace(image, frame_mask=given), replace(text, frame_mask=torch.zeros_like(given))]
    for batch in (collate(samples), collate([replace(s, encoded=None) for s in samples])):
        _, _, tokens = with_image_tokens.encode(batch)
        assert tokens is not None and tokens.shape[:2] == (2, 17)  # there, not absent
        assert tokens[0].abs().max() > 0 and tokens[1].abs().max() == 0


def test_sample_generates_scenes_of_the_batchs_size(module):
    batch = collate(stream(module, range(2)))
    scene = module.sample(batch)
    assert scene.frames.shape == scene.pointmap.shape == batch.frames.shape
    assert torch.equal(scene.frames, module.sample(batch).frames)


def test_a_module_whose_base_is_sharded_knows_where_it_computes(run_config, monkeypatch):
    """The engine moves it nowhere then, so nothing else would tell it, and its sigmas would lie on the CPU."""
    monkeypatch.setattr(ZeroStrategy, "root_device", torch.device("cpu", 0))
    module = One4DModule(run_config(), adapters=None)
    ZeroStrategy.__new__(ZeroStrategy)._setup_model(module)
    assert module.device == torch.device("cpu", 0)


def test_zero_sets_itself_up_on_the_gpus_that_lightning_gives_it(monkeypatch):
    """Lightning has two classes of this name; the Trainer's own is meant, else a GPU would be taken for a CPU."""
    strategy = ZeroStrategy(TrainConfig(zero_stage=2), bfloat16=True, timeout=timedelta(minutes=1))
    strategy.accelerator = AcceleratorRegistry.get("cuda")
    strategy.parallel_devices = gpus = [torch.device("cuda", i) for i in range(2)]
    strategy.cluster_environment = LightningEnvironment()
    chosen = []
    monkeypatch.setattr(type(strategy.accelerator), "setup_device", lambda self, device: chosen.append(device))
    monkeypatch.setattr(ZeroStrategy, "setup_distributed", lambda self: None)  # there is no NCCL here
    strategy.setup_environment()
    assert chosen == gpus[:1] and strategy.parallel_devices == gpus


def test_learning_rates_groups_and_warm_up(module):
    config = module.config.optim
    optimizer = build_optimizer(module.transformer, config)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["links"]["base_lr"] == config.lr  # width 24 is below 1280
    assert groups["xyz_patch_embedding"]["weight_decay"] == 0
    wide = build_optimizer(module.transformer, replace(config, link_lr_width=12))
    assert wide.param_groups[1]["base_lr"] == pytest.approx(config.lr / 2)
    set_learning_rates(optimizer, 0, 100, replace(config, warmup_steps=10))
    assert groups["lora"]["lr"] == pytest.approx(config.lr / 10)
    constant = replace(config, warmup_steps=2, cooldown_steps=0)
    assert [lr_share(s, 6, constant) for s in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert [lr_share(s, 6, replace(constant, cooldown_steps=4)) for s in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    counted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert counted == sum(module.transformer.parameter_counts().values())


def test_bfloat16_autocast_trains_float32_trainables(module):
    batch = collate(stream(module, range(2)))
    with torch.autocast("cpu", torch.bfloat16):
        step = module.training_step(batch, 0)
    step["loss"].backward()
    full = losses(module, batch)
    half = torch.stack([step["rgb"], step["xyz"]])
    assert all(p.dtype == p.grad.dtype == torch.float32 for _, p in module.transformer.trainable_parameters())
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)
    assert not torch.equal(half, full)
