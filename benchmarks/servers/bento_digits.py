"""A classifier in BentoML, one worker, adaptively batched.

    ONNX=FILE THREADS=N MOST_IMAGES=N python -m bentoml serve bento_digits:Digits

The engine is overproof's.
"""

import os
from pathlib import Path

import bentoml
import numpy as np

from overproof.engines.onnx_runtime import OnnxRuntime


@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False})
class Digits:
    def __init__(self) -> None:
        self.engine = OnnxRuntime(Path(os.environ["ONNX"]), int(os.environ["THREADS"]))

    @bentoml.api(batchable=True, max_batch_size=int(os.environ["MOST_IMAGES"]), route="/v1/classify")
    def classify(self, images: np.ndarray) -> np.ndarray:
        return np.exp(self.engine.logprobs(images.astype(np.float32)))
