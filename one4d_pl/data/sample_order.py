"""The sample at each position of the training stream: a pure function of (seed, position).

1. The stream of global positions 0, 1, 2 ... is endless and does not depend on ranks, workers or the ends of epochs.
2. The mixture's weights decide which source has its turn at a position, by a fixed cycle of 1000 turns.
3. Each source walks its own permutation, a new one per epoch: its shards are permuted, then its samples within
   consecutive blocks of `block_shards` shards, so reads stay near each other on Lustre and object stores.
4. An optimiser step takes `global_batch` positions; position n goes to rank n mod world.
5. Every random draw of a sample (task, noise ...) is seeded by (seed, position, purpose).

So the step is all that resuming needs, and another world size loses and repeats nothing. Permutations sort the raw
words of PCG64, which numpy promises never to change, unlike `Generator.permutation`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

CYCLE = 1000  # turns, so that weights are kept to 0.1 %
TURN_BLOCK = 10  # so many turns are shuffled among each other, else a rank might always get the same source
KEPT = 2  # permutations remembered per source: the present one and, at a border, the one before

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """Where a sample lies: its source's number, its index in that ShardSet, and the epoch."""

    source: int
    index: int
    epoch: int


class MixtureOrder:
    """The endless, seeded order of one or several sources."""

    def __init__(
        self,
        sizes_per_source: Sequence[Sequence[int]],  # per source: samples of each shard (>= 1), in manifest order
        weights: Sequence[float],  # relative; the config has checked that every source has its turns
        seed: int,
        block_shards: int,  # shards whose samples are shuffled together
    ) -> None:
        self._turns = _cycle_of_turns(weights, seed)  # [CYCLE], the source at each turn
        owns = self._turns == np.arange(len(weights))[:, None]  # [sources, CYCLE]
        self._turns_before = np.cumsum(owns, axis=1) - owns  # [sources, CYCLE], within the cycle
        self._turns_per_cycle = owns.sum(axis=1)  # [sources]
        self._walks = [_Walk(sizes, seed, source, block_shards) for source, sizes in enumerate(sizes_per_source)]
        self._seed = seed

    def locate(self, position: int) -> Place:
        """Return the place of the sample at a position of the stream."""
        cycle, turn = divmod(position, CYCLE)
        source = int(self._turns[turn])
        visit = cycle * int(self._turns_per_cycle[source]) + int(self._turns_before[source, turn])
        epoch, step = divmod(visit, self._walks[source].num_samples)
        return Place(source, self._walks[source].index(epoch, step), epoch)

    def replacement(self, position: int, attempt: int) -> Place:
        """Return the place to read at attempt 0, 1, ... when the sample at `position` is broken.

        The first n-1 attempts name each of the source's n-1 other samples once, the same for any
        number of ranks and workers.
        """
        place = self.locate(position)
        others = self._walks[place.source].num_samples - 1
        start = derived_seed(self._seed, position, "replacement start") % others
        stride = 1 + derived_seed(self._seed, position, "replacement stride") % others
        while math.gcd(stride, others) > 1:
            stride += 1
        offset = 1 + (start + attempt * stride) % others  # 1 .. n-1
        return Place(place.source, (place.index + offset) % (others + 1), place.epoch)


class EachOnceOrder:
    """The order of a validation set: every sample of every source once, sources taking turns."""

    def __init__(self, sizes: Sequence[int]) -> None:  # samples per source
        self._sizes = sizes
        self._places = [Place(s, i, 0) for i in range(max(sizes)) for s, size in enumerate(sizes) if i < size]

    def locate(self, position: int) -> Place:
        """Return the place of the sample at a position; IndexError past the last."""
        return self._places[position]

    def replacement(self, position: int, attempt: int) -> Place:
        """Return the places of the samples that follow in the same source, one per attempt."""
        place = self._places[position]
        return Place(place.source, (place.index + 1 + attempt) % self._sizes[place.source], 0)


class _Walk:
    """The permutations of one source, a new one in each epoch."""

    def __init__(self, sizes: Sequence[int], seed: int, source: int, block_shards: int) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes  # index of each shard's first sample
        self._seed, self._source, self._block_shards = seed, source, block_shards
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # permuted shards, end of each block
        self._blocks: dict[tuple[int, int], np.ndarray] = {}  # sample indices in the order of the walk
        self.num_samples = int(self._sizes.sum())

    def index(self, epoch: int, step: int) -> int:
        """Return the index of the sample at a step of an epoch."""
        shards, ends = _remember(self._epochs, epoch, lambda: self._permute_shards(epoch))
        block = int(np.searchsorted(ends, step, side="right"))
        samples = _remember(self._blocks, (epoch, block), lambda: self._permute_block(shards, epoch, block))
        return int(samples[step - int(ends[block]) + len(samples)])

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = permutation(len(self._sizes), (self._seed, self._source, epoch, 0, 0))
        firsts = np.arange(0, len(shards), self._block_shards)
        return shards, np.cumsum(np.add.reduceat(self._sizes[shards], firsts))

    def _permute_block(self, shards: np.ndarray, epoch: int, block: int) -> np.ndarray:
        chosen = shards[block * self._block_shards : (block + 1) * self._block_shards]
        samples = np.concatenate([self._starts[s] + np.arange(self._sizes[s]) for s in chosen])
        return samples[permutation(len(samples), (self._seed, self._source, epoch, 1, block))]


def _remember(memory: dict[Key, Value], key: Key, compute: Callable[[], Value]) -> Value:
    if key not in memory:
        if len(memory) >= KEPT:
            del memory[next(iter(memory))]  # the oldest
        memory[key] = compute()
    return memory[key]


def _cycle_of_turns(weights: Sequence[float], seed: int) -> np.ndarray:  # [CYCLE] int64
    """Give each turn a source: interleaved by weight, then shuffled in short blocks."""
    relative = np.asarray(weights, dtype=np.float64)
    exact = relative / relative.sum() * CYCLE
    quota = np.floor(exact)
    quota[np.argsort(quota - exact, kind="stable")[: CYCLE - int(quota.sum())]] += 1  # largest remainders
    turns = np.empty(CYCLE, dtype=np.int64)
    taken = np.zeros(len(quota))
    for turn in range(CYCLE):
        turns[turn] = np.argmax(quota * (turn + 1) / CYCLE - taken)  # the source that is farthest behind its quota
        taken[turns[turn]] += 1
    for block, start in enumerate(range(0, CYCLE, TURN_BLOCK)):
        shuffled = start + permutation(TURN_BLOCK, (seed, 0, 0, 2, block))
        turns[start : start + TURN_BLOCK] = turns[shuffled]
    return turns


def permutation(count: int, entropy: tuple[int, int, int, int, int]) -> np.ndarray:  # [count] int64
    """Permute 0 .. count-1, the same for this entropy on every platform and numpy version."""
    # always five numbers, since SeedSequence treats missing ones as zeros
    words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(words, kind="stable")


def rank_positions(step: int, global_batch: int, rank: int, world: int) -> range:
    """Return the positions of a rank at an optimiser step, in order; position n goes to rank n mod world."""
    return range(step * global_batch + rank, (step + 1) * global_batch, world)


def derived_seed(seed: int, position: int, purpose: str) -> int:
    """Derive 64 bits that depend on (seed, position, purpose) and on nothing else."""
    text = f"{seed}/{position}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def derived_generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """Make the CPU generator (it keeps 32 bits of the seed) for one draw of one sample, e.g. purpose "noise"."""
    return torch.Generator().manual_seed(derived_seed(seed, position, purpose))


def derived_numpy_generator(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Make the numpy counterpart of `derived_generator`; its numbers are others."""
    return np.random.Generator(np.random.PCG64(derived_seed(seed, position, purpose)))
