"""What trial comes next: values suggested by Optuna, which learns from what came of the earlier ones. No Ray."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from overproof.recipe import Sweep, Tune
from overproof.recipe.search import Choice, Domain, Grid, Integers, LogUniform, Tpe, Values

SEEDS_APART = 1_000_003
STUDENT = "student"  # the value that names the base of a trial


class Study:
    """Suggests values for one trial after another. The caller knows a trial by a key of its own.

    Grid and random search and the tree-structured Parzen estimator, for one objective or several.
    """

    def __init__(self, tune: Tune, sweep: Sweep, seed: int, before: Sequence[Values] = ()) -> None:
        """``before`` are the trials of an attempt that was killed: they are asked for first, in their order."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.tune, self.seed, self.objectives = tune, seed, tune.objectives
        self.left = tune.trials(sweep)
        self.spaces = distributions(tune, sweep)
        self.fixed = iter(before)
        if isinstance(tune.search, Grid):
            self.fixed = iter([*before, *_without(before, tune.grid(sweep))])
        self.study = optuna.create_study(directions=["minimize"] * len(self.objectives))
        self.trials: dict[str, optuna.Trial] = {}
        self.reached: dict[str, int] = {}  # steps

    def ask(self, key: str) -> Values | None:
        """Values of the next trial; None after the last."""
        if self.left == 0:
            return None
        self.left -= 1
        known = next(self.fixed, None)
        if known is not None:
            self.study.enqueue_trial(known)
        # Draws are a function of the trial's number: a search that goes on draws what it would have drawn.
        self.study.sampler = _sampler(self.tune, (self.seed * SEEDS_APART + len(self.study.trials)) % 2**32)
        trial = self.trials[key] = self.study.ask(self.spaces)
        self.reached[key] = 0
        return dict(trial.params)

    def report(self, key: str, steps: int, result: Mapping[str, Any]) -> None:
        """A trial has come so far."""
        # Optuna has no part results for several; a trial whose process was killed tells again what it did before.
        if len(self.objectives) == 1 and steps > self.reached[key]:
            self.trials[key].report(float(result[self.objectives[0]]), steps)
            self.reached[key] = steps

    def tell(self, key: str, result: Mapping[str, Any] | None, finished: bool) -> None:
        """A trial is over: with its last result, if it gave a usable one, and whether it ran every step."""
        trial = self.trials.pop(key)
        values = [float(result[name]) for name in self.objectives] if result else []
        if not values or not all(map(math.isfinite, values)):
            self.study.tell(trial, state=TrialState.FAIL)
        elif finished or len(values) > 1:
            self.study.tell(trial, values)
        else:  # what it had reached stands among its reports
            self.study.tell(trial, state=TrialState.PRUNED)


def distributions(tune: Tune, sweep: Sweep) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms; the students are one of its choices."""
    names = tuple(student.name for student in sweep.students)
    return {STUDENT: CategoricalDistribution(names)} | {
        name: _distribution(domain) for name, domain in tune.space.domains.items()
    }


def _distribution(domain: Domain) -> BaseDistribution:
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


def _without(before: Sequence[Values], every: Iterator[Values]) -> Iterator[Values]:
    done = list(before)
    return (values for values in every if values not in done)
