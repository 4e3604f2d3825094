"""What a sweep has seen of its trials: curves, last results, who failed and why. Knows nothing of Ray."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overproof.config.search import current_values
from overproof.distill.trial_job import CONTROL, TrialJob
from overproof.stage_context import Notice, Progress, ProgressEvent, TaskProgress

TrialResult = Mapping[str, Any]
TRIAL_FIELDS = (
    "name", "student", "values", "temperature", "teacher_weight", "parameters", "steps", "validation_loss", "status",
    "reason", "seconds", "cpu_seconds", "resumed_step", "pid", "import_seconds",
)  # fmt: skip


class SweepTracker:
    """Follows the trials and the controls, and reports their progress; steps may be told from another thread."""

    def __init__(self, progress: Progress, steps: int, trials: int, max_deaths: int) -> None:
        """``steps`` are a whole trial's; one whose process died ``max_deaths`` times may still be proposed again."""
        self.progress, self.steps, self.trials, self.max_deaths = progress, steps, trials, max_deaths
        self.deaths = Counter[str]()
        self.death_reasons: dict[str, str] = {}  # the last one's
        self.curves: dict[str, list[Mapping[str, float]]] = {}
        self.last_results: dict[str, TrialResult] = {}
        self.failures: dict[str, str] = {}  # why
        self.ended: set[str] = set()
        self._trained: dict[str, int] = {}  # steps that were told, of trials and controls
        self._controls: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self.report_progress()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes down all it is given, to restore it; a sweep goes on from its `SweepState`."""
        return {}

    def add_trial(self, name: str) -> None:
        """A trial has been started."""
        with self._lock:
            self.curves[name] = []

    def start_controls(self, names: Sequence[str]) -> None:
        """The trials are over, and these controls begin."""
        self._controls = tuple(names)
        self.report_controls("starting")

    def show(self, event: ProgressEvent) -> None:
        """What processes tell of themselves: steps of trials and controls that take long, which their next results
        tell again; and notices.
        """
        if isinstance(event, Notice):
            self.progress(event)
            return
        with self._lock:
            self._trained[event.task] = event.done
        if event.task in self._controls:
            self.report_controls(f"{event.task} {event.note}")
        elif event.task not in self.ended:
            self.report_progress()

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
            with self._lock:
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
        """Of the trials together."""
        with self._lock:
            names = [name for name in self.curves if name not in self._controls]
            reached = {name: self.steps if name in self.ended else self._reached(name) for name in names}
            sound = [result for result in self.last_results.values() if result["failed"] is None]
            best = min(sound, key=lambda result: float(result["validation_loss"]), default=None)
            begun = "training" if any(reached.values()) else "starting trials"
            note = f"best {best['validation_loss']:.3f} ({best['name']})" if best else begun
            self.progress(TaskProgress("sweep", sum(reached.values()), self.steps * self.trials, note))

    def report_controls(self, note: str) -> None:
        """Of the controls together."""
        with self._lock:
            done = sum(self._reached(name) for name in self._controls)
            self.progress(TaskProgress(CONTROL, done, self.steps * len(self._controls), note))

    def _reached(self, name: str) -> int:
        """Steps that a trial or control has made, by its last result or what it told since."""
        result = self.last_results.get(name)
        return max(int(result["steps"]) if result else 0, self._trained.get(name, 0))

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
