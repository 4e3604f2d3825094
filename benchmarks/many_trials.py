"""What a sweep's driver spends on a trial, and keeps of it, as trials become many; nothing is trained.

    .venv/bin/python benchmarks/many_trials.py [--trials 100 1000 10000] [--steps 100] [--validations 4]

Prints one Markdown table with a column for each number of trials. All of the sweep's own code runs, as Ray Tune would
call it, on results that are made up here; the teacher's data, Ray, and the actors that train are left out. Times are
of one trial: the mean of the last hundred, so that what grows with the trials before shows. Each number of trials has a
process of its own. The state is of the workspace, and the journal's bytes are all that were ever written of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from measuring import child, machine, table

from overproof.artifacts import Store
from overproof.config import load_recipe
from overproof.config.search import TrialValues, current_values, varying_values
from overproof.distill import sweep as stage
from overproof.distill import sweep_state
from overproof.distill.optuna_study import OptunaStudy
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.trial_job import STUDENTS, TrialJob, trial_result
from overproof.distill.tune_search import OptunaSearcher, TensorBoardCallback, TrackerCallback
from overproof.stage_context import StageContext, no_progress

RECIPE = Path(__file__).parents[1] / "jobs" / "recipes" / "digits.yaml"
SPACE = ("learning_rate: {kind: log_uniform, low: 1.0e-4, high: 1.0e-1}", "layers: {kind: integers, low: 1, high: 4}",
         "weight_decay: {kind: uniform, low: 0.0, high: 0.5}")  # fmt: skip
RUNNING = 8  # trials at a time
LAST = 100
PARENTS = ("prepare", "train", "cache")


class Times:
    """Seconds of each part of the trials that began last."""

    def __init__(self) -> None:
        self.trials = deque[Counter[str]](maxlen=LAST)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began_s = time.perf_counter()
        yield
        self.trials[-1][name] += time.perf_counter() - began_s

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*given, **named)

        return timed

    def milliseconds(self) -> dict[str, float]:
        total = sum(self.trials, Counter[str]())
        return {name: 1e3 * seconds / len(self.trials) for name, seconds in total.items()}


class Trial:
    """As Tune's callbacks take one."""

    def __init__(self, job: TrialJob) -> None:
        self.config = {"job": job}


def results(job: TrialJob, validations: int) -> Iterator[dict[str, Any]]:
    """What a trial would tell: its loss falls as its learning rate comes near 0.003."""
    rate, each = job.settings.learning_rate, job.settings.steps // validations
    off = abs(math.log10(rate / 3e-3))
    for last in range(each, job.settings.steps + 1, each):
        rows: list[dict[str, float]] = [
            {"step": step, "loss": 2 + off + 1 / step, "grad_norm": 1 / step, "learning_rate": rate}
            for step in range(last - each + 1, last + 1)
        ]
        loss = 1 + off + 1 / last
        rows.append({"step": last, "validation_loss": loss})
        yield trial_result(job, last, validation_loss=loss, curve=tuple(rows)) | {
            "parameters": 10_000, "resumed_step": 0, "values": current_values(job.settings, job.student),
        }  # fmt: skip


def run_stubs(
    times: Times, validations: int, context: StageContext, study: OptunaStudy,
    start_trial: Callable[[TrialValues], TrialJob], tracker: SweepTracker,
) -> None:  # fmt: skip
    """In place of Tune: asks for trials, a few at a time, and tells what they would."""
    shown = varying_values(context.recipe.sweep, context.recipe.tune)
    told, events = TrackerCallback(tracker), TensorBoardCallback(context.draft, shown)
    starts = times.wrapped("start: its job, the journal, its ledger", start_trial)
    searcher = OptunaSearcher(study, starts, lambda _: False, lambda: RUNNING)
    running = deque[tuple[str, Trial, Iterator[dict[str, Any]]]]()
    for number in count():
        times.trials.append(Counter())
        with times.part("propose, with its start"):
            config = searcher.suggest(str(number))
        if isinstance(config, dict):
            running.append((str(number), Trial(config["job"]), results(config["job"], validations)))
            if len(running) < RUNNING:
                continue
        if not running:
            return
        key, trial, lines = running.popleft()
        for result in lines:
            with times.part("results: tracker and progress"):
                told.on_trial_result(result=result)
            with times.part("results: TensorBoard's events"):
                events.on_trial_result(result=result)
        folder = Path(context.draft.uri) / STUDENTS / trial.config["job"].name
        folder.mkdir(parents=True)  # of its weights
        with times.part("results: tracker and progress"):
            told.on_trial_complete(trial=trial)
        events.on_trial_complete(trial=trial)
        with times.part("tell the search"):
            searcher.on_trial_complete(key, result)


def one(trials: int, steps: int, validations: int) -> dict[str, float]:
    """A sweep of so many trials."""
    with tempfile.TemporaryDirectory(prefix="overproof-many-") as folder:
        sets = (f"sweep.steps={steps}", f"tune.search={{kind: tpe, trials: {trials}}}", "tune.scheduler={kind: none}",
                f"tune.space={{{', '.join(SPACE)}}}", f"store={folder}")  # fmt: skip
        recipe, store = load_recipe(RECIPE, sets), Store(folder)
        parents = {}
        for name in PARENTS:
            draft = store.new_writer("digits", name, "a" * 64, {}, {})
            parents[name] = draft.commit({}, 0)
        context = StageContext(recipe, parents, store.new_writer("digits", "sweep", "b" * 64, {}, {}), no_progress)
        times, written = Times(), Counter[str]()
        write = sweep_state.atomic_write

        def counted(files: Any, path: str, content: bytes, **options: Any) -> None:
            written["bytes"] += len(content)
            write(files, path, content, **options)

        def controls(jobs: Sequence[TrialJob], _room: Any, tracker: SweepTracker) -> None:
            for job in jobs:
                for result in results(job, validations):
                    tracker.record_result(result)

        began_s, ended_s = time.monotonic(), 0.0

        def trains(*given: Any) -> None:
            nonlocal ended_s
            run_stubs(times, validations, *given)
            ended_s = time.monotonic()

        memory = psutil.Process().memory_info().rss
        with patch.multiple(
            stage, check_cache=lambda _: None, check_student=lambda *_: None, run_trials=trains,
            train_controls=controls, relay_progress=lambda _: nullcontext(no_progress),
            scorer_pool=lambda *_: nullcontext(None),
        ), patch.object(sweep_state, "atomic_write", counted):  # fmt: skip
            stage.sweep(context)
        finished_s = time.monotonic()
        grown = psutil.Process().memory_info().rss - memory
        again_s = time.monotonic()
        found = len(sweep_state.SweepState(context.draft).load_trials())
        assert found == trials, found
        loaded_s = time.monotonic() - again_s
        files = [path.stat().st_size for path in Path(context.draft.uri).rglob("*") if path.is_file()]
        return {
            **{f"{name}, ms": spent for name, spent in times.milliseconds().items()},
            "all of it, s": ended_s - began_s,
            "the artifact's files, ms": 1e3 * (finished_s - ended_s) / trials,
            "memory, kB": grown / trials / 1e3,
            "journal written, kB": written["bytes"] / trials / 1e3,
            "artifact, kB": sum(files) / trials / 1e3,
            "artifact, files": len(files) / trials,
            "to read the journal again, s": loaded_s,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--validations", type=int, default=4)
    parser.add_argument("--one", type=int, help="run one and print it as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.steps, given.validations)))
        return
    options = ["--steps", given.steps, "--validations", given.validations]
    found = [child([sys.executable, __file__, "--one", trials, *options], threads=1) for trials in given.trials]
    print(machine(1))
    rows = [[name, *(f"{each[name]:.3g}" for each in found)] for name in found[0]]
    table(["of one trial", *(f"{trials:,} trials" for trials in given.trials)], rows)


if __name__ == "__main__":
    main()
