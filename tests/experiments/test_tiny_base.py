"""The pretraining of the tiny base: RGB only, resumable, and what it leaves is a base like any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.tiny_wan import build_base
from experiments.tiny_wan.base import TinyBaseModule
from experiments.tiny_wan.build_base import build
from one4d_pl.config import DLCConfig, TinyWanConfig, load_config
from one4d_pl.models.pointmap_codec import PointmapCodec
from one4d_pl.models.sample_encoder import FrozenSampleEncoder
from one4d_pl.models.transformer import One4DTransformer
from one4d_pl.models.wan import WanEncoders, load_transformer
from one4d_pl.types import Encoded, collate

TINY = "{num_layers: 5, num_heads: 2, head_dim: 12, ffn_dim: 48, text_dim: 16}"


@pytest.fixture
def base_config(run_config, tmp_path):
    def make(name: str, *overrides: str):
        places = (f"run_dir={tmp_path}/{name}", f"base.path={tmp_path}/{name}_start", f"base.tiny={TINY}")
        return run_config(*places, "train.micro_batch_size=4", "train.save_every=2", *overrides)

    return make


@pytest.mark.slow
def test_a_resumed_pretraining_is_bitwise_the_undisturbed_one_and_leaves_a_base(base_config, tiny_base_plain):
    vae = Path(tiny_base_plain.path) / "vae"
    build(base_config("a"), vae)
    _stop_at(base_config("b"), vae, 4)
    build(base_config("b"), vae)
    a, b = (load_file(Path(base_config(name).run_dir) / "state.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    bundle = Path(base_config("a").run_dir) / "wan"
    start = load_transformer(base_config("a").base.path, "float32").state_dict()
    trained = load_transformer(str(bundle), "float32")
    assert any(not torch.equal(p, start[name]) for name, p in trained.state_dict().items())
    encoders = WanEncoders(str(bundle), "float32", 16)
    expected = tiny_base_plain.encoders()
    for name, tensor in encoders.vae.state_dict().items():
        assert torch.equal(tensor, expected.vae.state_dict()[name])  # the VAE is not touched
    One4DTransformer(trained, DLCConfig(rank=2), seed=0)


def _stop_at(config, vae: Path, step: int) -> None:
    """Run the whole schedule, then put back the state that lay there at `step`, as a kill after that save leaves it."""
    from experiments.tiny_wan import base as tiny_base

    kept = {}
    original = tiny_base.BaseState._save

    def save_and_keep(self, module, optimizer, at):
        original(self, module, optimizer, at)
        if at == step:
            for path in (self.path, self.path.with_suffix(".json")):
                kept[path] = path.read_bytes()

    tiny_base.BaseState._save = save_and_keep
    try:
        build(config, vae)
    finally:
        tiny_base.BaseState._save = original
    for path, content in kept.items():
        path.write_bytes(content)
    assert json.loads(next(p for p in kept if p.suffix == ".json").read_text())["step"] == step


def clip_encoder(module: TinyBaseModule) -> FrozenSampleEncoder:
    return FrozenSampleEncoder(module.encoders, PointmapCodec(1.0, module.encoders.latent_channels))


def test_the_base_never_sees_geometry(base_config, tiny_base_plain):
    config = base_config("a")
    shutil.copytree(tiny_base_plain.path, config.base.path)
    module = TinyBaseModule(config)
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # no trainer here
    from one4d_pl.data.decode import Draw, make_sample
    from one4d_pl.toy.world import render_clip

    given = torch.ones(17, dtype=torch.bool)
    given[5:] = False
    sample = make_sample(render_clip(0, 17, 32, 48), 0, Draw("sparse", given, False), config.data, None)
    encoded = clip_encoder(module).encode_sample(sample)
    other = replace(
        sample,
        pointmap=torch.rand_like(sample.pointmap),
        encoded=Encoded(
            torch.stack([encoded.latents[0], torch.randn_like(encoded.latents[1])]), encoded.prompt_embeds, None
        ),
    )
    losses = [module.training_step(collate([s]), 0) for s in (replace(sample, encoded=encoded), other)]
    assert torch.equal(losses[0], losses[1])


def test_an_image_is_the_first_frame_alone_and_nothing_of_it_is_given(base_config, tiny_base_plain):
    vae = Path(tiny_base_plain.path) / "vae"
    build(base_config("clips", "train.max_steps=2"), vae)
    config = base_config("images", "train.max_steps=2", f"base.path={base_config('clips').run_dir}/wan")
    build(config, vae, images=True)  # goes on from there
    module = TinyBaseModule(config, images=True)
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # no trainer here
    from one4d_pl.data.decode import Draw, make_sample
    from one4d_pl.toy.world import render_clip

    losses = []
    for given in (0, 17):
        mask = torch.zeros(17, dtype=torch.bool)
        mask[:given] = True
        sample = make_sample(render_clip(0, 17, 32, 48), 0, Draw("sparse", mask, False), config.data, None)
        latents = clip_encoder(module).encode_sample(sample).latents.clone()
        latents[:, :, 1:] = given  # later frames
        losses.append(module.training_step(collate([replace(sample, encoded=Encoded(latents, None, None))]), 0))
    assert torch.equal(losses[0], losses[1])


def test_a_missing_vae_is_one_line(capsys, tmp_path):
    repo = Path(__file__).parents[2]
    arguments = ["--vae", str(tmp_path / "none"), "--config", str(repo / "configs" / "tiny_base.yaml")]
    assert build_base.main(arguments) == 2
    assert "build_vae" in capsys.readouterr().err


def test_the_shipped_recipe_loads():
    config = load_config([str(Path(__file__).parents[2] / "configs" / "tiny_base.yaml")], [])
    assert isinstance(config.base.tiny, TinyWanConfig) and config.data.toy is not None
