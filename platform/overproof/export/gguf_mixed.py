"""The type of each matrix of a GGUF file, chosen by what rounding it costs, for a file of a given size.

Types are those of blocks of 32. llama.cpp rounds what it multiplies with a K type's matrix in blocks of 256 (Q8_K),
where one large activation takes the others' bits: with the last matrices of SmolLM2's feed-forward layers in Q6_K and
all others in Q8_0 the KL divergence from f16 is 0.020 nats, without 0.005; and kernels for one token and for many then
give logits that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from overproof.export.base import MOST_FISHER_ROWS
from overproof.export.calibration import CalibrationRows
from overproof.export.ggml_blocks import BLOCKS, Weights, aligned, dequantise, quantise
from overproof.export.sensitivity import Option, choose_types, fisher_diagonal
from overproof.models.hf_directory import load_model

KINDS = (Ggml.Q4_0, Ggml.Q5_0, Ggml.Q5_1, Ggml.Q8_0)
COMPENSATED = 0.4  # of what rounding by itself costs is left by GPTQ; 0.2 to 0.7 was measured


def choose_mixed(
    model: Path, family: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], copies: Mapping[str, int],
    rows: CalibrationRows, budget_bytes: int, where: str, tell: Callable[[str], None],
) -> dict[str, Ggml]:  # fmt: skip
    """A type for each matrix, by its name in the directory; ``shapes`` are as the file has them,
    and ``copies`` how often it has each.

    Raises:
        InputError: the budget is less than the smallest types take.
    """
    loaded, predict = load_model(model), rows.predict
    rows = replace(rows, rows=min(rows.rows, MOST_FISHER_ROWS))
    batches = (one for batch in rows.batches() for one in _rows_of(batch))
    fisher = fisher_diagonal(
        loaded, shapes, batches, predict, lambda row: tell(f"what rounding costs, row {row} of {rows.rows}")
    )
    weights, options = dict(loaded.named_parameters()), dict[str, list[Option]]()
    for name in shapes:
        change = family.gguf.change(name)
        written, weighed = (_written(value.data, change, config) for value in (weights[name], fisher.pop(name)))
        in_layer = name.startswith(f"{family.names.layers}.")
        options[name] = [_option(written, weighed, kind, copies[name], in_layer and kind in BLOCKS) for kind in KINDS]
    return choose_types(options, budget_bytes, where)


def _rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(len(batch["tokens"]))]


def _written(values: Tensor, change: Any, config: Any) -> Weights:
    found: Weights = values.float().numpy()
    return found if change is None else np.ascontiguousarray(change.to_gguf(found, config))


def _option(weights: Weights, fisher: Weights, kind: Ggml, copies: int, compensated: bool) -> Option:
    errors = torch.from_numpy(dequantise(quantise(weights, kind), kind) - weights)
    cost = 0.5 * float((torch.from_numpy(fisher) * errors.square()).sum(dtype=torch.float64))
    size_bytes = aligned(int(np.prod(gguf.quants.quant_shape_to_byte_shape(weights.shape, kind))))
    return Option(kind, copies * size_bytes, COMPENSATED * cost if compensated else cost)
