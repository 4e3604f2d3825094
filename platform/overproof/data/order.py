"""Which rows form which step: arithmetic on a few integers, and nothing else.

Only raw Philox words (Salmon et al., SC 2011) and a stable sort are used. numpy keeps the words of its bit
generators for ever, while the methods of ``Generator`` may draw differently in a later release.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

BLOCK_ROWS = 4096  # about as many have their order worked out and cached together: whole row groups, one at least


def permutation(seed: int, epoch: int, stream: int, size: int) -> Ids:
    """A permutation of ``range(size)``, a function of its arguments alone; ``seed`` < 2**64."""
    return permutations(seed, epoch, np.array([stream]), size).reshape(-1)


def permutations(seed: int, epoch: int, streams_N: Ids, size: int) -> Ids:
    """A permutation of ``range(size)`` for each stream: (N, size)."""
    words_NS = random_words(seed, epoch, streams_N, size)
    return np.argsort(words_NS, axis=1, kind="stable").astype(np.int64, copy=False)


def random_words(seed: int, key: int, streams_N: Ids, size: int) -> NDArray[np.uint64]:
    """Raw Philox words of each stream, a function of the arguments alone; those of a stream begin alike at any size."""
    generator = np.random.Philox(key=np.array([seed, key], np.uint64))
    start = generator.state  # set back for each stream, which costs a fourth of a new generator
    words_NS = np.empty((len(streams_N), size), np.uint64)
    for words_S, stream in zip(words_NS, streams_N.tolist(), strict=True):
        start["state"]["counter"][:] = (0, 0, 0, stream)
        generator.state = start
        words_S[:] = generator.random_raw(size)
    return words_NS


def uniforms(seed: int, key: int, streams_N: Ids, size: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) of each stream: ``random_words`` by their 53 highest bits."""
    words_NS = random_words(seed, key, streams_N, size) >> np.uint64(11)
    numbers_NS: NDArray[np.float64] = words_NS.astype(np.float64) * 2.0**-53
    return numbers_NS


@lru_cache(maxsize=4)
def _group_order(seed: int, epoch: int, groups: int) -> Ids:
    return permutation(seed, epoch, 0, groups)


@dataclass(frozen=True)
class Order:
    """The endless order of a train split: every epoch permutes the row groups, and the rows inside each."""

    groups: int
    rows_per_group: int
    seed: int

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return self.groups * self.rows_per_group

    def rows_at(self, start: int, stop: int) -> Ids:
        """The sample ids at positions ``[start, stop)``; epoch e covers ``[e * rows, (e + 1) * rows)``."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions [{start}, {stop}): expected 0 <= start <= stop")
        if start == stop:
            return np.empty(0, np.int64)
        parts = []
        while start < stop:
            epoch, position = divmod(start, self.rows)
            block, offset = divmod(position, self.groups_per_block * self.rows_per_group)
            parts.append(_block_rows(self, epoch, block)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def step_rows(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Ids:
        """A rank's equal, contiguous share of the global batch of a step, counted from 0.

        The global batch is the positions ``[step * batch_size, (step + 1) * batch_size)`` at any world size.
        """
        share = _share(batch_size, rank, world)
        start = step * batch_size + rank * share
        return self.rows_at(start, start + share)

    def steps_rows(self, first: int, last: int, batch_size: int, rank: int = 0, world: int = 1) -> Ids:
        """A rank's shares of the steps ``[first, last)``, step after step."""
        share = _share(batch_size, rank, world)
        ids = self.rows_at(first * batch_size, last * batch_size)
        return ids.reshape(last - first, world, share)[:, rank].reshape(-1)

    @property
    def groups_per_block(self) -> int:
        """Row groups whose order is worked out together."""
        return max(1, BLOCK_ROWS // self.rows_per_group)


def _share(batch_size: int, rank: int, world: int) -> int:
    if batch_size % world or not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} cannot take an equal share of {batch_size} rows")
    return batch_size // world


@lru_cache(maxsize=8)
def _block_rows(order: Order, epoch: int, block: int) -> Ids:
    """The rows of a block of an epoch: ``groups_per_block`` row groups, or those that are left."""
    first = block * order.groups_per_block
    groups_N = _group_order(order.seed, epoch, order.groups)[first : first + order.groups_per_block]
    rows_NR = permutations(order.seed, epoch, 1 + groups_N, order.rows_per_group)
    ids = (groups_N[:, None] * order.rows_per_group + rows_NR).reshape(-1)
    ids.flags.writeable = False  # the cache gives every caller the same array
    return ids


def rows_hash(sample_ids: Ids) -> int:
    """A hash of a multiset of rows: the sum of a 32-bit hash of each (SplitMix64's mixing), so parts add up."""
    mixed = sample_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return int((mixed >> np.uint64(32)).sum())
