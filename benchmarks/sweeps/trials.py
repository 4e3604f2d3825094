"""Trials of one small student each, two at a time, under one of four.

    trials.py WHO RECIPE.json TRIALS

WHO is `alone` (one after another in this process), `ours` (the product's sweep), `stock` (Ray Tune with a TorchTrainer
of one worker for each trial) or `optuna` (two processes, one study in a journal file). All train through the product's
`StudentTrainer`, each trial with another weight of the teacher. Prints JSON: when this process was up, when each
trial and when all were over, and the seconds of training of each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from students import Trial, job, made

from overproof.artifacts import Store
from overproof.config import Recipe, Space, Tpe, Tune
from overproof.config.search import Uniform
from overproof.distill.trial_job import CONTROL

PROCESSES = 2
LEAST, MOST = 0.5, 0.95  # of the teacher's weight
WEIGHT = "teacher_weight"


def one(recipe: Recipe, scratch: str, number: int, weight: float) -> dict[str, Any]:
    """The training function of every peer: what an actor of the product's sweep does."""
    from overproof.distill.student_trainer import StudentTrainer

    trial = Trial(recipe, made(recipe, "cache"), "cached", recipe.seed, "", {WEIGHT: weight})
    run = StudentTrainer(job(trial, f"{scratch}/{number}"))
    while (chunk := run.run_to_validation()).steps < recipe.sweep.steps:
        pass
    run.save_weights()
    return {"seconds": run.seconds, "loss": chunk.validation_loss, "end": time.time()}


def alone(recipe: Recipe, trials: int, scratch: str) -> dict[str, Any]:
    found = [one(recipe, scratch, number, LEAST) for number in range(trials)]
    return {"ends": [each["end"] for each in found], "seconds": [each["seconds"] for each in found]}


def ours(recipe: Recipe, trials: int, scratch: str) -> dict[str, Any]:
    from overproof.cluster import ray_cluster
    from overproof.distill.sweep import sweep
    from overproof.stage_context import ProgressEvent, StageContext, TaskProgress

    search = Tune(space=Space(teacher_weight=Uniform(low=LEAST, high=MOST)), search=Tpe(trials=trials))
    own = recipe.model_copy(update={"tune": search})
    ray_cluster.connect()
    ends: list[float] = []
    over: list[float] = []

    def note(event: ProgressEvent) -> None:
        if not isinstance(event, TaskProgress):
            return
        if event.task == CONTROL:  # the one trial that the peers do not have
            over.append(time.time())
        elif event.task == "sweep":
            ends.extend([time.time()] * (event.done // recipe.sweep.steps - len(ends)))

    draft = Store(scratch).new_writer("bench", "sweep", "c" * 64, {}, {})
    sweep(StageContext(own, made(recipe, "cache"), draft, note))
    listed = json.loads((Path(draft.uri) / "trials.json").read_text())["trials"]
    return {"ends": ends, "over": over[0], "seconds": [trial["seconds"] for trial in listed]}


def stock_loop(config: dict[str, Any]) -> None:
    from ray import train

    recipe = Recipe.model_validate_json(config["recipe"])
    found = one(recipe, config["scratch"], config["number"], config[WEIGHT])
    Path(config["scratch"], f"{config['number']}.json").write_text(json.dumps(found))
    train.report({"loss": found["loss"]})


def stock(recipe: Recipe, trials: int, scratch: str) -> dict[str, Any]:
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from overproof.cluster import ray_cluster

    def trial(config: dict[str, Any]) -> None:
        TorchTrainer(
            stock_loop,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=f"trial-{config['number']}", storage_path=f"{scratch}/ray"),
        ).fit()
        tune.report({"loss": json.loads(Path(scratch, f"{config['number']}.json").read_text())["loss"]})

    ray_cluster.connect()
    tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.5}),
        param_space={
            "number": tune.grid_search(list(range(trials))),
            WEIGHT: tune.uniform(LEAST, MOST),
            "scratch": scratch,
            "recipe": recipe.model_dump_json(),
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=PROCESSES, metric="loss", mode="min"),
        run_config=tune.RunConfig(name="sweep", storage_path=f"{scratch}/tune", verbose=0),
    ).fit()
    return {**files(scratch, trials), "over": time.time()}


def files(scratch: str, trials: int) -> dict[str, Any]:
    found = [json.loads(Path(scratch, f"{number}.json").read_text()) for number in range(trials)]
    return {"ends": sorted(each["end"] for each in found), "seconds": [each["seconds"] for each in found]}


def optuna_worker(text: str, trials: int, scratch: str) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    recipe = Recipe.model_validate_json(text)

    def objective(trial: optuna.Trial) -> float:
        found = one(recipe, scratch, trial.number, trial.suggest_float(WEIGHT, LEAST, MOST))
        Path(scratch, f"{trial.number}.json").write_text(json.dumps(found))
        return float(found["loss"])

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(f"{scratch}/journal"))
    study = optuna.create_study(storage=storage, study_name="bench", load_if_exists=True)
    study.optimize(objective, n_trials=trials)


def by_optuna(recipe: Recipe, trials: int, scratch: str) -> dict[str, Any]:
    shares = [trials // PROCESSES + (number < trials % PROCESSES) for number in range(PROCESSES)]
    spawn, text = get_context("spawn"), recipe.model_dump_json()
    workers = [spawn.Process(target=optuna_worker, args=(text, share, scratch)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {**files(scratch, trials), "over": time.time()}


def main(who: str, file: Path, trials: int) -> None:
    recipe = Recipe.model_validate_json(file.read_text())
    makers = {"alone": alone, "ours": ours, "stock": stock, "optuna": by_optuna}
    with tempfile.TemporaryDirectory() as scratch:
        found = makers[who](recipe, trials, scratch)
    print("\n" + json.dumps({"up": psutil.Process().create_time(), "over": found["ends"][-1], **found}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
