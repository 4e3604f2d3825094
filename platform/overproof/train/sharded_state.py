"""The state of a training at ZeRO stage 3 in the files of its ranks, and the part of it that a rank of a group of
another size has: every flat weight is cut anew, and so are its master's averages.

Of the files only those are read that hold a piece of the part, and of those the piece alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overproof.models.zero_parts import part_range

FP32 = "fp32"  # masters, beside the names that Adam has for its averages
STEP = "step"


@dataclass(frozen=True)
class ShardedState:
    """The files in a folder that ``world`` ranks have saved."""

    folder: Path
    world: int
    _read: dict[int, dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    @cached_property
    def model_state(self) -> dict[str, Any]:
        """The file of the model's, that of any rank: no weights are in it."""
        found: dict[str, Any] = read_state(min(self.folder.glob("*_model_states.pt")))
        return found

    def part(self, numels: Mapping[str, int], rank: int, world: int) -> dict[str, Any]:
        """What one of ``world`` ranks has of a group of weights: flat, the masters and each of Adam's averages, and
        the steps made. ``numels`` are the numbers in each weight, in the group's order.
        """
        found: dict[str, Any] = {STEP: self._step}
        size = sum(-(-numel // world) for numel in numels.values())
        for key in self._keys:
            flat, offset = torch.zeros(size), 0
            for name, numel in numels.items():
                start, stop = part_range(numel, rank, world)
                for saved in overlapping(numel, rank, world, self.world):
                    first, last = part_range(numel, saved, self.world)
                    low, high = max(start, first), min(stop, last)
                    piece = self._pieces(saved)[key][name][low - first : high - first]
                    flat[offset + low - start : offset + high - start] = piece
                offset += -(-numel // world)
            found[key] = flat
        return found

    @cached_property
    def common(self) -> dict[str, Any]:
        """What every rank has saved of the optimizer, or the like of it: that of any rank."""
        found: dict[str, Any] = read_state(min(self.folder.glob("*_optim_states.pt")))["optimizer_state_dict"]
        return found

    @property
    def _step(self) -> Any:
        step = self.common["optimizer_state_dict"]["state"][0][STEP]
        return step.clone() if isinstance(step, Tensor) else step

    @property
    def _keys(self) -> list[str]:
        return [FP32, *(key for key in self.common["optimizer_state_dict"]["state"][0] if key != STEP)]

    def _pieces(self, rank: int) -> dict[str, dict[str, Tensor]]:
        """What a rank has saved, by what it is and by weight: flat, in the file."""
        if rank not in self._read:
            state = read_state(self.folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
            found: dict[str, dict[str, Tensor]] = {key: {} for key in self._keys}
            for index, shapes in enumerate(self.model_state["param_shapes"]):
                flats = {FP32: state["fp32_flat_groups"][index], **state["optimizer_state_dict"]["state"][index]}
                for name, start, stop in group_ranges(shapes, rank, self.world):
                    for key, weights in found.items():
                        weights[name] = flats[key][start:stop]
            self._read[rank] = found
        return self._read[rank]


def overlapping(numel: int, rank: int, world: int, saved_world: int) -> range:
    """The ranks of ``saved_world`` that have a piece of what one of ``world`` has of a flat weight."""
    start, stop = part_range(numel, rank, world)
    size = -(-numel // saved_world)
    return range(start // size, -(-stop // size)) if start < stop else range(0)


def needed_ranks(numels: Mapping[str, int], rank: int, world: int, saved_world: int) -> set[int]:
    """The ranks whose files hold a piece of any of these weights' parts; one at least."""
    found = {saved for numel in numels.values() for saved in overlapping(numel, rank, world, saved_world)}
    return found or {0}


def group_ranges(shapes: Mapping[str, torch.Size], rank: int, world: int) -> Iterator[tuple[str, int, int]]:
    """Where a rank's part of each weight lies in its flat group."""
    offset = 0
    for name, shape in shapes.items():
        start, stop = part_range(shape.numel(), rank, world)
        yield name, offset, offset + stop - start
        offset += -(-shape.numel() // world)


def read_state(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
