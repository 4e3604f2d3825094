"""Models that take one array a row, in ONNX Runtime.

A file of a model whose rows end where their text does says so in its metadata, and takes any number of columns up to
the width of a row: what all rows of a call have beyond their ends is not computed.

Shapes: B rows in a batch, D numbers in a row, V outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from overproof.engines.base import EngineSettings
from overproof.errors import InputError

WIDTH, PADDING = "overproof.width", "overproof.padding"  # in a file's metadata, of one whose rows may be shorter


def without_padding(rows_BD: NDArray[np.float32], metadata: Mapping[str, str]) -> NDArray[np.float32]:
    """The columns up to where the longest row ends, one at least; all of them where a file says nothing of rows that
    are shorter.
    """
    if PADDING not in metadata:
        return rows_BD
    (used,) = np.nonzero((rows_BD != float(metadata[PADDING])).any(0))
    return rows_BD[:, : int(used[-1]) + 1 if len(used) else 1]


class OnnxRuntime:
    """One ONNX file that takes ``inputs`` (B, D) and gives ``logprobs`` (B, V), both float32."""

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
        expected = [(name, "tensor(float)", 2) for name in ("inputs", "logprobs")]
        if found != expected:
            raise InputError(f"{path}: inputs and outputs are {found}; expected {expected}")
        self._metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.width = int(self._metadata.get(WIDTH, values[0].shape[1]))

    def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities in nats, shape (B, V).

        Raises:
            InputError: the rows have another width than the model takes.
        """
        if inputs_BD.ndim != 2 or inputs_BD.shape[1] != self.width or len(inputs_BD) == 0:
            raise InputError(f"inputs: found shape {inputs_BD.shape}; expected (rows, {self.width}), one row at least")
        rows_BD = without_padding(inputs_BD.astype(np.float32), self._metadata)
        logprobs_BV: NDArray[np.float32] = self._session.run(None, {"inputs": rows_BD})[0]
        return logprobs_BV

    def check(self) -> None:
        """Nothing to check: a session holds no state between calls."""

    def close(self) -> None:
        """Free the model."""
        del self._session


class OnnxRuntimeLoader:
    """See ``EngineLoader``."""

    kv_caches = ()

    def require(self) -> None:
        """It is a dependency of this package."""

    def load(self, path: Path, settings: EngineSettings) -> OnnxRuntime:
        return OnnxRuntime(path, settings.threads)


ENGINE = OnnxRuntimeLoader()
