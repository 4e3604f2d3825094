"""The picture as matplotlib lays it out: no label on its right hides another or a point."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from overproof.evaluate.gate import CandidateVerdict, Verdict
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.report.figure import DPI, MARKER_POINTS, PlottedCurve, draw_report, plot_report
from overproof.report.label_placement import place_labels
from overproof.tasks.base import Metric

CURVE = PlottedCurve("teacher", "teacher", [(1, 3.0), (2, 2.0)], [(2, 2.5)])


def measured(name: str, size_bytes: int, quality: float, interval: float) -> MeasuredFile:
    metric = Metric(value=quality, low=quality - interval, high=quality + interval, unit="bits", n=10)
    return MeasuredFile(
        name=name, student=None if name == "teacher" else "student", format="any", size_bytes=size_bytes,
        sha256="0" * 64, candidate=name.startswith("q"), metrics={"bits_per_byte": metric},
    )  # fmt: skip


def report_of(sizes_mb: tuple[float, ...], step: float, interval: float = 0.05) -> tuple[Report, Verdict]:
    """Files of these sizes; the quality of each is a step from the one before."""
    names = ["teacher", "student", *(f"q{i} $_$" for i in range(len(sizes_mb) - 2))]
    files = tuple(
        measured(name, round(size * 1e6), 2 + i * step, interval)
        for i, (name, size) in enumerate(zip(names, sizes_mb, strict=True))
    )
    candidates = tuple(CandidateVerdict(name=m.name, passed=m.name != "q1 $_$", reasons=()) for m in files[2:])
    verdict = Verdict(passed=True, chosen="q0 $_$", candidates=candidates)
    report = Report(
        task="language_modeling", quality="bits_per_byte", engine="any", computes_with="any", confidence=0.95,
        measured=files, comparisons=(),
    )  # fmt: skip
    return report, verdict


def boxes_of(texts: list[Text]) -> list[Bbox]:
    return [text.get_window_extent() for text in texts]


def apart(boxes: list[Bbox]) -> bool:
    return not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def around(centres_N2: np.ndarray) -> list[Bbox]:
    """The markers of the files."""
    half = MARKER_POINTS / 2 * DPI / 72
    return [Bbox([(x - half, y - half), (x + half, y + half)]) for x, y in centres_N2]


@pytest.mark.parametrize(
    ("sizes_mb", "step"),
    [
        ((9.9, 1.31, 1.29, 1.27, 1.3, 1.31, 0.402, 0.4), 0.02),
        ((0.0042, 0.0041, 0.0041, 0.00405), 0.02),
        (tuple(100 + i for i in range(30)), 0.02),
        ((5.0,) * 6, 0.02),
        ((171.0, 42.0, 42.1, 24.0, 24.0, 41.9, 24.1, 23.9), 0.0005),
        ((9.0, *(1 + i / 1000 for i in range(11))), 0.0),
    ],
)
def test_labels_of_files_that_lie_close_hide_nothing(sizes_mb: tuple[float, ...], step: float) -> None:
    report, verdict = report_of(sizes_mb, step)
    names = [file.name for file in report.measured]
    figure = plot_report([CURVE], report, verdict)
    figure.savefig(io.BytesIO(), format="png")
    _, plane = figure.axes
    ticks = plane.get_xticklabels()
    assert apart(boxes_of(ticks))
    assert ticks[0].get_text() == f"{min(sizes_mb):g}"
    assert {float(tick.get_text()) for tick in ticks} <= {float(f"{size:.3g}") for size in sizes_mb}
    labels = [text for text in plane.texts if text.get_text().startswith(tuple(names))]
    assert len(labels) == len(names)
    points_N2 = plane.transData.transform([label.xy for label in labels])
    boxes, markers = boxes_of(labels), around(points_N2)
    assert apart(boxes)
    assert not any(box.overlaps(marker) for box in boxes for marker in markers)
    inside = plane.bbox.expanded(1.001, 1.001)
    assert all(inside.containsx(x) and inside.containsy(y) for box in boxes for x, y in (box.min, box.max))
    for box, (x, y) in zip(boxes, points_N2, strict=True):
        assert np.hypot(np.clip(x, box.x0, box.x1) - x, np.clip(y, box.y0, box.y1) - y) < 250


def test_the_picture_is_a_png_of_its_size() -> None:
    content = draw_report([CURVE], *report_of((9.0, 2.0, 1.0), 0.02, interval=0.0))
    assert content.startswith(b"\x89PNG")
    assert (int.from_bytes(content[16:20]), int.from_bytes(content[20:24])) == (1800, 720)


def test_a_teacher_that_took_no_step_has_no_curve() -> None:
    untrained = PlottedCurve("teacher", "teacher", [], [(0, 2.5)])
    losses, _ = plot_report([untrained], *report_of((9.0, 2.0, 1.0), 0.02)).axes
    assert [line.get_xydata().tolist() for line in losses.lines] == [[[0.0, 2.5]]]


def test_a_label_stands_at_its_point_where_there_is_room() -> None:
    point, marker = np.array([[50.0, 50.0]]), np.array([[45.0, 45.0, 55.0, 55.0]])
    (box,) = place_labels(point, np.array([[30.0, 10.0]]), marker, np.empty((0, 4)), np.array([0.0, 0.0, 200.0, 100.0]))
    assert box.tolist() == [58, 45, 88, 55]
    (box,) = place_labels(point, np.array([[30.0, 10.0]]), marker, np.empty((0, 4)), np.array([0.0, 0.0, 60.0, 100.0]))
    assert box[2] <= 60
    line = np.array([[44.0, 0.0, 80.0, 100.0]])
    (box,) = place_labels(point, np.array([[30.0, 10.0]]), marker, line, np.array([0.0, 0.0, 200.0, 100.0]))
    assert box[2] <= 44
