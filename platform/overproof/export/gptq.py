"""Rounding that makes up for itself: GPTQ (Frantar et al., arXiv 2210.17323) on the grids of a format's blocks.

A layer's outputs change by (w - q)ᵀ H (w - q) for each row of weights, where H sums x xᵀ over the inputs of a
calibration set. Columns are rounded one after the other, and what rounding one took from the outputs is given to those
that follow, as far as H says they can stand in. The scales of a block are chosen for the weights as they are when its
turn comes, by whoever chooses them in a plain file; so a file has the size of a plain one and is read as one.

Shapes: R rows, C columns, U columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from overproof.export.ggml_blocks import BLOCKS, Bytes, Weights, quantise

# Of H's mean diagonal, added to it. The paper's 0.01 fits the calibration's kind of text, and serves other kinds worse:
# SmolLM2-135M at 105 MB, calibrated on a reference, loses 0.013 nats less on source code with 1.0, and 0.002 more on
# further pages of the reference.
DAMPING = 1.0
# Of a block (R, U) and what an error in each of its columns costs (U): scale and offset of each number, (R, U).
Grid = Callable[[Weights, Weights], tuple[Weights, Weights]]


def gptq(weights_RC: Weights, hessian_CC: Tensor, kind: Ggml) -> Bytes:
    """A matrix in a type of ``BLOCKS``, packed, (R, bytes): in scales that ggml itself chose."""
    layout, plain = BLOCKS[kind], list[Bytes]()

    def grid(block_RU: Weights, importance_U: Weights) -> tuple[Weights, Weights]:
        plain.append(quantise(block_RU, kind, importance_U))
        return layout.grid(plain[-1])

    codes_RC = compensated_codes(weights_RC, hessian_CC, layout.columns, layout.most, grid)
    codes_BRU = np.split(codes_RC, len(plain), axis=1)
    packed = [layout.with_codes(block, codes_RU) for block, codes_RU in zip(plain, codes_BRU, strict=True)]
    assert packed[0].shape[1] == gguf.quants.quant_shape_to_byte_shape((1, layout.columns), kind)[-1]
    return np.concatenate(packed, axis=1)


def compensated_codes(weights_RC: Weights, hessian_CC: Tensor, columns: int, most: int, grid: Grid) -> Bytes:
    """Of each number a code from 0 to ``most``, (R, C), for blocks of so many columns: it stands for its scale times
    the code, plus its offset.
    """
    upper_CC = inverse_factor(hessian_CC, DAMPING)
    importance_C = upper_CC.diagonal().pow(-2)  # what an error in a column costs once those after it made up for it
    left_RC = torch.from_numpy(np.array(weights_RC, np.float32))
    codes_RC = torch.empty(left_RC.shape, dtype=torch.uint8)
    for first in range(0, left_RC.shape[1], columns):
        last = first + columns
        block_RU, upper_UU = left_RC[:, first:last].clone(), upper_CC[first:last, first:last]
        scale_RU, offset_RU = map(torch.from_numpy, grid(block_RU.numpy(), importance_C[first:last].numpy()))
        errors_RU = torch.empty_like(block_RU)
        for column in range(columns):
            weight_R, scale_R, offset_R = (each[:, column] for each in (block_RU, scale_RU, offset_RU))
            code_R = ((weight_R - offset_R) / scale_R).nan_to_num(0, 0, 0).round().clamp(0, most)
            codes_RC[:, first + column] = code_R.to(torch.uint8)
            error_R = (weight_R - scale_R * code_R - offset_R) / upper_UU[column, column]
            errors_RU[:, column] = error_R
            block_RU[:, column + 1 :] -= error_R[:, None] * upper_UU[column, column + 1 :]
        left_RC[:, last:] -= errors_RU @ upper_CC[first:last, last:]
    return codes_RC.numpy()


def inverse_factor(hessian_CC: Tensor, damping: float) -> Tensor:
    """The upper factor U of the inverse, UᵀU, of the damped H: row c of it says how columns after c make up for c."""
    damped_CC = hessian_CC.double()
    diagonal_C = damped_CC.diagonal()
    unused_C = diagonal_C == 0  # inputs that are always 0: any code does
    diagonal_C += damping * diagonal_C.mean() + unused_C.double()
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(damped_CC))
    upper_CC: Tensor = torch.linalg.cholesky(inverse_CC, upper=True)
    return upper_CC.float()
