"""Laws of the encoded cache: what is written is read back, a stale one never, and a broken file is a SampleError."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from one4d_pl.config import DataConfig, MaskingConfig
from one4d_pl.data.decode import ClipStream
from one4d_pl.data.encoded import EMPTY_PROMPT, EncodedCache, cache_key
from one4d_pl.data.order import MixtureOrder
from one4d_pl.data.shards import SampleError, ShardSet, write_shards
from one4d_pl.data.toy_world import render_clip
from one4d_pl.types import Encoded


def make_encoded(seed: int, image_tokens: bool = False, dtype: torch.dtype = torch.float32) -> Encoded:
    rng = torch.Generator().manual_seed(seed)
    return Encoded(
        latents=torch.randn(2, 16, 5, 2, 4, generator=rng),
        prompt_embeds=torch.randn(3 + seed, 8, generator=rng).to(dtype),
        image_embeds=torch.randn(5, 6, generator=rng).to(dtype) if image_tokens else None,
    )


def empty_prompt() -> torch.Tensor:
    return torch.full((1, 8), -1.0)


@pytest.fixture
def cache(tmp_path: Path) -> EncodedCache:
    """Of two clips, "a" and "b"."""
    cache = EncodedCache.beside(str(tmp_path / "shards"), "0123456789abcdef")
    cache.write_empty_prompt(empty_prompt)
    cache.write("a", make_encoded(0))
    cache.write("b", make_encoded(1))
    return cache


@pytest.mark.parametrize("image_tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoding_comes_back_bit_for_bit(cache, image_tokens, dtype):
    expected = make_encoded(2, image_tokens, dtype)
    assert not cache.has("c")
    cache.write("c", expected)
    assert cache.has("c")
    actual = cache.read("c", drop_caption=False)
    assert torch.equal(actual.latents, expected.latents)
    assert torch.equal(actual.prompt_embeds, expected.prompt_embeds) and actual.prompt_embeds.dtype == dtype
    if image_tokens:
        assert torch.equal(actual.image_embeds, expected.image_embeds)
    else:
        assert actual.image_embeds is None


def test_a_dropped_caption_reads_the_empty_prompt_and_the_same_latents(cache):
    kept, dropped = cache.read("a", drop_caption=False), cache.read("a", drop_caption=True)
    assert torch.equal(dropped.prompt_embeds, empty_prompt())
    assert torch.equal(kept.prompt_embeds, make_encoded(0).prompt_embeds)
    assert torch.equal(dropped.latents, kept.latents)


def test_the_empty_prompt_is_embedded_once(cache):
    def never() -> torch.Tensor:
        raise AssertionError("embedded twice")

    cache.write_empty_prompt(never)


def test_a_clip_called_like_the_empty_prompt_does_not_take_its_place(cache):
    cache.write(EMPTY_PROMPT.strip("_"), make_encoded(5))
    assert torch.equal(cache.read("a", drop_caption=True).prompt_embeds, empty_prompt())


def test_strided_tensors_are_stored_as_they_look(cache):
    encoded = make_encoded(0)
    turned = dataclasses.replace(encoded, latents=encoded.latents.transpose(3, 4))
    cache.write("turned", turned)
    assert torch.equal(cache.read("turned", False).latents, turned.latents)


def test_nothing_is_left_beside_the_files(cache):
    assert {path.name for path in cache.folder.iterdir()} == {f"{key}.safetensors" for key in ("a", "b", EMPTY_PROMPT)}


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "not safetensors": lambda path: path.write_bytes(b"\x80\x04pickle" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("broken", ["a", EMPTY_PROMPT])
def test_a_broken_file_is_a_sample_error_with_a_remedy(cache, damage, broken):
    DAMAGE[damage](cache.folder / f"{broken}.safetensors")
    with pytest.raises(SampleError) as caught:
        cache.read("a", drop_caption=broken == EMPTY_PROMPT)
    message = str(caught.value)
    assert "\n" not in message and "sample a" in message and str(cache.folder) in message and "delete" in message
    cache.read("b", drop_caption=False)  # the others are fine


def test_a_file_of_other_tensors_is_a_sample_error(cache):
    (cache.folder / "a.safetensors").write_bytes((cache.folder / f"{EMPTY_PROMPT}.safetensors").read_bytes())
    with pytest.raises(SampleError, match="latents"):
        cache.read("a", drop_caption=False)


def test_every_setting_that_changes_an_encoding_changes_the_key():
    config = DataConfig(num_frames=17, height=16, width=32)
    knobs = {"num_frames": 21, "height": 32, "width": 16, "far_limit": 5.0, "z_offset": True}
    changed = [dataclasses.replace(config, **{knob: value}) for knob, value in knobs.items()]
    keys = [cache_key("wan", 96, config), cache_key("another wan", 96, config), cache_key("wan", 512, config)]
    keys += [cache_key("wan", 96, other) for other in changed]
    assert len(set(keys)) == len(keys)
    assert cache_key("wan", 96, dataclasses.replace(config, num_workers=7, block_shards=2)) == keys[0]


def test_the_stream_brings_each_clips_own_encoding_and_skips_a_broken_one(tmp_path):
    folder = tmp_path / "shards"
    clips = [render_clip(seed, 17, 16, 32) for seed in range(4)]
    write_shards(clips, folder, samples_per_shard=2)
    cache = EncodedCache.beside(str(folder), "0123456789abcdef")
    cache.write_empty_prompt(empty_prompt)
    expected = {clip.key: make_encoded(n) for n, clip in enumerate(clips)}
    for key, encoded in expected.items():
        cache.write(key, encoded)
    DAMAGE["cut short"](cache.folder / f"{clips[2].key}.safetensors")
    source = ShardSet.open(folder)
    order = MixtureOrder([source.samples_per_shard], [1.0], 0, 8)
    config = DataConfig(num_frames=17, height=16, width=32)
    stream = ClipStream([source], [cache], order, config, MaskingConfig(), 0.5, 0, 0, validation=False)
    samples = [stream[n] for n in range(40)]
    assert {sample.drop_caption for sample in samples} == {False, True}
    for sample in samples:
        assert torch.equal(sample.encoded.latents, expected[sample.key].latents)
        prompt = empty_prompt() if sample.drop_caption else expected[sample.key].prompt_embeds
        assert torch.equal(sample.encoded.prompt_embeds, prompt)
    skipped = [reason for sample in samples for reason in sample.skipped]
    assert len(skipped) == 10 and all(clips[2].key in reason for reason in skipped)
