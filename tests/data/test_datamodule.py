"""Laws of the loaders: every layout and every resume sees the same stream, and the cache is filled once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from one4d_pl.config import Config, ConfigError, DataConfig, SourceConfig, ToyConfig, TrainConfig, ValConfig
from one4d_pl.data import datamodule as datamodule_file
from one4d_pl.data import sample_order as order_module
from one4d_pl.data.datamodule import One4DDataModule, SampleEncoder, StepSampler
from one4d_pl.data.ranged_reads import RangeReader
from one4d_pl.data.sample_order import MixtureOrder
from one4d_pl.data.shards import ShardSet, ShardSetError, write_shards
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Batch, Encoded, Sample
from tests.data.conftest import assert_same

STEPS, GLOBAL_BATCH = 6, 12


class PlainEncoder:
    """A linear stand-in for the frozen encoders, told apart from clip to clip; counts what it is asked."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_sample(self, sample: Sample) -> Encoded:
        self.encoded.append(sample.key)
        latents = torch.stack([sample.frames, sample.pointmap])[:, :, ::4, ::8, ::8]
        return Encoded(latents.clone(), self.encode_prompts([sample.caption])[0], None)

    def encode_prompts(self, prompts: list[str]) -> list[Tensor]:
        return [torch.tensor([[float(len(prompt))]]) for prompt in prompts]

    def encode_conditions(self, sample: Sample, frame_masks: Tensor) -> Tensor:
        return torch.stack([(sample.frames * given[:, None, None])[:, ::4, ::8, ::8] for given in frame_masks])


def no_encoder(device: torch.device) -> SampleEncoder:
    raise AssertionError("the encoders were opened")


def make_config(folder: Path, num_workers: int = 0, cache_latents: bool = False, devices: int = 1) -> Config:
    return Config(
        data=DataConfig(
            sources=[SourceConfig(str(folder), 1.0)],
            val_sources=[SourceConfig(str(folder), 1.0)],
            height=16,
            width=32,
            num_workers=num_workers,
            cache_latents=cache_latents,
        ),
        train=TrainConfig(
            max_steps=STEPS,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=1 if devices == 4 else 2,
            strategy="single" if devices == 1 else "ddp",
            devices=devices,
        ),
        val=ValConfig(clips=5),
    )


def make_module(config: Config, rank: int = 0, encoder: PlainEncoder | None = None) -> One4DDataModule:
    module = One4DDataModule(config, no_encoder if encoder is None else lambda device: encoder, "fingerprint")
    module.trainer = SimpleNamespace(global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    return module


def prepare(module: One4DDataModule) -> None:
    """What Lightning calls before training."""
    module.prepare_data()
    module.setup("fit")


@pytest.fixture(scope="module")
def folder(seven_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips, one of them broken; not to be changed."""
    path = shutil.copytree(seven_clips, tmp_path_factory.mktemp("broken") / "set")
    last = path / "shard-000002.tar"  # holds one clip
    last.write_bytes(last.read_bytes()[:-20_000])
    return path


# --- loaders; test_order_simulation.py has the laws of their positions


def test_a_run_that_is_done_has_no_batch_left_and_asking_twice_moves_nothing():
    for start in (STEPS, STEPS + 2):
        done = StepSampler(start, STEPS, GLOBAL_BATCH, 2, 1, 3)
        assert (len(done), list(done)) == (0, [])
    sampler = StepSampler(1, STEPS, GLOBAL_BATCH, 2, 1, 3)
    assert list(sampler) == list(sampler)


def test_ranks_that_come_and_go_in_the_middle_of_an_epoch_see_one_stream(folder):
    """1 -> 4 -> 2 -> 3 ranks at global batch 12: what stands where, each once, as one process sees it."""
    alone = {n: seen for batch in make_module(make_config(folder)).train_dataloader() for n, seen in by_position(batch)}
    together: list[tuple[int, tuple[str, str, bool]]] = []
    for world, steps in ((1, range(0, 1)), (4, range(1, 3)), (2, range(3, 4)), (3, range(4, 6))):
        config = make_config(folder, devices=world)
        config.train.micro_batch_size = 1
        for rank in range(world):
            module = make_module(config, rank)
            module.start_step = steps.start  # the loader is made for the whole run, and left when the job ends
            batches = itertools.islice(module.train_dataloader(), len(steps) * GLOBAL_BATCH // world)
            together += [seen for batch in batches for seen in by_position(batch)]
    assert len(together) == len(dict(together)) and dict(together) == alone
    order = make_module(make_config(folder)).train_dataloader().dataset.order
    visits = Counter((order.locate(n).epoch, order.locate(n).index) for n in dict(together))
    epochs = STEPS * GLOBAL_BATCH // 7
    assert [visits[epoch, n] for epoch in range(epochs) for n in range(7)] == [1] * 7 * epochs


@pytest.mark.parametrize("step", [0, 10**6 // GLOBAL_BATCH])
def test_the_next_batch_costs_the_same_at_position_a_million(folder, step, monkeypatch):
    """Counted, not timed: what a restart reads and permutes until its first batch."""
    counts = Counter[str]()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            counts[name] += 1
            return function(*args)

        return call

    config = make_config(folder)
    config.train.max_steps = 10**9
    module = make_module(config)
    module.start_step = step
    loader = module.train_dataloader()
    monkeypatch.setattr(order_module, "permutation", counted("permutations", order_module.permutation))
    monkeypatch.setattr(MixtureOrder, "locate", counted("places", MixtureOrder.locate))
    monkeypatch.setattr(RangeReader, "read", counted("reads", RangeReader.read))
    batch = next(iter(loader))
    first = step * GLOBAL_BATCH
    assert batch.position.tolist() == [first, first + 1]
    assert counts["reads"] == 2 + len(batch.skipped) and counts["places"] == 2 + len(batch.skipped)
    assert counts["permutations"] <= 4  # the shards and a block, of an epoch or of two at a border


def test_a_remote_source_is_read_once_where_there_is_a_cache(folder, serve, tmp_path):
    server = serve(folder)
    config = make_config(folder)
    config.train.max_steps = 2  # three epochs
    alone = list(make_module(config).train_dataloader())
    config.data.sources = [SourceConfig(server.url, 1.0)]
    config.data.cache_dir, config.data.cache_gib = str(tmp_path / "cache"), 1.0
    for _ in range(2):  # a run, and one that resumes on the same node
        remote = list(make_module(config).train_dataloader())
        assert [by_position(batch) for batch in remote] == [by_position(batch) for batch in alone]
    whole = {request for request in server.requests if request[0] != "/shard-000002.tar"}
    assert len(whole) == 6 == len([r for r in server.requests if r in whole])
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*local disk"):
        make_module(config).train_dataloader()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of more workers than cores
def test_worker_processes_change_nothing_and_resume_is_the_tail(folder):
    alone = list(make_module(make_config(folder)).train_dataloader())
    assert [n for batch in alone for n in batch.position.tolist()] == list(range(STEPS * GLOBAL_BATCH))
    assert any(batch.skipped for batch in alone)  # the broken clip was met
    module = make_module(make_config(folder, num_workers=2))
    module.start_step = 2
    per_step = GLOBAL_BATCH // 2
    for batch, expected in zip(module.train_dataloader(), alone[2 * per_step :], strict=True):
        assert_same(batch, expected)


def by_position(batch: Batch) -> list[tuple[int, tuple[str, str, bool]]]:
    values = zip(batch.keys, batch.tasks, (prompt == "" for prompt in batch.prompts), strict=True)
    return list(zip(batch.position.tolist(), values, strict=True))


@pytest.mark.parametrize(("devices", "clips"), [(1, 5), (2, 5), (3, 100), (4, 1), (4, 8)])
def test_validation_counts_each_clip_once_in_equally_many_batches_on_every_rank(folder, devices, clips):
    """Also where there are fewer clips than ranks."""
    config = make_config(folder, devices=devices)
    config.val.clips = clips
    ranks = [list(make_module(config, rank).val_dataloader()) for rank in range(devices)]
    count = min(clips, 7)
    assert {len(batches) for batches in ranks} == {-(-count // devices)}
    everything = list(itertools.chain(*ranks))
    assert {len(batch) for batch in everything} == {1}
    batches = [batch for batch in everything if batch.counted]
    positions = sorted(int(batch.position) for batch in batches)
    assert positions == list(range(count))
    shown = {int(batch.position): batch for batch in batches}
    for again in (batch for batch in everything if not batch.counted):
        assert_same(again, shown[int(again.position)], but=("counted",))
    whole = [batch.keys[0] for batch in batches if not batch.skipped]
    assert len(set(whole)) == len(whole) >= len(positions) - 1
    assert not any(prompt == "" for batch in batches for prompt in batch.prompts)


def test_a_run_that_overfits_is_validated_on_the_clips_that_it_trains_on(folder, tmp_path):
    config = make_config(folder)
    config.train.overfit_clips = 2
    write_shards([render_clip(50, 17, 16, 32)], tmp_path / "val", samples_per_shard=1)
    config.data.val_sources = [SourceConfig(str(tmp_path / "val"), 1.0)]
    trained = {key for batch in make_module(config).train_dataloader() for key in batch.keys}
    validated = [batch.keys[0] for batch in make_module(config).val_dataloader()]
    assert len(trained) == 2 and len(validated) == config.val.clips == 5 and set(validated) == trained


def test_a_source_of_clips_too_short_is_a_mistake_in_the_config(folder):
    config = make_config(folder)
    config.data.num_frames = 21
    with pytest.raises(ConfigError, match=r"data\.num_frames: 21, but 7 of 7 clips .*longest 17"):
        make_module(config).train_dataloader()


def test_the_sources_are_described_for_the_card(folder):
    card = make_module(make_config(folder)).describe_sources()
    assert card == [{"source": "toy", "domain": "synthetic", "licence": "CC0-1.0"}]


# --- preparation


@pytest.fixture
def toy_config(tmp_path: Path) -> Config:
    config = make_config(tmp_path / "toy/train_synthetic", cache_latents=True)
    config.data.toy = ToyConfig(str(tmp_path / "toy"), train_synthetic=3, train_real=2, val=1)
    config.data.sources.append(SourceConfig(str(tmp_path / "toy/train_real"), 1.0))
    config.data.val_sources = [SourceConfig(str(tmp_path / "toy/val"), 1.0)]
    return config


def test_toy_shards_and_encodings_are_made_once(toy_config, tmp_path):
    encoder = PlainEncoder()
    prepare(make_module(toy_config, encoder=encoder))
    sources = {split: ShardSet.open(tmp_path / "toy" / split) for split in ("train_synthetic", "train_real", "val")}
    assert [len(source) for source in sources.values()] == [3, 2, 1]
    assert [source.manifest.domain for source in sources.values()] == ["synthetic", "real", "synthetic"]
    keys = [source.key(n) for source in sources.values() for n in range(len(source))]
    assert len(set(keys)) == len(keys)  # no validation clip is trained on
    assert encoder.encoded == keys
    prepare(make_module(toy_config))  # opens no encoder
    for batch in make_module(toy_config).train_dataloader():
        assert batch.encoded is not None and not batch.skipped
        for frames, pointmap, prompt, encoded in zip(batch.frames, batch.pointmap, batch.prompts, batch.encoded):
            assert torch.equal(encoded.latents, torch.stack([frames, pointmap])[:, :, ::4, ::8, ::8])
            assert float(encoded.prompt_embeds) == len(prompt)


def test_every_tensor_of_a_batch_is_pinned_where_there_is_a_gpu(toy_config, monkeypatch):
    encoder = PlainEncoder()
    prepare(make_module(toy_config, encoder=encoder))
    batch = next(iter(make_module(toy_config).train_dataloader()))
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:  # what a machine without CUDA can do of it
        copy = tensor.clone()
        pinned.append(id(copy))
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    locked = pin_memory(batch)  # as the DataLoader's thread calls it
    assert isinstance(locked, Batch) and locked.encoded is not None and batch.encoded is not None
    assert_same(locked, batch, but=("encoded",))
    inner = [*vars(locked.scale).values(), *(e.latents for e in locked.encoded)]
    inner += [e.prompt_embeds for e in locked.encoded]
    tensors = [t for t in vars(locked).values() if isinstance(t, Tensor)] + inner
    assert len(tensors) >= 14 and {id(t) for t in tensors} <= set(pinned)


def test_loaders_pin_and_keep_their_workers_where_they_can(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = make_module(make_config(folder, num_workers=1)).train_dataloader()
    assert loader.pin_memory and loader.persistent_workers and loader.prefetch_factor == 2


def test_an_interrupted_encoding_continues(toy_config, tmp_path):
    class DyingEncoder(PlainEncoder):
        def encode_sample(self, sample: Sample) -> Encoded:
            if len(self.encoded) == 2:
                raise KeyboardInterrupt
            return super().encode_sample(sample)

    first, second = DyingEncoder(), PlainEncoder()
    with pytest.raises(KeyboardInterrupt):
        prepare(make_module(toy_config, encoder=first))
    prepare(make_module(toy_config, encoder=second))
    splits = ("train_synthetic", "train_real", "val")
    keys = [entry.key for split in splits for entry in ShardSet.open(tmp_path / "toy" / split).entries]
    assert len(first.encoded) == 2 and first.encoded + second.encoded == keys


def test_two_processes_share_the_encoding_and_both_wait_until_it_is_whole(toy_config, monkeypatch):
    """Each on its own device, each telling the watchdog of what itself and the other have done."""
    monkeypatch.setattr(datamodule_file, "WAITING_S", 0.2)
    make_module(toy_config).prepare_data()
    toy_config.train = dataclasses.replace(toy_config.train, strategy="ddp", devices=2, micro_batch_size=1)
    encoders, beats, ended = [PlainEncoder(), PlainEncoder()], [0, 0], [0.0, 0.0]

    def run(rank: int) -> None:
        module = make_module(toy_config, rank, encoders[rank])

        def beat() -> None:
            beats[rank] += 1
            time.sleep(0.3 * rank)  # one is slower

        module.on_progress = beat
        module.setup("fit")
        ended[rank] = time.monotonic()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    done = [set(encoder.encoded) for encoder in encoders]
    assert len(done[0]) >= 3 and len(done[1]) >= 2 and len(done[0] | done[1]) == 6 and not done[0] & done[1]
    assert abs(ended[0] - ended[1]) < 2 and beats[0] > len(done[0])  # the quick one waited, and saw the other move
    assert not list(Path(toy_config.data.toy.root).rglob(".staging"))
    make_module(toy_config, 1).setup("fit")  # opens no encoder


def test_a_cache_of_other_clips_is_refused(toy_config, tmp_path):
    prepare(make_module(toy_config, encoder=PlainEncoder()))
    folder = tmp_path / "toy/train_real"
    (folder / "manifest.json").unlink()
    write_shards([render_clip(99, 17, 16, 32)], folder, samples_per_shard=1)
    toy_config.data.toy = None
    with pytest.raises(ShardSetError, match=r"encodes other clips than .*train_real"):
        prepare(make_module(toy_config, encoder=PlainEncoder()))


def test_benchmark_clips_are_no_training_data(tmp_path):
    clip = render_clip(0, 17, 16, 32)
    write_shards([clip], tmp_path, samples_per_shard=1)
    text = (tmp_path / "manifest.json").read_text()
    config = make_config(tmp_path)
    make_module(config).train_dataloader()
    (tmp_path / "manifest.json").write_text(text.replace('"benchmark": ""', '"benchmark": "bonn"'))
    make_module(config).val_dataloader()  # may be looked at
    with pytest.raises(ConfigError, match=f"1 clips of the benchmark bonn .*first: {clip.key}.*--exclude") as caught:
        make_module(config).train_dataloader()
    assert "\n" not in str(caught.value)


def test_a_broken_clip_is_not_encoded_and_the_stream_counts_it(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "set")
    encoder = PlainEncoder()
    config = make_config(copy, cache_latents=True)
    prepare(make_module(config, encoder=encoder))
    assert len(set(encoder.encoded)) == 6
    skipped = [reason for batch in make_module(config).train_dataloader() for reason in batch.skipped]
    broken = ShardSet.open(copy).key(6)
    assert len(skipped) >= STEPS * GLOBAL_BATCH // 7 and all(broken in reason for reason in skipped)


def with_consistency(folder: Path, values: list[float | None]) -> None:
    """Write into a folder's manifest how consistent its clips are."""
    tree = json.loads((folder / "manifest.json").read_text())
    entries = [sample for shard in tree["shards"] for sample in shard["samples"]]
    for entry, value in zip(entries, values, strict=True):
        entry["consistency"] = value
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_training_takes_the_consistent_clips_and_validation_all(folder, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(folder, copy)
    values = [0.99, None, 0.5, 0.95, 0.97, 1.0, 0.1]  # the last one is broken
    with_consistency(copy, values)
    config = make_config(copy)
    config.data.min_consistency = 0.95
    keys = [entry.key for entry in ShardSet.open(copy).entries]
    good = {key for key, value in zip(keys, values, strict=True) if value is not None and value >= 0.95}
    module = make_module(config)
    assert {key for batch in module.train_dataloader() for key in batch.keys} == good
    assert len({key for batch in module.val_dataloader() for key in batch.keys}) == config.val.clips
    for least, count in ((0.0, 6), (1.0, 1)):
        config.data.min_consistency = least
        assert len({key for batch in make_module(config).train_dataloader() for key in batch.keys}) == count
    with_consistency(copy, [0.1] * 7)
    with pytest.raises(ShardSetError, match=r"data\.min_consistency: .* its best has 0\.100"):
        make_module(config).train_dataloader()
    config.data.sources = [SourceConfig(str(folder), 1.0)]
    with pytest.raises(ShardSetError, match="says no consistency of its clips; write its shards again"):
        make_module(config).train_dataloader()


def test_what_check_shards_flagged_is_neither_trained_on_nor_validated(folder, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(folder, copy)
    keys = [entry.key for entry in ShardSet.open(copy).entries]
    flagged, config = (keys[1], keys[6]), make_config(copy)  # the last one is broken
    listed = copy / "check/exclude.txt"
    listed.parent.mkdir()
    listed.write_text("".join(f"{key}  # static points land 30 % off\n" for key in flagged))
    module = make_module(config)
    batches = [*module.train_dataloader(), *module.val_dataloader()]
    assert {key for batch in batches for key in batch.keys} == set(keys) - set(flagged)
    assert module.clips_per_source == [5] and not any(batch.skipped for batch in batches)
    listed.write_text("\n".join(keys))
    with pytest.raises(ShardSetError, match=r"check/exclude\.txt: lists every clip of the set"):
        make_module(config).train_dataloader()
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ShardSetError, match="no text in UTF-8"):
        make_module(config).train_dataloader()
