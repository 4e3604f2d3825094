"""What the command line prints about artifacts: listing, record and the closing table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from overproof import pipeline
from overproof.artifacts import Artifact, Store, artifact_id, read_record
from overproof.config import Recipe
from overproof.console import out
from overproof.errors import InputError
from overproof.files import read_json
from overproof.registry import TASKS
from overproof.units import format_bytes

if TYPE_CHECKING:
    from overproof.evaluate.metrics import MeasuredFile
    from overproof.tasks.base import Metric


def list_artifacts(store: str) -> int:
    """List every artifact of a store, oldest first."""
    table = Table("artifact", "created (UTC)", "seconds", "MB", box=None, pad_edge=False)
    for artifact in Store(store).artifacts():
        record = artifact.record
        size = sum(f.size_bytes for f in record.files.values())
        table.add_row(artifact.id, record.created[:19], f"{record.seconds:.1f}", f"{size / 1e6:.2f}")
    out.print(table)
    return 0


def show_artifact(store: str, name: str) -> int:
    """Print one artifact's record, and its parents back to the shards.

    Raises:
        InputError: there is no such artifact, or its record cannot be read.
    """
    record = read_record(name) if Path(name).is_dir() else None
    artifact = Artifact(name, record) if record else Store(store).get(name)
    out.print_json(artifact.record.model_dump_json())
    out.print(artifact.id)
    for line in _lineage(Store(store), artifact, depth=1, shown=set()):
        out.print(line, markup=False)
    return 0


def _lineage(store: Store, artifact: Artifact, depth: int, shown: set[str]) -> Iterator[str]:
    """A line for each parent and, below it, its own; what was shown further up is not opened again."""
    branch = f"{'  ' * depth}└ "
    for stage, fingerprint in artifact.record.parents.items():
        id = artifact_id(artifact.record.recipe, stage, fingerprint)
        parent = None if id in shown else store.lookup(artifact.record.recipe, stage, fingerprint)
        yield f"{branch}{id}{' (see above)' if id in shown else '' if parent else f' (not in {store.uri})'}"
        shown.add(id)
        if parent:
            yield from _lineage(store, parent, depth + 1, shown)
    if not artifact.record.parents:
        for name, entry in artifact.record.files.items():
            if name.endswith(".parquet"):
                yield f"{branch}{name}  {format_bytes(entry.size_bytes)}  sha256 {entry.sha256[:12]}"


def sweep_page(store: str, name: str, to: Path | None) -> int:
    """Write the page of a finished sweep, with what is measured and judged of it so far.

    Raises:
        InputError: it is no finished sweep of the store, or the page cannot be written.
    """
    from overproof.report.stage import sweep_report

    sweep, page = sweep_report(Store(store), name)
    path = to or Path(f"{sweep.id.replace('/', '-')}.html")
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file you may write: --out FILE") from None
    out.print(f"report   {path}")
    return 0


def print_summary(recipe: Recipe) -> None:
    """Print the closing table: every export with its quality, size, speed and verdict."""
    from overproof.evaluate.gate import Verdict
    from overproof.evaluate.metrics import Report

    found = {s.stage.name: s.artifact for s in pipeline.resolve_stages(recipe, Store(recipe.store))}
    if not (found["evaluate"] and found["gate"]):
        return
    report = read_json(Report, found["evaluate"].local() / "report.json")
    verdict = read_json(Verdict, found["gate"].local() / "verdict.json")
    passed = {c.name: c.passed for c in verdict.candidates}
    task = TASKS[report.task]
    table = Table("model", task.quality.title, "agreement", "MB", "p50 / p95 ms", task.speed_unit, "verdict",
                  title=recipe.name)  # fmt: skip
    if report.served_teacher is not None:
        quality = report.served_teacher.metrics[report.quality]
        table.add_row("teacher (served)", f"{quality.value:.4f} ± {_half(quality):.4f}", "", "", "", "", "")
    for measured in report.measured:
        quality, agreement = measured.metrics[report.quality], measured.metrics["agreement"]
        outcome = (
            "" if measured.name not in passed else "[green]passed[/]" if passed[measured.name] else "[red]refused[/]"
        )
        rate = measured.metrics.get(task.speed)  # a model may end every answer at once
        table.add_row(measured.name, f"{quality.value:.4f} ± {_half(quality):.4f}", f"{agreement.value:.1%}",
                      f"{measured.size_bytes / 1e6:.2f}", _latency(measured), f"{rate.value:,.0f}" if rate else "",
                      f"{outcome}{' · shipped' if measured.name == verdict.chosen else ''}")  # fmt: skip
    out.print(table)
    gain = report.compare(report.winner, "control")
    if gain and gain.low is not None and gain.high is not None:
        unit = task.quality.difference_unit
        sign, how, did = (-100, "better", "bought") if gain.value <= 0 else (100, "worse", "cost")
        least, most = sorted((sign * gain.low, sign * gain.high))
        out.print(
            f"{report.winner} is {sign * gain.value:.2f} {unit} {how} than the control, at equal steps "
            f"(interval {least:.2f} to {most:.2f} {unit}): what distillation {did}"
        )
    if found["report"]:
        out.print(f"picture  {found['report'].uri}/report.png\nreport   {found['report'].uri}/report.html")


def _half(metric: Metric) -> float:
    return ((metric.high or metric.value) - (metric.low or metric.value)) / 2


def _latency(measured: MeasuredFile) -> str:
    p50, p95 = (1000 * measured.metrics[f"latency_p{share}_s"].value for share in (50, 95))
    return f"{p50:.3g} / {p95:.3g}"
