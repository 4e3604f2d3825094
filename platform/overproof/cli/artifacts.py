"""What the command line prints about artifacts: listing, record and the closing table."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from overproof import pipeline
from overproof.artifacts import Artifact, Store, artifact_id, read_record
from overproof.cli.recipe_arguments import RecipeArguments
from overproof.config import Recipe
from overproof.console import notice, out, say
from overproof.errors import GateRefused, InputError
from overproof.files import join_uri, read_json
from overproof.registry import TASKS
from overproof.units import format_bytes, format_number, format_percent, format_seconds

if TYPE_CHECKING:
    from overproof.evaluate.gate import Verdict
    from overproof.evaluate.metrics import MeasuredFile, Report
    from overproof.evaluate.outcome import Outcome
    from overproof.evaluate.remedies import Remedy
    from overproof.tasks.base import Metric


def show_artifact(store: str, name: str, as_json: bool) -> int:
    """Print what an artifact is, and its parents back to the shards; or its record, for programs.

    Raises:
        InputError: there is no such artifact, or its record cannot be read.
    """
    record = read_record(name) if Path(name).is_dir() else None
    artifact = Artifact(name, record) if record else Store(store).get(name)
    if as_json:
        print(artifact.record.model_dump_json(indent=1))
        return 0
    made = artifact.record
    out.print(artifact.id, markup=False)
    for line in _lineage(Store(store), artifact, depth=1, shown=set()):
        out.print(line, markup=False)
    took = f"took {format_seconds(made.seconds)}"
    out.print(f"made     {made.created[:19]} UTC, {took}, {format_bytes(artifact.size_bytes)}", markup=False)
    out.print(f"place    {artifact.uri}", markup=False)
    for title, values in (("figures", made.metrics), ("versions", made.versions)):
        told = " · ".join(f"{key} {value}" for key, value in values.items() if isinstance(value, int | float | str))
        out.print(f"{title:<8} {told}", markup=False)
    for name, entry in made.files.items():
        out.print(f"file     {name}  {format_bytes(entry.size_bytes)}  sha256 {entry.sha256[:12]}", markup=False)
    out.print("the whole record: --json", markup=False)
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
    sweep = Store(store).get(name)
    if sweep.record.stage != "sweep":
        raise InputError(f"{name}: is {sweep.id}; expected a sweep, see `overproof ls`, or a recipe")
    from overproof.report.stage import sweep_report  # with torch: seconds to import, and a name may be misspelt

    page = sweep_report(Store(store), sweep)
    path = to or Path(f"{sweep.id.replace('/', '-')}.html")
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file you may write: --out FILE") from None
    out.print(f"report   {path}")
    return 0


def run_to_summary(recipe: Recipe, arguments: RecipeArguments, until: str | None = None) -> dict[str, Artifact]:
    """Run a recipe, and print what it came to, also where the gate refuses.

    Raises:
        InputError, GateRefused: as ``pipeline.run``.
    """
    done: dict[str, Artifact] = {}
    try:
        pipeline.run(recipe, until, done)
    except GateRefused:
        _print_summary(recipe, arguments, done)
        raise
    if "gate" in done:
        _print_summary(recipe, arguments, done)
    return done


def compress_to_table(recipe: Recipe, arguments: RecipeArguments) -> None:
    """Run a recipe until every file is measured, and print them in one table, in Markdown.

    Raises:
        InputError: as ``pipeline.run``.
    """
    from overproof.evaluate.metrics import REPORT, Report
    from overproof.evaluate.variant_table import markdown_lines, variant_table

    done = run_to_summary(recipe, arguments, "evaluate")
    report = read_json(Report, done["evaluate"].local() / REPORT)
    for line in markdown_lines(variant_table(report)):
        print(line)


def _print_summary(recipe: Recipe, arguments: RecipeArguments, done: Mapping[str, Artifact]) -> None:
    """Print the closing table, what it comes to and what to do next."""
    from overproof.evaluate.gate import VERDICT, Verdict
    from overproof.evaluate.metrics import REPORT, Report
    from overproof.evaluate.outcome import OUTCOME, Outcome

    judged = done["gate"].local()
    report = read_json(Report, done["evaluate"].local() / REPORT)
    out.print(_summary_table(recipe.name, report, read_json(Verdict, judged / VERDICT)))
    _print_outcome(read_json(Outcome, judged / OUTCOME), arguments)
    if "report" in done:
        for what, name in (("picture", "report.png"), ("report ", "report.html")):
            out.print(f"{what}  {join_uri(done['report'].uri, name)}", markup=False)


def print_package(where: str, package: Artifact) -> None:
    """Print where a package of a store lies, and the line that serves it."""
    store = "" if where == "store" else f" --store {shlex.quote(where)}"
    out.print(f"package  {package.uri}\nserve it: overproof serve {package.id}{store}", markup=False)


def _summary_table(name: str, report: Report, verdict: Verdict) -> Table:
    """Every export with its quality, size, speed and verdict."""
    from overproof.evaluate.gate import teacher_loss

    broken = {c.name: [r.rule for r in c.reasons if not r.passed] for c in verdict.candidates}
    task = TASKS[report.task]
    columns = ("model", "against the teacher", task.quality.title, "agreement", "MB", "p50 / p95 ms", task.speed_unit)
    table = Table(*columns, "verdict", title=name)
    if (teacher := report.unwritten_teacher) is not None:
        quality = teacher.metrics[report.quality]
        own = f"{quality.value:.4f} ± {_half(quality):.4f}"
        table.add_row(f"teacher ({teacher.runs})", "", own, *[""] * 5)
    for measured in report.measured:
        quality, agreement = measured.metrics[report.quality], measured.metrics["agreement"]
        rules = broken.get(measured.name)
        outcome = "" if rules is None else f"[red]refused: {', '.join(rules)}[/]" if rules else "[green]passed[/]"
        rate = measured.metrics.get(task.speed)  # a model may end every answer at once
        table.add_row(measured.name, teacher_loss(report, measured.name),
                      f"{quality.value:.4f} ± {_half(quality):.4f}", format_percent(agreement.value),
                      f"{measured.size_bytes / 1e6:.2f}", _latency(measured), f"{rate.value:,.0f}" if rate else "",
                      f"{outcome}{' · shipped' if measured.name == verdict.chosen else ''}")  # fmt: skip
    return table


def _print_outcome(outcome: Outcome, arguments: RecipeArguments) -> None:
    for sentence in outcome.sentences:
        say(sentence)
    for warning in outcome.warnings:
        notice(warning)
    for broken in outcome.nearest.broken if outcome.nearest else ():
        say(f"{broken.kind}: {broken.text}; what would meet it:")
        _print_remedies(broken.remedies, arguments)
    if outcome.next_steps:
        out.print("next:")
        _print_remedies(outcome.next_steps, arguments)


def _print_remedies(remedies: Iterable[Remedy], arguments: RecipeArguments) -> None:
    for remedy in remedies:
        line = f": overproof run {arguments.with_overrides(*remedy.overrides)}" if remedy.overrides else ""
        out.print(f"  {remedy.text}{line}", markup=False)


def _half(metric: Metric) -> float:
    return ((metric.high or metric.value) - (metric.low or metric.value)) / 2


def _latency(measured: MeasuredFile) -> str:
    found = (measured.metrics[f"latency_p{share}_s"].value for share in (50, 95))
    return " / ".join(format_number(1e3 * value_s) for value_s in found)
