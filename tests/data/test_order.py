"""Laws of the sample order: every sample once per epoch, the mixture's weights at every moment, no memory of ranks."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch

from one4d_pl.data.sample_order import (
    MixtureOrder,
    Place,
    derived_generator,
    derived_numpy_generator,
    derived_seed,
    permutation,
    rank_positions,
)

SIZES = [[3, 1, 4, 1, 5], [2, 6], [7]]  # samples per shard of three sources: 14, 8 and 7 samples
WEIGHTS = [0.5, 0.3, 0.2]


def make_order(seed: int = 0, block_shards: int = 2) -> MixtureOrder:
    return MixtureOrder(SIZES, WEIGHTS, seed=seed, block_shards=block_shards)


def visits(order: MixtureOrder, source: int, positions: int = 2000) -> list[Place]:
    return [place for place in map(order.locate, range(positions)) if place.source == source]


@pytest.mark.parametrize("block_shards", [1, 2, 3, 99])
@pytest.mark.parametrize("source", range(3))
def test_every_epoch_of_a_source_visits_every_sample_once(source, block_shards):
    walk = visits(make_order(block_shards=block_shards), source)
    size = sum(SIZES[source])
    assert len(walk) > 20 * size
    for epoch, first in enumerate(range(0, len(walk) - size, size)):
        places = walk[first : first + size]
        assert {place.epoch for place in places} == {epoch}
        assert sorted(place.index for place in places) == list(range(size))


@pytest.mark.parametrize("block_shards", [1, 50])  # the shards' permutation alone; both together
def test_epochs_sources_and_seeds_are_ordered_differently(block_shards):
    sizes = [[1] * 50, [1] * 50]
    walks = []
    for seed in (0, 1):
        order = MixtureOrder(sizes, [1, 1], seed=seed, block_shards=block_shards)
        for source in (0, 1):
            walk = [place.index for place in visits(order, source, 200)]
            walks += [tuple(walk[:50]), tuple(walk[50:100])]
    assert len(set(walks)) == len(walks) == 8


def test_within_a_block_samples_come_from_few_shards_and_are_shuffled():
    sizes, block_shards = [10] * 40, 4
    order = MixtureOrder([sizes], [1], seed=0, block_shards=block_shards)
    indices = np.array([order.locate(position).index for position in range(400)])
    for block in indices.reshape(10, 40):
        assert len(set(block // 10)) == block_shards
        assert len(set(block[:10] // 10)) > 1  # not shard by shard
    visited = [set(block // 10) for block in indices.reshape(10, 40)]
    assert visited != [set(range(n, n + 4)) for n in range(0, 40, 4)]  # the shards are permuted as well


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.3, 0.2], [3, 1], [0.997, 0.002, 0.001], [1] * 7])
def test_every_window_holds_the_mixture(weights):
    order = MixtureOrder([[5]] * len(weights), weights, seed=3, block_shards=1)
    sources = np.array([order.locate(position).source for position in range(3000)])
    share = np.array(weights) / sum(weights)
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    for length in (10, 64, 999, 1000, 2500):
        windows = counts[length:] - counts[:-length]
        # turns are shuffled in blocks of 10 (both ends may cut one) and the cycle rounds weights to 0.1 %
        assert np.abs(windows - length * share).max() <= 6 + length * 0.0005


def test_no_rank_is_bound_to_one_source():
    order = MixtureOrder([[5], [5]], [0.5, 0.5], seed=0, block_shards=1)
    for world in (2, 4, 8):
        for rank in range(world):
            seen = Counter(order.locate(position).source for position in range(rank, 1000, world))
            assert min(seen[0], seen[1]) > 0.25 * sum(seen.values())


def test_the_order_is_pinned():
    """A change of these values breaks the resume of every run in flight."""
    order = make_order(seed=7)
    places = [(place.source, place.index, place.epoch) for place in map(order.locate, range(12))]
    assert places == GOLDEN_PLACES
    assert order.locate(10**6) == GOLDEN_MILLIONTH
    assert [order.replacement(5, attempt).index for attempt in range(4)] == GOLDEN_REPLACEMENTS
    assert permutation(8, (1, 2, 3, 4, 5)).tolist() == GOLDEN_PERMUTATION
    assert derived_seed(7, 11, "noise") == GOLDEN_SEED


GOLDEN_PLACES = [
    (0, 3, 0),
    (0, 4, 0),
    (1, 2, 0),
    (2, 4, 0),
    (0, 6, 0),
    (1, 1, 0),
    (0, 7, 0),
    (1, 7, 0),
    (2, 1, 0),
    (0, 5, 0),
    (0, 0, 0),
    (1, 3, 0),
]
GOLDEN_MILLIONTH = Place(source=0, index=7, epoch=35714)
GOLDEN_REPLACEMENTS = [6, 2, 5, 0]
GOLDEN_PERMUTATION = [5, 2, 4, 6, 0, 1, 3, 7]
GOLDEN_SEED = 5335651358359079530


def test_a_place_depends_on_its_position_alone():
    forwards = make_order()
    expected = [forwards.locate(position) for position in range(300)]
    backwards = make_order()
    assert [backwards.locate(position) for position in reversed(range(300))] == expected[::-1]
    scattered = make_order()
    for position in np.random.default_rng(0).integers(0, 300, 500):
        assert scattered.locate(int(position)) == expected[position]


def test_resume_at_any_step_continues_the_undisturbed_stream():
    order = make_order()
    undisturbed = [order.locate(position) for position in range(240)]
    for resumed_step in range(0, 20, 3):
        order = make_order()
        positions = itertools.chain.from_iterable(rank_positions(step, 12, 0, 1) for step in range(resumed_step, 20))
        assert [order.locate(position) for position in positions] == undisturbed[resumed_step * 12 :]


def test_position_one_million_is_reached_at_once():
    order = MixtureOrder([[16] * 1100, [10] * 1700, [1000] * 2000], [5, 3, 2], seed=0, block_shards=8)
    started = time.perf_counter()
    for position in range(10**6, 10**6 + 64):
        order.locate(position)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_a_step_handles_the_same_positions_on_every_world_size(step):
    expected = list(range(step * 12, step * 12 + 12))
    for world in (1, 2, 3, 4, 6, 12):
        shares = [rank_positions(step, 12, rank, world) for rank in range(world)]
        assert sorted(itertools.chain(*shares)) == expected
        assert {len(share) for share in shares} == {12 // world}  # no rank runs dry before another
        assert all(position % world == rank for rank, share in enumerate(shares) for position in share)


def test_a_world_that_does_not_divide_the_batch_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"global batch 12 .* 5 ranks; possible are \[1, 2, 3, 4, 6, 12\]"):
        rank_positions(0, 12, 0, 5)
    for wrong in ((0, 12, 4, 4), (0, 12, -1, 4), (-1, 12, 0, 4), (0, 0, 0, 1), (0, 12, 0, 0)):
        with pytest.raises(ValueError):
            rank_positions(*wrong)


def test_replacements_are_every_other_sample_of_the_source_once():
    order, twin = make_order(), make_order()
    for position in range(60):
        place = order.locate(position)
        size = sum(SIZES[place.source])
        others = [order.replacement(position, attempt) for attempt in range(size - 1)]
        assert {other.source for other in others} == {place.source}
        assert sorted(other.index for other in others) == sorted(set(range(size)) - {place.index})
        assert [twin.replacement(position, attempt) for attempt in range(size - 1)] == others
    firsts = Counter(order.replacement(position, 0).index for position in range(1000))
    assert len(firsts) == 14  # spread over the source, not one scapegoat


def test_a_source_of_one_sample_cannot_be_replaced():
    with pytest.raises(ValueError, match="source 0 has one sample"):
        MixtureOrder([[1]], [1], seed=0, block_shards=1).replacement(0, 0)


def test_draws_depend_on_seed_position_and_purpose_alone():
    cases = list(itertools.product((0, 1), (0, 1, 10**9), ("noise", "task", "sigma")))
    draws = {case: torch.rand(2, generator=derived_generator(*case)).tolist() for case in cases}
    assert all(torch.rand(2, generator=derived_generator(*case)).tolist() == draws[case] for case in reversed(cases))
    assert len({tuple(draw) for draw in draws.values()}) == len(cases)
    twins = {case: tuple(derived_numpy_generator(*case).random(2)) for case in cases}
    assert all(tuple(derived_numpy_generator(*case).random(2)) == twins[case] for case in cases)
    assert len(set(twins.values())) == len(cases)


def test_neighbouring_positions_draw_independently():
    draws = np.array([torch.rand(1, generator=derived_generator(0, n, "sigma")).item() for n in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.06


@pytest.mark.parametrize(
    "sizes,weights,seed,block_shards,reason",
    [
        ([[3]], [0.5, 0.5], 0, 1, "as many weights"),
        ([], [], 0, 1, "as many weights"),
        ([[3], []], [1, 1], 0, 1, "source 1: every shard"),
        ([[3], [2, 0]], [1, 1], 0, 1, "source 1: every shard"),
        ([[3], [3]], [1, 0], 0, 1, "leave a source out"),
        ([[3], [3]], [1, -1], 0, 1, "leave a source out"),
        ([[3], [3]], [1, float("nan")], 0, 1, "leave a source out"),
        ([[3], [3]], [1, 1e-5], 0, 1, "0.1 %"),
        ([[3]], [1], -1, 1, "seed"),
        ([[3]], [1], 0, 0, "block_shards"),
    ],
)
def test_an_impossible_mixture_is_refused(sizes, weights, seed, block_shards, reason):
    with pytest.raises(ValueError, match=reason):
        MixtureOrder(sizes, weights, seed=seed, block_shards=block_shards)


def test_a_negative_position_is_refused():
    with pytest.raises(ValueError, match="position"):
        make_order().locate(-1)
