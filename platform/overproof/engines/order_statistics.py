"""Bounds of a quantile between order statistics, whatever the distribution.

Of n independent values the number within the true quantile of a share q is binomial (n, q): Conover, Practical
Nonparametric Statistics, section 3.2; as a one-sided tolerance limit Wilks, 1941, doi 10.1214/aoms/1177731788.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NORMAL_95 = 1.96


def fewest_values(share: float, confidence: float) -> int:
    """As many values as it takes until the largest bounds the quantile from above: 59 for 95 % at 95 %."""
    count = 1
    while share**count > 1 - confidence:
        count += 1
    return count


def upper_bound(values: Sequence[float], share: float, confidence: float) -> float | None:
    """What the quantile of a share is at most, at this one-sided confidence: the smallest value below which so many lie
    only with a probability of ``1 - confidence``. None where there are fewer than ``fewest_values``.
    """
    count = len(values)
    place, above = count, 0.0  # the place-th smallest; the probability that place values or more lie within
    while place > 0:
        above += _probability(place, count, share)
        if above > 1 - confidence:
            break
        place -= 1
    return None if place == count else sorted(values)[place]


def _probability(successes: int, count: int, share: float) -> float:
    """Of so many successes, by the binomial."""
    ways = math.lgamma(count + 1) - math.lgamma(successes + 1) - math.lgamma(count - successes + 1)
    return math.exp(ways + successes * math.log(share) + (count - successes) * math.log1p(-share))


def median_half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of a median between two order statistics (ranks by the normal approximation)."""
    count, ordered = len(values), sorted(values)
    low = math.floor((count - NORMAL_95 * math.sqrt(count)) / 2)
    return (ordered[count - low] - ordered[low - 1]) / 2
