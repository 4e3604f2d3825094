"""What is told of texts with several labels: F1 over all of them and of each, how many texts are right as a whole, and
how far each label's probability is from how often the label is there.

Shapes: U test units, S resamples, V labels, G bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overproof.tasks.base import FurtherMetric, QualityMetric, UnitColumns
from overproof.tasks.class_metrics import BINS, Counts, confidence_bins, macro_f1


@dataclass(frozen=True)
class MicroF1(QualityMetric):
    """Twice the labels that are there and given, by those there and those given; 1 where there are none of either."""

    def value(self, total: Any, size: Any) -> Any:
        return np.where(np.equal(size, 0), 1.0, self.scale * (total / np.maximum(size, 1)) ** self.power)


def label_columns(
    there_UV: NDArray[np.bool_], given_UV: NDArray[np.bool_], logprobs_UV: NDArray[np.float32]
) -> UnitColumns:
    """What the metrics below are made from: which labels each unit has, which it was given, and how probable each was
    to be there.
    """
    return {"there": there_UV, "given": given_UV, "probability": np.exp(logprobs_UV)}


def multilabel_macro_f1(units: UnitColumns, counts_SU: Counts) -> NDArray[np.float64]:
    """See ``macro_f1``; of units with several labels."""
    there_UV, given_UV = units["there"], units["given"]
    return macro_f1(counts_SU @ (there_UV & given_UV), counts_SU @ (there_UV.astype(float) + given_UV))


def classwise_calibration_error(units: UnitColumns, counts_SU: Counts) -> NDArray[np.float64]:
    """How far the probability of a label is from the share of units that have it, a mean over bins of that probability
    by the units in them, and over labels (Kull et al., arXiv 1910.12656, equation 3). It is above 0 by chance alone:
    the more, the fewer units.
    """
    there_UV, probability_UV = units["there"], units["probability"]
    gaps_S = np.zeros(len(counts_SU))
    for there_U, probability_U in zip(there_UV.T, probability_UV.T, strict=True):
        excess_UG = np.zeros((len(there_U), BINS))
        excess_UG[np.arange(len(there_U)), confidence_bins(probability_U)] = there_U - probability_U.astype(np.float64)
        gaps_S += np.abs(counts_SU @ excess_UG).sum(1)
    error_S: NDArray[np.float64] = gaps_S / counts_SU.sum(1) / there_UV.shape[1]
    return error_S


def exact_match(units: UnitColumns, counts_SU: Counts) -> NDArray[np.float64]:
    """The share of units that were given the labels that they have and no other."""
    right_U = (units["there"] == units["given"]).all(1)
    share_S: NDArray[np.float64] = counts_SU @ right_U / counts_SU.sum(1)
    return share_S


MICRO_F1 = MicroF1("micro_f1", "micro F1", "share", higher_is_better=True, relative=False)
LABEL_METRICS = (
    FurtherMetric("macro_f1", "macro F1", "share", higher_is_better=True, value=multilabel_macro_f1),
    FurtherMetric("exact_match", "exact match", "share", higher_is_better=True, value=exact_match),
    FurtherMetric(
        "classwise_calibration_error",
        "class-wise calibration error",
        "share",
        higher_is_better=False,
        value=classwise_calibration_error,
    ),
)
