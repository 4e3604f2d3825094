"""The one training loop. It knows batches and an engine: no Ray, no DeepSpeed, no files."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from overproof.config import Optimization
from overproof.errors import InputError
from overproof.models.hf_directory import Batch
from overproof.train.engine import Metrics, PendingMetrics, TrainingEngine
from overproof.train.objective import Objective, Predict, nll

STEPS_AHEAD = 1  # that are begun before the numbers of one are read, so that a GPU is never without work
CurveRow = dict[str, float]  # "step" counts finished steps; then what was measured at it


class CheckpointHook(Protocol):
    """Saves the state of a training as it goes. Every rank has one and calls it alike."""

    def after_step(self, step: int, score: float | None) -> None:
        """A step is over; ``score`` is the validation loss, if there was a validation at it."""


@dataclass(frozen=True)
class LoopHooks:
    """What a training does beside its steps: where it begins, what saves it, what becomes of a step gone wrong."""

    start_step: int = 0  # finished steps
    checkpoint: CheckpointHook | None = None
    on_nonfinite: Callable[[int, InputError], None] | None = None  # takes step and error; returns to leave it out
    extra_validation_steps: frozenset[int] = frozenset()  # beside those of the optimization


def fit(
    engine: TrainingEngine,
    objective: Objective,
    optimization: Optimization,
    batches: Iterator[Batch],
    validate: Callable[[], float],
    report: Callable[[CurveRow], None],
    hooks: LoopHooks = LoopHooks(),
) -> None:
    """Train to ``optimization.steps`` steps, one batch each; ``report`` gets a row after each step.

    Raises:
        InputError: the loss or the gradient is no longer finite.
    """
    for row in train_steps(engine, objective, optimization, batches, validate, hooks):
        report(row)


def train_steps(
    engine: TrainingEngine,
    objective: Objective,
    optimization: Optimization,
    batches: Iterator[Batch],
    validate: Callable[[], float],
    hooks: LoopHooks = LoopHooks(),
) -> Iterator[CurveRow]:
    """What ``fit`` does, a row at a time, for callers that stop early.

    Yields ``{"step", "loss", "learning_rate", "grad_norm"}`` for each step and ``{"step", "validation_loss"}``
    every ``validate_every`` steps, at those the hooks name, and after the last. A step that was left out has
    ``skipped`` 1 in place of what is not finite. The checkpoint hook is called when the caller has taken a step's rows
    and asks for more. Without such a hook a step's row may come when ``STEPS_AHEAD`` more are begun, but before any
    validation that follows it.
    """
    if optimization.steps == 0:
        yield {"step": 0, "validation_loss": validate()}
    begun = deque[tuple[int, PendingMetrics]]()
    for step in range(hooks.start_step + 1, optimization.steps + 1):
        begun.append((step, engine.step(objective, next(batches))))
        validates = (
            step % optimization.validate_every == 0
            or step == optimization.steps
            or step in hooks.extra_validation_steps
        )
        while len(begun) > (0 if validates or hooks.checkpoint else STEPS_AHEAD):
            yield _finished(*begun.popleft(), optimization, hooks)
        score = None
        if validates:
            score = validate()
            yield {"step": step, "validation_loss": score}
        if hooks.checkpoint:
            hooks.checkpoint.after_step(step, score)


def _finished(step: int, pending: PendingMetrics, optimization: Optimization, hooks: LoopHooks) -> CurveRow:
    """The row of a step.

    Raises:
        InputError: its loss or gradient is not finite, and the hooks do not leave it out.
    """
    metrics = pending()
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return {"step": step, **metrics}
    if not metrics.get("overflow"):
        error = _nonfinite_error(step, metrics, optimization)
        if hooks.on_nonfinite is None:
            raise error
        hooks.on_nonfinite(step, error)
    return {"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}, "skipped": 1.0}


def _nonfinite_error(step: int, metrics: Metrics, optimization: Optimization) -> InputError:
    return InputError(
        f"step {step}: loss is {metrics['loss']} and the gradient's norm {metrics['grad_norm']}; expected "
        f"finite numbers: lower learning_rate (at most {optimization.learning_rate:g} now) or raise "
        f"warmup_steps ({optimization.warmup_steps} now)"
    )


def validation_loss(
    model: nn.Module,
    predict: Predict,
    batches: Iterable[Batch],
    all_reduce: Callable[[Tensor], Tensor] = lambda values: values,
) -> float:
    """Mean negative log-likelihood of the predictions that count, nats.

    ``model`` comes from ``engine.eval_mode()``. Where ranks share the batches, ``all_reduce`` is the engine's and
    every rank brings equally many: ZeRO-3 gathers weights in each forward pass.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        prediction = predict(model, {name: value.to(device) for name, value in batch.items()})
        counted_BP = nll(prediction) * prediction.mask_BP
        sums += torch.stack([counted_BP.sum(dtype=torch.float64), (prediction.mask_BP > 0).sum().double()])
    loss, count = all_reduce(sums).tolist()
    return float(loss / count)


def validation_ids(rows: int, limit: int) -> NDArray[np.int64]:
    """``limit`` sample ids spread evenly over a split's ``rows``, or every one: the same at every validation."""
    count = min(rows, limit)
    return np.arange(count, dtype=np.int64) * rows // count


def shard_batches(ids: NDArray[np.int64], batch_size: int, rank: int, world: int) -> list[NDArray[np.int64]]:
    """A rank's part of the ids in batches of at most ``batch_size`` (2 at least); every rank has equally many.

    With fewer ids than ranks every rank takes them all, which leaves the mean over the ranks the same.
    """
    if len(ids) < world:
        rank, world = 0, 1
    count = math.ceil(math.ceil(len(ids) / world) / max(2, batch_size))
    return list(np.array_split(np.array_split(ids, world)[rank], count))
