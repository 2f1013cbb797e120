"""Laws of encoded shards: what is encoded is read back, a stale one never, and a broken one is a SampleError."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from one4d_pl.config import Config, DataConfig, FlowConfig, TrainConfig
from one4d_pl.data.clip_codec import tar_members
from one4d_pl.data.datamodule import video_sample_maker
from one4d_pl.data.decode import ClipStream
from one4d_pl.data.encoded import (
    EncodedSet,
    StoredClip,
    cache_folder,
    draw_sparse_masks,
    encode_set,
    encoding_recipe,
    open_set,
)
from one4d_pl.data.masking import task_of
from one4d_pl.data.ranged_reads import PLAIN_READER
from one4d_pl.data.sample_order import MixtureOrder
from one4d_pl.data.shards import SampleError, ShardSet, ShardSetError, write_shards
from one4d_pl.data.tar_set import tar_bytes
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Encoded, Sample
from tests.data.conftest import flip_byte

CONFIG = DataConfig(num_frames=17, height=16, width=32)
RECIPE = encoding_recipe("wan", 96, CONFIG)
K = 3


class HashEncoder:
    """Random numbers in the encoders' shapes, the same for the same clip; counts what it is asked."""

    def __init__(self, image_tokens: bool = True) -> None:
        self.image_tokens = image_tokens
        self.encoded: list[str] = []

    def encode_sample(self, sample: Sample) -> Encoded:
        self.encoded.append(sample.key)
        rng = torch.Generator().manual_seed(int(sample.key[-4:]))
        image = torch.randn(5, 6, generator=rng) if self.image_tokens else None
        latents = torch.randn(2, 16, 2, 4, 5, generator=rng).transpose(2, 4)  # strided, as encoders may give them
        return Encoded(latents, self.encode_prompts([sample.caption])[0], image)

    def encode_prompts(self, prompts: list[str]) -> list[Tensor]:
        return [torch.full((1 + len(prompt) % 5, 8), float(len(prompt))) for prompt in prompts]

    def encode_conditions(self, sample: Sample, frame_masks: Tensor) -> Tensor:
        return torch.stack([sample.frames.mean() + given.sum() + torch.zeros(16, 5, 4, 2) for given in frame_masks])


@pytest.fixture(scope="module")
def raw_pristine(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("raw")
    return write_shards([render_clip(seed, 17, 16, 32) for seed in range(5)], folder, samples_per_shard=2)


def encode(raw: ShardSet, folder: Path, draws: int = K, encoder: HashEncoder | None = None, **task: int) -> bool:
    encoder = encoder or HashEncoder()
    return encode_set(raw, folder, RECIPE, draws, lambda: encoder, video_sample_maker(raw, CONFIG), **task)


@pytest.mark.parametrize("image_tokens", [False, True])
def test_encodings_come_back(raw_pristine, tmp_path, image_tokens):
    encoder = HashEncoder(image_tokens)
    assert encode(raw_pristine, tmp_path, encoder=encoder)
    encoded_set = open_set(tmp_path)
    assert isinstance(encoded_set, EncodedSet) and encoded_set.sparse_draws == K
    assert [e.key for e in encoded_set.entries] == [e.key for e in raw_pristine.entries]
    make = video_sample_maker(raw_pristine, CONFIG)
    for index, entry in enumerate(raw_pristine.entries):
        sample, stored = make(index), encoded_set.read(index)
        expected = encoder.encode_sample(sample)
        assert torch.equal(stored.latents, expected.latents) and torch.equal(stored.cam2world, sample.cam2world)
        assert torch.equal(stored.prompt_embeds, expected.prompt_embeds) and stored.caption == sample.caption
        assert torch.equal(stored.empty_prompt, encoder.encode_prompts([""])[0])
        assert (stored.scale.scale, stored.scale.offset) == (sample.scale.scale, sample.scale.offset)
        assert (stored.image_embeds is None) == (not image_tokens)
        masks = draw_sparse_masks(entry.key, 17, K)
        assert torch.equal(stored.sparse_masks, masks) and len({tuple(m) for m in masks.tolist()}) > 1
        assert {task_of(given) for given in masks} == {"sparse"}
        first = torch.arange(17) == 0
        conditions = encoder.encode_conditions(sample, torch.cat([first[None], masks]))
        assert torch.equal(stored.conditions, conditions.bfloat16())


def test_each_draw_gets_its_own_condition_and_prompt(raw_pristine, tmp_path):
    encode(raw_pristine, tmp_path)
    stored = EncodedSet.open(tmp_path).read(1)
    for number, given in enumerate([torch.arange(17) == 0, *stored.sparse_masks]):
        assert torch.equal(stored.for_draw(False, given).condition, stored.conditions[number].float())
    for given in (torch.ones(17, dtype=torch.bool), torch.zeros(17, dtype=torch.bool), torch.arange(17) == 5):
        assert stored.for_draw(False, given).condition is None
    kept, dropped = stored.for_draw(False, given), stored.for_draw(True, given)
    assert torch.equal(kept.prompt_embeds, stored.prompt_embeds) and torch.equal(kept.latents, dropped.latents)
    assert torch.equal(dropped.prompt_embeds, stored.empty_prompt)


def test_tasks_and_a_second_run_give_the_same_bytes_and_encode_nothing_twice(raw_pristine, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert encode(raw_pristine, one)
    encoder = HashEncoder()
    assert not encode(raw_pristine, two, encoder=encoder, rank=1, world=2)
    assert encode(raw_pristine, two, encoder=encoder, rank=0, world=2)
    assert encode(raw_pristine, two, encoder=encoder)
    assert sorted(encoder.encoded) == [e.key for e in raw_pristine.entries]
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert files == {path.name: path.read_bytes() for path in two.iterdir()}
    with pytest.raises(ShardSetError, match=r"sparse_draws \(3 -> 5\)"):
        encode(raw_pristine, two, draws=5)


def test_every_setting_that_changes_an_encoding_changes_its_folder():
    knobs = {"num_frames": 21, "height": 32, "width": 16, "far_limit": 5.0, "z_offset": True, "pointmap_power": 0.5}
    recipes = [RECIPE, encoding_recipe("another wan", 96, CONFIG), encoding_recipe("wan", 512, CONFIG)]
    recipes += [encoding_recipe("wan", 96, dataclasses.replace(CONFIG, **{k: v})) for k, v in knobs.items()]
    assert len({cache_folder("shards", recipe) for recipe in recipes}) == len(recipes)
    same = dataclasses.replace(CONFIG, num_workers=7, block_shards=2)
    assert cache_folder("shards", encoding_recipe("wan", 96, same)) == cache_folder("shards", RECIPE)


def test_a_broken_encoding_is_a_sample_error_with_a_remedy_and_the_others_are_fine(raw_pristine, tmp_path):
    encode(raw_pristine, tmp_path)
    encoded_set = EncodedSet.open(tmp_path)
    flip_byte(encoded_set, 1)
    with pytest.raises(SampleError, match=r"checksum.*remove .* to encode it anew") as caught:
        encoded_set.read(1)
    assert "\n" not in str(caught.value) and encoded_set.key(1) in str(caught.value)
    encoded_set.read(0)
    with pytest.raises(SampleError, match=r"was not encoded \(dropped\.jsonl"):
        encoded_set.read_key("unknown")


def make_stream(source: ShardSet | EncodedSet, cache: EncodedSet | None, epochs_seed: int = 0) -> ClipStream:
    order = MixtureOrder([source.samples_per_shard], [1.0], 0, 8)
    config = Config(data=CONFIG, flow=FlowConfig(caption_dropout=0.5), train=TrainConfig(seed=epochs_seed))
    return ClipStream([source], [cache], order, config, validation=False)


def test_the_stream_brings_each_clips_own_encoding_and_skips_a_broken_one(raw_pristine, tmp_path):
    encode(raw_pristine, tmp_path)
    cache = EncodedSet.open(tmp_path)
    flip_byte(cache, 2)
    expected: dict[str, StoredClip] = {cache.key(n): cache.read(n) for n in (0, 1, 3, 4)}
    for stream in (make_stream(raw_pristine, cache), make_stream(cache, None)):
        samples = [stream[n] for n in range(40)]
        assert {sample.drop_caption for sample in samples} == {False, True}
        for sample in samples:
            stored = expected[sample.key]
            assert torch.equal(sample.encoded.latents, stored.latents)
            prompt = stored.empty_prompt if sample.drop_caption else stored.prompt_embeds
            assert torch.equal(sample.encoded.prompt_embeds, prompt)
        skipped = [reason for sample in samples for reason in sample.skipped]
        assert len(skipped) == 8 and all(cache.key(2) in reason for reason in skipped)


def test_an_encoded_source_needs_no_raw_clip_and_draws_every_stored_mask(raw_pristine, tmp_path):
    encode(raw_pristine, tmp_path)
    source = EncodedSet.open(tmp_path)
    raw, encoded = make_stream(raw_pristine, None), make_stream(source, None)
    seen: dict[str, set[tuple[bool, ...]]] = {}
    for position in range(300):
        sample = encoded[position]
        if position < 20:  # the same clip under the same draw, but for the sparse frames
            twin = raw[position]
            assert (sample.key, sample.task, sample.drop_caption) == (twin.key, twin.task, twin.drop_caption)
            assert torch.equal(sample.cam2world, twin.cam2world) and sample.caption == twin.caption
            assert sample.task == "sparse" or torch.equal(sample.frame_mask, twin.frame_mask)
        assert (sample.encoded.condition is None) == (sample.task == "video")
        if sample.task == "sparse":
            seen.setdefault(sample.key, set()).add(tuple(sample.frame_mask.tolist()))
    for key, drawn in seen.items():  # epoch by epoch, all of them
        assert drawn == {tuple(given) for given in draw_sparse_masks(key, 17, K).tolist()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", torch.tensor(1.0)),
        ("latents", torch.zeros(3, 1, 2, 2)),
        ("latents", torch.zeros(3, 1, 1, 2, 2)),
        ("cam2world", torch.eye(4)),
        ("sparse_masks", torch.zeros(17, dtype=torch.bool)),
        ("conditions", torch.zeros(1, 1, 1, 1, 1)),
    ],
)
def test_a_foreign_encoding_of_another_shape_is_a_sample_error(raw_pristine, tmp_path, field, value):
    encode(raw_pristine, tmp_path)
    encoded = EncodedSet.open(tmp_path)
    shard, entry = encoded.locate(0)
    tensors = load(tar_members(encoded.fetch(shard, entry), entry.key)["safetensors"])
    content = tar_bytes(entry.key, {"safetensors": save({**tensors, field: value}), "json": b'{"caption": ""}'})
    (tmp_path / shard.name).write_bytes(content)
    changed = dataclasses.replace(entry, offset=0, size=len(content), crc32=zlib.crc32(content))
    shards = (dataclasses.replace(shard, samples=(changed,)), *encoded.manifest.shards[1:])
    broken = EncodedSet.of(str(tmp_path), dataclasses.replace(encoded.manifest, shards=shards), PLAIN_READER)
    with pytest.raises(SampleError, match="broken encoding"):
        broken.read(0)
