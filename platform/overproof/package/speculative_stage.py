"""The speculate stage: the teacher with the shipped student as its draft, compared with itself, timed and packed."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from overproof.artifacts import TOOLS, Artifact
from overproof.config import Evaluate, Speculate
from overproof.data.parquet_reader import Shards
from overproof.engines import probe
from overproof.engines.probe_messages import DraftRequest
from overproof.errors import GateRefused
from overproof.evaluate.gate import VERDICT
from overproof.evaluate.metrics import REPORT
from overproof.export.stage import read_exports
from overproof.files import file_sha256
from overproof.package.contents import (
    CARD,
    PACKAGE,
    SPECULATION,
    DraftModel,
    PackageContents,
    list_parts,
)
from overproof.package.model_card import render_draft_card
from overproof.package.package import Package, open_package, sign_made_package
from overproof.package.speculation import SpeculationMeasurement, SpeculationResult, judge_draft
from overproof.ray_tasks import run_tasks
from overproof.registry import FORMATS
from overproof.stage_context import Progress, StageContext, TaskProgress


def pack_with_draft(context: StageContext) -> dict[str, Any]:
    """Pack the teacher with the packaged student as its draft.

    Raises:
        GateRefused: some text differs, or it comes no sooner, with the figures.
    """
    policy, shipped = context.recipe.speculate, open_package(context.parents["package"].local())
    assert policy is not None
    compressed, prepared = context.parents["compress"], context.parents["prepare"]
    draft = shipped.content.candidate
    context.progress(TaskProgress("speculate", 0, 1, f"{draft} drafts for {policy.teacher}"))
    arguments = (compressed, prepared, draft, policy, context.recipe.evaluate, context.progress)
    found = run_tasks(_measure, {draft: arguments})[draft]
    verdict = judge_draft(policy, shipped.report, found)
    if not verdict.passed:
        lines = "\n".join(f"  {reason.text}" for reason in verdict.reasons if not reason.passed)
        raise GateRefused(f"{draft} is no draft for {policy.teacher}; the package of {draft} is done:\n{lines}")
    with context.draft.directory() as folder:
        _pack(context, shipped, policy, SpeculationResult(found=found, verdict=verdict), folder)
        signer = sign_made_package(folder, context)
        open_package(folder)
    context.progress(TaskProgress("speculate", 1, 1))
    return {
        "times": median(found.times),
        "identical": found.identical,
        "prompts": found.prompts,
        "accepted": found.accepted / max(1, found.drafted),
        **signer,
    }


def _measure(
    compressed: Artifact, prepared: Artifact, draft: str, policy: Speculate, settings: Evaluate, progress: Progress
) -> SpeculationMeasurement:
    files = {export.name: compressed.local() / export.file for export in read_exports(compressed.local())}

    def say(note: str) -> None:
        progress(TaskProgress("speculate", 0, 1, note))

    return measure_draft(files[policy.teacher], files[draft], prepared.local_except("train/"), policy, settings, say)


def measure_draft(
    model: Path, draft: Path, root: Path, policy: Speculate, settings: Evaluate, say: probe.Say
) -> SpeculationMeasurement:
    """Continue the beginnings of test documents by the serving engine, with and without the draft in turn."""
    from overproof.tasks.text_evaluation import TestDocuments, test_prompts

    prompts = test_prompts(TestDocuments.of(root, settings.max_documents), Shards(root, "test"), policy.prompts)
    request = DraftRequest(
        file=str(model),
        draft=str(draft),
        draft_tokens=policy.draft_tokens,
        threads=settings.threads,
        kv_cache=settings.kv_cache,
        prompts=prompts,
        new_tokens=policy.new_tokens,
        repeats=policy.repeats,
    )
    answer = probe.probe_draft(request, say)
    return SpeculationMeasurement(
        model=model.stem,
        draft=draft.stem,
        model_sha256=file_sha256(model),
        draft_sha256=file_sha256(draft),
        draft_tokens=policy.draft_tokens,
        threads=settings.threads,
        prompts=len(prompts),
        identical=sum(answer.identical),
        new_tokens=policy.new_tokens,
        drafted=answer.drafted,
        accepted=answer.accepted,
        alone_tokens_per_s=tuple(answer.alone_tokens_per_s),
        drafted_tokens_per_s=tuple(answer.drafted_tokens_per_s),
    )


def _pack(context: StageContext, shipped: Package, policy: Speculate, judged: SpeculationResult, folder: Path) -> None:
    compressed = context.parents["compress"].local()
    teacher = next(export for export in read_exports(compressed) if export.name == judged.found.model)
    drafting = DraftModel(draft=judged.found.draft, policy=policy)
    shutil.copyfile(compressed / teacher.file, folder / shipped.content.model)
    shutil.copyfile(shipped.model, folder / drafting.file)
    for part in (REPORT, VERDICT, *shipped.content.companions):
        shutil.copyfile(shipped.path / part, folder / part)
    (folder / SPECULATION).write_text(judged.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(
        render_draft_card(context.recipe.name, FORMATS[context.recipe.compress.kind].library, shipped.report, judged),
        encoding="utf-8",
    )
    changed = {
        "id": context.draft.id,
        "candidate": teacher.name,
        "model_format": teacher.format,
        "speculate": drafting,
        "files": list_parts(folder),
        "parents": {stage: artifact.record.fingerprint for stage, artifact in context.parents.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {tool: version(tool) for tool in TOOLS},
    }
    content = PackageContents.model_validate(dict(shipped.content) | changed)
    (folder / PACKAGE).write_text(content.model_dump_json(indent=1), encoding="utf-8")
