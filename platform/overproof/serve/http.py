"""The HTTP API of one package and its engine. Knows nothing of Ray: any ASGI server, or a test, can run it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from overproof.errors import InputError
from overproof.serve.answers import FAILED, Outcome, asks, exchanges, streamed, usage_of, whole
from overproof.serve.beside import Beside
from overproof.serve.limits import KEY_IN_SCOPE, Access, Gatekeeper, error
from overproof.serve.replies import (
    ChatReply,
    Classified,
    ClassifyReply,
    CompletionReply,
    ErrorReply,
    Model,
    ModelList,
)
from overproof.serve.schema import ChatRequest, ClassifyRequest, CompletionRequest, RatingRequest
from overproof.serve.shapes import Chat, Completions, Served, model_of
from overproof.serve.traffic import Rating

Result = TypeVar("Result")
BODIES = (CompletionRequest, ChatRequest, ClassifyRequest, RatingRequest)
FIELDS = {name for body in BODIES for name in body.model_fields}
ROUTES = {"text": "/v1/completions", "digits": "/v1/classify"}
REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


def build_http(served: Served, access: Access, beside: Beside | None = None) -> FastAPI:
    """/v1/models, /v1/completions, /v1/chat/completions, /v1/classify, /healthz, and /docs to try them.

    Engine calls run in threads of their own.
    """
    beside = beside or Beside()
    pool = ThreadPoolExecutor(served.calls, thread_name_prefix="engine")

    async def call(function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.engine.close)
        await asyncio.to_thread(beside.close)
        pool.shutdown()

    app = FastAPIOffline(title="overproof", lifespan=lifespan, redoc_url=None, responses=REFUSALS)
    app.add_middleware(Gatekeeper, access=access, beside=beside)
    _explain_errors(app)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the engine answers."""
        await asyncio.to_thread(served.engine.check)  # also when every engine thread is taken
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Figures of all replicas, for Prometheus."""
        return await beside.metrics()

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The package that is served, and what proves it."""
        return ModelList(data=[model_of(served.package)])

    @app.get("/v1/models/{model}")
    async def model(model: str) -> Model:
        """The package of this name."""
        _engine(served, served.package.content.kind, model)
        return model_of(served.package)

    async def respond(shape: Completions | Chat, prompts: list[Any], http: Request) -> Any:
        engine = served.engine
        asking = partial(asks, served, shape.request, prompts, shape.logprobs)
        asked = await call(asking) if shape.request.constrained else asking()  # a schema may be large
        began_s, first_event_s = time.perf_counter(), None

        async def done(outcomes: list[Outcome]) -> None:
            await beside.used(http.scope.get(KEY_IN_SCOPE), usage_of(outcomes, shape.request.n))
            if beside.recorder is not None:
                for exchange in exchanges(shape, asked, outcomes, time.perf_counter() - began_s, first_event_s):
                    beside.recorder.keep(exchange)

        if shape.request.stream:
            events = streamed(shape, engine, asked, call, done)
            first = await anext(events)  # what is wrong with the request shows before the reply begins
            first_event_s = time.perf_counter() - began_s
            beside.began(first_event_s)
            return StreamingResponse(_chain(first, events), media_type="text/event-stream")
        ended = await asyncio.gather(*(call(partial(engine.complete, *ask)) for ask in asked))  # type: ignore[union-attr]
        reply, outcomes = whole(shape, ended)
        await done(outcomes)
        return reply

    @app.post("/v1/completions", response_model=CompletionReply)
    async def completions(request: CompletionRequest, http: Request) -> Any:
        """Continue one prompt or several."""
        _engine(served, "text", request.model)
        return await respond(Completions(served, request), request.prompt, http)

    @app.post("/v1/chat/completions", response_model=ChatReply)
    async def chat_completions(request: ChatRequest, http: Request) -> Any:
        """Answer messages, by the model's own chat template."""
        engine = _engine(served, "text", request.model)
        messages = [{"role": m.role.replace("developer", "system"), "content": m.content} for m in request.messages]
        prompt = await call(partial(engine.chat_prompt, messages))
        return await respond(Chat(served, request), [prompt], http)

    @app.post("/v1/ratings")
    async def ratings(request: RatingRequest) -> dict[str, str]:
        """Say what a reply was worth, where traffic is kept."""
        if beside.recorder is None:
            raise HTTPException(404, "no traffic is kept here, so there is nothing to rate; set serve.traffic")
        beside.recorder.rate(Rating(request.id, datetime.now(UTC), request.rating, request.comment))
        return {"status": "ok"}

    @app.post("/v1/classify")
    async def classify(request: ClassifyRequest) -> ClassifyReply:
        """The class of each image."""
        engine = _engine(served, "digits", request.model)
        if len({len(image) for image in request.images}) > 1:
            raise InputError("images: they differ in size; expected one size")
        pixels_BD = np.array(request.images, dtype=np.float32)
        probabilities_BC = np.exp(await call(partial(engine.classify, pixels_BD)))
        data = [
            Classified(index=i, label=int(row.argmax()), probabilities=row.tolist())
            for i, row in enumerate(probabilities_BC)
        ]
        return ClassifyReply(**served.named, data=data)

    return app


async def _chain(first: str, events: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _engine(served: Served, kind: str, model: str | None) -> Any:
    """The engine, where the package is of this kind and the one that was asked for."""
    content = served.package.content
    if content.kind != kind:
        raise HTTPException(404, f"{content.name} is a {content.kind} package; ask it at POST {ROUTES[content.kind]}")
    if model is not None and model != content.name:
        raise HTTPException(404, f"model {model!r} is not served here; expected {content.name!r}")
    return served.engine


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
        message = first["msg"].removeprefix("Value error, ")
        if place:
            return error(400, f"{'.'.join(place)}: {message[0].lower()}{message[1:]}", param=place[0])
        if first["type"] == "value_error":  # of several fields
            return error(400, message)
        return error(400, "expected a JSON object as the body, with Content-Type: application/json")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, refused: HTTPException) -> Response:
        kind = "not_found_error" if refused.status_code == 404 else "invalid_request_error"
        return error(refused.status_code, refused.detail, kind, headers=dict(refused.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return error(500, FAILED, kind="server_error")
