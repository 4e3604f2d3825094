"""Which channels of a convolutional model matter least on train rows, and a smaller model without them.

Channels that stay or go together (``ChannelGroup``) are those that a stage gives, to which all its blocks add, and
those between two convolutions of a block. They matter by the mean size of what they give over a calibration set, as
channels of feed-forward layers do (Minitron, arXiv 2407.14679). Batch norm in evaluation treats each channel by
itself, so what comes out is the teacher whose other channels are nothing (arXiv 1608.08710).

Shapes: B rows, C channels, H height, W width; G channels of all groups together, one group after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from overproof.config.student_models import Pruned
from overproof.models.base import ChannelGroup, ConvolutionalFamily


@torch.inference_mode()
def measure_channels(
    model: PreTrainedModel,
    family: ConvolutionalFamily,
    batches: Iterable[Any],
    predict: Callable[[Any, Any], object],
) -> NDArray[np.float64]:
    """(G) mean absolute activations, in one pass over the batches, in evaluation mode."""
    groups, was_training = family.channel_groups(model.config.to_dict()), model.training
    sums = [torch.zeros(group.channels, dtype=torch.float64) for group in groups]
    rows = 0

    def add(sum_C: Tensor, _module: Any, _given: Any, found_BCHW: Tensor) -> None:
        sum_C += found_BCHW.abs().mean((2, 3)).double().sum(0).cpu()

    hooks = [
        model.get_submodule(group.measured).register_forward_hook(partial(add, sum_C))
        for group, sum_C in zip(groups, sums, strict=True)
    ]
    try:
        model.eval()
        for batch in batches:
            predict(model, batch)
            rows += len(next(iter(batch.values())))
    finally:
        for hook in hooks:
            hook.remove()
    model.train(was_training)
    return torch.cat(sums).numpy() / max(1, rows)


def prune_channels(
    model: PreTrainedModel, family: ConvolutionalFamily, section: Pruned, importance_G: NDArray[np.float64]
) -> PreTrainedModel:
    """A copy without the channels that matter least.

    Raises:
        InputError: the model has fewer, or something else is to go.
    """
    settings = model.config.to_dict()
    narrowed = family.narrowed(settings, section.stages(f"a {type(model).__name__}"))
    groups, left = family.channel_groups(settings), family.channel_groups(narrowed)
    state, importance = dict(model.state_dict()), _by_group(importance_G, groups)
    for group, smaller, importance_C in zip(groups, left, importance, strict=True):
        kept = torch.from_numpy(np.sort(np.argsort(-importance_C, kind="stable")[: smaller.channels]))
        for module in group.given_by:
            for name, value in state.items():
                if name.rpartition(".")[0] == module and value.ndim:  # counts of batches have no channels
                    state[name] = value.index_select(0, kept)
        for module in group.read_by:
            state[f"{module}.weight"] = state[f"{module}.weight"].index_select(1, kept)
    made = type(model)(type(model.config).from_dict(narrowed))
    made.load_state_dict(state)
    return made


def _by_group(values_G: NDArray[np.float64], groups: Sequence[ChannelGroup]) -> list[NDArray[np.float64]]:
    return np.split(values_G, np.cumsum([group.channels for group in groups])[:-1])
