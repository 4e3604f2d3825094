"""The evaluate and gate stages: every exported file scored in parallel, then its engine asked, one after another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from overproof.artifacts import Artifact
from overproof.cluster.ray_cluster import run_tasks
from overproof.config import Recipe
from overproof.data.manifest import Manifest
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import (
    Bootstrap,
    MeasuredFile,
    PerExampleSums,
    Report,
    further_metrics,
    quality_metrics,
)
from overproof.export.stage import Export, read_exports
from overproof.files import read_json
from overproof.registry import ENGINES, FORMATS, TASKS
from overproof.stage_context import Progress, StageContext, TaskProgress
from overproof.tasks.base import FileScores, Metric, agreements

REPORT, UNITS, VERDICT = "report.json", "units.parquet", "verdict.json"


def evaluate_exports(context: StageContext) -> dict[str, Any]:
    """Measure every exported file and write the report."""
    exports = read_exports(context.parents["compress"].local())
    scores = _score_all(context, exports)
    engines = _probe_all(context, exports)
    report = make_report(context.recipe, exports, scores, engines)
    with context.draft.directory() as root:
        pq.write_table(units_table(scores), root / UNITS, compression="zstd")
        (root / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return {"quality": report.quality} | {m.name: m.metrics[report.quality].value for m in report.measured}


def judge_report(context: StageContext) -> dict[str, Any]:
    """Judge the report and write the verdict; a refusal is a verdict like any other."""
    report = read_json(Report, context.parents["evaluate"].local() / REPORT)
    verdict = judge(context.recipe.gate, report)
    with context.draft.directory() as root:
        (root / VERDICT).write_text(verdict.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return {"passed": verdict.passed, "chosen": verdict.chosen}


def make_report(
    recipe: Recipe,
    exports: tuple[Export, ...],
    scores: Mapping[str, FileScores],
    engines: Mapping[str, Mapping[str, Metric]],
) -> Report:
    """Figures with intervals from the scores, and the engine's beside them."""
    teacher, settings, task = scores["teacher"], recipe.evaluate, TASKS[recipe.data.kind]
    sums = {
        name: PerExampleSums(
            s.total, s.size.astype(float), agreements(s, teacher).astype(float), s.predictions.astype(float)
        )
        for name, s in scores.items()
    }
    bootstrap = Bootstrap(settings.bootstrap_samples, settings.confidence, recipe.seed)
    metrics, comparisons = quality_metrics(task.quality, sums, bootstrap)
    further = {name: further_metrics(task.further, s.columns, len(s.units), bootstrap) for name, s in scores.items()}
    measured = tuple(
        MeasuredFile(
            name=export.name,
            student=export.student,
            format=export.format,
            size_bytes=export.size_bytes,
            sha256=scores[export.name].sha256,
            candidate=export.candidate,
            metrics=metrics[export.name] | further[export.name] | dict(engines[export.name]),
        )
        for export in exports
    )
    return Report(
        task=recipe.data.kind,
        quality=task.quality.name,
        engine=recipe.engine,
        computes_with=ENGINES[recipe.engine].computes_with,
        confidence=settings.confidence,
        measured=measured,
        comparisons=comparisons,
    )


def units_table(scores: Mapping[str, FileScores]) -> pa.Table:
    """One row for each export and test unit: what every quality figure of the report is made from."""
    return pa.concat_tables(
        pa.table(
            {
                "export": [name] * len(s.units),
                "unit": s.units,
                "total": s.total,
                "size": s.size,
                "predictions": s.predictions,
                "agreed": agreements(s, scores["teacher"]),
            }
        )
        for name, s in scores.items()
    )


def _score_all(context: StageContext, exports: tuple[Export, ...]) -> dict[str, FileScores]:
    """Score every export in a task of its own, the largest first: it takes longest."""
    prepared, compressed = context.parents["prepare"], context.parents["compress"]
    began_s = time.monotonic()

    def report(done: int, last: str) -> None:
        note = f"{f'{last} done, ' if last else ''}{time.monotonic() - began_s:.0f} s"
        context.progress(TaskProgress("score", done, len(exports), note))

    scores = run_tasks(
        _score,
        {
            export.name: (compressed, prepared, export.file, context.recipe)
            for export in sorted(exports, key=lambda e: -e.size_bytes)
        },
        report,
        at_once=context.recipe.evaluate.concurrent_tasks,
    )
    context.progress(TaskProgress("score", len(exports), len(exports), f"{time.monotonic() - began_s:.0f} s"))
    return {export.name: scores[export.name] for export in exports}


def _probe_all(context: StageContext, exports: tuple[Export, ...]) -> dict[str, dict[str, Metric]]:
    """Ask the engine about one file after the other: two at a time would measure each other."""
    prepared, compressed = context.parents["prepare"], context.parents["compress"]
    found = run_tasks(
        _probe,
        {
            export.name: (compressed, prepared, export.file, context.recipe, context.progress, number, len(exports))
            for number, export in enumerate(exports)
        },
        gpus=context.recipe.evaluate.gpus,
    )
    context.progress(TaskProgress("engine", len(exports), len(exports)))
    return found


def _score(compressed: Artifact, prepared: Artifact, file: str, recipe: Recipe) -> FileScores:
    root, path = prepared.local(), compressed.local() / file
    task, format = TASKS[Manifest.read(root).task], FORMATS[recipe.compress.kind]
    return task.score(path, root, recipe.evaluate.max_documents, recipe.engine, format)


def _probe(
    compressed: Artifact, prepared: Artifact, file: str, recipe: Recipe, progress: Progress, number: int, total: int
) -> dict[str, Metric]:
    root, path = prepared.local(), compressed.local() / file
    task, format = TASKS[Manifest.read(root).task], FORMATS[recipe.compress.kind]

    def say(note: str) -> None:
        progress(TaskProgress("engine", number, total, f"{file}: {note}"))

    say("starting")
    return task.probe(path, root, recipe.evaluate, recipe.engine, format, say)
