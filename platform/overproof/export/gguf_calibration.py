"""The matrices of a language model as a calibration set has them rounded, for the file that they go into.

What is rounded lies in a folder until it is written: as much as the file will take, and not in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from overproof.export.calibration import CalibrationRows, calibrate
from overproof.export.ggml_blocks import Bytes, Weights, dequantise, quantise
from overproof.export.gguf_types import Rounding, is_compensated
from overproof.export.gptq import gptq
from overproof.models.hf_directory import load_model

QUANTISED = (Ggml.Q4_0, Ggml.Q5_0, Ggml.Q5_1, Ggml.Q4_K, Ggml.Q5_K, Ggml.Q6_K)  # of q8_0 there is nothing to gain


@dataclass(frozen=True)
class MatrixRounder:
    """Rounds the matrices of one model."""

    family: Any
    config: Any
    kinds: Mapping[str, Ggml]  # by the name of a tensor in its directory
    rounding: Rounding
    folder: Path

    def round_all(self, model: Path, rows: CalibrationRows, tell: Callable[[int, int], None]) -> None:
        """Put what is to be written of each matrix in a layer into the folder."""
        loaded = load_model(model)
        calibrate(loaded, self.family.names.layers, rows.batches(), rows.predict, self._renew, tell)

    def blocks(self, tensor: str) -> Bytes | None:
        """What is written of a tensor; None where it is none of these matrices."""
        file = self._file(tensor)
        return np.load(file, mmap_mode="r") if file.is_file() else None

    def _file(self, tensor: str) -> Path:
        return self.folder / f"{tensor}.npy"

    def _renew(self, tensor: str, weights: Tensor, inputs_CC: Tensor) -> Tensor | None:
        kind = self.kinds.get(tensor)
        if kind not in QUANTISED:
            return None
        assert kind is not None
        change = self.family.gguf.change(tensor)
        written: Weights = weights.float().numpy()
        if change is not None:
            written = np.ascontiguousarray(change.to_gguf(written, self.config))
        if is_compensated(kind, self.rounding):
            blocks = gptq(written, inputs_CC, kind)
        else:
            importance_C: Weights = inputs_CC.diagonal().numpy()
            blocks = quantise(written, kind, importance_C)
        np.save(self._file(tensor), blocks)
        if self.rounding == "imatrix":  # whose importance is of the model as it is
            return None
        rounded = dequantise(blocks, kind)
        if change is not None:
            rounded = np.ascontiguousarray(change.from_gguf(rounded, self.config))
        return torch.from_numpy(rounded)
