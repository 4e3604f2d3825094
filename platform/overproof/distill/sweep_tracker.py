"""What a sweep has seen of its trials: curves, last results, who failed and why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError

from overproof.config.search import current_values
from overproof.distill.trial_job import CONTROL, TrialJob
from overproof.stage_context import Notice, Progress, TaskProgress

TrialResult = Mapping[str, Any]
TRIAL = (
    "name", "student", "values", "temperature", "teacher_weight", "parameters", "steps", "validation_loss", "status",
    "reason", "seconds", "cpu_seconds", "began_at", "pid", "import_seconds",
)  # fmt: skip


class SweepTracker(tune.Callback):
    """Follows the trials: their curves, their last results, the bar."""

    def __init__(self, progress: Progress, steps: int, trials: int, most_deaths: int) -> None:
        """``steps`` are a whole trial's; one that Tune gave up ``most_deaths`` times may still be proposed again."""
        self.progress, self.steps, self.trials, self.most_deaths = progress, steps, trials, most_deaths
        self.deaths = Counter[str]()
        self.curves: dict[str, list[Mapping[str, float]]] = {}
        self.last: dict[str, TrialResult] = {}
        self.failed: dict[str, str] = {}  # why
        self.over: set[str] = set()
        self.show()

    def begin(self, name: str) -> None:
        """A trial is there."""
        self.curves[name] = []

    def on_trial_result(self, *, result: TrialResult, **_: Any) -> None:  # type: ignore[override]
        self.take(result)
        self.show()

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        self.over.add(trial.config["job"].name)
        self.show()

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        """Tune gave it up. One whose process died may have been lost before it ran, and is proposed again."""
        name, error = trial.config["job"].name, trial.get_error() or trial.get_pickled_error()
        self.deaths[name] += 1
        if isinstance(error, RayTaskError) or self.deaths[name] > self.most_deaths:
            self.fail(name, _brief(error))
            self.on_trial_complete(trial=trial)

    def take(self, result: TrialResult) -> None:
        """Note a result; one that another process gave before it died comes twice, and changes nothing."""
        name, before = result["name"], self.last.get(result["name"])
        if result["failed"] is not None:
            self.fail(name, result["failed"])
        if before is None or before["pid"] != result["pid"]:
            for fault in result["faults"]:
                self._say(f"{name}: {fault}")
            if result["began_at"]:
                self._say(f"{name}: going on from step {result['began_at']}")
        if before is None or result["steps"] > before["steps"]:
            self.curves.setdefault(name, []).extend(result["curve"])
            self.last[name] = result

    def fail(self, name: str, reason: str) -> None:
        """Record that a trial cannot go on."""
        self.failed[name] = reason
        self._say(f"{name} failed: {reason}")

    def show(self) -> None:
        names = [name for name in self.curves if name != CONTROL]
        reached = {name: int(self.last[name]["steps"]) if name in self.last else 0 for name in names}
        sound = [result for result in self.last.values() if result["failed"] is None]
        best = min(sound, key=lambda result: float(result["validation_loss"]), default=None)
        note = f"best {best['validation_loss']:.3f} ({best['name']})" if best else "starting trials"
        done = sum(self.steps if name in self.over else reached[name] for name in names)
        self.progress(TaskProgress("sweep", done, self.steps * self.trials, note))

    def finished(self) -> dict[str, TrialResult]:
        """The last results of those that ran every step, by name."""
        return {n: r for n, r in self.last.items() if r["steps"] == self.steps and n not in self.failed}

    def winner(self) -> TrialResult | None:
        """The best of those that ran every step, if any did."""
        return min(self.finished().values(), key=lambda result: float(result["validation_loss"]), default=None)

    def trial(self, job: TrialJob) -> dict[str, Any]:
        """A job's entry in trials.json; what was never measured is null."""
        result, failed = self.last.get(job.name, {"steps": 0}), self.failed.get(job.name)
        ended = "finished" if result["steps"] == job.settings.steps else "stopped"
        loss = result.get("validation_loss", math.inf)
        about = {
            "name": job.name,
            "student": job.student.name,
            "values": result.get("values") or current_values(job.settings, job.student),
            "temperature": job.student.temperature,
            "teacher_weight": job.student.teacher_weight if job.distilled else 0.0,
            "validation_loss": loss if math.isfinite(loss) else None,
            "status": "failed" if failed else ended,
            "reason": failed,
        }
        return {name: about[name] if name in about else result.get(name) for name in TRIAL}

    def _say(self, line: str) -> None:
        self.progress(Notice(line))

    def write(self, folder: Path) -> None:
        """A file of JSON lines for each curve."""
        folder.mkdir()
        for name, rows in self.curves.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _brief(error: BaseException | None) -> str:
    """The last line of what Ray wrapped around an error."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return (str(error or "").strip() or "its process died again and again").splitlines()[-1]
