"""The HTTP API of one package and its engine. Knows nothing of Ray: any ASGI server, or a test, can run it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from overproof.errors import InputError
from overproof.registry.package import Package
from overproof.serve.engines.base import ClassifierEngine, Piece, Pieces, TextEngine
from overproof.serve.limits import Access, Gatekeeper, error
from overproof.serve.schema import (
    DEFAULT_MAX_TOKENS,
    Choice,
    Classified,
    ClassifyReply,
    ClassifyRequest,
    CompletionReply,
    CompletionRequest,
    Model,
    ModelList,
    Proof,
    Usage,
)

Result = TypeVar("Result")
FIELDS = {*CompletionRequest.model_fields, *ClassifyRequest.model_fields}
ROUTES = {"text": "/v1/completions", "digits": "/v1/classify"}


@dataclass(frozen=True)
class Served:
    """A package, the engine that has loaded it, and what a request may ask."""

    package: Package
    engine: TextEngine | ClassifierEngine
    max_tokens: int
    calls: int  # engine calls at the same time; more wait

    @property
    def id(self) -> str:
        return self.package.content.name

    @property
    def fingerprint(self) -> str:
        return self.package.sha256[:16]


def build_http(served: Served, access: Access) -> FastAPI:
    """/healthz, /v1/models, /v1/completions, /v1/classify. Engine calls run in threads of their own."""
    pool = ThreadPoolExecutor(served.calls, thread_name_prefix="engine")

    async def call(function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.engine.close)
        pool.shutdown()

    app = FastAPI(title="overproof", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gatekeeper, access=access)
    _explain_errors(app)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        await asyncio.to_thread(served.engine.check)  # also when every engine thread is taken
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[_model(served.package)])

    @app.post("/v1/completions", response_model=CompletionReply)
    async def completions(request: CompletionRequest) -> Any:
        engine = _engine(served, "text", request.model)
        ask = _completion_arguments(request, served)
        reply = partial(_reply, served, f"cmpl-{uuid.uuid4().hex}", int(time.time()))
        if request.stream:
            pieces = await call(partial(engine.stream, **ask))
            return StreamingResponse(_events(pieces, reply, call), media_type="text/event-stream")
        done = await call(partial(engine.complete, **ask))
        return reply(Piece(done.text, done.finish_reason, done.prompt_tokens, len(done.tokens)))

    @app.post("/v1/classify")
    async def classify(request: ClassifyRequest) -> ClassifyReply:
        engine = _engine(served, "digits", request.model)
        if len({len(image) for image in request.images}) > 1:
            raise InputError("images: they differ in size; expected one size")
        pixels_BD = np.array(request.images, dtype=np.float32)
        probabilities_BC = np.exp(await call(partial(engine.classify, pixels_BD)))
        data = [
            Classified(index=i, label=int(row.argmax()), probabilities=row.tolist())
            for i, row in enumerate(probabilities_BC)
        ]
        return ClassifyReply(model=served.id, system_fingerprint=served.fingerprint, data=data)

    return app


def _engine(served: Served, kind: str, model: str | None) -> Any:
    """The engine, where the package is of this kind and the one that was asked for."""
    content = served.package.content
    if content.kind != kind:
        raise HTTPException(404, f"{content.name} is a {content.kind} package; ask it at POST {ROUTES[content.kind]}")
    if model is not None and model != content.name:
        raise HTTPException(404, f"model {model!r} is not served here; expected {content.name!r}")
    return served.engine


def _completion_arguments(request: CompletionRequest, served: Served) -> dict[str, Any]:
    asked = min(DEFAULT_MAX_TOKENS, served.max_tokens) if request.max_tokens is None else request.max_tokens
    if asked > served.max_tokens:
        raise InputError(f"max_tokens: found {asked}; this server gives at most {served.max_tokens}")
    return {"max_tokens": asked} | request.model_dump(include={"prompt", "temperature", "top_p", "seed", "stop"})


def _reply(served: Served, id_: str, created: int, piece: Piece) -> CompletionReply:
    usage = None
    if piece.finish_reason is not None:
        total = piece.prompt_tokens + piece.completion_tokens
        usage = Usage(prompt_tokens=piece.prompt_tokens, completion_tokens=piece.completion_tokens, total_tokens=total)
    return CompletionReply(
        id=id_,
        created=created,
        model=served.id,
        system_fingerprint=served.fingerprint,
        choices=[Choice(text=piece.text, finish_reason=piece.finish_reason)],
        usage=usage,
    )


async def _events(pieces: Pieces, reply: Callable[[Piece], CompletionReply], call: Any) -> AsyncIterator[str]:
    """Server-sent events; generation ends when the client goes."""
    try:
        while (piece := await call(partial(next, pieces, None))) is not None:
            yield f"data: {reply(piece).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        pieces.close()


def _model(package: Package) -> Model:
    content = package.content
    reasons = next(c.reasons for c in package.verdict.candidates if c.name == content.candidate)
    return Model(
        id=content.name,
        created=int(datetime.fromisoformat(content.created).timestamp()),
        overproof=Proof(
            kind=content.kind,
            candidate=content.candidate,
            format=content.model_format,
            sha256=package.sha256,
            size_bytes=package.size_bytes,
            verdict=[reason.text for reason in reasons],
            parents=content.parents,
        ),
    )


def _explain_errors(app: FastAPI) -> None:
    """Give every refusal one shape and one message."""

    @app.exception_handler(InputError)
    async def unusable(_: Request, refused: InputError) -> JSONResponse:
        field = str(refused).partition(":")[0]
        return error(400, str(refused), param=field if field in FIELDS else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, refused: RequestValidationError) -> JSONResponse:
        first = refused.errors()[0]
        place = [str(part) for part in first["loc"][1:]]
        if first["type"] == "json_invalid":
            return error(400, f"the body is not JSON: {first['ctx']['error']}")
        if first["type"] == "extra_forbidden":
            return error(400, f"{place[0]}: unknown field; leave it out", param=place[0])
        if not place:
            return error(400, "expected a JSON object as the body, with Content-Type: application/json")
        message = first["msg"].removeprefix("Value error, ")
        return error(400, f"{'.'.join(place)}: {message[0].lower()}{message[1:]}", param=place[0])

    @app.exception_handler(HTTPException)
    async def refused(_: Request, refused: HTTPException) -> Response:
        kind = "not_found_error" if refused.status_code == 404 else "invalid_request_error"
        return error(refused.status_code, refused.detail, kind, headers=dict(refused.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return error(500, "the server failed; its log says why", kind="server_error")
