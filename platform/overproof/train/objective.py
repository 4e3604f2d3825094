"""What training minimises. An objective turns a model and a batch into a loss; trainers know nothing else of it.

Shapes: B rows, P predictions in a row, N of a batch that count, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overproof.models.base import Prediction
from overproof.models.hf_directory import Batch
from overproof.models.sizes import family_of
from overproof.models.zero_memory import output_chunk_rows
from overproof.train.cross_entropy import linear_cross_entropy, mean_cross_entropy

CHUNK_LOGITS = 1 << 24  # numbers whose log-softmax is held at once: 64 MiB
Predict = Callable[[nn.Module, Batch], Prediction]  # a task's


class Objective(Protocol):
    """Distillation, fine-tuning and classification are objectives, not trainers."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, nats per prediction, and further scalars worth a curve."""


@dataclass(frozen=True)
class CrossEntropy:
    """The labels' negative log-likelihood, averaged over the predictions that count.

    ``counted`` is a column of these, (B, P), by which the output layer is spared the others: in a conversation they are
    many, and the layer is a large part of a small model with a large vocabulary.
    """

    predict: Predict
    counted: str | None = None
    compiled: bool = False  # whether the model runs through torch.compile, which heeds nothing done to its output layer

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.compiled:
            found = self.predict(model, batch)
            return mean_cross_entropy(found.logits_BPV, found.targets_BP, found.mask_BP), {}
        if self.counted is None:
            return self._loss(model, batch, lambda values_BP: values_BP), {}
        counted_BP = batch[self.counted] > 0
        with outputs_at(model, counted_BP):
            return self._loss(model, batch, lambda values_BP: values_BP[counted_BP][None]), {}

    def _loss(self, model: nn.Module, batch: Batch, chosen: Callable[[Tensor], Tensor]) -> Tensor:
        def asked(found: Prediction) -> tuple[Tensor, Tensor]:
            return chosen(found.targets_BP), chosen(found.mask_BP)

        with loss_at_output(model, lambda: asked(self.predict(cast(nn.Module, _no_outputs), batch))):
            found = self.predict(model, batch)
        logits = found.logits_BPV
        if logits.ndim == 0:
            return logits
        targets_BP, mask_BP = asked(found)
        return mean_cross_entropy(logits.view(*targets_BP.shape, -1), targets_BP, mask_BP)


@contextmanager
def outputs_at(model: Any, places_BP: Tensor) -> Iterator[None]:
    """Within the block a causal model of transformers, or an engine around it, gives the logits of these places alone:
    (N, V). By a hook of its output layer, which torch.compile would not heed.
    """

    def at_places(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (given[0][places_BP],)

    hook = model.get_output_embeddings().register_forward_pre_hook(at_places)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def loss_at_output(model: nn.Module, asked: Callable[[], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the block the logits that a causal model of transformers gives, or an engine around it, are their mean
    cross-entropy already, a scalar, where they would be large; ``asked`` gives the targets and the mask. Only where
    logits are what a linear layer gives, in the format of its weights.
    """
    layer = _plain_output(model)
    if layer is None:
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        device, outputs = hidden.device.type, len(layer.weight)
        large = hidden.shape[:-1].numel() > output_chunk_rows(device, outputs, hidden.element_size())
        if not large or hidden.dtype != layer.weight.dtype or torch.is_autocast_enabled(device):
            return nn.Linear.forward(layer, hidden)
        return linear_cross_entropy(hidden.flatten(0, -2), layer.weight, *asked())

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _plain_output(model: nn.Module) -> Any:
    """The linear layer whose outputs are a model's logits as they are, None where there is none."""
    module = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), None)
    layer = None if module is None else module.get_output_embeddings()
    if module is None or type(layer) is not nn.Linear or "forward" in vars(layer):
        return None
    _, family = family_of({"architectures": [type(module).__name__]}, module.config.name_or_path)
    return layer if family.plain_logits else None


def _no_outputs(**_: Any) -> Any:
    """A model of which nothing but what it is asked is of interest."""
    return SimpleNamespace(logits=None)


def nll(prediction: Prediction) -> Tensor:
    """Negative log-likelihood of every target, nats, fp32: (B, P). A few rows at a time, for use without gradients."""
    logits_BPV, targets_BP = prediction.logits_BPV, prediction.targets_BP
    rows = max(1, CHUNK_LOGITS // logits_BPV[0].numel())
    parts = zip(torch.split(logits_BPV, rows), torch.split(targets_BP, rows), strict=True)
    return torch.cat([_nll(part_BPV, part_BP) for part_BPV, part_BP in parts])


def _nll(logits_BPV: Tensor, targets_BP: Tensor) -> Tensor:
    logits_NV = logits_BPV.float().flatten(0, 1)
    return cross_entropy(logits_NV, targets_BP.flatten(), reduction="none").view_as(targets_BP)
