"""The train stage: starts the workers under Ray Train, and starts them again until the last step is done."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray.train
from ray.data import DataContext
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from overproof.artifacts import ArtifactWriter
from overproof.cluster.ray_cluster import preserve_sigint
from overproof.config import Pretrained
from overproof.data.manifest import Manifest
from overproof.errors import InputError
from overproof.models import pretrained
from overproof.stage_context import StageContext
from overproof.train.checkpoint import Checkpoints
from overproof.train.ray_elastic import ElasticScaling, RetryPolicy, describe_error, notify, root_causes
from overproof.train.ray_worker import train_rank
from overproof.train.train_job import SupervisedSpec, TrainJob

RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # at 2 s the end of a short run, or a kill, is noticed late
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # of the seconds that a drained node has left
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # to find room, nothing else; then the nodes are counted again
}
ABORT_TIMEOUT_S = 3


class QuietTorchBackend(_TorchBackend):
    """Ray's torch backend without its farewell, which waits 30 s for ranks that wait for a dead one.

    The processes are killed next, whatever they answer.
    """

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        del worker_group, backend_config


class QuietTorchConfig(TorchConfig):
    """A torch process group that ends with its processes."""

    @property
    def backend_cls(self) -> type[QuietTorchBackend]:
        return QuietTorchBackend


class RayTrainer(TorchTrainer):
    """Ray's trainer with this product's patience and choice of workers, without its placement-group cleaner.

    The cleaner looks for the controller in the newest Ray cluster of the machine and kills the run when it is not
    there, which is so wherever a second cluster was started meanwhile. Without it the group ends with the driver.
    """

    def __init__(self, job: TrainJob, scratch: str, work: Callable[[TrainJob], Any] = train_rank) -> None:
        """Each worker does ``work``. Ray keeps its own notes of the run in ``scratch``; none is needed afterwards."""
        settings = self.settings = job.train
        self.job = job
        super().__init__(
            partial(work, job),  # Train V2 hands on what it returns
            torch_config=QuietTorchConfig(backend="nccl" if settings.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(settings.fewest, settings.most),  # type: ignore[arg-type]
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker},
            ),
            run_config=RunConfig(name="train", storage_path=scratch),
        )

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = RetryPolicy(
            self.job.checkpoints, self.settings.max_failures, partial(notify, self.job)
        )
        given["scaling_policy"] = ElasticScaling(self.scaling_config, self.settings.worlds)  # type: ignore[arg-type]
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]

    def _register_sigint_handler(self, controller: Any) -> None:
        """End on Ctrl-C. Ray's handler waits for the controller, which does not answer while it waits for nodes."""

        def stop(*_: Any) -> None:
            with suppress(RayActorError, GetTimeoutError):
                ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
            ray.kill(controller)
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, stop)


def train_teacher(context: StageContext) -> dict[str, Any]:
    """Train the teacher; writes model/, curve.jsonl and events/.

    What an attempt that was killed has left in the draft's workspace is gone on from.

    Raises:
        InputError: the starting model does not fit the data, a shard cannot be read, the loss is not finite, memory
            does not suffice, or the workspace holds a training of another recipe or no good checkpoint.
        RuntimeError: the workers failed ``max_failures`` times in a row without a new checkpoint.
    """
    settings, prepared, draft = context.recipe.train, context.parents["prepare"], context.draft
    if isinstance(settings.model, Pretrained):
        from overproof.models.hf_directory import (
            check_tokenizer,  # transformers: seconds to import, and not needed otherwise
        )

        starting = pretrained.absolute_pretrained(settings.model)
        check_tokenizer(pretrained.fetch_pretrained(starting.path), Manifest.read(prepared.local()))
        settings = settings.model_copy(update={"model": starting})
    checkpoints = Checkpoints(draft.workspace, draft.fingerprint, draft.config, draft.parents, settings.checkpoint)
    checkpoints.begin()
    job = TrainJob(
        settings, context.recipe.seed, prepared, draft, checkpoints, context.progress, SupervisedSpec(settings.model)
    )
    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    DataContext.get_current().enable_progress_bars = False
    size = f"{settings.fewest} to {settings.most}" if settings.fewest < settings.most else settings.most
    context.progress("train", checkpoints.committed(), settings.steps, f"starting {size} workers")
    with tempfile.TemporaryDirectory(prefix="overproof-train-") as scratch:
        metrics: dict[str, Any] = run_trainer(RayTrainer(job, scratch))
    if isinstance(settings.model, Pretrained):
        keep_chat_template(settings.model, draft)
    return metrics


def keep_chat_template(starting: Pretrained, draft: ArtifactWriter) -> None:
    """What the model is asked with stays with it, for its students."""
    from overproof.models.hf_directory import CHAT_TEMPLATE, chat_template

    template = chat_template(pretrained.fetch_pretrained(starting.path))
    if template is not None:
        with draft.directory() as folder:
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def run_trainer(trainer: RayTrainer) -> Any:
    """Train, and give back what rank 0 returned.

    Raises:
        InputError: as a worker raised it, out of what Ray wrapped around it; or for what Ray killed a worker.
        RuntimeError: the end of patience, or of Ray's controller.
    """
    try:
        with preserve_sigint():
            return trainer.fit().return_value  # type: ignore[attr-defined]
    except RayActorError as error:
        raise RuntimeError(
            f"train: the controller of the run died: {describe_error([error])}; run again: training goes on from step "
            f"{trainer.job.checkpoints.committed()}"
        ) from error
    except ray.train.TrainingFailedError as error:
        found = root_causes(error)
        for cause in found:
            if isinstance(cause, InputError):
                raise cause from None
            if isinstance(cause, OutOfMemoryError):
                raise InputError(_out_of_memory(cause)) from None
        raise RuntimeError(
            f"train: {trainer.settings.max_failures} failures in a row without a new checkpoint after step "
            f"{trainer.job.checkpoints.committed()}; the last one: {describe_error(found)}"
        ) from error


def _out_of_memory(error: OutOfMemoryError) -> str:
    from overproof.train.memory_errors import ADVICE

    return f"out of memory in a training worker: a node's memory was nearly full: {describe_error([error])}; {ADVICE}"
