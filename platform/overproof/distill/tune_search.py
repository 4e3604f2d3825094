"""Ray Tune's view of the search: its trials come from a study, and the recipe's schedulers are Tune's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from overproof.config import Asha, Hyperband, Median, NoStop, Pbt, Space, Tune
from overproof.config.search import Domain, LogUniform, TrialValues, Uniform, current_values
from overproof.distill.optuna_study import OptunaStudy
from overproof.distill.trial_job import TrialJob

STEPS, LOSS = "steps", "validation_loss"
COMPARED: dict[str, Any] = {"time_attr": STEPS, "metric": LOSS, "mode": "min"}
RESAMPLED, FACTOR = 0.25, 1.25  # of population-based training: chance of a new draw, size of a move


class OptunaSearcher(Searcher):
    """Gives Tune a job for each suggestion of a study, and tells the study what came of it.

    Tune gives a trial up whose process dies before the trial runs in it; unless ``given_up``, it is proposed again.
    """

    def __init__(
        self, study: OptunaStudy, begin: Callable[[TrialValues], TrialJob], given_up: Callable[[str], bool]
    ) -> None:
        """``begin`` makes the next trial's job; ``given_up`` is asked by name."""
        super().__init__(metric=LOSS, mode="min")
        self.study, self.begin, self.given_up = study, begin, given_up
        self.open: dict[str, tuple[str, TrialJob]] = {}  # by Tune's id: the study's key, and the job
        self.lost: list[tuple[str, TrialJob]] = []

    def suggest(self, trial_id: str) -> Any:
        """A job; nothing for now, while one that is under way may yet be lost; or that there are no more."""
        while self.lost:
            key, job = self.lost.pop()
            if not self.given_up(job.name):
                return self._propose(trial_id, key, job)
            self.study.tell(key, None)
        values = self.study.ask(trial_id)
        if values is None:
            return None if self.open else Searcher.FINISHED
        return self._propose(trial_id, trial_id, self.begin(values))

    def _propose(self, trial_id: str, key: str, job: TrialJob) -> dict[str, Any]:
        self.open[trial_id] = key, job
        return {"job": job}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        key, job = self.open.pop(trial_id)
        if error:
            self.lost.append((key, job))
            return
        self.study.tell(key, result if result and result["failed"] is None else None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal of the sweep remembers what was suggested."""
        Path(checkpoint_path).touch()


class PopulationScheduler(PopulationBasedTraining):
    """Ray's, with the recipe's space: a trial keeps its own job, and values stay within their domains."""

    def __init__(self, settings: Pbt, space: Space, seed: int) -> None:
        super().__init__(
            **COMPARED,
            perturbation_interval=settings.interval_steps,
            quantile_fraction=settings.quantile,
            custom_explore_fn=dict,  # none of Ray's is used
            log_config=False,
        )
        self.space, self.random = space, np.random.default_rng(seed)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        best: TrialJob = trial_to_clone.config["job"]
        values = current_values(best.settings, best.student)
        searched = {name: values[name] for name in self.space.domains}
        return {"job": trial.config["job"].changed(perturbed(searched, self.space, self.random))}, {}


def perturbed(values: TrialValues, space: Space, random: np.random.Generator) -> TrialValues:
    """Each value drawn anew, or moved a little: by a fifth in a range, to a neighbour in a list."""
    return {name: _moved(space.domains[name], value, random) for name, value in values.items()}


def _moved(domain: Domain, value: Any, random: np.random.Generator) -> Any:
    anew = random.random() < RESAMPLED
    if isinstance(domain, Uniform | LogUniform):
        if not anew:
            return min(max(value * random.choice([1 / FACTOR, FACTOR]), domain.low), domain.high)
        if isinstance(domain, Uniform):
            return random.uniform(domain.low, domain.high)
        return math.exp(random.uniform(math.log(domain.low), math.log(domain.high)))
    places = len(domain.values)
    place = random.integers(places) if anew else domain.values.index(value) + random.choice([-1, 1])
    return domain.values[min(max(int(place), 0), places - 1)]


def tune_scheduler(search: Tune, steps: int, seed: int) -> TrialScheduler:
    """Who stops trials; ``steps`` are a whole trial's."""
    settings = search.scheduler
    match settings:
        case NoStop():
            return FIFOScheduler()  # type: ignore[no-untyped-call]
        case Asha() | Hyperband():
            return ASHAScheduler(
                **COMPARED,
                max_t=steps,
                grace_period=min(settings.grace_steps, steps),
                reduction_factor=settings.reduction_factor,
                brackets=settings.brackets if isinstance(settings, Hyperband) else 1,
            )
        case Median(grace_steps=grace, least_trials=least):
            return MedianStoppingRule(**COMPARED, grace_period=grace, min_samples_required=least)
        case Pbt():
            return PopulationScheduler(settings, search.space, seed)
        case _:
            assert_never(settings)
