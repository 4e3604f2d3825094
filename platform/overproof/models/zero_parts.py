"""A parameter as a rank holds it: whole, or the part that ZeRO-3 has left it (arXiv 1910.02054).

ZeRO-3 cuts the flat parameter into equal parts, one for each rank; the last ones may be shorter, or empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_apart(parameter: Any) -> bool:
    """Whether ZeRO-3 has taken it apart."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> torch.Size:
    """Of a parameter, also where ZeRO-3 has taken it apart."""
    shape: torch.Size = parameter.ds_shape if is_apart(parameter) else parameter.shape
    return shape


def own_part(parameter: Any, rank: int) -> tuple[int, Tensor]:
    """Where a rank's part begins in the flat parameter, and the part, which is no copy; of a whole one, all of it."""
    if not is_apart(parameter):
        return 0, parameter.detach().reshape(-1)
    part = parameter.ds_tensor.detach()
    start, stop = part_range(parameter.ds_numel, rank, parameter.ds_numel_aligned // len(part))
    return start, part[: stop - start]


def part_range(numel: int, rank: int, world: int) -> tuple[int, int]:
    """The numbers of a flat parameter that a rank has, as ZeRO-3 cuts it."""
    size = -(-numel // world)
    return min(numel, rank * size), min(numel, (rank + 1) * size)


def model_parts(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """What a rank holds of a model's weights, flat and by name; what every rank has whole counts as rank 0's."""
    state = model.state_dict(keep_vars=True)
    return {name: own_part(value, rank)[1] for name, value in state.items() if rank == 0 or is_apart(value)}
