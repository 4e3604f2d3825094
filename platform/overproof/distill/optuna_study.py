"""Which values the next trial has: Optuna suggests them, and learns from the results of earlier ones. No Ray."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, TypeGuard

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from overproof.config import Sweep, Tune
from overproof.config.search import Choice, Domain, Grid, Integers, LogUniform, Tpe, TrialValues

SEED_STRIDE = 1_000_003
STUDENT = "student"  # the value that names the student a trial starts from
MAX_REJECTED = 4  # suggestions that were there before; then values are drawn at random
REMEMBERED, BEST = 1000, 50  # results that a search goes by, and how many of them are there for being the best


class OptunaStudy:
    """Suggests values for one trial after another, none of them twice. The caller knows a trial by a key of its own.

    Grid and random search and the tree-structured Parzen estimator, for one objective or several. Listed numbers are
    ordinal, not mere categories.

    Once there are twice ``REMEMBERED`` results, all but the best and the latest are forgotten: a suggestion takes no
    longer however many there were. The estimator holds its 25 best results against all others, of which it counts older
    ones less, so that this takes from it what it counted least.
    """

    def __init__(self, tune: Tune, sweep: Sweep, seed: int, previous: Sequence[TrialValues] = ()) -> None:
        """``previous`` are the trials of an attempt that was killed: they are suggested first, in their order."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.tune, self.seed = tune, seed
        self.remaining = tune.trials(sweep)
        # Optuna is told of listed values by their places.
        self.listed = {n: _in_order(d) for n, d in tune.space.domains.items() if isinstance(d, Choice)}
        names = tuple(student.name for student in sweep.students)
        self.spaces = {STUDENT: CategoricalDistribution(names)} | {
            name: _distribution(domain) for name, domain in tune.space.domains.items()
        }
        self.queued = iter(previous)
        if isinstance(tune.search, Grid):
            self.queued = iter([*previous, *_excluding(previous, tune.grid(sweep))])
        self.study = self._new_study()
        self.remembered = max(REMEMBERED, tune.search.startup_trials if isinstance(tune.search, Tpe) else 0)
        self.suggested = dict[str, None]()
        self.trials: dict[str, optuna.Trial] = {}

    def ask(self, key: str) -> TrialValues | None:
        """Values of the next trial; None after the last."""
        if self.remaining == 0:
            return None
        self.remaining -= 1
        queued = next(self.queued, None)
        self._forget()
        if queued is not None:
            places = {name: list(map(_key, row)).index(_key(queued[name])) for name, row in self.listed.items()}
            self.study.enqueue_trial({**queued, **places})
        # Draws are a function of the trial's number: a search that goes on draws what it would have drawn.
        seed = (self.seed * SEED_STRIDE + len(self.suggested)) % 2**32
        self.study.sampler = self._sampler(seed)
        for rejected in count(1):
            trial = self.study.ask(self.spaces)
            values = trial.params | {name: row[trial.params[name]] for name, row in self.listed.items()}
            if queued is not None or _key(values) not in self.suggested:
                break
            self.study.tell(trial, state=TrialState.FAIL)
            if rejected == MAX_REJECTED:
                self.study.sampler = RandomSampler(seed)
        self.suggested[_key(values)] = None
        self.trials[key] = trial
        return dict(values)

    def tell(self, key: str, result: Mapping[str, Any] | None) -> None:
        """A trial has ended, with its last result if it gave a usable one.

        One that was stopped counts with the result it had: it is among the worse, or it would not have been stopped.
        """
        trial = self.trials.pop(key)
        values = [float(result[name]) for name in self.tune.objectives] if result else []
        if values and all(map(math.isfinite, values)):
            self.study.tell(trial, values)
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    def _sampler(self, seed: int) -> BaseSampler:
        search = self.tune.search
        if not isinstance(search, Tpe):
            return RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # Several trials run at a time: constant_liar keeps them from being alike.
            return _SpaceTpeSampler(self.spaces, seed=seed, multivariate=True, constant_liar=True,
                                    n_startup_trials=search.startup_trials)  # fmt: skip

    def _new_study(self) -> optuna.Study:
        return optuna.create_study(directions=["minimize"] * len(self.tune.objectives))

    def _forget(self) -> None:
        """Go on with a study of fewer trials, once there are too many."""
        results = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(results) < 2 * self.remembered:
            return
        best = set(_least_dominated(np.array([trial.values for trial in results]))[:BEST])
        latest = len(results) - (self.remembered - BEST)
        before, self.study = self.trials, self._new_study()
        self.study.add_trials([trial for i, trial in enumerate(results) if i in best or i >= latest])
        for key, trial in before.items():  # those that run
            self.study.enqueue_trial(trial.params)
            self.trials[key] = self.study.ask(self.spaces)


class _SpaceTpeSampler(TPESampler):
    """Is told the space, which Optuna's would find out from every trial, at more than half of its time."""

    def __init__(self, spaces: Mapping[str, BaseDistribution], **options: Any) -> None:
        super().__init__(**options)
        self.spaces = {name: space for name, space in sorted(spaces.items()) if not space.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        del study, trial
        return dict(self.spaces)


def _least_dominated(values: np.ndarray) -> list[int]:
    """Places of the rows ``[trial, objective]``, those first to which the fewest others are nowhere worse, and better
    somewhere. Of one objective that is their order.
    """
    first, second = values[:, None], values[None]
    dominates = (first <= second).all(2) & (first < second).any(2)
    return [int(place) for place in np.argsort(dominates.sum(0), kind="stable")]


def _key(values: Any) -> str:
    """The same of what a journal gives back, where tuples are lists."""
    return json.dumps(values, sort_keys=True)


def _is_ordinal(domain: Domain) -> TypeGuard[Choice[float]]:
    return isinstance(domain, Choice) and all(isinstance(value, int | float) for value in domain.values)


def _in_order(domain: Choice[Any]) -> tuple[Any, ...]:
    return tuple(sorted(domain.values)) if _is_ordinal(domain) else domain.values


def _distribution(domain: Domain) -> BaseDistribution:
    if _is_ordinal(domain):
        return IntDistribution(0, len(domain.values) - 1)
    if isinstance(domain, Choice):
        return CategoricalDistribution(range(len(domain.values)))
    if isinstance(domain, Integers):
        return IntDistribution(domain.low, domain.high, step=domain.step)
    return FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))


def _excluding(previous: Sequence[TrialValues], every: Iterator[TrialValues]) -> Iterator[TrialValues]:
    done = set(map(_key, previous))
    return (values for values in every if _key(values) not in done)
