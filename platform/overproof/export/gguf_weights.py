"""Whether a quantised GGUF file holds the numbers that it was made from, tensor by tensor.

What a quality shows on average may hide one wrong tensor: a small model loses little by a matrix that is half as large
again. Rounding moves a tensor by a share of its numbers that its bits bound.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Ggml

from overproof.export.ggml_blocks import dequantise

# Root mean square of the errors over that of the numbers, at most. Of normal numbers it is 0.09, 0.04, 0.02 and 0.005,
# of ones with outliers more, and compensated rounding goes further from each number.
MOST_ERROR = {
    Ggml.F32: 1e-6, Ggml.F16: 1e-3, Ggml.BF16: 1e-2, Ggml.Q8_0: 0.05, Ggml.Q6_K: 0.12, Ggml.Q5_K: 0.25, Ggml.Q5_1: 0.25,
    Ggml.Q5_0: 0.25, Ggml.Q4_K: 0.5, Ggml.Q4_0: 0.5,
}  # fmt: skip


def require_same_weights(file: Path, unquantised: Path) -> None:
    """Return where every tensor of a file is that of the unquantised one, as far as its type can hold it.

    Raises:
        RuntimeError: one is missing, or is another.
    """
    whole, found = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (unquantised, file))
    if missing := sorted(whole.keys() ^ found.keys()):
        raise RuntimeError(f"{file}: tensor {missing[0]} is in one of it and {unquantised.name}: the export is wrong")
    for name, tensor in found.items():
        expected = dequantise(whole[name].data, whole[name].tensor_type)
        numbers = dequantise(tensor.data, tensor.tensor_type)
        if numbers.shape != expected.shape:
            raise RuntimeError(f"{file}: tensor {name} is {numbers.shape}, not {expected.shape}: the export is wrong")
        size = float(np.linalg.norm(expected))
        error = float(np.linalg.norm(numbers - expected)) / size if size else float(np.abs(numbers).max(initial=0))
        most = MOST_ERROR[tensor.tensor_type]
        if not error <= most:
            raise RuntimeError(
                f"{file}: tensor {name} is {error:.3g} of its numbers from what it was made from, and rounding to "
                f"{tensor.tensor_type.name} explains {most:g}: the export is wrong"
            )
