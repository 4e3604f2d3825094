"""The model card: what a package is, how it was made, what was measured, how to run it.

Markdown with the front matter of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards), so that a package
may be uploaded there as it is. The words are in ``card.md.j2``.
"""

from __future__ import annotations

import json
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from overproof.config import Section
from overproof.data.manifest import Manifest
from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.evaluate.outcome import Outcome, as_trained
from overproof.evaluate.variant_table import variant_table
from overproof.package.speculation import SpeculationResult
from overproof.registry import FORMATS, TASKS
from overproof.stage_context import StageContext
from overproof.tasks.base import Metric


def render_card(
    context: StageContext,
    manifest: Manifest,
    report: Report,
    verdict: Verdict,
    outcome: Outcome,
    model: str,
    sha256: str,
) -> str:
    """The card of the chosen export, from the recipe and the records of every stage."""
    recipe = context.recipe
    sweep = json.loads((context.parents["sweep"].local("trials.json") / "trials.json").read_text(encoding="utf-8"))
    measured = next(m for m in report.measured if m.name == verdict.chosen)
    environment = Environment(
        loader=PackageLoader("overproof.package", "."),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    mine = next((trial for trial in sweep["trials"] if trial["name"] == measured.student), None)
    settings, student = (None, None) if mine is None else as_trained(recipe, mine)
    task, library = TASKS[manifest.task], FORMATS[recipe.compress.kind].library
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(recipe.name, library, report, measured),
        recipe=recipe,
        task=task,
        words=task.card(manifest, recipe.evaluate),
        body=json.dumps(task.example(manifest.details)).replace("'", "\\u0027"),  # it stands in single quotes
        manifest=manifest,
        dropped={reason: count for reason, count in manifest.dropped.items() if count},
        report=report,
        verdict=verdict,
        outcome=outcome,
        table=_table(report, verdict),
        units=measured.metrics[report.quality].measured_on,
        timed=measured.metrics.get("latency_p50_s"),
        conversion=_conversion(report, measured),
        student=student,
        measured=measured,
        settings=settings,
        mine=mine,
        winner=sweep["winner"],
        control=sweep["control"],
        trials=sweep["trials"],
        shape=_shape,
        trial=_trial,
        model=model,
        sha256=sha256,
        port=recipe.serve.port or 8000,
        parents=context.parents.values(),
    )


def render_draft_card(name: str, library: str, report: Report, judged: SpeculationResult) -> str:
    """The card of a teacher that answers with a draft."""
    measured = next(m for m in report.measured if m.name == judged.found.model)
    lines = "\n".join(f"- {reason.text}" for reason in judged.verdict.reasons)
    return f"""{_front_matter(name, library, report, measured)}
# {name}: {measured.name}, drafted by {judged.found.draft}

`model.gguf` is the teacher, and every text is its own; `draft.gguf`, the student that passed its gate
(`verdict.json`), guesses {judged.found.draft_tokens} tokens at a time, which the teacher reads at once and takes where
they are what it would have written. `overproof serve` loads both. As measured (`speculation.json`):

{lines}
"""


def _conversion(report: Report, measured: MeasuredFile) -> Metric | None:
    """Of the unquantised file of the student that a file was made from."""
    whole = report.find(measured.student or measured.name)
    return None if whole is None else whole.metrics.get("conversion_nats")


def _front_matter(name: str, library: str, report: Report, measured: MeasuredFile) -> str:
    quality, tag = measured.metrics[report.quality], TASKS[report.task].pipeline_tag
    result = {
        "task": {"type": tag},
        "dataset": {"name": f"{name}, test split", "type": report.task},
        "metrics": [{"type": report.quality, "value": quality.value}],
    }
    head = {
        "library_name": library,
        "pipeline_tag": tag,
        "tags": ["overproof", "distillation", "quantization", measured.format],
        "model-index": [{"name": f"{name}-{measured.name}", "results": [result]}],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _table(report: Report, verdict: Verdict) -> list[tuple[str, ...]]:
    words = {c.name: "passed" if c.passed else "refused" for c in verdict.candidates}
    if verdict.chosen is not None:
        words[verdict.chosen] = "**packaged**"
    return variant_table(report, ("verdict", words))


def _shape(model: Section) -> str:
    return ", ".join(f"{name} {value}" for name, value in model.without_resources().items() if name != "path")


def _trial(trial: dict[str, Any]) -> str:
    loss = f"validation loss {trial['validation_loss']:.4f} nats"
    return f"{trial['parameters']:,} parameters, {trial['steps']:,} steps, {loss}"
