"""Layer after layer of a model over a calibration set: what each matrix is multiplied with, and new weights for it.

Later layers see what earlier ones give with their new weights, so that rounding is measured where it is felt. One
layer's sums are in memory at a time, beside the activations between two layers.

Shapes: S tokens of a row, D numbers of a token, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.artifacts import Artifact
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.export.base import BATCH_TOKENS, ExportContext
from overproof.models.base import Prediction
from overproof.models.documents import at_counted, counted_places
from overproof.models.hf_directory import Batch, to_tensors
from overproof.registry import TASKS

Renew = Callable[[str, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class CalibrationRows:
    """The train rows that a model is calibrated on: the first in training order."""

    prepared: Artifact
    seed: int
    rows: int

    @classmethod
    def of(cls, context: ExportContext) -> Self | None:
        """Those that a format's settings ask for; None where there is no data."""
        if context.prepared is None:
            return None
        return cls(context.prepared, context.seed, context.settings.calibration.rows)

    def batches(self) -> list[Batch]:
        """What the model reads, about ``BATCH_TOKENS`` tokens at a time."""
        manifest = Manifest.read(self.prepared)
        order, each = manifest.order(self.seed), max(1, BATCH_TOKENS // manifest.positions)
        ids, shards = order.rows_at(0, min(self.rows, order.rows)), Shards(self.prepared, "train")
        return [to_tensors(shards.take(ids[first : first + each])) for first in range(0, len(ids), each)]

    @property
    def predict(self) -> Callable[[Any, Batch], Prediction]:
        """How the data's task calls a model with a batch."""
        return TASKS[Manifest.read(self.prepared).task].predict


@dataclass
class _Call:
    """How the model called a layer for a batch."""

    arguments: tuple[Any, ...]  # behind the activations
    named: dict[str, Any]


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel, layers: str, batches: Iterable[Batch], ask: Callable[[PreTrainedModel, Batch], object],
    renew: Renew, tell: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Give ``renew`` each matrix of each layer: its name in the model, its weights, and the sum of x xᵀ over what it is
    given, (C, C) in fp32. Where that gives weights back, the layers that follow work with those.

    ``layers`` names the list of layers, ``ask`` calls the model with a batch, ``tell`` hears how many layers are done.
    """
    named = model.get_submodule(layers)
    assert isinstance(named, nn.ModuleList)
    stack = list(named)
    hidden, calls, counted = _called(model, stack, batches, ask)
    for number, layer in enumerate(stack):
        tell(number, len(stack))
        matrices = {name: module for name, module in layer.named_modules() if _is_matrix(module)}
        with _summed(matrices) as sums:
            for states_BSD, call, places in zip(hidden, calls[number], counted, strict=True):
                sums.places = places
                layer(states_BSD, *call.arguments, **call.named)
        for name, module in matrices.items():
            new = renew(f"{layers}.{number}.{name}.weight", module.weight.data, sums.of[name])
            if new is not None:
                module.weight.data = new.to(module.weight.dtype)
        for batch, call in enumerate(calls[number]):
            hidden[batch] = _activations(layer(hidden[batch], *call.arguments, **call.named))
    tell(len(stack), len(stack))


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _called(
    model: PreTrainedModel,
    stack: Sequence[nn.Module],
    batches: Iterable[Batch],
    ask: Callable[[PreTrainedModel, Batch], object],
) -> tuple[list[Tensor], list[list[_Call]], list[Tensor | None]]:
    """What the first layer is given of each batch, how every layer is called, and which places count."""
    hidden, calls, counted = list[Tensor](), [list[_Call]() for _ in stack], list[Tensor | None]()

    def note(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if number == 0:
                hidden.append(arguments[0])
            calls[number].append(_Call(arguments[1:], dict(named)))

        return hook

    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        for batch in batches:
            counted.append(counted_places(batch))
            ask(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, calls, counted


@dataclass
class _Sums:
    """Of x xᵀ, by the name of a matrix, over the places that count."""

    of: dict[str, Tensor]
    places: Tensor | None = None

    def add(self, name: str, inputs: Tensor) -> None:
        inputs_NC = at_counted(inputs, self.places)
        if name not in self.of:
            self.of[name] = inputs_NC.T @ inputs_NC
        else:
            self.of[name].addmm_(inputs_NC.T, inputs_NC)


@contextmanager
def _summed(matrices: dict[str, nn.Module]) -> Iterator[_Sums]:
    """The sums of x xᵀ over what these modules are given within."""
    sums = _Sums({})
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: sums.add(name, given[0]))
        for name, module in matrices.items()
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _activations(found: Any) -> Tensor:
    activations: Tensor = found if isinstance(found, Tensor) else found[0]
    return activations
