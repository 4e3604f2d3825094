"""The report: a self-contained page and a picture, of a recipe's run or of one sweep by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from overproof.artifacts import Artifact, Store
from overproof.errors import InputError
from overproof.evaluate.gate import VERDICT, Verdict
from overproof.evaluate.metrics import REPORT, Report
from overproof.evaluate.outcome import OUTCOME, Outcome, training_folders
from overproof.files import read_json
from overproof.report.content import EvaluatedFiles, read_curves, report_content
from overproof.report.figure import draw_report
from overproof.stage_context import StageContext
from overproof.units import format_number

SWEEP_ANCESTORS = ("prepare", "train", "generate", "cache")
SWEEP_DESCENDANTS = ("compress", "sweep"), ("evaluate", "compress"), ("gate", "evaluate")  # each with its parent


def write_report(context: StageContext) -> dict[str, Any]:
    """Write report.png and report.html."""
    evaluated = _read_evaluation(context.parents)
    assert evaluated is not None
    assert evaluated.verdict is not None
    curves = read_curves(*training_folders(context.parents))
    page = render_page(context.recipe.name, context.parents)
    with context.draft.directory() as folder:
        (folder / "report.png").write_bytes(draw_report(curves, evaluated.report, evaluated.verdict))
        (folder / "report.html").write_text(page, encoding="utf-8")
    return {"curves": len(curves), "exports": len(evaluated.report.measured)}


def sweep_report(store: Store, sweep: Artifact) -> str:
    """The page of a sweep, with what is measured and evaluated of it so far.

    Raises:
        InputError: its teacher or cache is gone.
    """
    artifacts = store.artifacts()
    stages = {"sweep": sweep}
    for stage in (name for name in SWEEP_ANCESTORS if name in sweep.record.parents):
        matching = [a for a in artifacts if a.record.fingerprint == sweep.record.parents[stage]]
        if not matching:
            raise InputError(f"{sweep.id}: its {stage}-{sweep.record.parents[stage][:8]} is not in {store.uri}")
        stages[stage] = matching[0]
    for stage, parent in SWEEP_DESCENDANTS:
        fingerprint = stages[parent].record.fingerprint if parent in stages else None
        matching = [a for a in artifacts if a.record.stage == stage and a.record.parents.get(parent) == fingerprint]
        if stage == "gate":  # of an earlier version there is none
            matching = [a for a in matching if OUTCOME in a.record.files]
        if fingerprint and matching:
            stages[stage] = matching[-1]  # the newest
    return render_page(sweep.record.recipe, stages)


def _read_evaluation(artifacts: Mapping[str, Artifact]) -> EvaluatedFiles | None:
    if "evaluate" not in artifacts:
        return None
    report = read_json(Report, artifacts["evaluate"].local() / REPORT)
    if "gate" not in artifacts:
        return EvaluatedFiles(report)
    judged = artifacts["gate"].local()
    return EvaluatedFiles(report, read_json(Verdict, judged / VERDICT), read_json(Outcome, judged / OUTCOME))


def render_page(name: str, artifacts: Mapping[str, Artifact]) -> str:
    """The page. ``artifacts`` by stage: the sweep, what it was made from, and what was made of it so far."""
    evaluated = _read_evaluation(artifacts)
    curves = read_curves(*training_folders(artifacts))
    content = report_content(name, artifacts, curves, evaluated)
    environment = Environment(
        loader=PackageLoader("overproof.report", "page"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    return environment.get_template("page.html").render(
        name=name,
        files=content["files"],
        verdict=evaluated.verdict if evaluated else None,
        outcome=evaluated.outcome if evaluated else None,
        reasons={c.name: c.reasons for c in evaluated.verdict.candidates} if evaluated and evaluated.verdict else {},
        costs=content["costs"],
        trials=content["trials"],
        lineage=_oldest_first(artifacts.values()),
        data=embed_json(content),
    )


def embed_json(value: Any) -> str:
    """JSON that may stand within a script element: nothing in it ends the element or starts a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _oldest_first(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return sorted(artifacts, key=lambda artifact: artifact.record.created)
