"""A classifier in plain FastAPI under uvicorn: an endpoint that is no coroutine, so each request has a thread.

    python fast_digits.py ONNX THREADS PORT

The engine is overproof's. `GET /v1/models` does nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from overproof.serve.engines.onnx import OnnxClassifier

MODELS: dict[str, object] = {
    "object": "list",
    "data": [{"id": "forged", "object": "model", "created": 1, "owned_by": "x" * 400}],
}


class Images(BaseModel):
    images: list[list[float]]


class Classified(BaseModel):
    index: int
    label: int
    probabilities: list[float]


class Reply(BaseModel):
    data: list[Classified]


def build(engine: OnnxClassifier) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/classify")
    def classify(asked: Images) -> Reply:
        probabilities_BC = np.exp(engine.classify(np.array(asked.images, np.float32)))
        rows = enumerate(probabilities_BC)
        return Reply(data=[Classified(index=i, label=row.argmax(), probabilities=row.tolist()) for i, row in rows])

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return MODELS

    return app


if __name__ == "__main__":
    engine = OnnxClassifier(Path(sys.argv[1]), int(sys.argv[2]))
    uvicorn.run(build(engine), host="127.0.0.1", port=int(sys.argv[3]), access_log=False, log_level="warning")
