"""What a sweep has seen of its trials: curves, last results, who failed and why. Knows nothing of Ray."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overproof.config.search import current_values
from overproof.distill.trial_job import CONTROL, TrialJob
from overproof.files import FileEntry
from overproof.stage_context import Notice, Progress, ProgressEvent, TaskProgress

TrialResult = Mapping[str, Any]
TRIAL_FIELDS = (
    "name", "student", "values", "temperature", "teacher_weight", "parameters", "steps", "validation_loss", "status",
    "reason", "seconds", "cpu_seconds", "resumed_step", "pid", "import_seconds",
)  # fmt: skip


class SweepTracker:
    """Follows the trials and the controls, and reports their progress; steps may be told from another thread.

    An event costs the same however many trials there are, and the rows of their curves lie in files.
    """

    def __init__(self, progress: Progress, steps: int, trials: int, max_deaths: int, curves: Path) -> None:
        """``steps`` are a whole trial's, or the most of any; one whose process died ``max_deaths`` times may still be
        proposed again. ``curves`` is an empty folder, for a file of JSON lines of each curve.
        """
        self.progress, self.steps, self.trials, self.max_deaths = progress, steps, trials, max_deaths
        self.curves = curves
        self.deaths = Counter[str]()
        self.death_reasons: dict[str, str] = {}  # the last one's
        self.last_results: dict[str, TrialResult] = {}  # without their rows
        self.files: dict[str, dict[str, FileEntry]] = {}  # of the draft, by who wrote them
        self.failures: dict[str, str] = {}  # why
        self.ended: set[str] = set()
        self._started: dict[str, int] = {}  # the steps of trials, in their order
        self._controls: dict[str, int] = {}
        self._reached = Counter[str]()  # steps of each, by its last result or what it told since
        self._trial_steps = self._control_steps = 0  # of all of them
        self._best: TrialResult | None = None
        self._lock = threading.RLock()
        self.report_progress()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes down all it is given, to restore it; a sweep goes on from its `SweepState`."""
        return {}

    def add_trial(self, name: str, steps: int | None = None) -> None:
        """A trial has been started; it ends after ``steps``, where not all have as many."""
        with self._lock:
            self._started[name] = self.steps if steps is None else steps
        self.curve_file(name).touch()

    def curve_file(self, name: str) -> Path:
        """Of a trial or control."""
        return self.curves / f"{name}.jsonl"

    def read_curve(self, name: str) -> list[dict[str, float]]:
        """The rows that a trial or control has told."""
        return [json.loads(line) for line in self.curve_file(name).read_text(encoding="utf-8").splitlines()]

    def start_controls(self, steps: Mapping[str, int]) -> None:
        """The trials are over, and these controls begin, each of so many steps."""
        self._controls = dict(steps)
        self.report_controls("starting")

    def show(self, event: ProgressEvent) -> None:
        """What processes tell of themselves: steps of trials and controls that take long, which their next results
        tell again; and notices.
        """
        if isinstance(event, Notice):
            self.progress(event)
            return
        self._advance(event.task, event.done)
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
        self.files.setdefault(name, {}).update(result["files"])  # written again, they are the later ones
        if before is None or result["steps"] > before["steps"]:
            with self.curve_file(name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in result["curve"])
            with self._lock:
                self.last_results[name] = {key: value for key, value in result.items() if key != "curve"}
                self._compare(name)
            self._advance(name, int(result["steps"]))

    def record_end(self, name: str) -> None:
        """A trial takes no further step: it ran all, failed, or was stopped."""
        self.ended.add(name)
        self._advance(name, self.steps)
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
            done, best = self._trial_steps, self._best
            begun = "training" if done else "starting trials"
            note = f"best {best['validation_loss']:.3f} ({best['name']})" if best else begun
            self.progress(TaskProgress("sweep", done, self.steps * self.trials, note))

    def report_controls(self, note: str) -> None:
        """Of the controls together."""
        with self._lock:
            self.progress(TaskProgress(CONTROL, self._control_steps, sum(self._controls.values()), note))

    def finished(self) -> dict[str, TrialResult]:
        """The last results of those that ran every step, by name."""
        return {
            name: result
            for name, result in self.last_results.items()
            if result["steps"] == self._started.get(name, self.steps) and name not in self.failures
        }

    def winner(self) -> TrialResult | None:
        """The best of those that ran every step, if any did."""
        return min(self.finished().values(), key=_loss, default=None)

    def unfinished(self) -> list[str]:
        """Of every trial that has not ended, how far it is and, where its process died, why; in their order."""
        lines = []
        for name in self._started:
            if name in self.ended:
                continue
            reached = self.last_results[name]["steps"] if name in self.last_results else 0
            why = f", its process died: {self.death_reasons[name]}" if name in self.death_reasons else ""
            lines.append(f"{name} (at step {reached} of {self._started[name]}{why})")
        if never := self.trials - len(self._started):
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

    def _advance(self, name: str, steps: int) -> None:
        """A trial or control has made so many steps."""
        with self._lock:
            more = max(0, steps - self._reached[name])
            self._reached[name] += more
            if name in self._controls:
                self._control_steps += more
            elif name in self._started:
                self._trial_steps += more

    def _compare(self, name: str) -> None:
        """Whether a trial is the best, now that it has another result."""
        result, best = self.last_results[name], self._best
        if result["failed"] is None and (best is None or _loss(result) < _loss(best)):
            self._best = result
        elif best is not None and best["name"] == name:  # it was
            sound = (each for each in self.last_results.values() if each["failed"] is None)
            self._best = min(sound, key=_loss, default=None)

    def _notify(self, line: str) -> None:
        self.progress(Notice(line))


def _loss(result: TrialResult) -> float:
    return float(result["validation_loss"])
