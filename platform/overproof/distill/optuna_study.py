"""What trial comes next: values suggested by Optuna, which learns from what came of the earlier ones. No Ray."""

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

SEEDS_APART = 1_000_003
STUDENT = "student"  # the value that names the base of a trial
TRIES = 4  # of a sampler that suggests what was asked for before, until any other values are taken


class OptunaStudy:
    """Suggests values for one trial after another, none of them twice. The caller knows a trial by a key of its own.

    Grid and random search and the tree-structured Parzen estimator, for one objective or several. Listed numbers lie
    in a row for it, and are no mere categories.
    """

    def __init__(self, tune: Tune, sweep: Sweep, seed: int, before: Sequence[TrialValues] = ()) -> None:
        """``before`` are the trials of an attempt that was killed: they are asked for first, in their order."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.tune, self.seed = tune, seed
        self.left = tune.trials(sweep)
        self.ordered = {n: tuple(sorted(d.values)) for n, d in tune.space.domains.items() if _in_a_row(d)}
        names = tuple(student.name for student in sweep.students)
        self.spaces = {STUDENT: CategoricalDistribution(names)} | {
            name: _distribution(domain) for name, domain in tune.space.domains.items()
        }
        self.fixed = iter(before)
        if isinstance(tune.search, Grid):
            self.fixed = iter([*before, *_without(before, tune.grid(sweep))])
        self.study = optuna.create_study(directions=["minimize"] * len(tune.objectives))
        self.asked = list[TrialValues]()
        self.trials: dict[str, optuna.Trial] = {}

    def ask(self, key: str) -> TrialValues | None:
        """Values of the next trial; None after the last."""
        if self.left == 0:
            return None
        self.left -= 1
        known = next(self.fixed, None)
        if known is not None:
            places = {name: row.index(known[name]) for name, row in self.ordered.items()}
            self.study.enqueue_trial({**known, **places})
        # Draws are a function of the trial's number: a search that goes on draws what it would have drawn.
        seed = (self.seed * SEEDS_APART + len(self.asked)) % 2**32
        self.study.sampler = _sampler(self.tune, seed)
        for rejected in count(1):
            trial = self.study.ask(self.spaces)
            values = trial.params | {name: row[trial.params[name]] for name, row in self.ordered.items()}
            if known is not None or values not in self.asked:
                break
            self.study.tell(trial, state=TrialState.FAIL)
            if rejected == TRIES:
                self.study.sampler = RandomSampler(seed)
        self.asked.append(values)
        self.trials[key] = trial
        return dict(values)

    def tell(self, key: str, result: Mapping[str, Any] | None) -> None:
        """A trial is over, with its last result if it gave a usable one.

        One that was stopped counts as if it had ended there: it is among the worse, or it would not have been stopped.
        """
        trial = self.trials.pop(key)
        values = [float(result[name]) for name in self.tune.objectives] if result else []
        if values and all(map(math.isfinite, values)):
            self.study.tell(trial, values)
        else:
            self.study.tell(trial, state=TrialState.FAIL)


def _in_a_row(domain: Domain) -> TypeGuard[Choice[float]]:
    return isinstance(domain, Choice) and all(isinstance(value, int | float) for value in domain.values)


def _distribution(domain: Domain) -> BaseDistribution:
    if _in_a_row(domain):
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


def _without(before: Sequence[TrialValues], every: Iterator[TrialValues]) -> Iterator[TrialValues]:
    done = list(before)
    return (values for values in every if values not in done)
