"""A classifier in LitServe, one worker, batched.

    python lit_digits.py ONNX THREADS PORT MOST_IMAGES WAIT_S

The engine is overproof's. A batch waits WAIT_S for others, MOST_IMAGES at most.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
from numpy.typing import NDArray

from overproof.engines.onnx_runtime import OnnxRuntime


class Digits(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002
        self.engine = OnnxRuntime(Path(sys.argv[1]), int(sys.argv[2]))

    def decode_request(self, request) -> NDArray[np.float32]:  # type: ignore[no-untyped-def]  # it would be a query
        return np.array(request["images"][0], np.float32)

    def batch(self, inputs: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.stack(inputs)

    def predict(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.exp(self.engine.logprobs(pixels_BD))

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, Any]:
        return {"data": [{"index": 0, "label": int(output.argmax()), "probabilities": output.tolist()}]}


if __name__ == "__main__":
    api = Digits(max_batch_size=int(sys.argv[4]), batch_timeout=float(sys.argv[5]), api_path="/v1/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[3]), num_api_servers=1, generate_client_file=False, log_level="warning"
    )
