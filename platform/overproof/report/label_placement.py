"""Where the labels of points in a picture go: near their points, over nothing else. Pure numpy, in pixels.

A box is (left, bottom, right, top). Shapes: N labels, K boxes, C candidates, L samples of a line.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DIRECTIONS = 16  # around a point
DISTANCES = (8, 14, 22, 32, 44, 58, 76, 98, 124, 154, 190, 230, 280, 340, 410, 500)  # from a point to its label
LEADER_SAMPLES = 24
COVERED_COST, OUTSIDE_COST, ON_LINE_COST, CROSSED_COST = 1e6, 1e4, 90.0, 200.0


def place_labels(points_N2: Floats, sizes_N2: Floats, markers_K4: Floats, lines_K4: Floats, bounds_4: Floats) -> Floats:
    """The box of each label, (N, 4), one label after the other, each where it costs least.

    It costs its distance from its point and, in pixels too: covering a marker or an earlier label, which nothing
    outweighs; lying outside the bounds; lying on one of the lines or on a leader; a leader across a label or
    another point's marker.
    """
    boxes_N4 = np.empty((len(points_N2), 4))
    leaders_L4 = np.empty((0, 4))
    for label, (point_2, size_2) in enumerate(zip(points_N2, sizes_N2, strict=True)):
        candidates_C4, cost_C = _candidates(point_2, size_2)
        labels_K4 = boxes_N4[:label]
        outside_C2 = (candidates_C4[:, :2] < bounds_4[:2]) | (candidates_C4[:, 2:] > bounds_4[2:])
        samples_CL4 = _leader_samples(point_2, candidates_C4)
        foreign_K = ~((markers_K4[:, :2] <= point_2) & (point_2 <= markers_K4[:, 2:])).all(axis=1)
        obstacles_K4 = np.concatenate([markers_K4[foreign_K], labels_K4])
        crossed_CL = _overlaps_any(samples_CL4.reshape(-1, 4), obstacles_K4).reshape(len(candidates_C4), -1)
        cost_C = (
            cost_C
            + COVERED_COST * _overlaps_any(candidates_C4, np.concatenate([markers_K4, labels_K4]))
            + OUTSIDE_COST * (outside_C2[:, 0] | outside_C2[:, 1])
            + ON_LINE_COST * _overlaps_any(candidates_C4, np.concatenate([lines_K4, leaders_L4]))
            + CROSSED_COST * np.asarray(crossed_CL.any(axis=1))
        )
        best = int(np.argmin(cost_C))
        boxes_N4[label] = candidates_C4[best]
        leaders_L4 = np.concatenate([leaders_L4, samples_CL4[best]])
    return boxes_N4


def leader_end(point_2: Floats, box_4: Floats) -> Floats:
    """The point of a label's box that is nearest to what it names."""
    return np.clip(point_2, box_4[:2], box_4[2:])


def _candidates(point_2: Floats, size_2: Floats) -> tuple[Floats, Floats]:
    """Boxes of this size around a point and their distances, the nearest first, and to the right first."""
    turns = np.arange(DIRECTIONS) * 2 * np.pi / DIRECTIONS
    turns = turns[np.argsort(np.round(1 - np.cos(turns), 9), kind="stable")]
    unit_D2 = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    centres_C2 = (point_2 + np.array(DISTANCES)[:, None, None] * unit_D2 + unit_D2 * size_2 / 2).reshape(-1, 2)
    boxes_C4 = np.concatenate([centres_C2 - size_2 / 2, centres_C2 + size_2 / 2], axis=1)
    return boxes_C4, np.repeat(np.array(DISTANCES, float), DIRECTIONS)


def _leader_samples(point_2: Floats, boxes_C4: Floats) -> Floats:
    """Points along the line from a point to each box, as boxes without an area: (C, L, 4)."""
    ends_C2 = np.clip(point_2, boxes_C4[:, :2], boxes_C4[:, 2:])
    shares_L1 = np.linspace(0, 1, LEADER_SAMPLES, endpoint=False)[:, None]
    samples_CL2 = point_2 + (ends_C2 - point_2)[:, None] * shares_L1
    return np.concatenate([samples_CL2, samples_CL2], axis=2)


def _overlaps_any(boxes_C4: Floats, others_K4: Floats) -> NDArray[np.bool_]:
    """Whether each box shares an area with, or holds, any of the others."""
    boxes_C14, others_1K4 = boxes_C4[:, None], others_K4[None]
    apart_CK2 = (boxes_C14[..., :2] >= others_1K4[..., 2:]) | (others_1K4[..., :2] >= boxes_C14[..., 2:])
    return np.asarray((~(apart_CK2[..., 0] | apart_CK2[..., 1])).any(axis=1))
