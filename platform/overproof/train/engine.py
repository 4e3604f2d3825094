"""Engines: one optimizer step, on one process or sharded by DeepSpeed ZeRO, behind one interface.

DeepSpeed is imported inside functions alone: a driver without a compiler or GPU never loads it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from overproof.models import Batch
from overproof.recipe import Optimization, Train
from overproof.train.objective import Objective

Metrics = dict[str, float]

ADAM_EPSILON = 1e-8
BUCKET_ELEMENTS = 20_000_000  # of a collective; DeepSpeed reserves the memory of one at the start


def learning_rate(optimization: Optimization, step: int) -> float:
    """The rate of a step, counted from 0: linear warm-up to the peak at ``warmup_steps``, then the schedule.

    The last step, ``steps - 1``, has ``final_fraction`` of the peak (unless the schedule is constant).
    """
    peak, warmup = optimization.learning_rate, optimization.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, optimization.steps - 1 - warmup))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[optimization.schedule]
    return peak * (optimization.final_fraction + (1 - optimization.final_fraction) * left)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms, class tokens) do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = sum(size > 1 for size in parameter.shape) > 1
        (matrices if is_matrix else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def deepspeed_config(train: Train, world: int) -> dict[str, Any]:
    """What DeepSpeed is told. The rate is set from outside at every step, so there is no scheduler here.

    ZeRO keeps fp32 masters of bf16 weights. Without ZeRO, DeepSpeed 0.19's bf16 optimizer takes an empty Adam
    step before the first, which bends the start of training, so stage 0 casts activations alone.
    """
    lower = (
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        if train.zero_stage == 0
        else {"bf16": {"enabled": True}}
    )
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // world // train.accumulation(world),
        "gradient_accumulation_steps": train.accumulation(world),
        "gradient_clipping": train.clip_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": [train.beta1, train.beta2],
                "eps": ADAM_EPSILON,
                "weight_decay": train.weight_decay,
                "torch_adam": True,  # DeepSpeed's own would be compiled first
            },
        },
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        **(lower if train.precision == "bf16" else {}),
    }


class Engine(Protocol):
    """A model in training. Every rank calls the same methods in the same order."""

    def step(self, objective: Objective, batch: Batch) -> Metrics:
        """Train on this rank's share of a batch.

        Returns ``loss`` (nats, mean over the global batch), ``learning_rate``, ``grad_norm`` (global, before
        clipping) and the objective's own scalars.
        """

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model to call, in evaluation mode and without gradients, until the block ends."""

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""

    def state_dict(self) -> dict[str, Tensor]:
        """Full weights, fp32 on the CPU, on rank 0; empty on the others."""


def default_device() -> torch.device:
    """The GPU this process was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class TorchEngine:
    """One process, fp32, no DeepSpeed: the reference, and what small students train on."""

    def __init__(self, model: nn.Module, optimization: Optimization, device: torch.device | None = None) -> None:
        self.optimization = optimization
        self.device = device or default_device()
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, optimization.weight_decay),
            lr=optimization.learning_rate,
            betas=(optimization.beta1, optimization.beta2),
            eps=ADAM_EPSILON,
        )
        self.steps_done = 0

    def step(self, objective: Objective, batch: Batch) -> Metrics:
        rate = learning_rate(self.optimization, self.steps_done)
        _set_rate(self.optimizer, rate)
        loss, scalars = objective.loss(self.model, _place(batch, self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optimization.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        values = {name: value.item() for name, value in scalars.items()}
        return {"loss": loss.item(), "learning_rate": rate, "grad_norm": norm.item(), **values}

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        self.model.eval()
        try:
            with torch.inference_mode():
                yield self.model
        finally:
            self.model.train()

    def total(self, values: Tensor) -> Tensor:
        return values

    def state_dict(self) -> dict[str, Tensor]:
        return {name: _fp32(value) for name, value in self.model.state_dict().items()}


class ZeroEngine:
    """One rank of a DeepSpeed ZeRO group (arXiv 1910.02054), stages 0 to 3, over gloo on CPUs or nccl on GPUs.

    The process group must be up. Weights start from rank 0's. Gradients and losses are means over the ranks, so
    ranks bring equally many predictions that count.
    """

    def __init__(self, model: nn.Module, train: Train) -> None:
        os.environ["DS_ACCELERATOR"] = "cuda" if dist.get_backend() == "nccl" else "cpu"
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        deepspeed.ops.__compatible_ops__ = {}  # else a kernel for tensor-parallel inference is compiled, for minutes
        self.optimization = train
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model.train(),
            model_parameters=parameter_groups(model, train.weight_decay),
            config=deepspeed_config(train, dist.get_world_size()),
            dist_init_required=False,
        )
        self.device = torch.device(self.engine.device)
        self.steps_done = 0

    def step(self, objective: Objective, batch: Batch) -> Metrics:
        rate = learning_rate(self.optimization, self.steps_done)
        _set_rate(self.optimizer, rate)
        loss, scalars = objective.loss(self.engine, _place(batch, self.device))
        self.engine.backward(loss)
        norm = self._plain_norm()
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        self.steps_done += 1
        names = ["loss", *scalars]
        means = self.total(torch.stack([loss.detach(), *scalars.values()]).double()) / dist.get_world_size()
        values = dict(zip(names, means.tolist(), strict=True))
        return {"loss": values.pop("loss"), "learning_rate": rate, "grad_norm": float(norm), **values}

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        self.engine.eval()
        try:
            with torch.no_grad():
                yield self.engine
        finally:
            self.engine.train()

    def total(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    def state_dict(self) -> dict[str, Tensor]:
        import deepspeed

        state: dict[str, Tensor] = {}
        for name, value in self.engine.module.state_dict(keep_vars=True).items():
            # One at a time, so that no rank ever holds the whole model twice.
            sharded = self.optimization.zero_stage == 3 and isinstance(value, nn.Parameter)
            with deepspeed.zero.GatheredParameters([value] if sharded else [], enabled=sharded):
                if dist.get_rank() == 0:
                    state[name] = _fp32(value)
        return state

    def _plain_norm(self) -> float | None:
        """The gradients' norm where DeepSpeed keeps none: without ZeRO, where every rank has them all."""
        if self.optimization.zero_stage > 0:
            return None
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _place(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _fp32(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)
