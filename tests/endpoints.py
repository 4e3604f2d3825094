"""overproof's own server as the endpoint of a teacher, over real HTTP, which can be made to answer otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from overproof.engines.llamacpp import LlamaCpp
from overproof.files import file_sha256
from overproof.serve.api_keys import hash_key
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.middleware import Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel
from overproof.serve.responses import ModelInfo, Provenance
from overproof.serve.routes import build_app
from single_model import listening

KEY = "a-key-of-the-test"


@dataclass
class OwnServer:
    """Where it answers, what it was asked, and what comes between it and its clients."""

    url: str = ""
    completions: int = 0  # requests that were answered
    busy: int = 0  # further requests that are turned away
    down_after: int | None = None  # answered requests after which all are turned away
    change: Callable[[Any], None] | None = None  # of the content of an answer

    async def between(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        if self.busy > 0 or (self.down_after is not None and self.completions >= self.down_after):
            self.busy -= 1
            return JSONResponse({"error": {"message": "busy"}}, 503)
        self.completions += request.method == "POST"
        response = await call_next(request)
        if self.change is None:
            return response
        content = json.loads(b"".join([chunk async for chunk in response.body_iterator]))  # type: ignore[attr-defined]
        self.change(content)
        return JSONResponse(content, response.status_code)


@contextmanager
def own_server(file: Path) -> Iterator[OwnServer]:
    """A server of a GGUF file, called `teacher` there, which asks for ``KEY``."""
    proof = Provenance(
        task="language_modeling", details={}, package="made/package-0", candidate="teacher", format="f16",
        sha256=file_sha256(file), size_bytes=file.stat().st_size, verdict=[], parents={},
    )  # fmt: skip
    engine, made = LlamaCpp(file), OwnServer()
    served = ServedModel(ModelInfo(id="teacher", created=0, overproof=proof), ThreadedEngine(engine, 4), 32, str(file))
    app = build_app(SingleModel(served), Access(hash_key(KEY)))
    app.add_middleware(BaseHTTPMiddleware, dispatch=made.between)
    with listening(app) as address:
        made.url = f"{address}/v1"
        yield made
    engine.close()
