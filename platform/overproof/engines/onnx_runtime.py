"""Classifiers in ONNX Runtime.

Shapes: B images in a batch, D pixels, C classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from overproof.errors import InputError


class OnnxClassifier:
    """One ONNX file that takes ``pixels`` (B, D) and gives ``logprobs`` (B, C), both float32."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Load a file.

        Raises:
            InputError: it is missing, not ONNX, or has other inputs or outputs.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # replicas share the cores
        if not path.is_file():
            raise InputError(f"{path}: missing; expected an ONNX file")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            raise InputError(f"{path}: cannot be loaded: {error}; expected an ONNX file") from None
        values = (*self._session.get_inputs(), *self._session.get_outputs())
        found = [(value.name, value.type, len(value.shape)) for value in values]
        expected = [(name, "tensor(float)", 2) for name in ("pixels", "logprobs")]
        if found != expected:
            raise InputError(f"{path}: inputs and outputs are {found}; expected {expected}")
        self.pixels = values[0].shape[1]

    def classify(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities in nats, shape (B, C).

        Raises:
            InputError: the pixels have another shape than the model takes.
        """
        if pixels_BD.ndim != 2 or pixels_BD.shape[1] != self.pixels or len(pixels_BD) == 0:
            raise InputError(f"images: found shape {pixels_BD.shape}; expected (images, {self.pixels}), one at least")
        logprobs_BC: NDArray[np.float32] = self._session.run(None, {"pixels": pixels_BD.astype(np.float32)})[0]
        return logprobs_BC

    def check(self) -> None:
        """Nothing to check: a session holds no state between calls."""

    def close(self) -> None:
        """Free the model."""
        del self._session
