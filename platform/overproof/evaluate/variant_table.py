"""One table of a model: every variant with its quality and its interval, what it lost, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from overproof.evaluate.gate import teacher_loss
from overproof.evaluate.metrics import EXPECTED_ACCURACY, Report
from overproof.registry import TASKS
from overproof.tasks.base import DIVERGENCE, STREAMS_RATE, Metric
from overproof.units import format_fixed

COSTS = {  # metric -> title, factor, decimals
    "time_to_first_token_s": ("first token, ms", 1000, 1),
    "latency_p50_s": ("p50, ms", 1000, 2),
    "latency_p95_s": ("p95, ms", 1000, 2),
    "resident_mb": ("resident MB", 1, 1),
    "parity_nats": ("parity, nats", 1, 4),
    "split_otherwise": ("split otherwise, %", 100, 1),
}
Column = tuple[str, float, int]


def variant_table(report: Report, *further: tuple[str, Mapping[str, str]]) -> list[tuple[str, ...]]:
    """The rows of a Markdown table, the head and the line below it first; ``further`` columns come last, each a title
    and what it has for a file's name. Metrics that no file has are left out.
    """
    columns = {n: c for n, c in _columns(report).items() if any(n in m.metrics for m in report.measured)}
    titles = [title for title, _, _ in columns.values()]
    head = ("variant", "against the teacher", "format", "MB", *titles, *(title for title, _ in further))
    rows = [
        (
            f"`{m.name}`",
            teacher_loss(report, m.name),
            m.format,
            f"{m.size_bytes / 1e6:.2f}",
            *_cells(m.metrics, columns),
            *(words.get(m.name, "") for _, words in further),
        )
        for m in report.measured
    ]
    teacher = report.unwritten_teacher
    if teacher is not None:
        rows.insert(0, ("`teacher`", "", teacher.runs, "", *_cells(teacher.metrics, columns), *("" for _ in further)))
    return [head, tuple("---" for _ in head), *rows]


def markdown_lines(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """The lines of a Markdown table, its cells as wide as the widest of a column: to be read as it is, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        rule = set(row) == {"---"}
        cells = (("-" * width if rule else cell.ljust(width)) for cell, width in zip(row, widths, strict=True))
        yield f"| {' | '.join(cells)} |"


def _columns(report: Report) -> dict[str, Column]:
    """The metrics that are shown: title, factor and decimals of each."""
    task, timed = TASKS[report.task], (m.metrics.get(STREAMS_RATE) for m in report.measured)
    streams = next((metric.n for metric in timed if metric is not None), 0)
    return {
        report.quality: _percent(task.quality.title, task.quality.unit == "share"),
        DIVERGENCE: ("KL from teacher, nats", 1, 4),
        **{each.name: _percent(each.title, each.unit == "share") for each in task.further},
        "agreement": ("agrees with teacher, %", 100, 1),
        EXPECTED_ACCURACY: ("answers as expected, %", 100, 1),
        task.speed: (task.speed_unit, 1, 0),
        STREAMS_RATE: (f"tokens/s, {streams} at once", 1, 0),
        **COSTS,
    }


def _percent(title: str, share: bool) -> Column:
    return (f"{title}, %", 100, 2) if share else (title, 1, 4)


def _cells(metrics: Mapping[str, Metric], columns: Mapping[str, Column]) -> Iterator[str]:
    return (_cell(metrics.get(name), factor, decimals) for name, (_, factor, decimals) in columns.items())


def _cell(metric: Metric | None, factor: float, decimals: int) -> str:
    if metric is None:
        return ""
    value, low, high = (
        None if figure is None else format_fixed(factor * figure, decimals)
        for figure in (metric.value, metric.low, metric.high)
    )
    if high is None:
        return f"{value}"
    return f"{value} (at most {high})" if low is None else f"{value} ({low} to {high})"
