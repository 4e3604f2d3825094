"""What rounding each matrix of a model would cost, and the types that a number of bytes buys.

To second order a loss grows by half the sum of F (w - q)², where F, the diagonal of the Fisher information, is the mean
square of the gradients on rows of the data (LeCun, Denker and Solla, Optimal Brain Damage, 1989). Errors of rounding
are small and independent, so that these costs add up; bytes go to where each takes away most of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from overproof.errors import InputError
from overproof.models.base import Prediction

Batch = dict[str, Tensor]
MOST_UNITS = 1 << 16  # that a budget is divided into


@dataclass(frozen=True)
class Option:
    """A type that a matrix may have."""

    kind: Ggml
    size_bytes: int
    cost: float  # by which the loss grows, in nats a prediction


def fisher_diagonal(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Batch],
    predict: Callable[[nn.Module, Batch], Prediction],
    tell: Callable[[int], None],
) -> dict[str, Tensor]:
    """Of parameters by their names: the mean, over predictions, of their gradients' squares. Each batch is one row.

    ``tell`` hears how many rows are done.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    sums, rows = {name: torch.zeros_like(value) for name, value in chosen.items()}, 0
    for rows, batch in enumerate(batches, 1):
        tell(rows)
        found = predict(model, batch)
        counted = found.mask_BP > 0
        loss = cross_entropy(found.logits_BPV[counted].float(), found.targets_BP[counted], reduction="sum")
        for name, gradient in zip(chosen, torch.autograd.grad(loss, list(chosen.values())), strict=True):
            sums[name].addcmul_(gradient, gradient, value=1 / max(1, int(counted.sum())))
    return {name: total / max(1, rows) for name, total in sums.items()}


def choose_types(options: Mapping[str, list[Option]], budget_bytes: int, where: str) -> dict[str, Ggml]:
    """A type for each matrix, of which all together take ``budget_bytes`` at most, with the least cost.

    A knapsack in which one option of each matrix is taken, by dynamic programming over the bytes beyond the smallest
    types: exact where these have a common divisor that is not too small, else all but exact.

    Raises:
        InputError: not even the smallest fit.
    """
    least = {name: min(option.size_bytes for option in found) for name, found in options.items()}
    left = budget_bytes - sum(least.values())
    if left < 0:
        raise InputError(
            f"{where}: {budget_bytes / 1e6:.2f} MB are left for matrices, and the least they take is "
            f"{(budget_bytes - left) / 1e6:.2f} MB: give {-left / 1e6:.2f} MB more, or a smaller student"
        )
    beyond = {name: [option.size_bytes - least[name] for option in found] for name, found in options.items()}
    unit = max(math.gcd(*chain.from_iterable(beyond.values())), -(-left // MOST_UNITS), 1)
    costs_U = np.zeros(left // unit + 1)  # the least, of the matrices so far, in so many units at most
    taken = dict[str, NDArray[np.intp]]()
    for name, found in options.items():
        each = np.full((len(found), len(costs_U)), np.inf)
        for place, (option, more) in enumerate(zip(found, beyond[name], strict=True)):
            units = -(-more // unit)
            if units < len(costs_U):
                each[place, units:] = costs_U[: len(costs_U) - units] + option.cost
        taken[name] = each.argmin(0)
        costs_U = each.min(0)
    chosen, units = dict[str, Ggml](), len(costs_U) - 1
    for name in reversed(list(options)):
        place = int(taken[name][units])
        chosen[name] = options[name][place].kind
        units -= -(-beyond[name][place] // unit)
    return {name: chosen[name] for name in options}
