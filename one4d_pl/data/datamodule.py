"""The LightningDataModule: toy shards, the encoded cache, loaders whose only state is the step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from one4d_pl.config import Config, ConfigError, DataConfig, SourceConfig, ToyConfig, changes
from one4d_pl.data.decode import ClipStream, Draw, PaddedStream, make_sample
from one4d_pl.data.encoded import (
    EncodedSet,
    SampleEncoder,
    cache_folder,
    encode_set,
    encoding_recipe,
    open_set,
    raw_digest,
)
from one4d_pl.data.latent_stats import LatentStats, latent_statistics
from one4d_pl.data.ranged_reads import RangeReader, is_remote, one_line
from one4d_pl.data.read_cache import RangeCache
from one4d_pl.data.sample_order import EachOnceOrder, MixtureOrder, rank_positions
from one4d_pl.data.shards import ShardSet, ShardSetError, write_shards
from one4d_pl.data.shared_memory import PREFETCH
from one4d_pl.data.worker import become_worker
from one4d_pl.files import check_folder
from one4d_pl.interrupts import before_workers
from one4d_pl.progress import Progress
from one4d_pl.toy.world import clip_key, render_clip
from one4d_pl.types import Batch, Sample, collate

WAITING_S = 5.0  # between two checks of which clips other processes have encoded
WORKER_TIMEOUT_S = 600.0  # a batch that takes longer ends the run instead of hanging it
MEASURED_CLIPS = 16  # of each training source, for the latents' statistics
VAL_SEED_OFFSET = 1_000_000  # keeps toy seeds of the validation split apart from those of the training splits
REAL_SEED_OFFSET = 2_000_000


class StepSampler(Sampler[list[int]]):
    """The stream positions of this rank's micro batches from an optimiser step on: that step is the only state."""

    def __init__(self, start_step: int, max_steps: int, global_batch: int, micro_batch: int, rank: int, world: int):
        self.start_step, self.max_steps = start_step, max_steps
        self.global_batch, self.micro_batch, self.rank, self.world = global_batch, micro_batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            positions = rank_positions(step, self.global_batch, self.rank, self.world)
            for i in range(0, len(positions), self.micro_batch):
                yield list(positions[i : i + self.micro_batch])

    def __len__(self) -> int:
        per_step = self.global_batch // self.world // self.micro_batch
        return max(0, self.max_steps - self.start_step) * per_step


class TimedLoader(DataLoader[Sample]):
    """A DataLoader that measures how long its reader has waited for batches."""

    waited_s = 0.0  # in total

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def validation_batches(count: int, rank: int, world: int) -> list[list[int]]:
    """List a rank's validation batches of one position each (n is on rank n mod world); every rank has as many."""
    return [[first + rank] for first in range(0, count, world)]


def datamodule_of(trainer: lightning.Trainer) -> One4DDataModule:
    """Return the run's data module, or its stand-in in a rehearsal."""
    datamodule: One4DDataModule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it, undeclared
    return datamodule


class One4DDataModule(lightning.LightningDataModule):
    """Streams of clips for training and validation.

    Args:
        config: the whole run's config; its data, masking, flow, train, val and base.max_text_tokens are read.
        encoder: opens the encoders on a device; called only if some clip is not cached yet.
        encoder_fingerprint: identifies those encoders, and so the cache.
        on_progress: called whenever this process, or another one that it waits for, has encoded a clip.
        between_clips: called before and after every clip that is encoded and while waiting for others; may raise to
            stop, by which no encoded clip is lost.
    """

    def __init__(
        self,
        config: Config,
        encoder: Callable[[torch.device], SampleEncoder],
        encoder_fingerprint: str,
        on_progress: Callable[[], None] = lambda: None,
        between_clips: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.on_progress, self.between_clips = on_progress, between_clips
        self.prepare_data_per_node = False  # shards lie on shared storage: one writer for all nodes
        self.config = config
        self.encoder = encoder
        self.recipe = encoding_recipe(encoder_fingerprint, config.base.max_text_tokens, config.data)
        self._latents: tuple[LatentStats | None] | None = None  # measured once; (None,) = nothing to measure
        self.start_step = 0  # set on resume, before the loaders are built
        self.clips_per_source: list[int] = []  # to train on; known once the loader is built

    def prepare_data(self) -> None:
        """Write the toy shards where absent; Lightning calls this in one process only."""
        data = self.config.data
        if data.toy is not None:
            write_toy_world(data.toy, data.num_frames, data.height, data.width)

    def setup(self, stage: str) -> None:
        """Encode clips that the cache lacks: every process its share, on its own device."""
        if self.config.data.cache_latents:
            self._fill_cache()

    def train_dataloader(self) -> TimedLoader:
        """Return the loader of this rank's micro batches from `start_step` to the end."""
        train, rank = self.config.train, self.trainer.global_rank if self.trainer else 0
        sampler = StepSampler(
            self.start_step, train.max_steps, train.global_batch_size, train.micro_batch_size, rank, train.world_size
        )
        stream = self._stream(self.config.data.sources, validation=False)
        self.clips_per_source = [len(source) for source in stream.sources]
        return self._loader(stream, sampler)

    def val_dataloader(self) -> TimedLoader:
        """Return the loader of the first val.clips validation clips, split over the ranks.

        Every clip counts once. Every rank gets equally many batches, since a forward pass may be a collective; where
        the clips cannot be split evenly, the last batches show some again and do not count. A run with
        train.overfit_clips is validated on the clips that it overfits, repeated to fill val.clips.
        """
        overfit = self.config.train.overfit_clips
        data = self.config.data
        stream = self._stream(data.sources if overfit else data.val_sources, validation=True)
        rank = self.trainer.global_rank if self.trainer else 0
        count = self.config.val.clips if overfit else min(self.config.val.clips, sum(map(len, stream.sources)))
        world = self.config.train.world_size
        return self._loader(PaddedStream(stream, count), validation_batches(count, rank, world))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def describe_sources(self) -> list[dict[str, str]]:
        """List name, domain and licence tag of every training source, for the adapter's card."""
        manifests = [open_set(source.path).manifest for source in self.config.data.sources]
        return [{"source": m.source, "domain": m.domain, "licence": m.licence} for m in manifests]

    def describe_latents(self) -> LatentStats | None:
        """Measure the latents of some training clips, for the card and dlc.standardise_xyz; None if none is encoded."""
        if self._latents is None:
            sources = [open_set(source.path) for source in self.config.data.sources]
            sets = [s if isinstance(s, EncodedSet) else self._cache(s) for s in sources]
            known = [s for s in sets if s is not None]
            self._latents = (latent_statistics(known, MEASURED_CLIPS) if known else None,)
        return self._latents[0]

    def _loader(self, stream: ClipStream | PaddedStream, batches: StepSampler | list[list[int]]) -> TimedLoader:
        workers = self.config.data.num_workers
        if workers:
            before_workers()
        return TimedLoader(
            stream,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            timeout=WORKER_TIMEOUT_S if workers else 0,
            worker_init_fn=become_worker,
            # not fork: a forked copy of a process that runs OpenMP or CUDA threads can hang
            multiprocessing_context="forkserver" if workers else None,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def _stream(self, configs: list[SourceConfig], validation: bool) -> ClipStream:
        reader = RangeReader(self._range_cache())
        sources = [open_set(source.path, reader).without_flagged() for source in configs]
        if not validation or self.config.train.overfit_clips:
            sources = [source.consistent(self.config.data.min_consistency) for source in sources]
        for source in sources:
            self._refuse_short(source)
            if isinstance(source, EncodedSet):
                self._refuse_other_encoding(source, validation)
            if not validation:
                _refuse_benchmarks(source)
        if len({type(source) for source in sources}) > 1:
            raise ConfigError("data.sources: raw and encoded shards cannot be mixed; encode the raw ones too")
        order: MixtureOrder | EachOnceOrder
        if validation and not self.config.train.overfit_clips:
            order = EachOnceOrder([len(source) for source in sources])
        else:
            sizes, weights = [source.samples_per_shard for source in sources], [source.weight for source in configs]
            order = MixtureOrder(sizes, weights, self.config.train.seed, self.config.data.block_shards)
        return ClipStream(sources, [self._cache(source) for source in sources], order, self.config, validation)

    def _range_cache(self) -> RangeCache | None:
        """Return the cache for reads of remote shards; None without remote shards or without data.cache_dir."""
        data = self.config.data
        if data.cache_dir is None or not any(is_remote(s.path) for s in [*data.sources, *data.val_sources]):
            return None
        try:
            Path(data.cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir: {one_line(error)}; name a folder of a local disk") from error
        return RangeCache(Path(data.cache_dir), int(data.cache_gib * 2**30))

    def _refuse_short(self, source: ShardSet | EncodedSet) -> None:
        """Raise ConfigError where more than max_skip_share of the clips are too short: a mistake in the config."""
        lengths = [sample.num_frames for shard in source.manifest.shards for sample in shard.samples]
        needed = self.config.data.num_frames
        short = sum(length < needed for length in lengths)
        if short > self.config.data.max_skip_share * len(lengths):
            raise ConfigError(
                f"data.num_frames: {needed}, but {short} of {len(lengths)} clips in {source.location} are shorter "
                f"(longest {max(lengths)}); lower data.num_frames or write longer clips"
            )

    def _refuse_other_encoding(self, source: EncodedSet, validation: bool) -> None:
        """Raise ConfigError where a source was not encoded with the config's encoders and sizes."""
        where = f"data.sources: {source.location}"
        if validation:
            raise ConfigError(f"{where} holds encoded clips; validation shows pictures, give it raw shards")
        if not source.sparse_draws:
            raise ConfigError(f"{where} holds no conditioning latents; encode it with --sparse-draws 1 or more")
        differing = changes(source.manifest.recipe, self.recipe, ignore=lambda key: key in ("raw", "sparse_draws"))
        if differing:
            raise ConfigError(f"{where} was encoded with another config: {', '.join(map(str, differing))}")

    def _cache_folder(self, source: ShardSet | EncodedSet) -> Path | None:
        """Return the folder of a source's encodings, beside its shards; None for remote ones, or if nothing is kept."""
        if not self.config.data.cache_latents or isinstance(source, EncodedSet) or "://" in source.location:
            return None
        return cache_folder(source.location, self.recipe)

    def _cache(self, source: ShardSet | EncodedSet) -> EncodedSet | None:
        folder = self._cache_folder(source)
        return None if folder is None else EncodedSet.open(folder)

    def check_caches(self) -> None:
        """Raise UserError where clips are to be encoded into a folder that cannot be written."""
        for path in {source.path: None for source in [*self.config.data.sources, *self.config.data.val_sources]}:
            if "://" not in path and not (Path(path) / "manifest.json").is_file():
                continue  # fit will make it
            folder = self._cache_folder(open_set(path))
            if folder is not None and not (folder / "manifest.json").is_file():
                advice = "set data.cache_latents=false, or encode with data_prep.encode_latents --out"
                check_folder(folder, "data.cache_latents", advice)

    def _fill_cache(self) -> None:
        """Encode the clips that are not cached. A set made by data_prep.encode_latents serves as cache, too."""
        self.check_caches()
        rank, world, device = 0, 1, torch.device("cpu")
        if self.trainer:
            rank, world = self.trainer.global_rank, self.config.train.world_size
            device = self.trainer.strategy.root_device
        open_encoder = functools.cache(lambda: self.encoder(device))
        for path in {source.path: None for source in [*self.config.data.sources, *self.config.data.val_sources]}:
            source = open_set(path)
            folder = self._cache_folder(source)
            if folder is None or not isinstance(source, ShardSet):
                continue
            if not (folder / "manifest.json").is_file():
                make = video_sample_maker(source, self.config.data)
                share = (rank, world, self._clip_encoded, rank == 0)
                self.between_clips()
                while not encode_set(source, folder, self.recipe, 0, open_encoder, make, *share):
                    self._wait_for_others(folder)
            elif EncodedSet.open(folder).manifest.recipe["raw"] != raw_digest(source):
                raise ShardSetError(f"{folder}: encodes other clips than {path} holds now; remove it")
        open_encoder.cache_clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the transformer comes next

    def _clip_encoded(self) -> None:
        self.on_progress()
        self.between_clips()

    def _wait_for_others(self, folder: Path) -> None:
        """Wait a while for other processes to finish clips. The watchdog ends the run if none ever does."""
        before, until = len(list(folder.rglob("*"))), time.monotonic() + WAITING_S
        while time.monotonic() < until and not (folder / "manifest.json").is_file():
            self.between_clips()
            time.sleep(0.2)
        if len(list(folder.rglob("*"))) != before:
            self.on_progress()


def video_sample_maker(shards: ShardSet, config: DataConfig) -> Callable[[int], Sample]:
    """Return a function that makes of a clip the sample to encode, all frames given."""
    given = torch.ones(config.num_frames, dtype=torch.bool)
    return lambda index: make_sample(shards.read(index), 0, Draw("video", given, False), config, None)


def _refuse_benchmarks(source: ShardSet | EncodedSet) -> None:
    """Raise ConfigError where a training source holds clips of a benchmark."""
    tagged = [entry for entry in source.entries if entry.benchmark]
    if tagged:
        names = ", ".join(sorted({entry.benchmark for entry in tagged}))
        raise ConfigError(
            f"data.sources: {source.location} holds {len(tagged)} clips of the benchmark {names} (first: "
            f"{tagged[0].key}), which is for evaluation only; write it again with --exclude naming these sequences"
        )


def write_toy_world(config: ToyConfig, num_frames: int, height: int, width: int) -> None:
    """Write the toy shards that are absent: train_synthetic, train_real and val below `root`."""
    splits = (
        ("train_synthetic", config.train_synthetic, "synthetic", config.seed),
        ("train_real", config.train_real, "real", config.seed + REAL_SEED_OFFSET),
        ("val", config.val, "synthetic", config.seed + VAL_SEED_OFFSET),
    )
    for split, count, domain, seed in splits:
        folder = Path(config.root) / split
        if count == 0:
            continue
        if (folder / "manifest.json").is_file():
            keys = [clip_key(s, domain, config.level) for s in range(seed, seed + count)]
            _refuse_other_world(folder, keys, (num_frames, height, width))
            continue
        seeds = Progress(range(seed, seed + count), desc=f"rendering {folder}", unit="clip")
        clips = (render_clip(s, num_frames, height, width, domain, config.level) for s in seeds)
        write_shards((replace(clip, source=f"toy_{split}") for clip in clips), folder, samples_per_shard=32)


def _refuse_other_world(folder: Path, keys: list[str], size: tuple[int, int, int]) -> None:
    """Raise ConfigError where a folder holds toy shards of another level, seed, count or size."""
    samples = [sample for shard in ShardSet.open(folder).manifest.shards for sample in shard.samples]
    sizes = {(s.num_frames, s.height, s.width) for s in samples}
    if [s.key for s in samples] != keys or sizes != {size}:
        raise ConfigError(
            f"data.toy: {folder} holds another toy world ({len(samples)} clips of {sorted(sizes)[0]} from "
            f"{samples[0].key}); delete the folder or set another data.toy.root"
        )
