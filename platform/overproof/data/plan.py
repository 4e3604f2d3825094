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


def permutation(seed: int, epoch: int, stream: int, size: int) -> Ids:
    """A permutation of ``range(size)``, a function of its arguments alone; ``seed`` < 2**64."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return np.argsort(bits.random_raw(size), kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=4)
def _group_order(seed: int, epoch: int, groups: int) -> Ids:
    return permutation(seed, epoch, 0, groups)


@lru_cache(maxsize=64)
def _row_order(seed: int, epoch: int, group: int, rows: int) -> Ids:
    return permutation(seed, epoch, 1 + group, rows)


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
        first, last = start // self.rows_per_group, (stop - 1) // self.rows_per_group
        ids = np.concatenate([self._group_at(slot) for slot in range(first, last + 1)])
        offset = start - first * self.rows_per_group
        return ids[offset : offset + stop - start]

    def step_rows(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> Ids:
        """A rank's equal, contiguous share of the global batch of a step, counted from 0.

        The global batch is the positions ``[step * batch_size, (step + 1) * batch_size)`` at any world size.
        """
        if batch_size % world or not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} cannot take an equal share of {batch_size} rows")
        share = batch_size // world
        start = step * batch_size + rank * share
        return self.rows_at(start, start + share)

    def _group_at(self, slot: int) -> Ids:
        """The rows of the slot-th row group of the endless order."""
        epoch, place = divmod(slot, self.groups)
        group = int(_group_order(self.seed, epoch, self.groups)[place])
        return group * self.rows_per_group + _row_order(self.seed, epoch, group, self.rows_per_group)
