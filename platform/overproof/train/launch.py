"""The train stage: starts the workers under Ray Train, on rows that Ray Data reads in planned order."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.data import DataContext, ExecutionOptions
from ray.exceptions import RayTaskError
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from overproof.cluster import own_interrupt
from overproof.data.ingest import planned_dataset
from overproof.data.manifest import Manifest
from overproof.data.plan import Order
from overproof.errors import InputError
from overproof.recipe import Pretrained
from overproof.stage import Context
from overproof.train.worker import Job, work

RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # at 2 s the end of a short run is noticed late
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process at the start, of use only to runs that resume
}


class Trainer(TorchTrainer):
    """Ray's trainer without its placement-group cleaner.

    The cleaner looks for the controller in the newest Ray cluster of the machine and kills the run when it is not
    there, which is so wherever a second cluster was started meanwhile. Without it the group ends with the driver.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]


def train(context: Context) -> dict[str, Any]:
    """Train the teacher; writes model/, curve.jsonl and events/.

    Raises:
        InputError: the starting model does not fit the data, a shard cannot be read, the loss is not finite.
    """
    settings, prepared = context.recipe.train, context.parents["prepare"]
    root = prepared.local()
    manifest = Manifest.read(root)
    if isinstance(settings.model, Pretrained):
        from overproof.models import check_tokenizer  # transformers: seconds to import, and not needed otherwise

        path = Path(settings.model.path).expanduser().absolute()  # workers have other working directories
        check_tokenizer(path, manifest)
        settings = settings.model_copy(update={"model": Pretrained(path=str(path))})
    order = Order(manifest.groups, manifest.rows_per_group, context.recipe.seed)
    plan = partial(planned_dataset, root, order, settings.batch_size, 0, settings.steps, settings.most)
    job = Job(settings, context.recipe.seed, prepared, context.draft, context.progress)
    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    DataContext.get_current().enable_progress_bars = False
    context.progress("train", 0, settings.steps, f"starting {settings.most} workers")
    # Ray keeps its own notes of the run there; nothing of them outlives it.
    with tempfile.TemporaryDirectory(prefix="overproof-train-") as scratch:
        trainer = Trainer(
            partial(work, job),  # type: ignore[arg-type]  # Train V2 hands on what it returns
            torch_config=TorchConfig(backend="nccl" if settings.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=settings.most,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker},
            ),
            run_config=RunConfig(name="train", storage_path=scratch, failure_config=FailureConfig(max_failures=0)),
            datasets={"train": plan} if settings.steps else {},
            dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        )
        metrics: dict[str, Any] = _run(trainer)
        return metrics


def _run(trainer: Trainer) -> Any:
    """Train, and give back what rank 0 returned.

    Raises:
        InputError: as a worker raised it, out of what Ray wrapped around it.
        KeyboardInterrupt: Ctrl-C, which Ray takes over, answers with exit code 0 and never gives back.
    """
    try:
        with own_interrupt():
            return trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        cause = _input_error(error)
        if cause is None:
            raise
        raise cause from None
    except SystemExit:
        raise KeyboardInterrupt from None


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError at the bottom of a chain of errors, if there is one."""
    match error:
        case None:
            return None
        case RayTaskError():  # may pose as an InputError, with a traceback for a message
            return _input_error(error.cause)
        case InputError():
            return error
        case ray.train.WorkerGroupError():
            found = (_input_error(failure) for failure in error.worker_failures.values())
            return next((cause for cause in found if cause), None)
        case ray.train.ControllerError():
            return _input_error(error.controller_failure)
    return _input_error(error.__cause__)
