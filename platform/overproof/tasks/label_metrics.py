"""What is told of texts with several labels: F1 over all of them and of each, and how many texts are right as a whole.

Shapes: U test units, S resamples, V labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.tasks.base import FurtherMetric, Quality, UnitColumns

Counts = NDArray[np.float64]  # (S, U): how often each unit was drawn


@dataclass(frozen=True)
class MicroF1(Quality):
    """Twice the labels that are there and given, by those there and those given; 1 where there are none of either."""

    def value(self, total: Any, size: Any) -> Any:
        return np.where(np.equal(size, 0), 1.0, self.scale * (total / np.maximum(size, 1)) ** self.power)


def label_columns(there_UV: NDArray[np.bool_], given_UV: NDArray[np.bool_]) -> UnitColumns:
    """What the metrics below are made from: which labels each unit has, and which it was given."""
    return {"there": there_UV, "given": given_UV}


def macro_f1(units: UnitColumns, counts_SU: Counts) -> NDArray[np.float64]:
    """The mean of F1 over labels; one that is neither there nor given has no part in it."""
    there_UV, given_UV = units["there"], units["given"]
    both_SV = counts_SU @ (there_UV.astype(float) + given_UV)
    f1_SV = 2 * (counts_SU @ (there_UV & given_UV)) / np.maximum(both_SV, 1)
    labels_S = (both_SV > 0).sum(1)
    mean_S: NDArray[np.float64] = np.where(labels_S == 0, 1.0, f1_SV.sum(1) / np.maximum(labels_S, 1))
    return mean_S


def exact_match(units: UnitColumns, counts_SU: Counts) -> NDArray[np.float64]:
    """The share of units that were given the labels that they have and no other."""
    right_U = (units["there"] == units["given"]).all(1)
    share_S: NDArray[np.float64] = counts_SU @ right_U / counts_SU.sum(1)
    return share_S


MICRO_F1 = MicroF1("micro_f1", "micro F1", "share", higher_is_better=True, relative=False)
LABEL_METRICS = (
    FurtherMetric("macro_f1", "macro F1", "share", higher_is_better=True, value=macro_f1),
    FurtherMetric("exact_match", "exact match", "share", higher_is_better=True, value=exact_match),
)
