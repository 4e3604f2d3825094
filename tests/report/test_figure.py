"""The picture as matplotlib lays it out: no word on its right hides another."""

from __future__ import annotations

import io
from itertools import combinations

import pytest
from matplotlib.text import Text

from overproof.evaluate.gate import CandidateVerdict, Verdict
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.report.figure import PlottedCurve, draw_report, picture
from overproof.tasks.base import Metric

CURVE = PlottedCurve("teacher", "teacher", [(1, 3.0), (2, 2.0)], [(2, 2.5)])


def measured(name: str, size_bytes: int, quality: float) -> MeasuredFile:
    metric = Metric(value=quality, low=quality - 0.05, high=quality + 0.05, unit="bits", n=10)
    return MeasuredFile(
        name=name, student=None if name == "teacher" else "student", format="any", size_bytes=size_bytes,
        sha256="0" * 64, candidate=name.startswith("q"), metrics={"bits_per_byte": metric},
    )  # fmt: skip


def apart(words: list[Text]) -> bool:
    boxes = [word.get_window_extent() for word in words]
    return not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize(
    "sizes_mb",
    [
        (9.9, 1.31, 1.29, 1.27, 1.3, 1.31, 0.402, 0.4),
        (0.0042, 0.0041, 0.0041, 0.00405),
        tuple(100 + i for i in range(30)),
        (5.0,) * 6,
    ],
)
def test_sizes_and_names_that_lie_close_hide_nothing(sizes_mb: tuple[float, ...]) -> None:
    names = ["teacher", "student", *(f"q{i} $_$" for i in range(len(sizes_mb) - 2))]
    files = tuple(
        measured(name, round(size * 1e6), 2 + i / 50)
        for i, (name, size) in enumerate(zip(names, sizes_mb, strict=True))
    )
    candidates = tuple(CandidateVerdict(name=m.name, passed=m.name != "q1 $_$", reasons=()) for m in files[2:])
    verdict = Verdict(passed=True, chosen="q0 $_$", candidates=candidates)
    report = Report(
        task="language_modeling", quality="bits_per_byte", engine="any", computes_with="any", confidence=0.95,
        measured=files, comparisons=(),
    )  # fmt: skip
    figure = picture([CURVE], report, verdict)
    figure.savefig(io.BytesIO(), format="png")
    _, plane = figure.axes
    ticks = plane.get_xticklabels()
    assert apart(ticks)
    assert ticks[0].get_text() == f"{min(sizes_mb):g}"
    assert {float(tick.get_text()) for tick in ticks} <= {float(f"{size:.3g}") for size in sizes_mb}
    points = [text for text in plane.texts if text.get_text().startswith(tuple(names))]
    assert len(points) == len(names)
    assert apart(points)
    assert draw_report([CURVE], report, verdict).startswith(b"\x89PNG")
