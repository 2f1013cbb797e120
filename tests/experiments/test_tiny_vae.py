"""Laws of the tiny VAE's training: it learns, resumes exactly, is measured through diffusers, beside a true PCA."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from experiments.tiny_wan import build_vae
from experiments.tiny_wan import vae as tiny_vae
from experiments.tiny_wan.vae import (
    ClipPool,
    Stage,
    TinyVaeConfig,
    VaeTraining,
    decode_unclamped,
    draw_batch,
    evaluate,
    importance,
    load_training,
    measure_latents,
    orthogonalise,
    pca_baseline,
    principal_components,
    render_pool,
    save_training,
    train_step,
)

SMALL = TinyVaeConfig(
    base_dim=4,
    decoder_base_dim=4,
    lr=0.02,
    warmup_steps=2,
    stages=(Stage(0.5, 5, 16, 16, 2), Stage(1.0, 9, 16, 16, 2)),
)


@pytest.fixture(scope="module")
def pool() -> ClipPool:
    clips = [(seed, "synthetic") for seed in range(3)] + [(2_000_000, "real")]
    return render_pool(clips, 9, 16, 24, far_limit=10.0, z_offset=False)


def run(training: VaeTraining, pool: ClipPool, config: TinyVaeConfig, steps: range, total: int) -> list[float]:
    return [float(train_step(training, pool, config, step / total).mean()) for step in steps]


def assert_same(actual: VaeTraining, expected: VaeTraining) -> None:
    assert (actual.step, actual.seconds) == (expected.step, expected.seconds)
    torch.testing.assert_close(actual.vae.state_dict(), expected.vae.state_dict(), rtol=0, atol=0)
    for group in ("average", "first", "second"):
        torch.testing.assert_close(getattr(actual, group), getattr(expected, group), rtol=0, atol=0)


def test_the_pool_holds_what_the_vae_can_hold(pool):
    for kind in tiny_vae.KINDS:
        videos = pool.videos(kind, slice(None))
        assert videos.shape == (4, 3, 9, 16, 24)
        assert videos.abs().max() <= 1
    assert pool.pointmaps.float().abs().max() < 0.975  # the sky code, strictly inside the VAE's clamp
    assert pool.valid.any()


def test_training_makes_the_error_fall(pool):
    config = replace(SMALL, stages=(Stage(1.0, 5, 16, 16, 2),))
    training = VaeTraining.start(tiny_vae.build_vae(config))
    errors = run(training, pool, config, range(60), 60)
    assert sum(errors[-5:]) < 0.6 * sum(errors[:5])
    for name, p in training.vae.named_parameters():
        assert bool(p.isfinite().all()), name


def test_a_resumed_run_equals_an_uninterrupted_one(pool, tmp_path):
    whole, part = VaeTraining.start(tiny_vae.build_vae(SMALL)), VaeTraining.start(tiny_vae.build_vae(SMALL))
    run(whole, pool, SMALL, range(6), 6)
    run(part, pool, SMALL, range(3), 6)
    part.seconds = whole.seconds = 1 / 3  # a number that is not short in decimals
    save_training(part, SMALL, tmp_path / "state.safetensors")
    resumed = load_training(tmp_path / "state.safetensors", SMALL)
    assert_same(resumed, part)
    run(resumed, pool, SMALL, range(3, 6), 6)
    assert_same(resumed, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_state_is_refused_under_another_config(tmp_path):
    save_training(VaeTraining.start(tiny_vae.build_vae(SMALL)), SMALL, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="another folder"):
        load_training(tmp_path / "state.safetensors", replace(SMALL, lr=0.1))


def test_batches_follow_from_the_step_alone_and_alternate_frames_and_pointmaps(pool):
    stage = Stage(1.0, 5, 16, 16, 4)
    batch = draw_batch(pool, stage, SMALL, 7)
    torch.testing.assert_close(batch, draw_batch(pool, stage, SMALL, 7), rtol=0, atol=0)
    assert not torch.equal(batch, draw_batch(pool, stage, SMALL, 8))
    frames_only = draw_batch(pool, stage, replace(SMALL, pointmaps=False), 7)

    def is_bytes(video: Tensor) -> bool:
        levels = (video + 1) * 127.5
        return bool((levels - levels.round()).abs().max() < 1e-3)

    assert [is_bytes(video) for video in batch] == [True, False, True, False]
    assert all(is_bytes(video) for video in frames_only)


def test_near_points_count_more_and_frames_all_the_same():
    videos = torch.rand(4, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    videos[1], videos[3] = 0.05, 0.5
    weight = importance(videos, replace(SMALL, near_weight=0.2))
    assert weight.shape == (4, 1, 1, 2, 2)
    assert bool((weight[::2] == 1).all()) and bool((weight[1] > weight[3]).all()) and bool((weight[3] > 1).all())
    assert bool((importance(videos, replace(SMALL, pointmaps=False)) == 1).all())


def test_training_decodes_as_diffusers_does_up_to_the_clamp():
    vae = tiny_vae.build_vae(SMALL).eval()
    latents = 3 * torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(20)  # so that the clamp has something to do
        free = decode_unclamped(vae, latents)
        torch.testing.assert_close(free.clamp(-1, 1), vae.decode(latents).sample, rtol=0, atol=0)
    assert free.abs().max() > 1


def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values():
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u * torch.logspace(0, -1.7, 6) @ vt
    for given, expected in ((matrix, u @ vt), (matrix.T, (u @ vt).T)):
        result = orthogonalise(given)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.3
        assert torch.cosine_similarity(result.flatten(), expected.flatten(), dim=0) > 0.95


def test_principal_components_are_those_of_the_svd():
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.7 ** torch.arange(12.0)) + 3
    mean, basis = principal_components(rows, 4)
    centred = rows - mean
    residual = (centred - centred @ basis @ basis.T).square().sum()
    expected = torch.linalg.svdvals(centred.double())[4:].square().sum()  # Eckart-Young: nothing linear does better
    torch.testing.assert_close(residual, expected.float(), rtol=1e-3, atol=0)


def test_the_pca_bar_is_exact_where_the_clips_are_that_simple(pool):
    flat = torch.randint(0, 256, (4, 3, 1, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    blocks = flat.repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(9, 2)  # [4, 3, 9, 16, 24]
    simple = ClipPool(blocks, blocks.half() / 300, pool.valid)
    baseline = pca_baseline(simple, simple, 3)
    assert baseline["frames"].psnr > 80 and baseline["pointmaps"].psnr > 80
    assert baseline["pointmaps"].point_error is not None and baseline["pointmaps"].point_error < 1e-3
    assert pca_baseline(simple, simple, 2)["frames"].psnr < 40  # one colour axis is missing
    assert pca_baseline(pool, pool, 16)["frames"].psnr > pca_baseline(pool, pool, 4)["frames"].psnr


def test_the_latents_statistics_are_measured_over_frames(pool):
    vae = tiny_vae.build_vae(SMALL).eval()
    measure_latents(vae, pool, 2, bfloat16=False)
    with torch.no_grad():
        latents = vae.encode(pool.videos("frames", slice(0, 2))).latent_dist.mode()
    normalised = latents - torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    normalised = normalised / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    std, mean = torch.std_mean(normalised, dim=(0, 2, 3, 4))
    torch.testing.assert_close(mean, torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones(16), rtol=0, atol=1e-4)


def test_an_exported_vae_is_the_averaged_one_4x_in_time_and_space(pool, tmp_path):
    training = VaeTraining.start(tiny_vae.build_vae(SMALL))
    run(training, pool, SMALL, range(3), 3)
    exported = build_vae.export(training, SMALL, pool, tmp_path / "vae", bfloat16=False)
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False).eval()
    torch.testing.assert_close(loaded.state_dict(), exported.state_dict(), rtol=0, atol=0)
    for name, p in loaded.named_parameters():
        torch.testing.assert_close(p.detach(), training.average[name], rtol=1e-3, atol=1e-6)  # half precision on disk
    assert (loaded.config.scale_factor_temporal, loaded.config.scale_factor_spatial) == (4, 4)
    assert loaded.config.latents_std != [1.0] * 16
    with torch.no_grad():
        latents = loaded.encode(pool.videos("frames", slice(0, 1))).latent_dist.mode()
    assert latents.shape == (1, 16, 3, 4, 6)
    assert evaluate(loaded, pool, bfloat16=False) == evaluate(exported, pool, bfloat16=False)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    build_vae.export(training, SMALL, pool, tmp_path / "vae", bfloat16=False)  # over an older one
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_the_door_trains_resumes_and_leaves_its_figures(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(build_vae, "render_pools", lambda config: (pool, pool))
    monkeypatch.setattr(build_vae, "EVALUATE_SECONDS", 4.0)
    ticks = itertools.count()
    monkeypatch.setattr(build_vae, "monotonic", lambda: float(next(ticks)))  # every step takes one second
    monkeypatch.setattr(tiny_vae, "TinyVaeConfig", lambda pointmaps: replace(SMALL, pointmaps=pointmaps))
    seen: list[float] = []

    def watched(training: VaeTraining, pool: ClipPool, config: TinyVaeConfig, progress: float) -> Tensor:
        seen.append(progress)
        return train_step(training, pool, config, progress)

    monkeypatch.setattr(tiny_vae, "train_step", watched)
    folder = str(tmp_path / "run")
    assert build_vae.main(["--out", folder, "--minutes", "0.1", "--no-pointmaps"]) == 0
    first = json.loads((Path(folder) / "metrics.json").read_text())
    assert first["config"]["pointmaps"] is False
    assert build_vae.main(["--out", folder, "--minutes", "0.2", "--no-pointmaps", "--resume"]) == 0
    second = json.loads((Path(folder) / "metrics.json").read_text())
    assert (first["steps"], second["steps"]) == (6, 12)
    torch.testing.assert_close(seen, [step / 6 for step in range(6)] + [step / 12 for step in range(6, 12)])
    assert [point["step"] for point in second["curve"]] == [4, 6, 8, 12]
    assert second["curve"][: len(first["curve"])] == first["curve"]
    assert second["vae"]["frames"]["psnr"] > 0 and second["pca"]["frames"]["psnr"] > 0


def test_finishing_moves_the_decoder_and_keeps_the_latents(pool, tmp_path):
    started = tiny_vae.build_vae(SMALL)
    measure_latents(started.eval(), pool, 2, bfloat16=False)
    training = VaeTraining.start(started)
    before = {name: p.detach().clone() for name, p in started.named_parameters()}
    config = tiny_vae.finishing_config(SMALL, 9, 16, 24)
    errors = run(training, pool, config, range(30), 30)
    assert sum(errors[-5:]) < sum(errors[:5])
    moved = {name for name, p in started.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in moved} == {"decoder", "post_quant_conv"}
    exported = build_vae.export(training, config, pool, tmp_path / "vae", bfloat16=False)
    assert exported.config.latents_mean == started.config.latents_mean


def test_the_door_says_what_is_wrong(tmp_path, capsys):
    assert build_vae.main(["--out", str(tmp_path), "--minutes", "1", "--resume"]) == 2
    assert "leave --resume away" in capsys.readouterr().err
    assert build_vae.main(["--out", str(tmp_path), "--minutes", "1", "--finish", str(tmp_path / "none")]) == 2
    assert "holds no VAE" in capsys.readouterr().err
    save_training(VaeTraining.start(tiny_vae.build_vae(SMALL)), SMALL, tmp_path / "state.safetensors")
    assert build_vae.main(["--out", str(tmp_path), "--minutes", "1"]) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert build_vae.main(["--out", str(tmp_path), "--minutes", "1", "--resume"]) == 2
    assert "another folder" in capsys.readouterr().err


def test_bent_pointmaps_are_measured_as_points_and_trained_as_the_network_sees_them():
    clips = [(seed, "synthetic") for seed in range(2)]
    straight, bent = (render_pool(clips, 5, 16, 24, 10.0, False, "clear", pointmap_power=power) for power in (1.0, 0.5))
    assert torch.equal(straight.pointmaps, bent.pointmaps) and torch.equal(straight.frames, bent.frames)
    truth, seen = straight.videos("pointmaps", slice(None)), bent.videos("pointmaps", slice(None))
    assert seen.norm(dim=1).mean() > 1.2 * truth.norm(dim=1).mean()  # near points get more of the cube
    exact = tiny_vae.measure(seen + 1e-6, bent, "pointmaps")
    assert exact.point_error is not None and exact.point_error < 1e-4
    # 1 % of each bent distance is 2 % of the distance that it stands for
    off = tiny_vae.measure(torch.where(bent.valid[:, None], 1.01 * seen, seen), bent, "pointmaps")
    assert off.point_error == pytest.approx(0.0201, rel=0.02)
    drawn = draw_batch(bent, Stage(1.0, 5, 16, 24, 2), SMALL, 0)[1]
    assert any(torch.equal(drawn, video) for video in seen)
