"""Searches replayed on tables of trainings that were really run: event by event, with several workers, without Ray."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from overproof.config import Random, Space, Sweep, Tpe, Tune
from overproof.config.search import Choice
from overproof.distill.optuna_study import OptunaStudy

Values = Mapping[str, Any]
ENDLESS = 100_000  # trials
optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Table:
    """Validation losses of every combination of the axes' values, at each of ``steps``."""

    axes: dict[str, list[Any]]
    steps: list[int]
    curves: dict[str, list[float]]  # by places on the axes, as "0-2-1"
    sweep: Sweep

    def curve(self, values: Values) -> list[float]:
        return self.curves["-".join(str(axis.index(values[name])) for name, axis in self.axes.items())]

    def target(self, best: float) -> float:
        """The loss after every step that this share of the grid reaches."""
        last = sorted(curve[-1] for curve in self.curves.values())
        return last[max(0, math.ceil(best * len(last)) - 1)]

    def tune(self, search: Random | Tpe) -> Tune:
        space = {name: Choice[Any](values=tuple(axis)) for name, axis in self.axes.items()}
        return Tune(space=Space.model_validate(space), search=search)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(axis) for name, axis in self.axes.items()}


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
    def ask(self, key: int) -> Values | None: ...

    def report(self, key: int, step: int, loss: float) -> None: ...

    def tell(self, key: int, loss: float, finished: bool, /) -> None: ...


class Product:
    """The product's own study: random, or its tree-structured Parzen estimator."""

    def __init__(self, table: Table, seed: int, search: Random | Tpe) -> None:
        self.study = OptunaStudy(table.tune(search), table.sweep, seed)

    def ask(self, key: int) -> Values | None:
        return self.study.ask(str(key))

    def report(self, key: int, step: int, loss: float) -> None: ...

    def tell(self, key: int, loss: float, _finished: bool, /) -> None:
        self.study.tell(str(key), {"validation_loss": loss})


class Optuna:
    """Its own tree-structured Parzen estimator with its own settings, and stopped trials told as such."""

    def __init__(self, table: Table, seed: int) -> None:
        self.spaces = table.distributions
        self.study, self.trials = optuna.create_study(sampler=TPESampler(seed=seed)), dict[int, optuna.Trial]()

    def ask(self, key: int) -> Values:
        self.trials[key] = self.study.ask(self.spaces)
        return self.trials[key].params

    def report(self, key: int, step: int, loss: float) -> None:
        self.trials[key].report(loss, step)

    def tell(self, key: int, loss: float, finished: bool, /) -> None:
        trial = self.trials.pop(key)
        if not math.isfinite(loss):
            self.study.tell(trial, state=TrialState.FAIL)
        elif finished:
            self.study.tell(trial, loss)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)


SEARCHERS: dict[str, Callable[[Table, int], Searcher]] = {
    "random": lambda table, seed: Product(table, seed, Random(trials=ENDLESS)),
    "Optuna's TPE as it is": Optuna,
    "product's TPE": lambda table, seed: Product(table, seed, Tpe(trials=ENDLESS)),
}


def replay(table: Table, searcher: Searcher, asha: Asha | None, workers: int, target: float, most: int) -> float:
    """Training steps in all until a trial's validation loss is at the target; infinity if not within ``most``."""
    spent, keys = 0, count()
    curves: dict[int, Sequence[float]] = {}
    events: list[tuple[int, int, int]] = []  # when, which trial, at which of the steps

    def begin(now: int) -> None:
        key = next(keys)
        values = searcher.ask(key)
        if values is not None:
            curves[key] = table.curve(values)
            heapq.heappush(events, (now + table.steps[0], key, 0))

    for _ in range(workers):
        begin(0)
    while spent < most and events:
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
    return math.inf
