"""What is told of classifiers beside their accuracy: macro-averaged F1, and the expected calibration error.

Shapes: U test units, S resamples, V classes, G groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from overproof.tasks.base import FurtherMetric, UnitColumns

BINS = 15  # of confidence, equally wide

Counts = NDArray[np.float64]  # (S, U): how often each unit was drawn


def class_columns(logprobs_UV: NDArray[np.float32], labels_U: NDArray[np.int32]) -> UnitColumns:
    """What the metrics below are made from."""
    return {"label": labels_U, "choice": logprobs_UV.argmax(1), "confidence": np.exp(logprobs_UV.max(1))}


def multiclass_macro_f1(units: UnitColumns, counts_SU: Counts) -> NDArray[np.float64]:
    """See ``macro_f1``; of units with a class each."""
    labels_U, choices_U = units["label"], units["choice"]
    classes = int(max(labels_U.max(), choices_U.max())) + 1
    right_SV = sums_by_group(counts_SU * (labels_U == choices_U), labels_U, classes)
    named_SV, there_SV = (sums_by_group(counts_SU, groups_U, classes) for groups_U in (choices_U, labels_U))
    return macro_f1(right_SV, named_SV + there_SV)


def macro_f1(right_SV: NDArray[np.float64], both_SV: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over classes of F1, the harmonic mean of precision and recall: twice how often a class was rightly
    named, by how often it was named and how often it was there together. A class that is neither has no part in it;
    it is 1 where there is no other.
    """
    f1_SV = 2 * right_SV / np.maximum(both_SV, 1)
    classes_S = (both_SV > 0).sum(1)
    mean_S: NDArray[np.float64] = np.where(classes_S == 0, 1.0, f1_SV.sum(1) / np.maximum(classes_S, 1))
    return mean_S


def calibration_error(units: UnitColumns, counts_SU: Counts) -> NDArray[np.float64]:
    """How far the probability of the first choice is from the share of right ones, a mean over bins of confidence by
    the units in them (Guo et al., arXiv 1706.04599). It is above 0 by chance alone: the more, the fewer units.
    """
    bins_U = confidence_bins(units["confidence"])
    excess_U = (units["label"] == units["choice"]) - units["confidence"].astype(np.float64)
    error_S: NDArray[np.float64] = np.abs(sums_by_group(counts_SU * excess_U, bins_U, BINS)).sum(1) / counts_SU.sum(1)
    return error_S


def confidence_bins(probabilities: NDArray[np.float32]) -> NDArray[np.int64]:
    """In which of the bins each probability is."""
    bins: NDArray[np.int64] = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    return bins


def sums_by_group(values_SU: NDArray[np.float64], groups_U: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """Sums of the values of each group: (S, G)."""
    order = np.argsort(groups_U, kind="stable")
    there, starts = np.unique(groups_U[order], return_index=True)
    sums_SG = np.zeros((len(values_SU), groups))
    sums_SG[:, there] = np.add.reduceat(values_SU[:, order], starts, axis=1)
    return sums_SG


CLASS_METRICS = (
    FurtherMetric("macro_f1", "macro F1", "share", higher_is_better=True, value=multiclass_macro_f1),
    FurtherMetric("calibration_error", "calibration error", "share", higher_is_better=False, value=calibration_error),
)
