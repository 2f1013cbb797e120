"""Laws of the sample order: the mixture's weights at every moment, shuffled blocks, draws without memory.

That every sample is seen once per epoch, whatever the ranks and resumes, is test_order_simulation.py's.
"""

from __future__ import annotations

import itertools
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
)

SIZES = [[3, 1, 4, 1, 5], [2, 6], [7]]  # samples per shard of three sources: 14, 8 and 7 samples
WEIGHTS = [0.5, 0.3, 0.2]


def make_order(seed: int = 0, block_shards: int = 2) -> MixtureOrder:
    return MixtureOrder(SIZES, WEIGHTS, seed=seed, block_shards=block_shards)


def visits(order: MixtureOrder, source: int, positions: int = 2000) -> list[Place]:
    return [place for place in map(order.locate, range(positions)) if place.source == source]


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
    (0, 3, 0), (0, 4, 0), (1, 2, 0), (2, 4, 0), (0, 6, 0), (1, 1, 0), (0, 7, 0), (1, 7, 0), (2, 1, 0), (0, 5, 0),
    (0, 0, 0), (1, 3, 0),
]  # fmt: skip
GOLDEN_MILLIONTH = Place(source=0, index=7, epoch=35714)
GOLDEN_REPLACEMENTS = [6, 2, 5, 0]
GOLDEN_PERMUTATION = [5, 2, 4, 6, 0, 1, 3, 7]
GOLDEN_SEED = 5335651358359079530


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
