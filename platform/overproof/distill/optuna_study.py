"""Which values the next trial has: Optuna suggests them, and learns from the results of earlier ones. No Ray."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, TypeGuard

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from overproof.config import Sweep, Tune
from overproof.config.search import Choice, Domain, Grid, Integers, LogUniform, Tpe, TrialValues

SEED_STRIDE = 1_000_003
STUDENT = "student"  # the value that names the student a trial starts from
MAX_REJECTED = 4  # suggestions that were there before; then values are drawn at random


class OptunaStudy:
    """Suggests values for one trial after another, none of them twice. The caller knows a trial by a key of its own.

    Grid and random search and the tree-structured Parzen estimator, for one objective or several. Listed numbers are
    ordinal, not mere categories.
    """

    def __init__(self, tune: Tune, sweep: Sweep, seed: int, previous: Sequence[TrialValues] = ()) -> None:
        """``previous`` are the trials of an attempt that was killed: they are suggested first, in their order."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.tune, self.seed = tune, seed
        self.remaining = tune.trials(sweep)
        self.ordinals = {n: tuple(sorted(d.values)) for n, d in tune.space.domains.items() if _is_ordinal(d)}
        names = tuple(student.name for student in sweep.students)
        self.spaces = {STUDENT: CategoricalDistribution(names)} | {
            name: _distribution(domain) for name, domain in tune.space.domains.items()
        }
        self.queued = iter(previous)
        if isinstance(tune.search, Grid):
            self.queued = iter([*previous, *_excluding(previous, tune.grid(sweep))])
        self.study = optuna.create_study(directions=["minimize"] * len(tune.objectives))
        self.suggested = list[TrialValues]()
        self.trials: dict[str, optuna.Trial] = {}

    def ask(self, key: str) -> TrialValues | None:
        """Values of the next trial; None after the last."""
        if self.remaining == 0:
            return None
        self.remaining -= 1
        queued = next(self.queued, None)
        if queued is not None:
            places = {name: row.index(queued[name]) for name, row in self.ordinals.items()}
            self.study.enqueue_trial({**queued, **places})
        # Draws are a function of the trial's number: a search that goes on draws what it would have drawn.
        seed = (self.seed * SEED_STRIDE + len(self.suggested)) % 2**32
        self.study.sampler = _sampler(self.tune, seed)
        for rejected in count(1):
            trial = self.study.ask(self.spaces)
            values = trial.params | {name: row[trial.params[name]] for name, row in self.ordinals.items()}
            if queued is not None or values not in self.suggested:
                break
            self.study.tell(trial, state=TrialState.FAIL)
            if rejected == MAX_REJECTED:
                self.study.sampler = RandomSampler(seed)
        self.suggested.append(values)
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


def _is_ordinal(domain: Domain) -> TypeGuard[Choice[float]]:
    return isinstance(domain, Choice) and all(isinstance(value, int | float) for value in domain.values)


def _distribution(domain: Domain) -> BaseDistribution:
    if _is_ordinal(domain):
        return IntDistribution(0, len(domain.values) - 1)
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    if isinstance(domain, Integers):
        return IntDistribution(domain.low, domain.high, step=domain.step)
    return FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))


def _sampler(tune: Tune, seed: int) -> BaseSampler:
    if not isinstance(tune.search, Tpe):
        return RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # Several trials run at a time: constant_liar keeps them from being alike.
        return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=tune.search.startup_trials)


def _excluding(previous: Sequence[TrialValues], every: Iterator[TrialValues]) -> Iterator[TrialValues]:
    done = list(previous)
    return (values for values in every if values not in done)
