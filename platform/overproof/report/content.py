"""What the report's page shows, as one plain tree: files with their standing, trials, curves, costs.

Shapes: N files, O objectives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from overproof.artifacts import Artifact
from overproof.evaluate.gate import Verdict
from overproof.evaluate.metrics import MeasuredFile, Report
from overproof.registry import TASKS
from overproof.report.figure import PlottedCurve
from overproof.report.pareto import hypervolume, non_dominated, standings
from overproof.train.metrics import WATTS_PER_CORE

CURVE_POINTS = 120  # of a training curve in the page: each is the mean of its neighbours
BEYOND = 1.05  # the hypervolume's reference point: the worst figure of all files, and this much
AXES = {  # cost -> its name in the page
    "size_mb": "file size, MB",
    "p50_ms": "p50 latency, ms",
    "p95_ms": "p95 latency, ms",
    "resident_mb": "resident memory, MB",
}


@dataclass(frozen=True)
class EvaluatedFiles:
    """What was measured of a sweep's files, and the verdict where there is one yet."""

    report: Report
    verdict: Verdict | None


def report_content(
    name: str, artifacts: Mapping[str, Artifact], curves: list[PlottedCurve], judged: EvaluatedFiles | None
) -> dict[str, Any]:
    """The tree. ``artifacts`` has the sweep, its teacher and what that left for it."""
    swept = json.loads((artifacts["sweep"].local() / "trials.json").read_text(encoding="utf-8"))
    return {
        "name": name,
        "trials": [_trial(trial, swept) for trial in swept["trials"]],
        "control": _trial(swept["control"], swept),
        "curves": [_curve(curve) for curve in curves],
        "costs": costs(swept, artifacts),
        "files": file_rows(judged, swept) if judged else None,
    }


def _trial(trial: Mapping[str, Any], swept: Mapping[str, Any]) -> dict[str, Any]:
    figures = ("values", "status", "reason", "steps", "validation_loss", "parameters", "seconds", "cpu_seconds")
    role = "winner" if trial["name"] == swept["winner"] else "kept" if trial["name"] in swept["kept"] else "trial"
    return {"name": trial["name"], "role": role, **{figure: trial.get(figure) for figure in figures}}


def _curve(curve: PlottedCurve) -> dict[str, Any]:
    return {
        "name": curve.name,
        "role": curve.role,
        "train": thin_curve(curve.train),
        "validation": [(step, _digits(loss)) for step, loss in curve.validation],
    }


def thin_curve(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``CURVE_POINTS`` points: the last step and the mean loss of each run of neighbours."""
    parts = np.array_split(np.array(points, float).reshape(-1, 2), min(CURVE_POINTS, len(points)) or 1)
    return [(int(part[-1, 0]), _digits(part[:, 1].mean())) for part in parts if len(part)]


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def costs(swept: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the teacher, its text and its cache cost, and what trials would have cost with the teacher beside each.

    What concerns a cache is there only where one is. Its seconds are the teacher's forward passes. Energy is nowhere
    measured: it is estimated as those seconds at one core's share of a processor's power.
    """
    training, written = artifacts["train"].record, artifacts.get("generate")
    return {
        "trials": len(swept["trials"]),
        "train_s": training.seconds,
        "train_energy_estimate_j": training.metrics["energy_estimate_j"],
        "text_s": written.record.metrics["teacher_seconds"] if written else None,
        "cached": None,
        "watts_per_core": WATTS_PER_CORE,
        **(_saved(swept, artifacts["cache"].record.metrics) if "cache" in artifacts else {}),
    }


def _saved(swept: Mapping[str, Any], cached: Mapping[str, Any]) -> dict[str, Any]:
    positions, seconds = cached["positions"], cached["teacher_seconds"]
    distilled = [trial for trial in swept["trials"] if trial["teacher_weight"] > 0]
    rows = sum(trial["steps"] * trial["values"]["batch_size"] for trial in distilled)
    asked = round(rows * positions / cached["rows"])
    live_s = seconds / positions * asked
    return {
        "cached": positions,
        "cache_s": seconds,
        "asked": asked,
        "live_s": live_s,
        "saved_energy_estimate_j": (live_s - seconds) * WATTS_PER_CORE,
    }


def file_rows(judged: EvaluatedFiles, swept: Mapping[str, Any]) -> dict[str, Any]:
    """Every exported file, where it stands against each cost, and what the several students add to one."""
    report, verdict = judged.report, judged.verdict
    passed = {c.name: c.passed for c in verdict.candidates} if verdict else {}
    spent = {trial["name"]: trial for trial in (*swept["trials"], swept["control"])}
    rows = [_file(m, report, passed.get(m.name), spent.get(m.student or m.name)) for m in report.measured]
    task = TASKS[report.task]
    sign = -1.0 if task.quality.higher_is_better else 1.0
    lost_N = np.array([sign * row["quality"] for row in rows])
    planes = {}
    for axis in AXES:
        costs_N2 = np.column_stack([[row[axis] for row in rows], lost_N])
        found = standings(costs_N2[:, :1], *_paired(report))
        planes[axis] = {
            "label": AXES[axis],
            "frontier": [row["name"] for row, on in zip(rows, non_dominated(costs_N2), strict=True) if on],
            "standing": {row["name"]: standing for row, standing in zip(rows, found, strict=True)},
            "volume": _volumes(report, costs_N2),
        }
    return {
        "quality": {"title": task.quality.title, "higher_is_better": task.quality.higher_is_better},
        "speed_unit": task.speed_unit,
        "engine": f"{report.engine}, which computes with {report.computes_with}",
        "confidence": report.confidence,
        "chosen": verdict.chosen if verdict else None,
        "rows": rows,
        "planes": planes,
    }


def _file(m: MeasuredFile, report: Report, passed: bool | None, trial: Mapping[str, Any] | None) -> dict[str, Any]:
    quality = m.metrics[report.quality]
    rate = m.metrics.get(TASKS[report.task].speed)
    return {
        "name": m.name,
        "role": m.name if m.student is None else "winner" if m.student == report.winner else "kept",
        "candidate": m.candidate,
        "passed": passed,
        "format": m.format,
        "quality": quality.value,
        "low": quality.low,
        "high": quality.high,
        "agreement": m.metrics["agreement"].value,
        "size_mb": m.size_bytes / 1e6,
        "p50_ms": 1e3 * m.metrics["latency_p50_s"].value,
        "p95_ms": 1e3 * m.metrics["latency_p95_s"].value,
        "resident_mb": m.metrics["resident_mb"].value,
        "rate": rate.value if rate else None,
        "requests": m.metrics["latency_p95_s"].n,
        "trained_s": trial.get("cpu_seconds") if trial else None,
    }


def _paired(report: Report) -> tuple[np.ndarray, np.ndarray]:
    """How much worse each file is than each other: the ends of the intervals, NaN where there is none."""
    place = {m.name: i for i, m in enumerate(report.measured)}
    low_NN, high_NN = np.full((2, len(place), len(place)), np.nan)
    for c in report.comparisons:
        if c.low is not None and c.high is not None:
            at = place[c.name], place[c.against]
            low_NN[at], high_NN[at] = c.low, c.high
    return low_NN, high_NN


def _volumes(report: Report, costs_N2: np.ndarray) -> dict[str, Any]:
    """The volume that all students' files reach, and the shares that the winner's files or the control do alone."""
    worst_2 = costs_N2.max(axis=0)
    reference_2 = np.where(worst_2 > 0, worst_2 * BEYOND, worst_2 / BEYOND)
    picked = {
        "all": [m.student is not None for m in report.measured],
        "winner": [m.student == report.winner for m in report.measured],
        "control": [m.name == "control" for m in report.measured],
    }
    found = {name: hypervolume(costs_N2[np.array(mask)], reference_2) for name, mask in picked.items()}
    whole = found["all"]
    return {
        "reference": [reference_2[0], abs(reference_2[1])],
        "volume": whole,
        **{name: found[name] / whole if whole else None for name in ("winner", "control")},
    }


def read_curves(train: Path, sweep: Path) -> list[PlottedCurve]:
    """The loss curves of teacher, trials and control."""
    swept = json.loads((sweep / "trials.json").read_text(encoding="utf-8"))
    roles = dict.fromkeys(swept["kept"], "kept") | {swept["winner"]: "student", "control": "control"}
    found = [_read("teacher", train / "curve.jsonl", "teacher")]
    return found + [_read(p.stem, p, roles.get(p.stem, "trial")) for p in sorted((sweep / "curves").glob("*.jsonl"))]


def _read(name: str, path: Path, role: str) -> PlottedCurve:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return PlottedCurve(name, role, _points(rows, "loss"), _points(rows, "validation_loss"))


def _points(rows: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
