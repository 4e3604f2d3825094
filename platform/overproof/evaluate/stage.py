"""The evaluate and gate stages: all exported files scored in parallel, then their engine asked, one on a machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from overproof.artifacts import Artifact
from overproof.cluster.apart_nodes import ApartNodes
from overproof.config import Evaluate, Recipe
from overproof.data.manifest import Manifest
from overproof.distill.row_cache import teacher_sha256
from overproof.evaluate.answers import check_answers
from overproof.evaluate.gate import VERDICT, judge, requests_needed
from overproof.evaluate.metrics import (
    REPORT,
    Bootstrap,
    Clusters,
    MeasuredFile,
    PerExampleSums,
    Report,
    further_metrics,
    quality_metrics,
)
from overproof.evaluate.outcome import OUTCOME, find_outcome, read_training, training_folders
from overproof.evaluate.stopping import FEWEST, next_count, time_limits, widest
from overproof.evaluate.unwritten_teacher import measured_teacher, teacher_logits, teacher_scorer
from overproof.export.base import TEACHER
from overproof.export.stage import EXPORTS, Export, export_folder, read_exports
from overproof.files import read_json
from overproof.ray_tasks import run_tasks
from overproof.registry import FORMATS, TASKS
from overproof.stage_context import Progress, StageContext, TaskProgress
from overproof.tasks.base import UNITS_TOGETHER, FileScores, Metric, TokenTask, agreements
from overproof.units import format_count

UNITS = "units.parquet"
TELL_EVERY_S = 1.0  # at least, between two events of one file


def evaluate_exports(context: StageContext) -> dict[str, Any]:
    """Measure every exported file and write the report."""
    exports = read_exports(context.parents["compress"].local(EXPORTS))
    scored = _score_all(context, exports)
    engines = _probe_all(context, exports)
    checked = check_answers(context, exports)
    figures = {name: found | checked.metrics(name) for name, found in engines.items()}
    manifest = Manifest.read(context.parents["prepare"])
    trained = None if any(export.name == TEACHER for export in exports) else context.parents["train"]
    report = make_report(context.recipe, exports, scored, figures, checked.summary, trained, manifest)
    with context.draft.directory() as root:
        checked.write(root)
        pq.write_table(units_table(scored), root / UNITS, compression="zstd")
        (root / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    values = {measured.name: measured.metrics[report.quality].value for measured in report.measured}
    return {"quality": report.quality, "scored": report.scored} | values


def judge_report(context: StageContext) -> dict[str, Any]:
    """Judge the report, write the verdict and what it comes to; a refusal is a verdict like any other."""
    report = read_json(Report, context.parents["evaluate"].local() / REPORT)
    verdict = judge(context.recipe.gate, report)
    training = read_training(context.recipe, *training_folders(context.parents))
    outcome = find_outcome(context.recipe, report, verdict, training)
    with context.draft.directory() as root:
        for name, value in ((VERDICT, verdict), (OUTCOME, outcome)):
            (root / name).write_text(value.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return {"passed": verdict.passed, "chosen": verdict.chosen}


def make_report(
    recipe: Recipe, exports: tuple[Export, ...], scored: Scored, engines: Mapping[str, Mapping[str, Metric]],
    answered: str = "", trained: Artifact | None = None, manifest: Manifest | None = None,
) -> Report:  # fmt: skip
    """Figures with intervals from the scores, and the engine's beside them; ``trained`` holds a teacher that has no
    file.
    """
    task, scores = TASKS[recipe.data.kind], scored.scores
    bootstrap = _bootstrap(recipe)
    metrics, comparisons = quality_metrics(task.quality, _sums(scores), bootstrap, scored.clusters)
    further = {
        name: further_metrics(task.further, s.columns, len(s.units), bootstrap, scored.clusters)
        for name, s in scores.items()
    }
    measured = tuple(
        MeasuredFile(
            name=export.name,
            student=export.student,
            format=export.format,
            size_bytes=export.size_bytes,
            sha256=scores[export.name].sha256,
            candidate=export.candidate,
            metrics={
                **{
                    name: m.model_copy(update={"of": scored.available})
                    for name, m in (metrics[export.name] | further[export.name]).items()
                },
                "scoring_s": Metric(value=scored.seconds[export.name], unit="s", n=len(scores[export.name].units)),
                **engines[export.name],
                **_conversion(export),
            },
        )
        for export in exports
    )
    return Report(
        task=recipe.data.kind,
        quality=task.quality.name,
        engine=recipe.engine,
        computes_with=FORMATS[recipe.compress.kind].engines[recipe.engine],
        kv_cache=recipe.evaluate.kv_cache,
        confidence=recipe.evaluate.confidence,
        scored=scored.summary,
        answered=answered,
        near_duplicates=manifest and manifest.near_duplicates,
        tokenizer_sha256=manifest and manifest.tokenizer_sha256,
        measured=measured,
        unwritten_teacher=trained and measured_teacher(recipe, trained, metrics[TEACHER]),
        comparisons=comparisons,
    )


def _conversion(export: Export) -> dict[str, Metric]:
    """How far an unquantised file is from its model, measured as it was written, on rows of so many places at most."""
    if export.difference_nats is None or export.checked_positions is None:
        return {}
    return {"conversion_nats": Metric(value=export.difference_nats, unit="nats", n=export.checked_positions)}


def units_table(scored: Scored) -> pa.Table:
    """One row for each export and test unit: what every quality figure of the report is made from. Units of one cluster
    are resampled together.
    """
    scores = scored.scores
    return pa.concat_tables(
        pa.table(
            {
                "export": [name] * len(s.units),
                "unit": s.units,
                "cluster": scored.clusters.of_unit_U,
                "total": s.total,
                "size": s.size,
                "predictions": s.predictions,
                "agreed": agreements(s, scores[TEACHER]),
            }
        )
        for name, s in scores.items()
    )


@dataclass(frozen=True)
class Scored:
    """The scores of every export on the same units, how many of these there are, and what was done, for people."""

    scores: dict[str, FileScores]
    seconds: dict[str, float]
    available: int
    summary: str
    clusters: Clusters  # of those units


def _score_all(context: StageContext, exports: tuple[Export, ...]) -> Scored:
    """Score the exports in rounds, each on the same further units, until these are enough (see ``stopping``)."""
    recipe, root = context.recipe, context.parents["prepare"].local_except("train/")
    settings, task = recipe.evaluate, TASKS[recipe.data.kind]
    names = tuple(_scored_files(exports))
    available = len(task.units(root, None))
    units = task.units(root, settings.max_documents)
    clusters = Clusters.of(task.clusters(root, units))
    scores, seconds = dict[str, FileScores](), dict.fromkeys(names, 0.0)
    began_s, done, why = time.monotonic(), 0, ""
    while done < len(units):
        spent_s = time.monotonic() - began_s
        upto = next_count(done, len(units), settings, spent_s)
        if upto == done:
            why = f"; evaluate.score_s allows {settings.score_s:g} s"
            break
        found = _score_round(context, exports, units[done:upto], time_limits(settings, seconds, spent_s))
        common = min(len(new.units) for new, _ in found.values())  # the time of a file may end before its units do
        new_scores = {name: new.first(common) for name, (new, _) in found.items()}
        scores = {name: scores[name].joined(new) if done else new for name, new in new_scores.items()}
        seconds = {name: seconds[name] + took_s for name, (_, took_s) in found.items()}
        done += common
        share = (
            None if settings.narrow is None or done < FEWEST else _widest(recipe, exports, scores, clusters.first(done))
        )
        if share is not None and settings.narrow is not None and share <= settings.narrow and done < len(units):
            why = f"; every interval that a rule looks at is within {share:.2g} of what the rule allows"
            break
    clusters = clusters.first(done)
    copies = (
        f" in {format_count(clusters.count, 'cluster')} of near-copies, which are resampled"
        if clusters.count < done
        else ""
    )
    cut = f" (evaluate.max_documents takes {len(units):,})" if len(units) < available else ""
    of = format_count(available, task.test_unit)
    spent = f"{done:,} of {of}{cut}{copies}, {time.monotonic() - began_s:.0f} s of scoring"
    return Scored({name: scores[name] for name in names}, seconds, available, spent + why, clusters)


def _scored_files(exports: Sequence[Export]) -> dict[str, str | None]:
    """By name the files that are scored; first of all a teacher that has none."""
    without = {} if any(export.name == TEACHER for export in exports) else {TEACHER: None}
    return {**without, **{export.name: export.file for export in exports}}


def _score_round(
    context: StageContext, exports: tuple[Export, ...], units: NDArray[np.int64], limits_s: Mapping[str, float | None]
) -> dict[str, tuple[FileScores, float]]:
    """Score every file, the largest first and, where time does not end it, split over several tasks: they take
    longest. However they are split, the scores are the same.
    """
    files = _scored_files(sorted(exports, key=lambda e: -e.size_bytes))
    prepared, compressed, recipe = context.parents["prepare"], context.parents["compress"], context.recipe
    settings, counts = recipe.evaluate, dict.fromkeys(files, 1)
    if settings.score_s is None:
        counts |= task_counts({e.name: e.size_bytes for e in exports}, settings.concurrent_tasks, len(units))
    began_s = time.monotonic()

    def report(done: int, last: str) -> None:
        note = f"{f'{last} done, ' if last else ''}{time.monotonic() - began_s:.0f} s"
        context.progress(TaskProgress("score", done, len(calls), note))

    calls, parts = dict[str, tuple[Any, ...]](), dict[str, list[str]]()
    for name, file in files.items():
        for number, share in enumerate(split_units(units, counts[name]), start=1):
            part = f"{name} {number}/{counts[name]}" if counts[name] > 1 else name
            given = _limited(recipe, limits_s[name])
            held = context.parents["train"] if file is None else compressed
            calls[part] = (held, prepared, file, given, share, f"score {part}", context.progress)
            parts.setdefault(name, []).append(part)
    found = run_tasks(_score, calls, report, settings.concurrent_tasks, settings.gpus_per_task)
    report(len(calls), "")
    return {
        name: (reduce(FileScores.joined, (found[part][0] for part in its)), sum(found[part][1] for part in its))
        for name, its in parts.items()
    }


def task_counts(sizes: Mapping[str, int], at_once: int, units: int) -> dict[str, int]:
    """Over how many tasks each file is split, so that so many at a time all have work to the end: scoring takes as long
    as a file is large.
    """
    share, most = sum(sizes.values()) / at_once, ceil(units / UNITS_TOGETHER)
    return {name: min(most, max(1, ceil(size / share))) for name, size in sizes.items()}


def split_units(units: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """Parts of about equal length, each of whole runs of ``UNITS_TOGETHER`` from the first on."""
    runs = np.arange(0, len(units), UNITS_TOGETHER)
    return np.split(units, [part[0] for part in np.array_split(runs, count)[1:]])


def _limited(recipe: Recipe, limit_s: float | None) -> Recipe:
    """With one file's seconds for scoring."""
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"score_s": limit_s})})


def _widest(
    recipe: Recipe, exports: tuple[Export, ...], scores: Mapping[str, FileScores], clusters: Clusters
) -> float | None:
    metrics, comparisons = quality_metrics(TASKS[recipe.data.kind].quality, _sums(scores), _bootstrap(recipe), clusters)
    return widest(recipe.gate.rules, [export for export in exports if export.candidate], metrics, comparisons)


def _sums(scores: Mapping[str, FileScores]) -> dict[str, PerExampleSums]:
    teacher = scores[TEACHER]
    return {
        name: PerExampleSums(
            s.total, s.size.astype(float), agreements(s, teacher).astype(float), s.predictions.astype(float)
        )
        for name, s in scores.items()
    }


def _bootstrap(recipe: Recipe) -> Bootstrap:
    return Bootstrap(recipe.evaluate.bootstrap_samples, recipe.evaluate.confidence, recipe.seed)


def _probe_all(context: StageContext, exports: tuple[Export, ...]) -> dict[str, dict[str, Metric]]:
    """Ask the engine about every file, on as many machines as there are: two on one would measure each other."""
    prepared, compressed, recipe = context.parents["prepare"], context.parents["compress"], context.recipe
    teacher = next((e.file for e in exports if e.name == TEACHER), None)
    beside = context.parents["train"] if teacher is None else teacher
    calls = {e.name: (compressed, prepared, e.file, beside, recipe, context.progress) for e in exports}

    def report(done: int, last: str) -> None:
        context.progress(TaskProgress("engine", done, len(calls), f"{last} done" if last else ""))

    gpus = recipe.evaluate.gpus
    found = run_tasks(_probe, calls, report, len(calls), gpus, ApartNodes(gpus))
    report(len(calls), "")
    return found


def _score(
    held: Artifact, prepared: Artifact, file: str | None, recipe: Recipe, units: NDArray[np.int64], about: str,
    progress: Progress,
) -> tuple[FileScores, float]:  # fmt: skip
    """A file of an artifact, or the teacher of one that holds no file."""
    root = prepared.local_except("train/")
    task, format = TASKS[Manifest.read(root).task], FORMATS[recipe.compress.kind]
    began_s = told_s = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told_s
        if done == len(units) or time.monotonic() - told_s >= TELL_EVERY_S:
            told_s = time.monotonic()
            progress(TaskProgress(about, done, len(units), f"{task.test_unit}s"))

    if file is None:
        assert isinstance(task, TokenTask)
        scorer = teacher_scorer(recipe, held, root)
        scores = task.score_by(scorer, teacher_sha256(held), root, units, recipe.evaluate, tell)
    else:
        path = export_folder(held, file) / file
        scores = task.score(path, root, units, recipe.evaluate, recipe.engine, format, tell)
    tell(len(units))
    return scores, time.monotonic() - began_s


def _probe(
    compressed: Artifact, prepared: Artifact, file: str, teacher: str | Artifact, recipe: Recipe, progress: Progress
) -> dict[str, Metric]:
    """What a file takes, and how far it is from the teacher's file, or from the teacher of one that holds no file."""
    root, path = prepared.local_except("train/"), export_folder(compressed, file) / file
    task, format = TASKS[Manifest.read(root).task], FORMATS[recipe.compress.kind]

    def say(note: str) -> None:
        progress(TaskProgress(f"engine {file}", 0, 1, note))

    say("starting")
    settings = probe_settings(recipe)
    found = task.probe(path, root, settings, recipe.engine, format, say)
    if isinstance(teacher, Artifact):
        assert isinstance(task, TokenTask)
        logits = teacher_logits(recipe, teacher)
        if logits is not None:
            found |= task.divergence_by(logits, path, root, settings, recipe.engine, format, say)
    elif file != teacher:
        beside = export_folder(compressed, teacher) / teacher
        found |= task.divergence(path, beside, root, settings, recipe.engine, format, say)
    progress(TaskProgress(f"engine {file}", 1, 1))
    return found


def probe_settings(recipe: Recipe) -> Evaluate:
    """Those of the recipe, with as many timed requests as its latency rules need."""
    settings, needed = recipe.evaluate, requests_needed(recipe.gate.rules, recipe.evaluate.confidence)
    return settings.model_copy(
        update={name: max(getattr(settings, name), needed) for name in ("timed_requests", "fewest_requests")}
    )
