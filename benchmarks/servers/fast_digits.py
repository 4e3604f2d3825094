"""A classifier in plain FastAPI under uvicorn: an endpoint that is no coroutine, so each request has a thread.

    python fast_digits.py ONNX THREADS CALLS PORT

The engine is overproof's, in CALLS calls at once at most. `GET /v1/models` does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from overproof.engines.onnx_runtime import OnnxRuntime

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


def build(engine: OnnxRuntime, calls: int) -> FastAPI:
    @asynccontextmanager
    async def limited(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = calls
        yield

    app = FastAPI(lifespan=limited)

    @app.post("/v1/classify")
    def classify(asked: Images) -> Reply:
        probabilities_BC = np.exp(engine.logprobs(np.array(asked.images, np.float32)))
        rows = enumerate(probabilities_BC)
        return Reply(data=[Classified(index=i, label=row.argmax(), probabilities=row.tolist()) for i, row in rows])

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return MODELS

    return app


if __name__ == "__main__":
    threads, calls, port = map(int, sys.argv[2:])
    app = build(OnnxRuntime(Path(sys.argv[1]), threads), calls)
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")
