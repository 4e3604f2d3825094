"""Students that learn in the numbers that they ship with: each forward pass has a layer's matrices as their file will
have them, and gradients pass the rounding as if it were not there (the straight-through estimator, arXiv 1308.3432;
LLM-QAT, arXiv 2305.17888). Weights themselves stay whole, so what is written of them is rounded once, by the format.

Shapes: R rows of a matrix (outputs), C columns (inputs), U columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.config.distillation import TrainedRounding
from overproof.errors import InputError
from overproof.models.hf_directory import layer_names

BLOCK = 32  # U, of ggml's plain types
Round = Callable[[Tensor], Tensor]


def round_q8_0(weights_RC: Tensor) -> Tensor:
    """ggml's Q8_0: the largest number of a block has code 127 or -127."""
    blocks_RBU = _blocks(weights_RC)
    scale_RB1 = blocks_RBU.abs().amax(-1, keepdim=True) / 127
    codes_RBU = (blocks_RBU / scale_RB1).nan_to_num(0, 0, 0).round()
    return (codes_RBU * scale_RB1.half().float()).view_as(weights_RC)


def round_q4_0(weights_RC: Tensor) -> Tensor:
    """ggml's Q4_0: the number that is furthest from 0 in a block has code -8."""
    blocks_RBU = _blocks(weights_RC)
    furthest_RB1 = blocks_RBU.gather(-1, blocks_RBU.abs().argmax(-1, keepdim=True))
    scale_RB1 = furthest_RB1 / -8
    codes_RBU = ((blocks_RBU / scale_RB1).nan_to_num(0, 0, 0) + 8.5).floor().clamp(0, 15) - 8
    return (codes_RBU * scale_RB1.half().float()).view_as(weights_RC)


def round_int8(weights_RC: Tensor) -> Tensor:
    """ONNX Runtime's int8 in seven bits: a scale for each output."""
    scale_R1 = weights_RC.abs().amax(1, keepdim=True) / 64
    return (weights_RC / scale_R1).nan_to_num(0, 0, 0).round() * scale_R1


ROUNDINGS: dict[TrainedRounding, Round] = {"q8_0": round_q8_0, "q4_0": round_q4_0, "int8": round_int8}


def train_rounded(model: PreTrainedModel, rounding: TrainedRounding) -> PreTrainedModel:
    """The same model, whose layers' matrices are rounded in each pass, while it trains and while it is validated.

    Raises:
        InputError: its layers hold no such matrices, or blocks do not divide their rows.
    """
    layers, width = layer_names(model).layers, 1 if rounding == "int8" else BLOCK
    found = [module for module in model.get_submodule(layers).modules() if type(module) is nn.Linear]
    uneven = next((module for module in found if module.in_features % width), None)
    if not found or uneven is not None:
        what = f"a matrix of {uneven.in_features} columns" if uneven is not None else f"none in {layers}"
        raise InputError(
            f"rounding {rounding}: found {what}; expected linear layers in blocks of {width} columns: leave it out"
        )
    for module in found:
        module.__class__ = _CLASSES[rounding]
    return model


def _blocks(weights_RC: Tensor) -> Tensor:
    return weights_RC.float().view(len(weights_RC), -1, BLOCK)


class _RoundedProduct(torch.autograd.Function):
    """x wᵀ with rounded w, which backward rounds again: nothing but what a plain layer keeps is kept."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, weights_RC: Tensor, round: Round) -> Tensor:
        context.save_for_backward(inputs, weights_RC)
        context.round = round
        return inputs @ round(weights_RC).to(inputs.dtype).T

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (outputs,), (inputs, weights_RC) = gradients, context.saved_tensors
        wanted = context.needs_input_grad
        to_inputs = outputs @ context.round(weights_RC).to(outputs.dtype) if wanted[0] else None
        to_weights = outputs.flatten(0, -2).T @ inputs.flatten(0, -2).to(outputs.dtype) if wanted[1] else None
        return (
            None if to_inputs is None else to_inputs.to(inputs.dtype),
            None if to_weights is None else to_weights.to(weights_RC.dtype),
            None,
        )


class _Rounded(nn.Linear):
    round: Round

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = _RoundedProduct.apply(input, self.weight, type(self).round)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias


_CLASSES: dict[TrainedRounding, type[_Rounded]] = {
    name: type(f"Rounded_{name}", (_Rounded,), {"round": staticmethod(round)}) for name, round in ROUNDINGS.items()
}
