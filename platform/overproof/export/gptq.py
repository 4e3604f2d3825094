"""Rounding that makes up for itself: GPTQ (Frantar et al., arXiv 2210.17323) on the grids of ggml's blocks.

A layer's outputs change by (w - q)ᵀ H (w - q) for each row of weights, where H sums x xᵀ over the inputs of a
calibration set. Columns are rounded one after the other, and what rounding one took from the outputs is given to those
that follow, as far as H says they can stand in. The scales of a block are ggml's own, chosen for the weights as they
are when its turn comes; so a file has the size of a plain one and any llama.cpp loads it.

Shapes: R rows, C columns, U columns of a block.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from overproof.export.ggml_blocks import BLOCKS, Bytes, Weights, quantise

DAMPING = 0.01  # of H's mean diagonal, added to it: inputs of a few thousand tokens span less than all columns


def gptq(weights_RC: Weights, hessian_CC: Tensor, kind: Ggml) -> Bytes:
    """A matrix in a type of ``BLOCKS``, packed, (R, bytes)."""
    layout = BLOCKS[kind]
    upper_CC = inverse_factor(hessian_CC)
    importance_C = upper_CC.diagonal().pow(-2)  # what an error in a column costs once those after it made up for it
    left_RC = torch.from_numpy(np.array(weights_RC, np.float32))
    width = gguf.quants.quant_shape_to_byte_shape((1, layout.columns), kind)[-1]
    packed = np.empty(gguf.quants.quant_shape_to_byte_shape(weights_RC.shape, kind), np.uint8)
    for block, first in enumerate(range(0, left_RC.shape[1], layout.columns)):
        last = first + layout.columns
        block_RU, upper_UU = left_RC[:, first:last].clone(), upper_CC[first:last, first:last]
        plain = quantise(block_RU.numpy(), kind, importance_C[first:last].numpy())
        scale_RU, offset_RU = map(torch.from_numpy, layout.grid(plain))
        errors_RU, codes_RU = torch.empty_like(block_RU), torch.empty(block_RU.shape, dtype=torch.uint8)
        for column in range(layout.columns):
            weight_R, scale_R, offset_R = (each[:, column] for each in (block_RU, scale_RU, offset_RU))
            code_R = ((weight_R - offset_R) / scale_R).nan_to_num(0, 0, 0).round().clamp(0, layout.most)
            codes_RU[:, column] = code_R.to(torch.uint8)
            error_R = (weight_R - scale_R * code_R - offset_R) / upper_UU[column, column]
            errors_RU[:, column] = error_R
            block_RU[:, column + 1 :] -= error_R[:, None] * upper_UU[column, column + 1 :]
        left_RC[:, last:] -= errors_RU @ upper_CC[first:last, last:]
        packed[:, block * width : (block + 1) * width] = layout.with_codes(plain, codes_RU.numpy())
    return packed


def inverse_factor(hessian_CC: Tensor) -> Tensor:
    """The upper factor U of the inverse, UᵀU, of the damped H: row c of it says how columns after c make up for c."""
    damped_CC = hessian_CC.double()
    diagonal_C = damped_CC.diagonal()
    unused_C = diagonal_C == 0  # inputs that are always 0: any code does
    diagonal_C += DAMPING * diagonal_C.mean() + unused_C.double()
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(damped_CC))
    upper_CC: Tensor = torch.linalg.cholesky(inverse_CC, upper=True)
    return upper_CC.float()
