"""The Pareto frontier: the points that no other dominates, how sure that is, and the volume they cover. Pure numpy.

Every objective is a cost: less is better. Negate one that is to be large.

Shapes: N points, O objectives.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Standing = Literal["certain", "open", "beaten"]


def non_dominated(costs_NO: Floats) -> NDArray[np.bool_]:
    """The points that no other dominates, shape (N,): none costs at most as much in every objective and less in one.

    Equal points do not dominate each other.

    Raises:
        ValueError: a cost is not a number, which no order holds for.
    """
    if np.isnan(costs_NO).any():
        raise ValueError("a cost is not a number; leave the point out, or give it an infinite cost")
    return np.array([not _dominates(costs_NO, point_O).any() for point_O in costs_NO], bool)


def standings(costs_NO: Floats, low_NN: Floats, high_NN: Floats) -> list[Standing]:
    """How sure it is that each point is on the frontier of its exact costs and one cost that is known in pairs.

    ``low_NN[i, j]`` and ``high_NN[i, j]`` bound how much worse i is than j in the uncertain cost. A point is

    - ``certain``: nothing at most as large in the exact costs could be as good, even at the interval's far end;
    - ``beaten``: something at most as large there is better, even at the interval's near end;
    - ``open`` otherwise: more test units would tell.

    An interval that is not known (NaN) proves neither.
    """
    standing_N: list[Standing] = []
    for i, point_O in enumerate(costs_NO):
        rivals = (costs_NO <= point_O).all(axis=1)
        rivals[i] = False
        if (low_NN[i, rivals] > 0).any():
            standing_N.append("beaten")
        elif (high_NN[i, rivals] < 0).all():
            standing_N.append("certain")
        else:
            standing_N.append("open")
    return standing_N


def hypervolume(costs_NO: Floats, reference_O: Floats) -> float:
    """The volume between the points and a reference: what at least one point is better than. Exact.

    Of two or three objectives; a point that is not below the reference in each of them adds nothing. Three are
    swept along the last, a slab of constant area between two neighbours (Fonseca and others, CEC 2006).

    Raises:
        ValueError: another number of objectives, or a cost that is not a number.
    """
    if costs_NO.ndim != 2 or costs_NO.shape[1:] != reference_O.shape or len(reference_O) not in (2, 3):
        raise ValueError(f"costs {costs_NO.shape}, reference {reference_O.shape}: expected (N, 2) and (2,), or three")
    if np.isnan(costs_NO).any():
        raise ValueError("a cost is not a number; leave the point out")
    inside_NO = costs_NO[(costs_NO < reference_O).all(axis=1)]
    if len(reference_O) == 2:
        return _area(inside_NO, reference_O)
    inside_NO = inside_NO[np.argsort(inside_NO[:, 2], kind="stable")]
    tops = np.append(inside_NO[1:, 2], reference_O[2])
    slabs = zip(range(1, len(inside_NO) + 1), tops - inside_NO[:, 2], strict=False)
    return float(sum(depth * _area(inside_NO[:n, :2], reference_O[:2]) for n, depth in slabs if depth > 0))


def _dominates(costs_NO: Floats, point_O: Floats) -> NDArray[np.bool_]:
    return np.asarray((costs_NO <= point_O).all(axis=1) & (costs_NO < point_O).any(axis=1))


def _area(costs_N2: Floats, reference_2: Floats) -> float:
    """Under a staircase: every point, from the left, adds what lies below the lowest before it."""
    order = np.argsort(costs_N2[:, 0], kind="stable")
    left, height = costs_N2[order, 0], np.minimum.accumulate(costs_N2[order, 1])
    before = np.append(reference_2[1], height[:-1]) if len(height) else height
    return float(((reference_2[0] - left) * (before - height)).sum())
