"""What a sweep has seen of its trials: curves, last results, who failed and why. Knows nothing of Ray."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overproof.config.search import current_values
from overproof.distill.trial_job import CONTROL, TrialJob
from overproof.stage_context import Notice, Progress, TaskProgress

TrialResult = Mapping[str, Any]
TRIAL_FIELDS = (
    "name", "student", "values", "temperature", "teacher_weight", "parameters", "steps", "validation_loss", "status",
    "reason", "seconds", "cpu_seconds", "resumed_step", "pid", "import_seconds",
)  # fmt: skip


class SweepTracker:
    """Follows the trials and the controls, and reports their progress."""

    def __init__(self, progress: Progress, steps: int, trials: int, max_deaths: int) -> None:
        """``steps`` are a whole trial's; one whose process died ``max_deaths`` times may still be proposed again."""
        self.progress, self.steps, self.trials, self.max_deaths = progress, steps, trials, max_deaths
        self.deaths = Counter[str]()
        self.death_reasons: dict[str, str] = {}  # the last one's
        self.curves: dict[str, list[Mapping[str, float]]] = {}
        self.last_results: dict[str, TrialResult] = {}
        self.failures: dict[str, str] = {}  # why
        self.ended: set[str] = set()
        self.report_progress()

    def add_trial(self, name: str) -> None:
        """A trial has been started."""
        self.curves[name] = []

    def record_result(self, result: TrialResult) -> None:
        """A result; one that another process gave before it died comes twice, and changes nothing."""
        name, before = result["name"], self.last_results.get(result["name"])
        if result["failed"] is not None:
            self.record_failure(name, result["failed"])
        if before is None or before["pid"] != result["pid"]:
            for fault in result["faults"]:
                self._notify(f"{name}: {fault}")
            if result["resumed_step"]:
                self._notify(f"{name}: going on from step {result['resumed_step']}")
        if before is None or result["steps"] > before["steps"]:
            self.curves.setdefault(name, []).extend(result["curve"])
            self.last_results[name] = result

    def record_end(self, name: str) -> None:
        """A trial takes no further step: it ran all, failed, or was stopped."""
        self.ended.add(name)
        self.report_progress()

    def record_death(self, name: str, reason: str, retry: bool) -> None:
        """A trial's process has ended; with ``retry`` the trial may be proposed again, if it has not died too often."""
        self.deaths[name] += 1
        self.death_reasons[name] = reason
        if not retry or self.deaths[name] > self.max_deaths:
            self.record_failure(name, reason)
            self.record_end(name)

    def record_failure(self, name: str, reason: str) -> None:
        """A trial cannot go on."""
        self.failures[name] = reason
        self._notify(f"{name} failed: {reason}")

    def report_progress(self) -> None:
        names = [name for name in self.curves if name != CONTROL]
        reached = {name: int(self.last_results[name]["steps"]) if name in self.last_results else 0 for name in names}
        sound = [result for result in self.last_results.values() if result["failed"] is None]
        best = min(sound, key=lambda result: float(result["validation_loss"]), default=None)
        note = f"best {best['validation_loss']:.3f} ({best['name']})" if best else "starting trials"
        done = sum(self.steps if name in self.ended else reached[name] for name in names)
        self.progress(TaskProgress("sweep", done, self.steps * self.trials, note))

    def finished(self) -> dict[str, TrialResult]:
        """The last results of those that ran every step, by name."""
        return {
            name: result
            for name, result in self.last_results.items()
            if result["steps"] == self.steps and name not in self.failures
        }

    def winner(self) -> TrialResult | None:
        """The best of those that ran every step, if any did."""
        return min(self.finished().values(), key=lambda result: float(result["validation_loss"]), default=None)

    def unfinished(self) -> list[str]:
        """Of every trial that has not ended, how far it is and, where its process died, why; in their order."""
        lines = []
        for name in self.curves:
            if name in self.ended:
                continue
            reached = self.last_results[name]["steps"] if name in self.last_results else 0
            why = f", its process died: {self.death_reasons[name]}" if name in self.death_reasons else ""
            lines.append(f"{name} (at step {reached} of {self.steps}{why})")
        if never := self.trials - len(self.curves):
            lines.append(f"{never} that never started")
        return lines

    def trial_entry(self, job: TrialJob) -> dict[str, Any]:
        """A job's entry in trials.json; what was never measured is null."""
        result, failure = self.last_results.get(job.name, {"steps": 0}), self.failures.get(job.name)
        ended = "finished" if result["steps"] == job.settings.steps else "stopped"
        loss = result.get("validation_loss", math.inf)
        entry = {
            "name": job.name,
            "student": job.student.name,
            "values": result.get("values") or current_values(job.settings, job.student),
            "temperature": job.student.temperature,
            "teacher_weight": job.student.teacher_weight if job.distilled else 0.0,
            "validation_loss": loss if math.isfinite(loss) else None,
            "status": "failed" if failure else ended,
            "reason": failure,
        }
        return {name: entry[name] if name in entry else result.get(name) for name in TRIAL_FIELDS}

    def write_curves(self, folder: Path) -> None:
        """A file of JSON lines for each curve."""
        folder.mkdir()
        for name, rows in self.curves.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def _notify(self, line: str) -> None:
        self.progress(Notice(line))
