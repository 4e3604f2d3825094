"""Training steps that a search takes to a target fixed beforehand, against random search under the same stopping rule.

    .venv/bin/python benchmarks/search.py [--seeds 30] [--workers 2] [--searchers random "product's TPE"] [--anew]

Prints one Markdown table. Four tasks: each point of a grid was trained once, with its whole validation curve, into
benchmarks/results/search/TASK.json (about 30 minutes where they are missing, or with --anew); searches are replayed on
these curves, a few minutes. The target is the loss after every step that the best 1 % of the grid reach; a step counts
on whichever worker it is made. A cell is the median over the seeds, and behind it that over random search's; "never"
counts the searches that had tried every point, or made as many steps as the grid, without reaching it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measuring import HERE, machine, say, table
from replay import SEARCHERS, Asha, Table, replay
from students import Trial, digits, made, options, text, train

from overproof.config import Recipe
from overproof.errors import InputError

TABLES = HERE / "results" / "search"
PROCESSES, EVERY = 2, 10  # steps between validations


@dataclass(frozen=True)
class Task:
    """A grid, and what is trained at each of its points."""

    kind: str
    teaching: Any
    steps: int
    axes: dict[str, list[Any]]

    def recipe(self, given: argparse.Namespace) -> Recipe:
        base = (text if self.kind == "text" else digits)(argparse.Namespace(**{**vars(given), "steps": self.steps}))
        changes = {"validate_every": EVERY, "validation_rows": 32 if self.kind == "text" else 256}
        return base.model_copy(update={"sweep": base.sweep.model_copy(update=changes)})


TASKS = {
    "digits, distilled": Task("digits", "cached", 100, {
        "learning_rate": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "hidden_size": [16, 24, 32],
        "temperature": [1.0, 2.0, 4.0], "teacher_weight": [0.3, 0.6, 0.9], "schedule": ["cosine", "constant"],
    }),
    "digits, labels alone": Task("digits", "none", 80, {
        "learning_rate": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "hidden_size": [16, 24, 32], "layers": [1, 2],
        "batch_size": [16, 32, 64], "schedule": ["cosine", "constant"],
    }),
    "standard library, labels alone": Task("text", "none", 60, {
        "learning_rate": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "hidden_size": [32, 64], "layers": [1, 2],
        "batch_size": [4, 8, 16], "schedule": ["cosine", "constant"],
    }),
    "standard library, distilled": Task("text", "cached", 60, {
        "learning_rate": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "hidden_size": [32, 64], "layers": [1, 2],
        "temperature": [1.0, 2.0], "teacher_weight": [0.3, 0.6, 0.9],
    }),
}  # fmt: skip


def curve(trial: Trial) -> dict[int, float]:
    """Validation losses by step; none after a loss that is not finite."""
    try:
        found: dict[int, float] = train(trial)["curve"]
    except InputError:
        return {}
    return found


def tabulate(name: str, task: Task, given: argparse.Namespace, file: Path) -> None:
    """Train every point of a grid once; what a killed run has done stands in a file beside."""
    recipe = task.recipe(given)
    parents = made(recipe, "cache")
    places = list(product(*(range(len(values)) for values in task.axes.values())))
    every = [dict(zip(task.axes, values, strict=True)) for values in product(*task.axes.values())]
    if given.points:
        kept = range(0, len(every), math.ceil(len(every) / given.points))
        every = [every[index // kept.step * kept.step] for index in range(len(every))]  # a smoke test's: few, repeated
    trials = {json.dumps(values): Trial(recipe, parents, task.teaching, recipe.seed, "", values) for values in every}
    steps = list(range(EVERY, task.steps + 1, EVERY))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    curves = dict(json.loads(line) for line in part.read_text().splitlines()) if part.exists() else {}
    todo = {key: trial for key, trial in trials.items() if key not in curves}
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool, part.open("a") as out:
        for key, found in zip(todo, pool.map(curve, todo.values()), strict=True):
            curves[key] = [round(found.get(step, math.inf), 5) for step in steps]
            out.write(json.dumps([key, curves[key]]) + "\n")
            out.flush()
            if len(curves) % 10 == 0:
                say(f"{name}: {len(curves)} of {len(trials)} trained")
    named = {"-".join(map(str, place)): curves[json.dumps(v)] for place, v in zip(places, every, strict=True)}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(values)}" for key, values in named.items())
    head = json.dumps({"axes": task.axes, "steps": steps})
    file.write_text(f'{head[:-1]}, "curves": {{\n{lines}\n}}}}\n')
    part.unlink()


def searched(job: tuple[str, str, tuple[int, int] | None, int, int, float, Table]) -> float:
    _, searcher, stopping, seed, workers, best, curves = job
    asha = Asha(*stopping, most=curves.steps[-1]) if stopping else None
    most = len(curves.curves) * curves.steps[-1]
    return replay(curves, SEARCHERS[searcher](curves, seed), asha, workers, curves.target(best), most)


def main() -> None:
    parser = options(__doc__, seeds=30)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--searchers", nargs="+", choices=list(SEARCHERS), default=list(SEARCHERS))
    parser.add_argument("--etas", type=int, nargs="+", default=[2, 3, 4], help="reduction factors of ASHA; 0: none")
    parser.add_argument("--grace", type=int, default=20, help=f"steps before ASHA may stop, a multiple of {EVERY}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--best", type=float, default=0.01, help="share of the grid that reaches the target")
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--points", type=int, help="train this many of a grid, for a smoke test")
    parser.add_argument("--anew", action="store_true", help="train the grids again")
    given = parser.parse_args()
    tables = {}
    for name in given.tasks:
        file, task = given.tables / f"{name.replace(', ', '-').replace(' ', '-')}.json", TASKS[name]
        if given.anew or not file.exists():
            tabulate(name, task, given, file)
        content = json.loads(file.read_text())
        if content["axes"] != task.axes:
            raise SystemExit(f"{file}: another grid than this program's; train it again with --anew")
        tables[name] = Table(**content, sweep=task.recipe(given).sweep)
    stoppings = [(given.grace, eta) if eta else None for eta in given.etas]
    jobs = [
        (name, searcher, stopping, seed, given.workers, given.best, tables[name])
        for searcher in given.searchers for stopping in stoppings for name in tables for seed in range(given.seeds)
    ]  # fmt: skip
    spent: dict[tuple[str, Any, str], list[float]] = {}
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for job, steps in zip(jobs, pool.map(searched, jobs, chunksize=given.seeds), strict=True):
            spent.setdefault((job[1], job[2], job[0]), []).append(steps)
            if job[3] == given.seeds - 1:
                say(f"{job[1]}, {job[2]}, {job[0]}: {statistics.median(spent[job[1], job[2], job[0]]):,.0f} steps")
    targets = "; ".join(f"{name} {each.target(given.best):.4f} of {len(each.curves)}" for name, each in tables.items())
    print(f"{machine(given.threads)}; {given.seeds} seeds, {given.workers} workers; targets: {targets}\n")
    rows = product(given.searchers, stoppings)
    head = ("search", "ASHA", *tables, "÷ random, geometric mean")
    table(head, [line(searcher, stopping, list(tables), spent) for searcher, stopping in rows])


def line(searcher: str, stopping: Any, names: list[str], spent: dict[tuple[str, Any, str], list[float]]) -> list[str]:
    about = f"grace {stopping[0]}, eta {stopping[1]}" if stopping else "none"
    cells, ratios = [], []
    for name in names:
        own, other = spent[searcher, stopping, name], spent.get(("random", stopping, name))
        ratio = statistics.median(own) / statistics.median(other) if other else math.nan
        missed = sum(map(math.isinf, own))
        cells.append(f"{statistics.median(own):,.0f} ({ratio:.2f})" + (f", {missed} never" if missed else ""))
        ratios.append(ratio)
    known = all(map(math.isfinite, ratios))
    return [searcher, about, *cells, f"{statistics.geometric_mean(ratios):.2f}" if known else ""]


if __name__ == "__main__":
    main()
