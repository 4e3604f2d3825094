"""The report stage: loss curves and the size-quality plane as one PNG and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from overproof.artifact import Artifact
from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import Report
from overproof.files import read_json
from overproof.report.figure import Curve, draw
from overproof.stage import Context


def report(context: Context) -> dict[str, Any]:
    """Write report.png and report.html."""
    parents = {name: artifact.local() for name, artifact in context.parents.items()}
    measured = read_json(Report, parents["evaluate"] / "report.json")
    verdict = read_json(Verdict, parents["gate"] / "verdict.json")
    trials = json.loads((parents["sweep"] / "trials.json").read_text())
    curves = _curves(parents["train"], parents["sweep"], trials["winner"])
    image = draw(curves, measured, verdict)
    page = _page(context.recipe.name, measured, verdict, trials, image, context.parents)
    with context.draft.directory() as folder:
        (folder / "report.png").write_bytes(image)
        (folder / "report.html").write_text(page, encoding="utf-8")
    return {"curves": len(curves), "exports": len(measured.measured)}


def _curves(train: Path, sweep: Path, winner: str) -> list[Curve]:
    found = [_curve("teacher", train / "curve.jsonl", "teacher")]
    for path in sorted((sweep / "curves").glob("*.jsonl")):
        role = {winner: "student", "control": "control"}.get(path.stem, "trial")
        found.append(_curve(path.stem, path, role))
    return found


def _curve(name: str, path: Path, role: str) -> Curve:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    return Curve(name, role, train, validation)


def _page(name: str, report: Report, verdict: Verdict, trials: dict[str, Any], image: bytes, parents: Any) -> str:
    environment = Environment(loader=PackageLoader("overproof.report", "."), autoescape=select_autoescape(("html",)))
    lineage = [
        {"id": a.id, "seconds": a.record.seconds, "fingerprint": a.record.fingerprint} for a in _in_order(parents)
    ]
    return environment.get_template("page.html").render(
        name=name,
        report=report,
        verdict=verdict,
        verdicts={c.name: c for c in verdict.candidates},
        trials=[*trials["trials"], trials["control"]],
        winner=trials["winner"],
        picture=base64.b64encode(image).decode(),
        text=report.quality == "bits_per_byte",
        lineage=lineage,
    )


def _in_order(parents: dict[str, Artifact]) -> list[Artifact]:
    return sorted(parents.values(), key=lambda artifact: artifact.record.created)
