"""Which weights of a matrix go to zero, and what the others become: by magnitude (Han et al., arXiv 1506.02626), by
Wanda (Sun et al., arXiv 2306.11695), and by SparseGPT (Frantar and Alistarh, arXiv 2301.00774).

Shapes: R rows (outputs), C columns (inputs), U columns of a block; N sets of M numbers of which some go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overproof.config.student_models import Masked
from overproof.export.gptq import inverse_factor

DAMPING = 0.01  # of the mean of x², as the paper has it
BLOCK = 128  # U, columns whose weights are chosen together, as SparseGPT's authors have it
GROUP, GROUP_ZEROS = 4, 2  # of the pattern 2:4


def sparsify(section: Masked, weights_RC: Tensor, inputs_CC: Tensor | None) -> Tensor:
    """A matrix with the section's share or pattern of zeros, (R, C) in fp32.

    ``inputs_CC`` sums x xᵀ over what it is multiplied with; magnitude alone does without.

    Raises:
        InputError: its rows cannot have the pattern.
    """
    section.require_columns(weights_RC.shape[1], "the number of a matrix's columns")
    weights_RC = weights_RC.float()
    if section.method == "magnitude":
        return weights_RC.masked_fill(_magnitude_zeros(weights_RC, section.sparsity), 0)
    assert inputs_CC is not None
    if section.method == "wanda":
        return weights_RC.masked_fill(_wanda_zeros(weights_RC, inputs_CC, section.sparsity), 0)
    return _sparsegpt(weights_RC, inputs_CC, section.sparsity)


def _magnitude_zeros(weights_RC: Tensor, sparsity: float | None) -> Tensor:
    """The smallest of the whole matrix; without a share, of each group of four."""
    if sparsity is None:
        return _pattern(weights_RC.abs())
    return _lowest(weights_RC.abs().view(1, -1), round(sparsity * weights_RC.numel())).view_as(weights_RC)


def _wanda_zeros(weights_RC: Tensor, inputs_CC: Tensor, sparsity: float | None) -> Tensor:
    """Of each row those that add least to its output: |w| times the norm of what they are multiplied with."""
    scores_RC = weights_RC.abs() * inputs_CC.diagonal().sqrt()
    return _pattern(scores_RC) if sparsity is None else _lowest(scores_RC, round(sparsity * weights_RC.shape[1]))


def _sparsegpt(weights_RC: Tensor, inputs_CC: Tensor, sparsity: float | None) -> Tensor:
    """Column after column; what taking a weight away changes is given to those after it, as far as they can stand in.

    What goes is chosen for a block at a time, of weights as they are when its turn comes; of the pattern, for a group.
    """
    rows, columns = weights_RC.shape
    upper_CC = inverse_factor(inputs_CC, DAMPING)
    cost_C = upper_CC.diagonal().pow(-2) * (inputs_CC.diagonal() > 0)  # of a weight of 1; inputs of 0 take anything
    left_RC = weights_RC.clone()
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block_RU, upper_UU = left_RC[:, first:last], upper_CC[first:last, first:last]
        zeros_RU, errors_RU = torch.zeros_like(block_RU, dtype=torch.bool), torch.empty_like(block_RU)
        if sparsity is not None:
            count = round(sparsity * rows * last) - round(sparsity * rows * first)
            zeros_RU = _lowest((block_RU.square() * cost_C[first:last]).view(1, -1), count).view_as(block_RU)
        for column in range(last - first):
            if sparsity is None and column % GROUP == 0:
                group = slice(column, column + GROUP)
                zeros_RU[:, group] = _pattern(block_RU[:, group].square() * cost_C[first:last][group])
            error_R = block_RU[:, column] * zeros_RU[:, column] / upper_UU[column, column]
            block_RU[:, column].masked_fill_(zeros_RU[:, column], 0)
            block_RU[:, column + 1 :] -= error_R[:, None] * upper_UU[column, column + 1 :]
            errors_RU[:, column] = error_R
        left_RC[:, last:] -= errors_RU @ upper_CC[first:last, last:]
    return left_RC


def _pattern(scores_RC: Tensor) -> Tensor:
    return _lowest(scores_RC.reshape(-1, GROUP), GROUP_ZEROS).view_as(scores_RC)


def _lowest(scores_NM: Tensor, count: int) -> Tensor:
    """Where the lowest of each set are; of two that are alike the first."""
    chosen = scores_NM.argsort(dim=-1, stable=True)[:, :count]
    return torch.zeros_like(scores_NM, dtype=torch.bool).scatter_(-1, chosen, True)
