"""The content of the report's page as plain JSON values: files with their standing, trials, curves, costs.

Shapes: N files, O objectives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from overproof.artifacts import Artifact
from overproof.evaluate.gate import Verdict, teacher_loss
from overproof.evaluate.metrics import EXPECTED_ACCURACY, MeasuredFile, Report
from overproof.evaluate.outcome import Outcome, curve_files, read_curve
from overproof.export.base import TEACHER
from overproof.registry import TASKS
from overproof.report.figure import PlottedCurve
from overproof.report.pareto import hypervolume, non_dominated, standings
from overproof.tasks.base import Metric
from overproof.train.metrics import WATTS_PER_CORE

CURVE_POINTS = 120  # of a training curve in the page: each is the mean of its neighbours
REFERENCE_MARGIN = 1.05  # the hypervolume's reference point is the worst figure of all files times this
COST_AXES = {  # cost -> its label in the page
    "size_mb": "file size, MB",
    "p50_ms": "p50 latency, ms",
    "p95_ms": "p95 latency, ms",
    "resident_mb": "resident memory, MB",
}


@dataclass(frozen=True)
class EvaluatedFiles:
    """What was measured of a sweep's files; the verdict and what it comes to, where there is one yet."""

    report: Report
    verdict: Verdict | None = None
    outcome: Outcome | None = None


def report_content(
    name: str, artifacts: Mapping[str, Artifact], curves: list[PlottedCurve], evaluated: EvaluatedFiles | None
) -> dict[str, Any]:
    """The content. ``artifacts`` by stage: the sweep, what it was made from, and what was made of it so far."""
    sweep_results = json.loads((artifacts["sweep"].local("trials.json") / "trials.json").read_text(encoding="utf-8"))
    return {
        "name": name,
        "trials": [_trial(trial, sweep_results) for trial in sweep_results["trials"]],
        "control": _trial(sweep_results["control"], sweep_results),
        "curves": [_curve(curve) for curve in curves],
        "costs": costs(sweep_results, artifacts),
        "files": file_rows(evaluated, sweep_results) if evaluated else None,
    }


def _trial(trial: Mapping[str, Any], sweep_results: Mapping[str, Any]) -> dict[str, Any]:
    figures = ("values", "status", "reason", "steps", "validation_loss", "parameters", "seconds", "cpu_seconds")
    role = (
        "winner"
        if trial["name"] == sweep_results["winner"]
        else "kept"
        if trial["name"] in sweep_results["kept"]
        else "trial"
    )
    values = trial["values"] | {"teacher_weight": trial["teacher_weight"]}  # a control's own is none
    values = {name: str(value) if isinstance(value, list) else value for name, value in values.items()}
    return {"name": trial["name"], "role": role, **{figure: trial.get(figure) for figure in figures}, "values": values}


def _curve(curve: PlottedCurve) -> dict[str, Any]:
    return {
        "name": curve.name,
        "role": curve.role,
        "train": thin_curve(curve.train),
        "validation": [(step, _round(loss)) for step, loss in curve.validation],
    }


def thin_curve(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``CURVE_POINTS`` points: the last step and the mean loss of each run of neighbours."""
    parts = np.array_split(np.array(points, float).reshape(-1, 2), min(CURVE_POINTS, len(points)) or 1)
    return [(int(part[-1, 0]), _round(part[:, 1].mean())) for part in parts if len(part)]


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def costs(sweep_results: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the teacher, its text and its cache cost, and what trials would have cost with the teacher beside each.

    What concerns a cache is there only where one is. Its seconds are the teacher's forward passes. Energy is nowhere
    measured: it is estimated as those seconds at one core's share of a processor's power.
    """
    training, generated = artifacts["train"].record, artifacts.get("generate")
    return {
        "trials": len(sweep_results["trials"]),
        "train_s": training.seconds,
        "train_energy_estimate_j": training.metrics["energy_estimate_j"],
        "text_s": generated.record.metrics["teacher_seconds"] if generated else None,
        "cached_predictions": None,
        "watts_per_core": WATTS_PER_CORE,
        **(_cache_costs(sweep_results, artifacts["cache"].record.metrics) if "cache" in artifacts else {}),
    }


def _cache_costs(sweep_results: Mapping[str, Any], cached: Mapping[str, Any]) -> dict[str, Any]:
    positions, seconds = cached["positions"], cached["teacher_seconds"]
    distilled = [trial for trial in sweep_results["trials"] if trial["teacher_weight"] > 0]
    rows = sum(trial["steps"] * trial["values"]["batch_size"] for trial in distilled)
    live_predictions = round(rows * positions / cached["rows"])
    live_s = seconds / positions * live_predictions
    return {
        "cached_predictions": positions,
        "cache_s": seconds,
        "live_predictions": live_predictions,
        "live_s": live_s,
        "saved_energy_estimate_j": (live_s - seconds) * WATTS_PER_CORE,
    }


def file_rows(evaluated: EvaluatedFiles, sweep_results: Mapping[str, Any]) -> dict[str, Any]:
    """Every exported file, where it stands against each cost, and what the several students add to one."""
    report, verdict = evaluated.report, evaluated.verdict
    passed = {c.name: c.passed for c in verdict.candidates} if verdict else {}
    trials = {trial["name"]: trial for trial in (*sweep_results["trials"], sweep_results["control"])}
    rows = [_file(m, report, passed.get(m.name), trials.get(m.student or m.name)) for m in report.measured]
    task = TASKS[report.task]
    sign = -1.0 if task.quality.higher_is_better else 1.0
    quality_cost_N = np.array([sign * row["quality"] for row in rows])
    planes = {}
    for axis in COST_AXES:
        costs_N2 = np.column_stack([[row[axis] for row in rows], quality_cost_N])
        file_standings = standings(costs_N2[:, :1], *_paired_bounds(report))
        planes[axis] = {
            "label": COST_AXES[axis],
            "frontier": [row["name"] for row, member in zip(rows, non_dominated(costs_N2), strict=True) if member],
            "standing": {row["name"]: standing for row, standing in zip(rows, file_standings, strict=True)},
            "volume": _volumes(report, costs_N2),
        }
    return {
        "quality": {"title": task.quality.title, "higher_is_better": task.quality.higher_is_better},
        "teacher": _teacher(report),
        "speed_unit": task.speed_unit,
        "engine": f"{report.engine}, which computes with {report.computes_with}",
        "confidence": report.confidence,
        "test_unit": task.test_unit,
        "scored": report.scored,
        "answered": report.answered,
        "near_duplicates": report.near_duplicates.summary if report.near_duplicates else "",
        "conversion": _conversion(report),
        "chosen": verdict.chosen if verdict else None,
        "rows": rows,
        "planes": planes,
    }


def _file(
    measured: MeasuredFile, report: Report, passed: bool | None, trial: Mapping[str, Any] | None
) -> dict[str, Any]:
    quality = measured.metrics[report.quality]
    rate = measured.metrics.get(TASKS[report.task].speed)
    return {
        "name": measured.name,
        "role": _role(measured, report.winner),
        "candidate": measured.candidate,
        "passed": passed,
        "format": measured.format,
        "lost": teacher_loss(report, measured.name),
        **_interval(quality),
        "agreement": measured.metrics["agreement"].value,
        "expected": _share(measured.metrics.get(EXPECTED_ACCURACY)),
        "size_mb": measured.size_bytes / 1e6,
        "p50_ms": 1e3 * measured.metrics["latency_p50_s"].value,
        "p95_ms": 1e3 * measured.metrics["latency_p95_s"].value,
        "resident_mb": measured.metrics["resident_mb"].value,
        "rate": rate.value if rate else None,
        "units": quality.measured_on,
        "requests": measured.metrics["latency_p95_s"].measured_on,
        "trained_s": trial.get("cpu_seconds") if trial else None,
    }


def _role(measured: MeasuredFile, winner: str) -> str:
    if measured.student is None:
        return measured.name
    if measured.student == TEACHER:
        return TEACHER
    return "winner" if measured.student == winner else "kept"


def _teacher(report: Report) -> dict[str, Any]:
    """Its quality, with its size where it is one of the files, and what it is where it is none."""
    unwritten, file = report.unwritten_teacher, report.find("teacher")
    if unwritten is not None:
        weights = unwritten.weights or "its endpoint does not name its weights"
        told = f"{unwritten.model}, which runs {unwritten.runs} ({weights})"
        return {**_interval(unwritten.metrics[report.quality]), "size_mb": None, "without_file": told}
    assert file is not None
    return {**_interval(file.metrics[report.quality]), "size_mb": file.size_bytes / 1e6, "without_file": None}


def _interval(quality: Metric) -> dict[str, float | None]:
    return {"quality": quality.value, "low": quality.low, "high": quality.high}


def _share(found: Metric | None) -> dict[str, float | None] | None:
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def _conversion(report: Report) -> dict[str, float] | None:
    """How far unquantised files are from their models at most, and the places of the longest row that all were held
    against them on; None where the report does not say.
    """
    found = [m.metrics["conversion_nats"] for m in report.measured if "conversion_nats" in m.metrics]
    return {"nats": max(m.value for m in found), "positions": min(m.n for m in found)} if found else None


def _paired_bounds(report: Report) -> tuple[np.ndarray, np.ndarray]:
    """How much worse each file is than each other: the ends of the intervals, NaN where there is none."""
    place = {m.name: i for i, m in enumerate(report.measured)}
    low_NN, high_NN = np.full((2, len(place), len(place)), np.nan)
    for c in report.comparisons:
        if c.low is not None and c.high is not None and {c.name, c.against} <= place.keys():
            at = place[c.name], place[c.against]
            low_NN[at], high_NN[at] = c.low, c.high
    return low_NN, high_NN


def _volumes(report: Report, costs_N2: np.ndarray) -> dict[str, Any]:
    """Which shares of the volume that all students' files reach the winner's files and the control do alone."""
    worst_2 = costs_N2.max(axis=0)
    reference_2 = np.where(worst_2 > 0, worst_2 * REFERENCE_MARGIN, worst_2 / REFERENCE_MARGIN)
    masks = {
        "all": [m.student not in (None, TEACHER) for m in report.measured],
        "winner": [m.student == report.winner for m in report.measured],
        "control": [m.name == "control" for m in report.measured],
    }
    volumes = {name: hypervolume(costs_N2[np.array(mask)], reference_2) for name, mask in masks.items()}
    whole = volumes["all"]
    return {name: volumes[name] / whole if whole else None for name in ("winner", "control")}


def read_curves(train: Path, sweep: Path) -> list[PlottedCurve]:
    """The loss curves of teacher, trials and control."""
    sweep_results = json.loads((sweep / "trials.json").read_text(encoding="utf-8"))
    roles = dict.fromkeys(sweep_results["kept"], "kept") | {sweep_results["winner"]: "student", "control": "control"}
    return [
        PlottedCurve(
            name, "teacher" if name == "teacher" else roles.get(name, "trial"),
            *map(list, read_curve(file, "loss", "validation_loss")),
        )
        for name, file in curve_files(train, sweep).items()
    ]  # fmt: skip
