"""The HTTP API of a house of models. Knows nothing of Ray: any ASGI server, or a test, can run it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from overproof.engines.base import Sampling
from overproof.errors import InputError
from overproof.serve.async_engine import AsyncEngine, Busy, Generation
from overproof.serve.generation import (
    FAILED,
    ChoiceResult,
    EngineRequest,
    build_requests,
    complete,
    require_grammar,
    stream_events,
    total_usage,
    traffic_exchanges,
)
from overproof.serve.middleware import KEY_IN_SCOPE, Access, AuthMiddleware, Telemetry, error_response
from overproof.serve.model_registry import ModelRegistry, ShadowRequest
from overproof.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest, ModelRequest, RatingRequest
from overproof.serve.response_builder import ChatResponses, CompletionResponses, ServedModel
from overproof.serve.responses import (
    ChatReply,
    Classified,
    ClassifyReply,
    CompletionReply,
    ErrorReply,
    ModelInfo,
    ModelList,
)
from overproof.serve.traffic import Rating

ResultT = TypeVar("ResultT")
BODIES = (CompletionRequest, ChatRequest, ClassifyRequest, RatingRequest)
FIELDS = {name for body in BODIES for name in body.model_fields}
ROUTES = {"text": "/v1/completions", "digits": "/v1/classify"}
SESSION = "x-session-id"  # keeps a client with one version, as its `user` does
CLIENT_GONE = 499  # nobody reads it
KINDS = {404: "not_found_error", 408: "timeout_error", 503: "server_error"}
AGAIN = {"Retry-After": "1"}
REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


def build_app(house: ModelRegistry, access: Access, beside: Telemetry | None = None) -> FastAPI:
    """/v1/models, /v1/completions, /v1/chat/completions, /v1/classify, /healthz, and /docs to try them."""
    beside = beside or Telemetry()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(beside.close)

    app = FastAPIOffline(title="overproof", lifespan=lifespan, redoc_url=None, responses=REFUSALS)
    app.add_middleware(AuthMiddleware, access=access, beside=beside)
    _explain_errors(app)

    async def find(kind: str, request: ModelRequest, http: HttpRequest) -> ServedModel:
        served = await house.find(request.model, http.headers.get(SESSION) or request.user)
        found = served.model.overproof.kind
        if found != kind:
            raise HTTPException(404, f"{served.model.id} is a {found} package; ask it at POST {ROUTES[found]}")
        return served

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether every model answers."""
        await house.check()
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Figures of all replicas, for Prometheus."""
        return await beside.metrics()

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The packages that are served, and what proves them."""
        return ModelList(data=[served.model for served in house.models()])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelInfo:
        """The package of this name or id."""
        return (await house.find(model, None)).model

    async def respond(shape: CompletionResponses | ChatResponses, prompts: list[Any], http: HttpRequest) -> Any:
        served, request = shape.served, shape.request
        asking = partial(build_requests, served, request, prompts, shape.logprobs)
        asked = await asyncio.to_thread(asking) if request.constrained else asking()  # a schema may be large
        house.asked(served, _text(asked))
        began_s, first_event_s = time.perf_counter(), None

        async def done(outcomes: list[ChoiceResult], failed: bool) -> None:
            seconds = time.perf_counter() - began_s
            house.ended(served, seconds, failed)
            usage = total_usage(outcomes, request.n)
            beside.used(served.model.overproof.package, http.scope.get(KEY_IN_SCOPE), usage)
            if beside.recorder is not None:
                for exchange in await traffic_exchanges(shape, asked, outcomes, seconds, first_event_s):
                    beside.recorder.keep(exchange)

        with _counted(house, served, began_s):
            if request.stream and len(prompts) > 1:  # else the first may be begun when another turns out to be bad
                await asyncio.gather(*(served.backend.accept(*ask) for ask in asked[:: request.n]))
            if request.stream:
                events = stream_events(shape, asked, done)
                first = await anext(events)  # what is wrong with the request shows before the reply begins
                first_event_s = time.perf_counter() - began_s
                beside.began(served.model.overproof.package, first_event_s)
                return StreamingResponse(_chain(first, events), media_type="text/event-stream")
            ended = await _while_there(http, asyncio.ensure_future(_all(served.backend, asked)))
        require_grammar(asked, ended)
        reply, outcomes = complete(shape, ended)
        await done(outcomes, False)
        return reply

    @app.post("/v1/completions", response_model=CompletionReply)
    async def completions(request: CompletionRequest, http: HttpRequest) -> Any:
        """Continue one prompt or several."""
        served = await find("text", request, http)
        return await respond(CompletionResponses(served, request), request.prompt, http)

    @app.post("/v1/chat/completions", response_model=ChatReply)
    async def chat_completions(request: ChatRequest, http: HttpRequest) -> Any:
        """Answer messages, by the model's own chat template."""
        served = await find("text", request, http)
        messages = [{"role": m.role.replace("developer", "system"), "content": m.content} for m in request.messages]
        prompt = await served.backend.chat_prompt(messages)
        return await respond(ChatResponses(served, request), [prompt], http)

    @app.post("/v1/ratings")
    async def ratings(request: RatingRequest) -> dict[str, str]:
        """Say what a reply was worth, where traffic is kept."""
        if beside.recorder is None:
            raise HTTPException(404, "no traffic is kept here, so there is nothing to rate; set serve.traffic")
        beside.recorder.rate(Rating(request.id, datetime.now(UTC), request.rating, request.comment))
        return {"status": "ok"}

    @app.post("/v1/classify")
    async def classify(request: ClassifyRequest, http: HttpRequest) -> ClassifyReply:
        """The class of each image."""
        served = await find("digits", request, http)
        if len({len(image) for image in request.images}) > 1:
            raise InputError("images: they differ in size; expected one size")
        pixels_BD = np.array(request.images, dtype=np.float32)
        house.asked(served, _images(pixels_BD))
        began_s = time.perf_counter()
        with _counted(house, served, began_s):
            probabilities_BC = np.exp(await served.backend.classify(pixels_BD))
        house.ended(served, time.perf_counter() - began_s, False)
        data = [
            Classified(index=i, label=int(row.argmax()), probabilities=row.tolist())
            for i, row in enumerate(probabilities_BC)
        ]
        return ClassifyReply(**served.named, data=data)

    return app


@contextmanager
def _counted(house: ModelRegistry, served: ServedModel, began_s: float) -> Iterator[None]:
    """A fault of the server is told to the house; one of the request, or too many of them, is none."""
    try:
        yield
    except (InputError, HTTPException, Busy):
        raise
    except Exception:
        house.ended(served, time.perf_counter() - began_s, True)
        raise


def _text(asked: list[EngineRequest]) -> ShadowRequest:
    async def everything(backend: AsyncEngine) -> Any:
        return await _all(backend, asked)

    async def next_token(backend: AsyncEngine) -> Any:
        return (await backend.complete(asked[0][0], Sampling(1))).text

    return ShadowRequest(everything, next_token)


def _images(pixels_BD: NDArray[np.float32]) -> ShadowRequest:
    async def labels(backend: AsyncEngine) -> Any:
        return (await backend.classify(pixels_BD)).argmax(axis=1).tolist()

    return ShadowRequest(labels, labels)


async def _all(backend: AsyncEngine, asked: list[EngineRequest]) -> list[Generation]:
    """Every choice; where one cannot be had, the others end too."""
    tasks = [asyncio.ensure_future(backend.complete(*ask)) for ask in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _while_there(http: HttpRequest, work: asyncio.Future[ResultT]) -> ResultT:
    """What comes of the work, which ends early when its client goes."""
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(CLIENT_GONE, "the client went away")
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _chain(first: str, events: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _explain_errors(app: FastAPI) -> None:
    """Give every refusal one shape and one message."""

    @app.exception_handler(InputError)
    async def unusable(_: HttpRequest, refused: InputError) -> JSONResponse:
        field = str(refused).partition(":")[0]
        return error_response(400, str(refused), param=field if field in FIELDS else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, refused: RequestValidationError) -> JSONResponse:
        first = refused.errors()[0]
        place = [str(part) for part in first["loc"][1:]]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not JSON: {first['ctx']['error']}")
        if first["type"] == "extra_forbidden":
            return error_response(400, f"{place[0]}: unknown field; leave it out", param=place[0])
        message = first["msg"].removeprefix("Value error, ")
        if place:
            return error_response(400, f"{'.'.join(place)}: {message[0].lower()}{message[1:]}", param=place[0])
        if first["type"] == "value_error":  # of several fields
            return error_response(400, message)
        return error_response(400, "expected a JSON object as the body, with Content-Type: application/json")

    @app.exception_handler(HTTPException)
    async def refused(_: HttpRequest, refused: HTTPException) -> Response:
        kind = KINDS.get(refused.status_code, "invalid_request_error")
        return error_response(refused.status_code, refused.detail, kind, headers=dict(refused.headers or {}))

    @app.exception_handler(Busy)
    async def busy(_: HttpRequest, __: Busy) -> JSONResponse:
        return error_response(429, "every replica is busy; ask again in a second", "rate_limit_error", headers=AGAIN)

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, __: Exception) -> JSONResponse:
        return error_response(500, FAILED, kind="server_error")
