"""Searches replayed on tables of trainings that were really run: event by event, with several workers, without Ray.

A table holds the whole validation curve of every point of a grid. A searcher suggests values from the ranges around the
grid, and its trial has the curve of the nearest point.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from overproof.distill.search import Study, distributions
from overproof.recipe import Random, Space, Sweep, Tpe, Tune
from overproof.recipe.search import Domain, LogUniform

Values = Mapping[str, Any]
ENDLESS = 100_000  # trials
optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Table:
    """Validation losses of every combination of the axes' values, at each of ``steps``."""

    axes: dict[str, list[Any]]
    steps: list[int]
    curves: dict[str, list[float]]  # by places on the axes, as "0-2-1"
    domains: dict[str, Domain]
    sweep: Sweep

    def curve(self, values: Values) -> list[float]:
        """Of the nearest point."""
        return self.curves["-".join(str(self._place(name, values[name])) for name in self.axes)]

    def _place(self, name: str, value: Any) -> int:
        if value in self.axes[name]:
            return self.axes[name].index(value)
        scale = math.log if isinstance(self.domains[name], LogUniform) else float
        return min(range(len(self.axes[name])), key=lambda place: abs(scale(self.axes[name][place]) - scale(value)))

    def target(self, best: float) -> float:
        """The loss after every step that this share of the grid reaches."""
        last = sorted(curve[-1] for curve in self.curves.values())
        return last[max(0, math.ceil(best * len(last)) - 1)]

    def tune(self, search: Random | Tpe) -> Tune:
        return Tune(space=Space(**self.domains), search=search)  # type: ignore[arg-type]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        found = distributions(self.tune(Random(trials=1)), self.sweep)
        return {name: each for name, each in found.items() if name in self.axes}


@dataclass
class Asha:
    """Ray Tune's rule: at a rung, a trial worse than the best 1 / eta of those before it stops."""

    grace: int
    eta: int
    most: int
    seen: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        step = self.grace
        while step < self.most:
            self.seen[step] = []
            step *= self.eta

    def stops(self, step: int, loss: float) -> bool:
        before = self.seen.get(step)
        if before is None:
            return False
        worse = bool(before) and loss > np.percentile(before, 100 / self.eta)
        before.append(loss)
        return worse


class Searcher(Protocol):
    def ask(self, key: int) -> Values: ...

    def report(self, key: int, step: int, loss: float) -> None: ...

    def tell(self, key: int, loss: float, finished: bool) -> None: ...


class Product:
    """The product's own study: random, or its tree-structured Parzen estimator."""

    def __init__(self, table: Table, seed: int, search: Random | Tpe) -> None:
        self.study = Study(table.tune(search), table.sweep, seed)

    def ask(self, key: int) -> Values:
        values = self.study.ask(str(key))
        assert values is not None
        return values

    def report(self, key: int, step: int, loss: float) -> None:
        self.study.report(str(key), step, {"validation_loss": loss})

    def tell(self, key: int, loss: float, finished: bool) -> None:
        self.study.tell(str(key), {"validation_loss": loss}, finished)


class Optuna:
    """One of its samplers; a stopped trial is told as stopped, or with its last loss as if it had ended there."""

    def __init__(self, table: Table, sampler: BaseSampler, last_is_final: bool = False) -> None:
        self.spaces, self.last_is_final = table.distributions, last_is_final
        self.study, self.trials = optuna.create_study(sampler=sampler), dict[int, optuna.Trial]()

    def ask(self, key: int) -> Values:
        self.trials[key] = self.study.ask(self.spaces)
        return self.trials[key].params

    def report(self, key: int, step: int, loss: float) -> None:
        self.trials[key].report(loss, step)

    def tell(self, key: int, loss: float, finished: bool) -> None:
        trial = self.trials.pop(key)
        if not math.isfinite(loss):
            self.study.tell(trial, state=TrialState.FAIL)
        elif finished or self.last_is_final:
            self.study.tell(trial, loss)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)


class Rungs:
    """TPE over the losses at one step: the last that enough trials have reached, ended or not (arXiv 1807.01774)."""

    def __init__(self, table: Table, seed: int, enough: int, **options: Any) -> None:
        self.spaces, self.enough, self.options, self.seeds = table.distributions, enough, options, count(seed * 10_000)
        self.values: dict[int, Values] = {}
        self.losses: dict[int, dict[int, float]] = {}  # step -> trial -> loss

    def ask(self, key: int) -> Values:
        ready = [step for step, losses in self.losses.items() if len(losses) >= self.enough]
        seed = next(self.seeds)
        sampler: BaseSampler = RandomSampler(seed)
        known: dict[int, float] = {}
        if ready:
            known = self.losses[max(ready)]
            sampler = TPESampler(seed=seed, multivariate=True, n_startup_trials=0, **self.options)
        study = optuna.create_study(sampler=sampler)
        worst = max(known.values(), default=0.0)
        for trial in self.values if ready else ():  # of those under way nothing good is assumed
            loss = known.get(trial, worst)
            study.add_trial(create_trial(params=dict(self.values[trial]), distributions=self.spaces, value=loss))
        self.values[key] = study.ask(self.spaces).params
        return self.values[key]

    def report(self, key: int, step: int, loss: float) -> None:
        if math.isfinite(loss):
            self.losses.setdefault(step, {})[key] = loss

    def tell(self, key: int, loss: float, finished: bool) -> None: ...


def make(name: str, table: Table, seed: int) -> Searcher:
    """A searcher by the name that the results give it."""
    parzen = partial(TPESampler, seed=seed)
    makers = {
        "random": lambda: Product(table, seed, Random(trials=ENDLESS)),
        "product's TPE": lambda: Product(table, seed, Tpe(trials=ENDLESS)),
        "product's TPE, 4 at random first": lambda: Product(table, seed, Tpe(trials=ENDLESS, startup_trials=4)),
        "Optuna's TPE as it is": lambda: Optuna(table, parzen()),
        "TPE, stopped told their last loss": lambda: Optuna(
            table, parzen(multivariate=True, constant_liar=True, n_startup_trials=8), last_is_final=True
        ),
        "TPE at a rung, from 8": lambda: Rungs(table, seed, 8),
        "TPE at a rung, from 4": lambda: Rungs(table, seed, 4),
        "TPE at a rung, from 8, best quarter": lambda: Rungs(table, seed, 8, gamma=lambda n: math.ceil(n / 4)),
        "GP": lambda: Optuna(table, GPSampler(seed=seed, n_startup_trials=8), last_is_final=True),
    }
    return makers[name]()  # type: ignore[no-any-return]


def replay(table: Table, searcher: Searcher, asha: Asha | None, workers: int, target: float, most: int) -> int:
    """Training steps in all until a trial's validation loss is at the target; ``most`` if that takes longer."""
    spent, keys = 0, count()
    curves: dict[int, Sequence[float]] = {}
    events: list[tuple[int, int, int]] = []  # when, which trial, at which of the steps

    def begin(now: int) -> None:
        key = next(keys)
        curves[key] = table.curve(searcher.ask(key))
        heapq.heappush(events, (now + table.steps[0], key, 0))

    for _ in range(workers):
        begin(0)
    while spent < most:
        now, key, place = heapq.heappop(events)
        step, loss = table.steps[place], curves[key][place]
        spent += step - (table.steps[place - 1] if place else 0)
        if loss <= target:
            return spent
        last = place + 1 == len(table.steps)
        searcher.report(key, step, loss)
        if last or not math.isfinite(loss) or (asha and asha.stops(step, loss)):
            searcher.tell(key, loss, last)
            begin(now)
        else:
            heapq.heappush(events, (now + table.steps[place + 1] - step, key, place + 1))
    return most
