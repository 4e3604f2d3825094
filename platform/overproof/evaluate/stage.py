"""The evaluate and gate stages: every exported file scored in parallel, then its engine asked, one after another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from tokenizers import Tokenizer

from overproof.artifacts import Artifact
from overproof.config import Evaluate
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.data.parquet_reader import Shards
from overproof.evaluate import engine_probe
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import (
    Bootstrap,
    MeasuredFile,
    Metric,
    PerExampleSums,
    QualityMetric,
    Report,
    quality_metrics,
)
from overproof.evaluate.parity import image_parity_nats, text_parity_nats
from overproof.evaluate.scoring import FileScores, TestDocuments, agreements, score_images, score_text, spread_units
from overproof.export.gguf import read_gguf
from overproof.export.onnx import Reference
from overproof.export.stage import Export, read_exports
from overproof.files import read_json
from overproof.stage_context import StageContext, TaskProgress

REPORT, UNITS, VERDICT = "report.json", "units.parquet", "verdict.json"
QUALITY: dict[str, QualityMetric] = {"text": "bits_per_byte", "digits": "accuracy"}
PROMPT_TOKENS = 32  # of the speed and the parity prompts
TIMED_PROMPTS = 16  # asked in turn
IMAGES_AT_LEAST = 300  # an image is quick, and its latency is cheap to know well
HEARTBEAT_S = 1.0


def evaluate_exports(context: StageContext) -> dict[str, Any]:
    """Measure every exported file and write the report."""
    prepared, compressed = context.parents["prepare"], context.parents["compress"]
    settings, exports = context.recipe.evaluate, read_exports(compressed.local())
    manifest = Manifest.read(prepared.local())
    scores = _score_all(context, exports)
    engines: dict[str, dict[str, Metric]] = {}
    for i, export in enumerate(exports):
        context.progress(TaskProgress("engine", i, len(exports), export.file))
        task = _probe_text if manifest.kind == "text" else _probe_images
        probed = task.options(num_gpus=settings.gpus).remote(compressed, prepared, export.file, settings)
        engines[export.name] = ray.get(probed)
    context.progress(TaskProgress("engine", len(exports), len(exports)))
    report = make_report(manifest.kind, exports, scores, engines, settings, context.recipe.seed)
    with context.draft.directory() as root:
        pq.write_table(units_table(manifest.kind, scores), root / UNITS, compression="zstd")
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
    kind: Literal["text", "digits"],
    exports: tuple[Export, ...],
    scores: Mapping[str, FileScores],
    engines: Mapping[str, Mapping[str, Metric]],
    settings: Evaluate,
    seed: int,
) -> Report:
    """Figures with intervals from the scores, and the engines' beside them."""
    teacher = scores["teacher"]
    units = {
        name: PerExampleSums(
            s.quality, s.size.astype(float), agreements(s, teacher).astype(float), s.predictions.astype(float)
        )
        for name, s in scores.items()
    }
    bootstrap = Bootstrap(settings.bootstrap_samples, settings.confidence, seed)
    metrics, comparisons = quality_metrics(QUALITY[kind], units, bootstrap)
    measured = tuple(
        MeasuredFile(
            name=export.name,
            student=export.student,
            format=export.format,
            size_bytes=export.size_bytes,
            sha256=scores[export.name].sha256,
            candidate=export.candidate,
            metrics=metrics[export.name] | dict(engines[export.name]),
        )
        for export in exports
    )
    return Report(
        kind=kind,
        quality=QUALITY[kind],
        engine=settings.engine if kind == "text" else "ONNX Runtime",
        confidence=settings.confidence,
        measured=measured,
        comparisons=comparisons,
    )


def units_table(kind: str, scores: Mapping[str, FileScores]) -> pa.Table:
    """One row for each export and test unit: what every quality figure of the report is made from."""
    quality = "nats" if kind == "text" else "correct"
    tables = []
    for name, s in scores.items():
        columns = {
            "export": [name] * len(s.units),
            "unit": s.units,
            quality: s.quality,
            "size_bytes": s.size,
            "predictions": s.predictions,
            "agreed": agreements(s, scores["teacher"]),
        }
        if kind != "text":
            del columns["size_bytes"]
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _score_all(context: StageContext, exports: tuple[Export, ...]) -> dict[str, FileScores]:
    """Score every export in a task of its own, the largest first: it takes longest."""
    prepared, compressed = context.parents["prepare"], context.parents["compress"]
    settings, begun = context.recipe.evaluate, time.monotonic()
    todo = sorted(exports, key=lambda e: e.size_bytes)
    waiting: dict[Any, str] = {}
    scores: dict[str, FileScores] = {}
    note = ""
    while todo or waiting:
        while todo and len(waiting) < settings.concurrent_tasks:  # a process that is used again has its imports paid
            export = todo.pop()
            waiting[_score.remote(compressed, prepared, export.file, settings.max_documents)] = export.name
        context.progress(TaskProgress("score", len(scores), len(exports), f"{note}{time.monotonic() - begun:.0f} s"))
        finished, _ = ray.wait(list(waiting), timeout=HEARTBEAT_S)
        for reference in finished:
            name = waiting.pop(reference)
            scores[name] = ray.get(reference)
            note = f"{name} done, "
    context.progress(TaskProgress("score", len(exports), len(exports), f"{time.monotonic() - begun:.0f} s"))
    return {export.name: scores[export.name] for export in exports}


@ray.remote(num_cpus=1)
def _score(compressed: Artifact, prepared: Artifact, file: str, most: int | None) -> FileScores:
    root = prepared.local()
    score = score_text if Manifest.read(root).kind == "text" else score_images
    return score(compressed.local() / file, root, most)


@ray.remote(num_cpus=1)
def _probe_text(compressed: Artifact, prepared: Artifact, file: str, settings: Evaluate) -> dict[str, Metric]:
    return measure_text(compressed.local() / file, prepared.local(), settings)


@ray.remote(num_cpus=1)
def _probe_images(compressed: Artifact, prepared: Artifact, file: str, settings: Evaluate) -> dict[str, Metric]:
    return measure_images(compressed.local() / file, prepared.local(), settings)


def measure_text(file: Path, root: Path, settings: Evaluate) -> dict[str, Metric]:
    """Speed, memory and parity of the serving engine on the beginnings of test documents."""
    rows = TestDocuments.of(root, settings.max_documents)
    prompts = test_prompts(rows, Shards(root, "test"), max(settings.probe_prompts, TIMED_PROMPTS))
    tokenizer = Tokenizer.from_file(str(root / TOKENIZER))
    probed = prompts[: settings.probe_prompts]
    texts = [tokenizer.decode(prompt) for prompt in probed]
    request = engine_probe.TextRequest(
        engine=settings.engine,
        file=str(file),
        threads=settings.threads,
        prompts=probed,
        probe_tokens=settings.probe_tokens,
        texts=texts,
        timed_prompts=prompts[:TIMED_PROMPTS],
        timed_requests=settings.timed_requests,
        decode_tokens=settings.decode_tokens,
    )
    answer = engine_probe.probe_text(request)
    reference = read_gguf(file)
    nats = [
        text_parity_nats(reference, prompt, given.tokens, given.logprobs)
        for prompt, given in zip(probed, answer.answers, strict=True)
        if given.tokens
    ]
    split_apart = sum(found != tokenizer.encode(text).ids for text, found in zip(texts, answer.splits, strict=True))
    compared = sum(len(given.tokens) for given in answer.answers)
    metrics = _memory(answer.before_mb, answer.resident_mb) | _latency(answer.latency_s)
    metrics |= {
        "time_to_first_token_s": Metric(value=median(answer.first_token_s), unit="s", n=len(answer.first_token_s)),
        "tokenizer_mismatches": Metric(value=split_apart, unit="texts", n=len(texts)),
    }
    if answer.tokens_per_s:
        rate = median(answer.tokens_per_s)
        metrics["decode_tokens_per_s"] = Metric(value=rate, unit="tokens/s", n=len(answer.tokens_per_s))
    if nats:
        metrics["parity_nats"] = Metric(value=max(nats), unit="nats", n=compared)
    return metrics


def measure_images(file: Path, root: Path, settings: Evaluate) -> dict[str, Metric]:
    """Speed, memory and parity of the serving engine on test images."""
    shards = Shards(root, "test")
    images_BD = shards.take(spread_units(np.arange(shards.rows), settings.probe_prompts))["pixels"]
    request = engine_probe.ImageRequest(
        file=str(file),
        threads=settings.threads,
        images=images_BD.tolist(),
        timed_requests=max(settings.timed_requests, IMAGES_AT_LEAST),
    )
    answer = engine_probe.probe_images(request)
    reference = Reference(file)
    reference_BC = np.concatenate([reference(image[None]) for image in images_BD])  # one at a time, as they were asked
    nats = image_parity_nats(reference_BC, np.array(answer.logprobs, np.float32))
    rate = 1 / median(answer.latency_s)
    return (
        _memory(answer.before_mb, answer.resident_mb)
        | _latency(answer.latency_s)
        | {
            "images_per_s": Metric(value=rate, unit="images/s", n=len(answer.latency_s)),
            "parity_nats": Metric(value=nats, unit="nats", n=len(images_BD)),
        }
    )


def _memory(before_mb: float, resident_mb: float) -> dict[str, Metric]:
    return {
        "resident_mb": Metric(value=resident_mb, unit="MB", n=1),
        "resident_before_load_mb": Metric(value=before_mb, unit="MB", n=1),
    }


def _latency(latency_s: Sequence[float]) -> dict[str, Metric]:
    """The latency that half of the requests, and 95 in 100, stay within: what a client of an idle engine waits."""
    return {
        f"latency_p{share}_s": Metric(
            value=float(np.percentile(latency_s, share, method="inverted_cdf")), unit="s", n=len(latency_s)
        )
        for share in (50, 95)
    }


def test_prompts(rows: TestDocuments, shards: Shards, count: int) -> list[list[int]]:
    """The first tokens of ``count`` rows, evenly spread over the chosen documents."""
    picked = spread_units(rows.sample_ids, count)
    columns = shards.take(picked)
    ends = np.minimum(columns["length"] + 1, PROMPT_TOKENS)
    return [tokens[:end].tolist() for tokens, end in zip(columns["tokens"], ends, strict=True)]
