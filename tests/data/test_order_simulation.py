"""Simulated runs over any ranks, workers, shards and resume points, against the order written down a second time.

The second writing follows the documentation of sample_order.py and shares no code with it: it enumerates the stream
position by position, knows neither epochs nor blocks ahead of time and takes nothing from the package.
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from one4d_pl.config import legal_worlds
from one4d_pl.data.datamodule import StepSampler, validation_batches
from one4d_pl.data.sample_order import EachOnceOrder, MixtureOrder

Where = tuple[int, int, int]  # source, index, epoch
LENGTH = 1500  # positions enumerated of a mixture: more than one cycle of turns, and many epochs
CASES_PER_MIXTURE = 50


# --- the order, enumerated


def enumerate_stream(
    sizes: list[list[int]], weights: list[float], seed: int, block_shards: int, length: int
) -> list[Where]:
    """The first `length` places of the stream."""
    turns = enumerate_turns(weights, seed)
    walks = [walk(shards, seed, source, block_shards) for source, shards in enumerate(sizes)]
    return [(source, *next(walks[source])) for source in itertools.islice(itertools.cycle(turns), length)]


def walk(shards: list[int], seed: int, source: int, block_shards: int) -> Iterator[tuple[int, int]]:
    """Index and epoch of every visit to a source, for ever."""
    for epoch in itertools.count():
        names = shuffled([(shard, size) for shard, size in enumerate(shards)], (seed, source, epoch, 0, 0))
        block = 0
        while names:
            taken, names = names[:block_shards], names[block_shards:]
            clips = [(shard, n) for shard, size in taken for n in range(size)]
            for shard, n in shuffled(clips, (seed, source, epoch, 1, block)):
                yield sum(shards[:shard]) + n, epoch
            block += 1


def enumerate_turns(weights: list[float], seed: int) -> list[int]:
    """The 1000 turns: shares rounded by largest remainders, whoever is farthest behind is next, tens are shuffled."""
    exact = [1000 * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for source in sorted(range(len(weights)), key=lambda s: shares[s] - exact[s])[: 1000 - sum(shares)]:
        shares[source] += 1
    turns: list[int] = []
    for turn in range(1, 1001):
        behind = [shares[s] * turn / 1000 - turns.count(s) for s in range(len(weights))]
        turns.append(behind.index(max(behind)))
    tens = [turns[n : n + 10] for n in range(0, 1000, 10)]
    return [turn for n, ten in enumerate(tens) for turn in shuffled(ten, (seed, 0, 0, 2, n))]


def shuffled(things: list, entropy: tuple[int, int, int, int, int]) -> list:
    """In the order of the raw words that PCG64 draws from this entropy."""
    words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(len(things)).tolist()
    return [thing for _, _, thing in sorted(zip(words, range(len(things)), things))]


# --- simulated runs


@dataclass(frozen=True)
class Mixture:
    sizes: list[list[int]]
    packed: bytes  # the order, as a loader sends it to its workers
    stream: list[Where]
    broken: set[tuple[int, int]]
    stand_ins: dict[int, Where]  # by position


def draw_mixture(rng: random.Random) -> Mixture:
    sizes = [[rng.randint(1, 9) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(1, 3))]
    weights = [rng.choice([0.5, 1.0, 2.0, rng.uniform(0.1, 3)]) for _ in sizes]
    seed, block_shards = rng.randrange(1000), rng.randint(1, 10)
    order = MixtureOrder(sizes, weights, seed, block_shards)
    packed = pickle.dumps(order)
    stream = enumerate_stream(sizes, weights, seed, block_shards, LENGTH)
    clips = [(source, n) for source, shards in enumerate(sizes) if sum(shards) > 2 for n in range(sum(shards))]
    broken = set(rng.sample(clips, len(clips) // 5))
    for source in range(len(sizes)):  # one clip at least is whole
        broken.discard((source, 0))
    met = [position for position, (source, index, _) in enumerate(stream) if (source, index) in broken]
    return Mixture(sizes, packed, stream, broken, {n: stand_in(order, n, broken) for n in reversed(met)})


def stand_in(order: MixtureOrder, position: int, broken: set[tuple[int, int]]) -> Where:
    """The first replacement that is not broken itself."""
    places = (order.replacement(position, attempt) for attempt in itertools.count())
    place = next(place for place in places if (place.source, place.index) not in broken)
    return place.source, place.index, place.epoch


def simulate_run(mixture: Mixture, rng: random.Random) -> None:
    """A run that is stopped and resumed on other layouts sees every position once, and there what stands there."""
    global_batch = rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24])
    first = step = rng.randrange((LENGTH - 1) // global_batch)
    last = min(LENGTH // global_batch, first + rng.randint(1, max(1, 60 // global_batch)))
    seen: list[int] = []
    while step < last:
        micro = rng.choice([n for n in range(1, global_batch + 1) if global_batch % n == 0])
        world = rng.choice([n for n in range(1, 25) if global_batch % (n * micro) == 0])
        assert world in legal_worlds(global_batch, micro)
        until = rng.randint(step + 1, last)  # where this job is killed; the loaders were made for the whole run
        ranks = []
        for rank in range(world):
            sampler = StepSampler(step, last, global_batch, micro, rank, world)
            batches = list(itertools.islice(sampler, (until - step) * global_batch // (world * micro)))
            assert len(sampler) == (last - step) * global_batch // (world * micro)
            read_by_workers(mixture, batches, rng.randint(1, 4))
            ranks.append(batches)
        assert len({len(batches) for batches in ranks}) == 1
        assert {len(batch) for batches in ranks for batch in batches} == {micro}
        per_step = global_batch // (world * micro)
        for n in range(until - step):
            together = [batch for batches in ranks for batch in batches[n * per_step : (n + 1) * per_step]]
            assert sorted(p for batch in together for p in batch) == list(
                range((step + n) * global_batch, (step + n + 1) * global_batch)
            )
        seen += [position for batches in ranks for batch in batches for position in batch]
        step = until
    assert sorted(seen) == list(range(first * global_batch, last * global_batch))


def read_by_workers(mixture: Mixture, batches: list[list[int]], workers: int) -> None:
    """Batch n is read by worker n mod workers, each of which has its own copy of the order."""
    for worker in range(min(workers, len(batches))):
        order = pickle.loads(mixture.packed)
        for position in itertools.chain(*batches[worker::workers]):
            place = order.locate(position)
            assert (place.source, place.index, place.epoch) == mixture.stream[position]
            if (place.source, place.index) in mixture.broken:
                assert stand_in(order, position, mixture.broken) == mixture.stand_ins[position]


def simulate_validation(mixture: Mixture, rng: random.Random) -> None:
    """Every clip counts once, sources in turn, and every rank takes equally many batches."""
    sizes = [sum(shards) for shards in mixture.sizes]
    count, world = rng.randint(1, sum(sizes)), rng.randint(1, 24)
    ranks = [validation_batches(count, rank, world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-count // world)}
    assert all(len(batch) == 1 and batch[0] % world == rank for rank, bs in enumerate(ranks) for batch in bs)
    positions = [batch[0] for batches in ranks for batch in batches]
    assert sorted(p for p in positions if p < count) == list(range(count))
    order, queues = EachOnceOrder(sizes), [list(range(size)) for size in sizes]
    rounds = [[(source, queue.pop(0)) for source, queue in enumerate(queues) if queue] for _ in range(max(sizes))]
    places = map(order.locate, range(sum(sizes)))
    assert [(place.source, place.index) for place in places] == [clip for one in rounds for clip in one]


def simulate(seed: int, cases: int) -> None:
    print(f"seed {seed}, {cases} cases")
    rng = random.Random(seed)
    for _ in range(cases // CASES_PER_MIXTURE):
        mixture = draw_mixture(rng)
        for _ in range(CASES_PER_MIXTURE):
            simulate_run(mixture, rng)
            simulate_validation(mixture, rng)


def test_the_enumeration_visits_every_clip_once_an_epoch_and_keeps_the_shares():
    """So that the two writings are not wrong in the same way."""
    sizes, weights = [[3, 1, 4], [2, 6]], [0.7, 0.3]
    stream = enumerate_stream(sizes, weights, 5, 2, 3000)
    for source, size in enumerate((8, 8)):
        visits = [(epoch, index) for s, index, epoch in stream if s == source]
        whole = visits[: len(visits) // size * size]
        assert sorted(whole) == [(epoch, n) for epoch in range(len(whole) // size) for n in range(size)]
    assert Counter(source for source, _, _ in stream) == {0: 2100, 1: 900}


def test_a_thousand_runs_lose_repeat_and_reorder_nothing():
    simulate(seed=random.SystemRandom().randrange(10**6), cases=1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_hundred_thousand_runs_lose_repeat_and_reorder_nothing(seed):
    simulate(seed=seed, cases=2500)
