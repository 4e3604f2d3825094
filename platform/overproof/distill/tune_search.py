"""The sweep's search under Ray Tune: trials come from a study, and the recipe's schedulers are Tune's.

All that the product knows of Tune's internals is here, `_get_new_config` of its population-based training among them.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from pyarrow import fs
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from overproof.artifacts import ArtifactWriter
from overproof.cluster import ray_cluster
from overproof.cluster.placement import Capacity, ResourceRequest
from overproof.config import Asha, Hyperband, Median, NoStop, Optimization, Pbt, Space, Sweep, Tune
from overproof.config.search import (
    Domain,
    LogUniform,
    TrialValues,
    Uniform,
    current_values,
    first_comparison,
    varying_values,
)
from overproof.distill.optuna_study import OptunaStudy
from overproof.distill.sweep_tracker import SweepTracker
from overproof.distill.tensorboard import EVENTS, TrialEvents
from overproof.distill.trial_job import MAX_DEATHS, TrialJob
from overproof.distill.tune_trial import TuneTrial
from overproof.files import filesystem, join_uri
from overproof.stage_context import StageContext

ROOM_S = 5.0
STEPS, LOSS = "steps", "validation_loss"
COMPARISON: dict[str, Any] = {"time_attr": STEPS, "metric": LOSS, "mode": "min"}
RESAMPLE_PROBABILITY = 0.25  # of population-based training: that a value is drawn anew
PERTURBATION_FACTOR = 1.25  # of population-based training: how far a value in a range moves
QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}


def run_trials(
    context: StageContext, study: OptunaStudy, start_trial: Callable[[TrialValues], TrialJob], tracker: SweepTracker
) -> None:
    """Run trial after trial until the scheduler stops it, it fails, or it has run every step.

    A trial whose process dies is started again, and goes on from its checkpoint.

    Raises:
        KeyboardInterrupt: the user interrupted.
        RuntimeError: Tune ended before its trials did; names them.
    """
    settings, search = context.recipe.sweep, context.recipe.tune
    population: dict[str, Any] = {}
    if isinstance(search.scheduler, Pbt):  # Tune's takes trials from no searcher
        suggestions = iter(lambda: study.ask(""), None)
        population = {"job": tune.grid_search([start_trial(values) for values in suggestions if values])}
    interrupt = InterruptStopper()
    with _tune_storage(context, shared=bool(population)) as (store, path), _quiet_tune(), interrupt.on_sigint():
        tune.Tuner(
            tune.with_resources(TuneTrial, _trial_resources(settings)),
            param_space=population,
            tune_config=tune.TuneConfig(
                search_alg=None
                if population
                else OptunaSearcher(study, start_trial, tracker.failures.__contains__, TrialRoom(settings)),
                scheduler=tune_scheduler(search, settings, context.recipe.seed),
                num_samples=1 if population else tracker.trials * (1 + MAX_DEATHS),
                max_concurrent_trials=settings.concurrent_trials,
                reuse_actors=settings.group is None,  # a group ends with its trial
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=path,
                storage_filesystem=store,
                verbose=0,
                stop=interrupt,
                callbacks=[
                    TrackerCallback(tracker),
                    TensorBoardCallback(context.draft, varying_values(settings, search)),
                ],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a finished trial wrote its weights
                failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            ),
        ).fit()
    if interrupt.received:
        raise KeyboardInterrupt
    if unfinished := tracker.unfinished():
        raise RuntimeError(f"Ray Tune ended the sweep before these trials: {'; '.join(unfinished)}")


class TrialRoom:
    """How many trials may run at the same time: on the nodes that are up, and those that the autoscaler may add, for it
    adds them when trials wait. Nodes come and go; they are counted again at most every ``ROOM_S`` seconds.
    """

    def __init__(self, settings: Sweep) -> None:
        self.settings = settings
        self._counted_s, self._room = -math.inf, 1

    def __call__(self) -> int:
        if time.monotonic() - self._counted_s > ROOM_S:
            slots = trial_slots(self.settings, ray_cluster.capacity())
            self._counted_s, self._room = time.monotonic(), min(self.settings.concurrent_trials, max(1, slots))
        return self._room


def trial_slots(settings: Sweep, capacity: Capacity) -> int:
    """Trials that fit the nodes at the same time; each bundle of one lies within a node."""
    bundles, cpus, gpus = settings.bundles
    return capacity.fits(ResourceRequest("sweep", bundles, cpus, gpus)) // bundles


def _trial_resources(settings: Sweep) -> Any:
    """What Tune reserves for a trial; a group reserves its own, and Tune insists on something."""
    if settings.group:
        return tune.PlacementGroupFactory([{"memory": 1}])
    return {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial}


@contextmanager
def _tune_storage(context: StageContext, shared: bool) -> Iterator[tuple[fs.FileSystem | None, str]]:
    """Where Tune keeps its files; states that trials load from each other must be seen from every node."""
    if not shared:
        with tempfile.TemporaryDirectory(prefix="overproof-sweep-") as folder:
            yield None, folder
        return
    store, path = filesystem(join_uri(context.draft.workspace, f"tune-{secrets.token_hex(4)}"))
    store.create_dir(path, recursive=True)
    yield (None if isinstance(store, fs.LocalFileSystem) else store), path
    store.delete_dir(path)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune prints tables at any verbosity, logs each trial to files, and keeps Ctrl-C for ever."""
    logger = logging.getLogger("ray.tune")
    before, level = {name: os.environ.get(name) for name in QUIET}, logger.level
    os.environ.update(QUIET)
    logger.setLevel(logging.CRITICAL)  # errors are raised, with the student's name
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class InterruptStopper(tune.Stopper):
    """Ends every trial after Ctrl-C; whether the user interrupted is known by this, not by how much is unfinished."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """No single trial is stopped."""
        del trial_id, result
        return False

    def stop_all(self) -> bool:
        return self.received

    @contextmanager
    def on_sigint(self) -> Iterator[None]:
        """Take the first Ctrl-C within; a second has its usual effect. Signals come to the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        original = signal.getsignal(signal.SIGINT)

        def receive(_number: int, _frame: Any) -> None:
            self.received = True
            signal.signal(signal.SIGINT, original)

        signal.signal(signal.SIGINT, receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, original)


class TrackerCallback(tune.Callback):
    """Passes Tune's events on to the tracker."""

    def __init__(self, tracker: SweepTracker) -> None:
        self.tracker = tracker

    def on_trial_result(self, *, result: Mapping[str, Any], **_: Any) -> None:  # type: ignore[override]
        self.tracker.record_result(result)
        self.tracker.report_progress()

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        self.tracker.record_end(trial.config["job"].name)

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        """Tune gave it up. One whose process died may have been lost before it ran, and is proposed again."""
        error = trial.get_error() or trial.get_pickled_error()
        raised = isinstance(error, RayTaskError)
        self.tracker.record_death(trial.config["job"].name, _error_line(error), retry=not raised)


def _error_line(error: BaseException | None) -> str:
    """The last line of what Ray wrapped around an error."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return (str(error or "").strip() or "its process died again and again").splitlines()[-1]


class TensorBoardCallback(tune.Callback):
    """Writes the trials' events into the workspace while they run, where that lies on a disk."""

    def __init__(self, draft: ArtifactWriter, shown: frozenset[str]) -> None:
        store, root = filesystem(draft.workspace)
        self.folder = Path(root) / EVENTS if isinstance(store, fs.LocalFileSystem) else None
        if self.folder is not None and self.folder.exists():  # of an attempt that was killed
            shutil.rmtree(self.folder)
        self.events: dict[str, TrialEvents] = {}
        self.shown = shown  # settings that may differ

    def on_trial_result(self, *, result: Mapping[str, Any], **_: Any) -> None:  # type: ignore[override]
        if self.folder is None:
            return
        name = result["name"]
        if name not in self.events:
            self.events[name] = TrialEvents(
                self.folder / name, {key: value for key, value in result["values"].items() if key in self.shown}
            )
        self.events[name].add(result["curve"])

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        self._close(trial.config["job"].name)

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        self._close(trial.config["job"].name)

    def on_experiment_end(self, **_: Any) -> None:  # type: ignore[override]
        for name in tuple(self.events):
            self._close(name)

    def _close(self, name: str) -> None:
        if name in self.events:
            self.events.pop(name).close()


class OptunaSearcher(Searcher):
    """Gives Tune a job for each suggestion of a study, and gives the study each trial's last result.

    Tune gives a trial up whose process dies before the trial runs in it; unless ``given_up``, it is proposed again.
    """

    def __init__(
        self, study: OptunaStudy, start_trial: Callable[[TrialValues], TrialJob], given_up: Callable[[str], bool],
        room: Callable[[], int],
    ) -> None:  # fmt: skip
        """``start_trial`` makes the next trial's job; ``given_up`` says by name whether a trial may not come again;
        ``room`` how many may run now.
        """
        super().__init__(metric=LOSS, mode="min")
        self.study, self.start_trial, self.given_up, self.room = study, start_trial, given_up, room
        self.running: dict[str, tuple[str, TrialJob]] = {}  # by Tune's id: the study's key, and the job
        self.lost: list[tuple[str, TrialJob]] = []

    def suggest(self, trial_id: str) -> Any:
        """A job; None for now, where there is no room or one that is running may yet be lost; or that there are no
        more. What is asked for no sooner than it can run is chosen by all that is known then.
        """
        if self.running and len(self.running) >= self.room():
            return None
        while self.lost:
            key, job = self.lost.pop()
            if not self.given_up(job.name):
                return self._propose(trial_id, key, job)
            self.study.tell(key, None)
        values = self.study.ask(trial_id)
        if values is None:
            return None if self.running else Searcher.FINISHED
        return self._propose(trial_id, trial_id, self.start_trial(values))

    def _propose(self, trial_id: str, key: str, job: TrialJob) -> dict[str, Any]:
        self.running[trial_id] = key, job
        return {"job": job}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        key, job = self.running.pop(trial_id)
        if error:
            self.lost.append((key, job))
            return
        self.study.tell(key, result if result and result["failed"] is None else None)

    def save(self, checkpoint_path: str) -> None:
        """An empty file: ``SweepState`` holds what was suggested."""
        Path(checkpoint_path).touch()


class PopulationScheduler(PopulationBasedTraining):
    """Tune's, with the recipe's space: a trial keeps its own job, and values stay within their domains."""

    def __init__(self, settings: Pbt, interval_steps: int, space: Space, seed: int) -> None:
        super().__init__(
            **COMPARISON,
            perturbation_interval=interval_steps,
            quantile_fraction=settings.quantile,
            custom_explore_fn=dict,  # Tune's own exploration is not used
            log_config=False,
        )
        self.space, self.random = space, np.random.default_rng(seed)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        donor: TrialJob = trial_to_clone.config["job"]
        values = current_values(donor.settings, donor.student)
        searched = {name: values[name] for name in self.space.domains}
        return {"job": trial.config["job"].with_values(perturbed(searched, self.space, self.random))}, {}


def perturbed(values: TrialValues, space: Space, random: np.random.Generator) -> TrialValues:
    """Each value drawn anew, or moved: in a range by PERTURBATION_FACTOR, in a list to a neighbour."""
    return {name: _perturb(space.domains[name], value, random) for name, value in values.items()}


def _perturb(domain: Domain, value: Any, random: np.random.Generator) -> Any:
    resample = random.random() < RESAMPLE_PROBABILITY
    if isinstance(domain, Uniform | LogUniform):
        if not resample:
            return min(
                max(value * random.choice([1 / PERTURBATION_FACTOR, PERTURBATION_FACTOR]), domain.low), domain.high
            )
        if isinstance(domain, Uniform):
            return random.uniform(domain.low, domain.high)
        return math.exp(random.uniform(math.log(domain.low), math.log(domain.high)))
    count = len(domain.values)
    index = random.integers(count) if resample else domain.values.index(value) + random.choice([-1, 1])
    return domain.values[min(max(int(index), 0), count - 1)]


def tune_scheduler(search: Tune, sweep: Optimization, seed: int) -> TrialScheduler:
    """What stops trials."""
    settings = search.scheduler
    match settings:
        case NoStop():
            return FIFOScheduler()  # type: ignore[no-untyped-call]
        case Asha() | Hyperband():
            return ASHAScheduler(
                **COMPARISON,
                max_t=sweep.steps,
                grace_period=first_comparison(settings, sweep),
                reduction_factor=settings.reduction_factor,
                brackets=settings.brackets if isinstance(settings, Hyperband) else 1,
            )
        case Median(least_trials=least):
            grace = first_comparison(settings, sweep)
            return MedianStoppingRule(**COMPARISON, grace_period=grace, min_samples_required=least)
        case Pbt():
            return PopulationScheduler(settings, first_comparison(settings, sweep), search.space, seed)
        case _:
            assert_never(settings)
