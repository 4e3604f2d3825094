"""The report: a self-contained page and a picture, of a recipe's run or of one sweep by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from overproof.artifacts import Artifact, Store
from overproof.errors import InputError
from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import Report
from overproof.files import read_json
from overproof.report.content import EvaluatedFiles, read_curves, report_content
from overproof.report.figure import draw_report
from overproof.stage_context import StageContext

ABOVE = ("prepare", "train", "generate", "cache")
BELOW = ("compress", "sweep"), ("evaluate", "compress"), ("gate", "evaluate")


def write_report(context: StageContext) -> dict[str, Any]:
    """Write report.png and report.html."""
    judged = _judged(context.parents)
    assert judged is not None
    assert judged.verdict is not None
    curves = read_curves(context.parents["train"].local(), context.parents["sweep"].local())
    page = render_page(context.recipe.name, context.parents)
    with context.draft.directory() as folder:
        (folder / "report.png").write_bytes(draw_report(curves, judged.report, judged.verdict))
        (folder / "report.html").write_text(page, encoding="utf-8")
    return {"curves": len(curves), "exports": len(judged.report.measured)}


def sweep_report(store: Store, name: str) -> tuple[Artifact, str]:
    """The sweep with this id (or a unique part of it), and its page with what is measured and judged of it so far.

    Raises:
        InputError: there is no such artifact, it is no sweep, or its teacher or cache is gone.
    """
    sweep = store.get(name)
    if sweep.record.stage != "sweep":
        raise InputError(f"{name}: is {sweep.id}; expected a sweep, see `overproof ls`, or a recipe")
    everything = store.artifacts()
    found = {"sweep": sweep}
    for stage in (name for name in ABOVE if name in sweep.record.parents):
        match = [a for a in everything if a.record.fingerprint == sweep.record.parents[stage]]
        if not match:
            raise InputError(f"{sweep.id}: its {stage}-{sweep.record.parents[stage][:8]} is not in {store.uri}")
        found[stage] = match[0]
    for stage, parent in BELOW:
        above = found[parent].record.fingerprint if parent in found else None
        match = [a for a in everything if a.record.stage == stage and a.record.parents.get(parent) == above]
        if above and match:
            found[stage] = match[-1]  # the newest
    return sweep, render_page(sweep.record.recipe, found)


def _judged(artifacts: Mapping[str, Artifact]) -> EvaluatedFiles | None:
    if "evaluate" not in artifacts:
        return None
    measured = read_json(Report, artifacts["evaluate"].local() / "report.json")
    if "gate" not in artifacts:
        return EvaluatedFiles(measured, None)
    return EvaluatedFiles(measured, read_json(Verdict, artifacts["gate"].local() / "verdict.json"))


def render_page(name: str, artifacts: Mapping[str, Artifact]) -> str:
    """The page. ``artifacts`` are by stage: those of the sweep and above it, and what there is of those after it."""
    judged = _judged(artifacts)
    curves = read_curves(artifacts["train"].local(), artifacts["sweep"].local())
    tree = report_content(name, artifacts, curves, judged)
    environment = Environment(
        loader=PackageLoader("overproof.report", "page"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        name=name,
        files=tree["files"],
        verdict=judged.verdict if judged else None,
        costs=tree["costs"],
        trials=tree["trials"],
        lineage=_in_order(artifacts.values()),
        data=embed_json(tree),
    )


def embed_json(tree: Any) -> str:
    """JSON that may stand within a script element: nothing in it ends the element or starts a comment."""
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _in_order(artifacts: Iterable[Artifact]) -> list[Artifact]:
    return sorted(artifacts, key=lambda artifact: artifact.record.created)
