"""One picture: loss curves on the left, the size-quality plane on the right."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import NullLocator

from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import Report
from overproof.registry import TASKS
from overproof.report.label_placement import leader_end, place_labels
from overproof.units import format_percent

# Okabe and Ito's palette, told apart by people who see colours differently.
COLOURS = {"teacher": "#000000", "student": "#0072B2", "control": "#D55E00", "trial": "#56B4E9", "kept": "#56B4E9"}
PASSED, REFUSED = "#009E73", "#CC3311"
DPI = 120
SMOOTHED_STEPS = 10
MARKER_POINTS, CAP_POINTS = 8, 4  # of a file's point and half the caps of its interval
LABEL_GAP = 2  # pixels around a label
LABEL_BACKGROUND = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}
LEADER_FROM = 20  # pixels between a point and its label, from which a line joins them
TICK_GAP = 6  # pixels between two labels of an axis, at least
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
    plot_report(curves, report, verdict).savefig(buffer, format="png")
    return buffer.getvalue()


def plot_report(curves: list[PlottedCurve], report: Report, verdict: Verdict) -> Figure:
    """The picture, laid out."""
    figure = Figure(figsize=(15, 6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_losses(left, curves)
    labels, note = _plot_files(right, report, verdict)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()  # where everything lies is known from here on
    _thin_ticks(right)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # and stays
    _place_labels(right, labels, note)
    return figure


def _plot_losses(axes: Axes, curves: list[PlottedCurve]) -> None:
    order = {"trial": 0, "kept": 1, "teacher": 2, "control": 3, "student": 4}
    dashes = cycle(("--", ":", "-."))
    crowded = sum(curve.role in ("trial", "kept") for curve in curves) > NAMED_TRIALS
    for curve in sorted(curves, key=lambda c: order[c.role]):
        colour, prominent = COLOURS[curve.role], curve.role not in ("trial", "kept")
        label = f"{curve.name} (best student)" if curve.role == "student" else curve.name
        label = label if prominent or not crowded else "_"  # which matplotlib leaves out of the legend
        if curve.role == "teacher" and curve.train:  # one that is taken as it is has no steps
            steps, losses = zip(*curve.train, strict=True)
            axes.plot(steps, _smooth(np.array(losses)), color=colour, alpha=0.25, linewidth=1)
        if curve.validation:
            steps, losses = zip(*curve.validation, strict=True)
            axes.plot(steps, losses, color=colour, marker="o", markersize=4, label=label,
                      linewidth=2 if prominent else 1.2, linestyle="-" if prominent else next(dashes))  # fmt: skip
    axes.set(xlabel="step", ylabel="validation loss (nats per prediction)", title="Learning")
    axes.legend(frameon=False)


def _smooth(losses: np.ndarray) -> np.ndarray:
    width = min(SMOOTHED_STEPS, len(losses))
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    starts = np.maximum(np.arange(1, len(losses) + 1) - width, 0)
    ends = np.arange(1, len(losses) + 1)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


@dataclass(frozen=True)
class FileLabel:
    """The name of a file in the plane, its point and the ends of its interval, in units of the axes."""

    text: Annotation
    size_mb: float
    quality: float
    low: float
    high: float


def _plot_files(axes: Axes, report: Report, verdict: Verdict) -> tuple[list[FileLabel], Text]:
    """Draw size and quality of every file; returns the labels, still on their points, and the note below."""
    labels = []
    passed = {c.name: c.passed for c in verdict.candidates}
    for measured in sorted(report.measured, key=lambda m: (m.size_bytes, m.metrics[report.quality].value)):
        quality, size_mb = measured.metrics[report.quality], measured.size_bytes / 1e6
        role = "student" if measured.name == report.winner else measured.name
        colour = COLOURS.get(role, COLOURS["trial"])
        if measured.name in passed:
            colour = PASSED if passed[measured.name] else REFUSED
        low = quality.value if quality.low is None else quality.low
        high = quality.value if quality.high is None else quality.high
        axes.errorbar(size_mb, quality.value, [[quality.value - low], [high - quality.value]], color=colour, marker="o",
                      capsize=CAP_POINTS, markersize=MARKER_POINTS)  # fmt: skip
        outcome = {True: ": passed", False: ": refused"}.get(passed.get(measured.name), "")  # type: ignore[arg-type]
        star = " ★" if measured.name == verdict.chosen else ""
        text = axes.annotate(f"{measured.name}{outcome}{star}", (size_mb, quality.value), xytext=(0, 0),
                             textcoords="offset points", color=colour, parse_math=False,
                             bbox=LABEL_BACKGROUND)  # fmt: skip
        labels.append(FileLabel(text, size_mb, quality.value, low, high))
    if report.unwritten_teacher is not None:  # which has no size
        axes.axhline(report.unwritten_teacher.metrics[report.quality].value, color=COLOURS["teacher"], linestyle="--")
    note = axes.text(0.01, 0.01, "the gate compares files on the same test units: far narrower than these intervals",
                     transform=axes.transAxes, fontsize=8, alpha=0.7)  # fmt: skip
    quality_metric = TASKS[report.task].quality
    better = "higher is better" if quality_metric.higher_is_better else "lower is better"
    axes.set(xscale="log", xlabel="file size (MB, log scale; smaller is better)",
             ylabel=f"{quality_metric.title} on the test split ({better})",
             title=f"Size and quality, each with its own {format_percent(report.confidence, 0)} interval")  # fmt: skip
    sizes_mb = sorted({measured.size_bytes / 1e6 for measured in report.measured})
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes_mb, [f"{size_mb:.3g}" for size_mb in sizes_mb])
    axes.margins(x=0.25, y=0.15)
    return labels, note


def _place_labels(axes: Axes, labels: list[FileLabel], note: Text) -> None:
    """Put the name of each file beside its point, where it hides nothing; a line leads to one that is far away."""
    to_pixels = axes.transData.transform
    points_N2 = to_pixels([(label.size_mb, label.quality) for label in labels])
    lows_N2 = to_pixels([(label.size_mb, label.low) for label in labels])
    highs_N2 = to_pixels([(label.size_mb, label.high) for label in labels])
    extents = [label.text.get_window_extent() for label in labels]
    marker, cap = MARKER_POINTS / 2 * DPI / 72, CAP_POINTS * DPI / 72
    note_box = note.get_window_extent()
    boxes_N4 = place_labels(
        points_N2,
        np.array([(extent.width, extent.height) for extent in extents]) + 2 * LABEL_GAP,
        np.concatenate([np.hstack([points_N2 - marker, points_N2 + marker]), [note_box.extents]]),
        np.hstack([lows_N2 - cap, highs_N2 + cap]),
        np.array(axes.bbox.extents),
    )
    for label, extent, point_2, box_4 in zip(labels, extents, points_N2, boxes_N4, strict=True):
        moved = box_4[:2] + LABEL_GAP - (extent.x0, extent.y0)
        label.text.set_position(tuple(moved * 72 / DPI))
        end = leader_end(point_2, box_4) - point_2
        if np.hypot(*end) >= LEADER_FROM:
            axes.annotate("", (label.size_mb, label.quality), xytext=tuple(end * 72 / DPI), textcoords="offset points",
                          arrowprops={"arrowstyle": "-", "color": label.text.get_color(), "alpha": 0.5, "shrinkA": 0,
                                      "shrinkB": MARKER_POINTS / 2})  # fmt: skip


def _thin_ticks(axes: Axes) -> None:
    """Leave out ticks whose labels would touch the one before: the report's page has every size."""
    kept, end = [], float("-inf")
    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        box = label.get_window_extent()
        if box.x0 > end + TICK_GAP:
            kept.append((tick, label.get_text()))
            end = box.x1
    axes.set_xticks([tick for tick, _ in kept], [label for _, label in kept])
