"""What a training engine is, one optimizer step behind one interface, and that of one process.

``deepspeed_engine`` has that of several processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.config import Optimization
from overproof.errors import InputError
from overproof.models.compute import PLAIN, Compute
from overproof.models.hf_directory import Batch
from overproof.train.objective import Objective
from overproof.train.optim import ADAM_EPSILON, learning_rate, parameter_groups
from overproof.train.plain_loading import plain_loading
from overproof.train.running_statistics import RunningStatistics

STATE_FILE = "state.pt"  # of the engine of one process
MEMORY_ADVICE = (
    "ask for less: a smaller micro_batch_size, activation_checkpointing: true, a higher zero_stage, offload, or more "
    "workers (`overproof plan` says what each takes)"
)
Metrics = dict[str, float]
PendingMetrics = Callable[[], Metrics]  # waits for the device: a GPU may still be at work on the step
StateWriter = Callable[[str, Any], None]  # takes a file's name and its content


class TrainingEngine(Protocol):
    """A model in training. Every rank calls the same methods in the same order."""

    def step(self, objective: Objective, batch: Batch) -> PendingMetrics:
        """Train on this rank's share of a batch.

        What is returned gives ``loss`` (nats, mean over the global batch), ``learning_rate``, ``grad_norm`` (global,
        before clipping) and the objective's own scalars. Where ``loss`` or ``grad_norm`` is not finite the weights are
        as they were. ``overflow`` is 1 where fp16's loss scale was too high, which lowers it and is no fault.
        """

    @contextmanager
    def eval_mode(self) -> Iterator[nn.Module]:
        """The model to call, in evaluation mode and without gradients, until the block ends."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""


class TorchEngine:
    """One process, weights in fp32, no DeepSpeed: the reference, and what small students train on. On a GPU no step
    waits for it.

    Dropout and the like draw from a seed that is a function of ``seed`` and the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimization: Optimization,
        where: Compute = PLAIN,
        seed: int = 0,
        auxiliary: nn.Module | None = None,
    ) -> None:
        """``auxiliary`` is trained and saved with the model without being a part of it."""
        self.optimization, self.seed = optimization, seed
        self.device = where.device
        self.model = where.place(model, trained=True).train()
        self.trained = nn.ModuleList([self.model, *([auxiliary.to(self.device)] if auxiliary else [])])
        self.optimizer: Any = torch.optim.AdamW(
            parameter_groups(self.trained, optimization.weight_decay),
            lr=optimization.learning_rate,
            betas=(optimization.beta1, optimization.beta2),
            eps=ADAM_EPSILON,
            fused=True,  # on a CPU, too: one pass over the weights instead of ten
        )
        self.statistics = RunningStatistics(self.model)
        self.steps_done = 0

    def step(self, objective: Objective, batch: Batch) -> PendingMetrics:
        rate = learning_rate(self.optimization, self.steps_done)
        set_learning_rate(self.optimizer, rate)
        seed_rng(self.seed, self.steps_done, self.device)
        self.statistics.before_step()
        loss, scalars = objective.loss(self.model, to_device(batch, self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), self.optimization.clip_norm)
        leave_out_nonfinite(self.optimizer, norm)
        self.optimizer.step()
        self.statistics.after_step(norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        values = torch.stack([value.detach().double() for value in (loss, norm, *scalars.values())])

        def read() -> Metrics:
            own = dict(zip(("loss", "grad_norm", *scalars), values.tolist(), strict=True))
            return {"loss": own.pop("loss"), "learning_rate": rate, **own}

        return read

    @contextmanager
    def eval_mode(self) -> Iterator[nn.Module]:
        self.model.eval()
        try:
            with torch.inference_mode():
                yield self.model
        finally:
            self.model.train()

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def save(self, write: StateWriter) -> None:
        """Hand the whole state to ``write``, as one file."""
        write(STATE_FILE, {"model": self.trained.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, folder: Path, step: int) -> None:
        """Go on from the file that ``save`` gave after ``step`` steps, with this engine's own settings.

        Raises:
            InputError: it holds more than tensors and plain values.
        """
        with plain_loading(folder):
            state = torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True, mmap=True)
        self.trained.load_state_dict(state["model"])
        for group, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            group |= {name: own[name] for name in ("betas", "weight_decay", "fused", "foreach")}
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = step


def seed_rng(seed: int, position: int, device: torch.device) -> None:
    """Make what is drawn next a function of both: the same after a restart."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed}/{position}".encode()).digest()[:7], "big")
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed asks every kind of device, for milliseconds
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


def leave_out_nonfinite(fused: Any, norm: Tensor) -> None:
    """Have a fused optimizer of torch leave its next step out if the gradients' norm is not finite. The device decides:
    this is how torch's own scaler of fp16 (``torch.amp.GradScaler``) tells it.
    """
    fused.found_inf = (~norm.isfinite()).float()


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


@contextmanager
def explain_memory(phase: str, advice: str = MEMORY_ADVICE) -> Iterator[None]:
    """Turn what torch raises when memory runs out into bad input.

    Raises:
        InputError: naming what was under way and what to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"out of memory in {phase}: {first_line}; {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out.

    torch has a type for this on GPUs alone. Its CPU allocator raises a bare RuntimeError (c10/core/impl/
    alloc_cpu.cpp), so there its message is all that there is to go by; a test allocates too much to keep this true.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and "can't allocate memory" in str(error)
