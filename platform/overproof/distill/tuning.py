"""Ray Tune's view of the search: its trials come from a study, and the recipe's schedulers are Tune's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_never

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from overproof.distill.job import Job
from overproof.distill.search import Study
from overproof.recipe import Asha, Hyperband, Median, NoStop
from overproof.recipe.search import Scheduler, Values

STEPS, LOSS = "steps", "validation_loss"


class Trials(Searcher):
    """Gives Tune a job for each suggestion of a study, and tells the study what came of it."""

    def __init__(self, study: Study, begin: Callable[[Values], Job], steps: int) -> None:
        """``begin`` makes the next trial's job; ``steps`` are a whole trial's."""
        super().__init__(metric=LOSS, mode="min")
        self.study, self.begin, self.steps = study, begin, steps

    def suggest(self, trial_id: str) -> Any:
        values = self.study.ask(trial_id)
        return Searcher.FINISHED if values is None else {"job": self.begin(values)}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if result["failed"] is None:
            self.study.report(trial_id, int(result[STEPS]), result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        usable = result if result and not error and result["failed"] is None else None
        self.study.tell(trial_id, usable, finished=usable is not None and usable[STEPS] == self.steps)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal of the sweep remembers what was suggested."""
        Path(checkpoint_path).touch()


def scheduler(settings: Scheduler, steps: int) -> TrialScheduler:
    """Who stops trials; ``steps`` are a whole trial's."""
    compared: dict[str, Any] = {"time_attr": STEPS, "metric": LOSS, "mode": "min"}
    match settings:
        case NoStop():
            return FIFOScheduler()  # type: ignore[no-untyped-call]
        case Asha() | Hyperband():
            return ASHAScheduler(
                **compared,
                max_t=steps,
                grace_period=min(settings.grace_steps, steps),
                reduction_factor=settings.reduction_factor,
                brackets=settings.brackets if isinstance(settings, Hyperband) else 1,
            )
        case Median(grace_steps=grace, least_trials=least):
            return MedianStoppingRule(**compared, grace_period=grace, min_samples_required=least)
        case _:
            assert_never(settings)
