"""Answers that test records expect: every exported file is asked in the engine that serves it, as a client asks.

Each question goes through the chat template in the file, and the answer is the likeliest token each time. All files are
asked the same questions: where time ends it, those that each of them has answered count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overproof.artifacts import Artifact
from overproof.cluster.apart_nodes import ApartNodes
from overproof.config import Recipe
from overproof.engines.probe import probe_answers
from overproof.engines.probe_messages import AnswersRequest, GeneratedAnswer
from overproof.evaluate.metrics import EXPECTED_ACCURACY, wilson_interval
from overproof.export.stage import Export, export_folder
from overproof.ray_tasks import run_tasks
from overproof.registry import TASKS
from overproof.stage_context import Notice, Progress, StageContext, TaskProgress
from overproof.tasks.base import Metric, spread_units
from overproof.tasks.expected_answers import AnswerCheck, read_checks

ANSWERS = "answers.parquet"


@dataclass(frozen=True)
class CheckedAnswers:
    """What each file answered to the same questions, and whether it is what they expect."""

    checks: list[AnswerCheck]  # those that every file was asked
    available: int
    answers: Mapping[str, list[GeneratedAnswer]]  # of each file, one for each check
    clusters: int  # of near-copies, that the questions' conversations are in: as much is known as of so many
    confidence: float
    summary: str  # what was asked, for people; empty where no record expects anything

    def right(self, name: str) -> list[bool]:
        """Of each answer of a file, whether it is as expected; one that the engine refused to give is not."""
        return [
            answer.finish_reason is not None and check.expected.holds(answer.text)
            for check, answer in zip(self.checks, self.answers[name], strict=True)
        ]

    def metrics(self, name: str) -> dict[str, Metric]:
        """The share of a file's answers that are as expected."""
        if not self.checks:
            return {}
        right, asked = sum(self.right(name)), len(self.checks)
        low, high = wilson_interval(right * self.clusters / asked, self.clusters, self.confidence)
        found = Metric(value=right / asked, low=low, high=high, unit="share", n=asked, of=self.available)
        return {EXPECTED_ACCURACY: found}

    def write(self, root: Path) -> None:
        """A row for each file and question: what was asked, expected and answered."""
        if not self.checks:
            return
        rows = [
            {
                "export": name,
                "document": check.document,
                "name": check.name,
                "kind": check.expected.kind,
                "expected": check.expected.text,
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "refusal": answer.refusal,
                "right": is_right,
            }
            for name, answers in self.answers.items()
            for check, answer, is_right in zip(self.checks, answers, self.right(name), strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows), root / ANSWERS, compression="zstd")


def check_answers(context: StageContext, exports: tuple[Export, ...]) -> CheckedAnswers:
    """Ask every file as many questions as the recipe has documents and time for, one file at a time on a machine."""
    settings, root = context.recipe.evaluate, context.parents["prepare"].local_except("train/")
    checks = read_checks(root)
    if not checks:
        return CheckedAnswers([], 0, {}, 0, settings.confidence, "")
    asked = [checks[place] for place in spread_units(np.arange(len(checks)), settings.max_documents)]
    limit_s = None if settings.score_s is None else settings.score_s / len(exports)
    began_s = time.monotonic()

    def report(done: int, last: str) -> None:
        context.progress(TaskProgress("answers", done, len(exports), f"{last} done" if last else ""))

    found = run_tasks(
        _ask,
        {
            export.name: (
                context.parents["compress"], export.file, asked, context.recipe, limit_s, context.progress,
            )
            for export in exports
        },
        report,
        len(exports),
        settings.gpus,
        ApartNodes(settings.gpus),
    )  # fmt: skip
    report(len(exports), "")
    done = min(len(answers) for answers in found.values())
    answers = {name: given[:done] for name, given in found.items()}
    _tell_refusals(context, asked, answers)
    summary = (
        f"{done:,} of {len(checks):,} questions of the test split that say what is expected, asked in the chat "
        f"template and answered by the likeliest tokens, {settings.answer_tokens} at most, "
        f"{time.monotonic() - began_s:.0f} s"
    )
    if done < len(asked) and settings.score_s is not None:
        summary += f"; evaluate.score_s allows {settings.score_s:g} s"
    documents = np.array([check.document for check in asked[:done]], np.int64)
    clusters = len(np.unique(TASKS[context.recipe.data.kind].clusters(root, documents)))
    return CheckedAnswers(asked[:done], len(checks), answers, clusters, settings.confidence, summary)


def _tell_refusals(
    context: StageContext, asked: list[AnswerCheck], answers: Mapping[str, list[GeneratedAnswer]]
) -> None:
    refused = [
        (name, check.name, answer.refusal)
        for name, given in answers.items()
        for check, answer in zip(asked, given, strict=False)
        if answer.finish_reason is None
    ]
    if refused:
        name, where, words = refused[0]
        context.progress(
            Notice(
                f"{len(refused):,} questions were refused by the engine and count as wrong: {name}, {where}: {words}"
            )
        )


def _ask(
    compressed: Artifact, file: str, asked: list[AnswerCheck], recipe: Recipe, limit_s: float | None,
    progress: Progress,
) -> list[GeneratedAnswer]:  # fmt: skip
    def say(note: str) -> None:
        progress(TaskProgress(f"answers {file}", 0, 1, note))

    say("starting")
    request = AnswersRequest(
        engine=recipe.engine,
        kv_cache=recipe.evaluate.kv_cache,
        file=str(export_folder(compressed, file) / file),
        threads=recipe.evaluate.threads,
        chats=[check.messages for check in asked],
        tools=[check.tools for check in asked],
        answer_tokens=recipe.evaluate.answer_tokens,
        limit_s=limit_s,
    )
    answers = probe_answers(request, say).answers
    progress(TaskProgress(f"answers {file}", 1, 1))
    return answers
