"""One picture: loss curves on the left, the size-quality plane on the right."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import Report
from overproof.registry import TASKS

# Okabe and Ito's palette, told apart by people who see colours differently.
COLOURS = {"teacher": "#000000", "student": "#0072B2", "control": "#D55E00", "trial": "#56B4E9", "kept": "#56B4E9"}
PASSED, REFUSED = "#009E73", "#CC3311"
DPI = 120
SMOOTH_STEPS = 10
NAME_HEIGHT, MOST_AWAY = -4, 300  # of a point's name, points from the point; how far it may move
TICK_GAP = 6  # pixels between two labels, at least
NAMED_TRIALS = 8  # more of them have no name in the legend


@dataclass(frozen=True)
class PlottedCurve:
    """The losses of one run: (step, nats per prediction)."""

    name: str
    role: str  # teacher, student (the winner), kept, control or trial
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]


def draw_report(curves: list[PlottedCurve], report: Report, verdict: Verdict) -> bytes:
    """The picture as PNG bytes, 1,800 by 720 pixels."""
    buffer = io.BytesIO()
    picture(curves, report, verdict).savefig(buffer, format="png")
    return buffer.getvalue()


def picture(curves: list[PlottedCurve], report: Report, verdict: Verdict) -> Figure:
    """The picture, laid out."""
    figure = Figure(figsize=(15, 6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _losses(left, curves)
    names = _plane(right, report, verdict)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()  # where words lie is known from here on
    _spread(names)
    _thin_ticks(right)
    return figure


def _losses(axes: Axes, curves: list[PlottedCurve]) -> None:
    order = {"trial": 0, "kept": 1, "teacher": 2, "control": 3, "student": 4}
    dashes = cycle(("--", ":", "-."))
    many = sum(curve.role in ("trial", "kept") for curve in curves) > NAMED_TRIALS
    for curve in sorted(curves, key=lambda c: order[c.role]):
        colour, main = COLOURS[curve.role], curve.role not in ("trial", "kept")
        label = f"{curve.name} (best student)" if curve.role == "student" else curve.name
        label = label if main or not many else "_"  # stays out of the legend
        if main and curve.role == "teacher":
            steps, losses = zip(*curve.train, strict=True)
            axes.plot(steps, _smooth(np.array(losses)), color=colour, alpha=0.25, linewidth=1)
        if curve.validation:
            steps, losses = zip(*curve.validation, strict=True)
            axes.plot(steps, losses, color=colour, marker="o", markersize=4, label=label,
                      linewidth=2 if main else 1.2, linestyle="-" if main else next(dashes))  # fmt: skip
    axes.set(xlabel="step", ylabel="validation loss (nats per prediction)", title="Learning")
    axes.legend(frameon=False)


def _smooth(losses: np.ndarray) -> np.ndarray:
    width = min(SMOOTH_STEPS, len(losses))
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    starts = np.maximum(np.arange(1, len(losses) + 1) - width, 0)
    ends = np.arange(1, len(losses) + 1)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _plane(axes: Axes, report: Report, verdict: Verdict) -> list[Annotation]:
    """Draw it; gives the names of the points."""
    names = []
    passed = {c.name: c.passed for c in verdict.candidates}
    for measured in sorted(report.measured, key=lambda m: (m.size_bytes, m.metrics[report.quality].value)):
        quality, size = measured.metrics[report.quality], measured.size_bytes / 1e6
        role = "student" if measured.name == report.winner else measured.name
        colour = COLOURS.get(role, COLOURS["trial"])
        if measured.name in passed:
            colour = PASSED if passed[measured.name] else REFUSED
        low = quality.value if quality.low is None else quality.low
        high = quality.value if quality.high is None else quality.high
        axes.errorbar(size, quality.value, [[quality.value - low], [high - quality.value]], color=colour, marker="o",
                      capsize=4, markersize=8)  # fmt: skip
        word = {True: ": passed", False: ": refused"}.get(passed.get(measured.name), "")  # type: ignore[arg-type]
        star = " ★" if measured.name == verdict.chosen else ""
        names.append(axes.annotate(f"{measured.name}{word}{star}", (size, quality.value), xytext=(9, 0),
                                   textcoords="offset points", color=colour, parse_math=False))  # fmt: skip
    note = "the gate compares files on the same test units: far narrower than these intervals"
    axes.text(0.01, 0.01, note, transform=axes.transAxes, fontsize=8, alpha=0.7)
    quality_metric = TASKS[report.task].quality
    better = "higher is better" if quality_metric.higher_is_better else "lower is better"
    axes.set(xscale="log", xlabel="file size (MB, log scale; smaller is better)",
             ylabel=f"{quality_metric.title} on the test split ({better})",
             title=f"Size and quality, each with its own {report.confidence:.0%} interval")  # fmt: skip
    sizes = sorted({measured.size_bytes / 1e6 for measured in report.measured})
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    axes.margins(x=0.25, y=0.15)
    return names


def _spread(names: list[Annotation]) -> None:
    """Put each point's name at the height next to it where it hides no earlier one."""
    taken: list[Bbox] = []
    heights = sorted(range(-MOST_AWAY, MOST_AWAY, 2), key=lambda points: abs(points - NAME_HEIGHT))
    for name in names:
        level = name.get_window_extent()
        for height in heights:
            box = level.translated(0, height * DPI / 72)
            if not any(box.overlaps(other) for other in taken):
                break
        name.set_position((9, height))
        taken.append(box)


def _thin_ticks(axes: Axes) -> None:
    """Leave out ticks whose labels would touch the one before: the report's page has every size."""
    kept, end = [], float("-inf")
    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        box = label.get_window_extent()
        if box.x0 > end + TICK_GAP:
            kept.append((tick, label.get_text()))
            end = box.x1
    axes.set_xticks([tick for tick, _ in kept], [label for _, label in kept])
