"""The HTTP API: routes, and errors in one shape. Knows nothing of Ray: any ASGI server, or a test, can run it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, TypeVar, Union

from fastapi import Body, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from overproof.engines.base import Sampling
from overproof.errors import InputError, suggest_name
from overproof.registry import TASKS
from overproof.serve.async_engine import AsyncEngine, Busy, Generation, OnWork, ignore_work
from overproof.serve.bodies import CLIENT_CLOSED_REQUEST, fair_route
from overproof.serve.generation import (
    ChoiceResult,
    EngineRequest,
    build_reply,
    build_requests,
    grammar_source,
    require_grammar,
    stream_events,
    traffic_exchanges,
)
from overproof.serve.grammar_compiler import GrammarCompiler
from overproof.serve.middleware import (
    KEY_IN_SCOPE,
    Access,
    AuthMiddleware,
    SourceMiddleware,
    Telemetry,
    error_response,
)
from overproof.serve.model_registry import ModelRegistry, ShadowRequest, TimedAnswer
from overproof.serve.request_source import OPEN_PATHS, SourcePolicy
from overproof.serve.requests import ChatRequest, CompletionRequest, RatingRequest
from overproof.serve.response_builder import ChatResponses, CompletionResponses, ServedModel
from overproof.serve.responses import (
    ChatReply,
    CompletionReply,
    ErrorReply,
    ModelInfo,
    ModelList,
    RowsReply,
)
from overproof.serve.traffic import Rating
from overproof.tasks.base import ArrayTask
from overproof.tasks.http import ModelRequest

ResultT = TypeVar("ResultT")
RequestT = TypeVar("RequestT", bound=BaseModel)
COMPLETIONS, CHAT_COMPLETIONS = "/v1/completions", "/v1/chat/completions"
WRITING = (COMPLETIONS, CHAT_COMPLETIONS)  # every model that writes answers at both
SESSION_HEADER = "x-session-id"  # keeps a client with one version, as its `user` does
ERROR_TYPES = {404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error", 503: "server_error"}
TIMED_TOKENS = 16  # that two versions generate to be compared
LONGEST_GUESSED = 32  # characters of an unknown field that is held against the known ones
SHORT_BODY_BYTES = 16 << 10  # read in less time than a thread takes to begin
# Proxies pass events on one by one: nginx buffers a reply, and some compress or store it, unless told not to.
STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
RETRY_HEADERS = {"Retry-After": "1"}
DEFAULT_SOURCE = SourcePolicy()
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


def build_app(
    registry: ModelRegistry,
    access: Access,
    telemetry: Telemetry | None = None,
    source: SourcePolicy = DEFAULT_SOURCE,
) -> FastAPI:
    """/v1/models, the routes of every task, /healthz, /readyz, and /docs to try them."""
    telemetry, compiler = telemetry or Telemetry(), GrammarCompiler()
    array_tasks = {kind: task for kind, task in TASKS.items() if isinstance(task, ArrayTask)}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await compiler.close()
        await asyncio.to_thread(telemetry.close)

    app = FastAPIOffline(title="overproof", lifespan=lifespan, redoc_url=None, responses=ERROR_RESPONSES)
    app.router.route_class = fair_route()
    app.add_middleware(AuthMiddleware, access=access, telemetry=telemetry)
    app.add_middleware(SourceMiddleware, policy=source, needs_key=access.needs_key)  # before it
    _add_error_handlers(
        app, {CompletionRequest, ChatRequest, RatingRequest, *(task.request for task in array_tasks.values())}
    )

    async def find(route: str, request: ModelRequest, http: HttpRequest) -> ServedModel:
        served = await registry.find(request.model, http.headers.get(SESSION_HEADER) or request.user)
        task = served.model.overproof.task
        if TASKS[task].route not in (WRITING if route in WRITING else (route,)):
            raise HTTPException(404, f"{served.model.id} does {task}; ask it at POST {TASKS[task].route}")
        return served

    @app.get("/healthz", summary="Health")
    async def healthz() -> dict[str, str]:
        """Whether every model answers."""
        await registry.check()
        return {"status": "ok"}

    @app.get("/readyz", summary="Readiness")
    async def readyz() -> dict[str, str]:
        """Whether a load balancer should send requests to this gateway."""
        await registry.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Metrics of all replicas, for Prometheus."""
        return await telemetry.metrics()

    @app.get("/v1/models", summary="List models")
    async def models() -> ModelList:
        """The models that are served, and what proves them."""
        return ModelList(data=[served.model for served in registry.models()])

    @app.get("/v1/models/{model:path}", summary="Describe a model")
    async def model(model: str) -> ModelInfo:
        """The model of this name or package id."""
        return (await registry.find(model, None)).model

    async def respond(builder: CompletionResponses | ChatResponses, prompts: list[Any], http: HttpRequest) -> Any:
        served, request = builder.served, builder.request
        source = grammar_source(request, builder.syntax if isinstance(builder, ChatResponses) else None)
        grammar = None if source is None else await compiler.compile(source, len(prompts) * request.n)
        requests = build_requests(served, request, prompts, builder.logprobs, None if grammar is None else grammar.lark)
        registry.on_request(served, _text_shadow(requests))
        start_s, first_event_s = time.perf_counter(), None
        # Each request of the engine is charged when it has ended, which may be after this one: what was done counts.
        on_work = partial(telemetry.on_work, served.model.overproof.package, http.scope.get(KEY_IN_SCOPE))

        async def on_complete(results: list[ChoiceResult], failed: bool) -> None:
            seconds = time.perf_counter() - start_s
            registry.on_complete(served, failed)
            if telemetry.recorder is not None:
                for exchange in await traffic_exchanges(builder, requests, results, seconds, first_event_s):
                    telemetry.recorder.record(exchange)

        with _count_failures(registry, served):
            if request.stream and len(prompts) > 1:  # before any starts, for one may be bad
                await asyncio.gather(*(served.engine.validate(*each) for each in requests[:: request.n]))
            if request.stream:
                events = stream_events(builder, requests, grammar, on_complete, on_work)
                # An error of the request shows here, before the reply begins.
                first = await _unless_disconnected(http, asyncio.ensure_future(_first(events)))
                first_event_s = time.perf_counter() - start_s
                telemetry.on_first_event(served.model.overproof.package, first_event_s)
                return StreamingResponse(
                    _prepend(first, events), headers=STREAM_HEADERS, media_type="text/event-stream"
                )
            generations = await _unless_disconnected(
                http, asyncio.ensure_future(_complete_all(served.engine, requests, on_work))
            )
        if grammar is not None:
            require_grammar(grammar, generations)
        reply, results = build_reply(builder, generations)
        await on_complete(results, False)
        return reply

    @app.post(COMPLETIONS, summary="Continue a prompt", response_model=CompletionReply)
    async def completions(request: CompletionRequest, http: HttpRequest) -> Any:
        """Continue one prompt or several."""
        served = await find(COMPLETIONS, request, http)
        return await respond(CompletionResponses(served, request), request.prompt, http)

    @app.post(CHAT_COMPLETIONS, summary="Answer a conversation", response_model=ChatReply)
    async def chat_completions(request: ChatRequest, http: HttpRequest) -> Any:
        """Answer messages, or call a tool, by the model's own chat template."""
        served = await find(CHAT_COMPLETIONS, request, http)
        tools = [tool.model_dump(exclude_none=True) for tool in request.offered_tools]
        prompt = await served.engine.chat_prompt([message.for_template() for message in request.messages], tools)
        syntax = await served.engine.tool_syntax() if tools else None
        return await respond(ChatResponses(served, request, syntax), [prompt], http)

    @app.post("/v1/ratings", summary="Rate a reply")
    async def ratings(request: RatingRequest) -> dict[str, str]:
        """Rate a reply, where traffic is recorded."""
        if telemetry.recorder is None:
            raise HTTPException(404, "traffic is not recorded here, so there is nothing to rate; set serve.traffic")
        telemetry.recorder.rate(Rating(request.id, datetime.now(UTC), request.rating, request.comment))
        return {"status": "ok"}

    def add_rows_route(route: str) -> None:
        kinds = [kind for kind, task in array_tasks.items() if task.route == route]
        tasks = [array_tasks[kind] for kind in kinds]
        replies: Any = Union[tuple(task.row_reply for task in tasks)]  # noqa: UP007

        @app.post(
            route,
            summary=", ".join(kinds).replace("_", " ").capitalize(),
            response_model=RowsReply[replies],
            openapi_extra=_one_of([task.request for task in tasks]),
        )
        async def answer_rows(body: Annotated[dict[str, Any], Body()], http: HttpRequest) -> Any:
            """What the model says of each row of the request."""
            chosen = {name: body[name] for name in ModelRequest.model_fields if name in body}
            served = await find(route, _parse(ModelRequest, chosen), http)
            task = array_tasks[served.model.overproof.task]
            request = _parse(task.request, body)
            is_short = int(http.headers.get("content-length", SHORT_BODY_BYTES + 1)) <= SHORT_BODY_BYTES
            registry.on_request(served, _rows_shadow(task, request, is_short))
            with _count_failures(registry, served):
                data = await _answer_rows(task, request, served, is_short)
            registry.on_complete(served, False)
            return {**served.reply_fields, "data": data}

    for route in sorted({task.route for task in array_tasks.values()}):
        add_rows_route(route)
    for each in list(app.routes):
        if isinstance(each, APIRoute) and "GET" in (each.methods or ()):
            app.add_api_route(each.path, each.endpoint, methods=["HEAD"], include_in_schema=False,
                              response_class=each.response_class)  # fmt: skip
    if access.needs_key:
        _describe_key(app)
    return app


def _describe_key(app: FastAPI) -> None:
    """Have /docs ask for a key: "Authorize". What holds requests to it is ``AuthMiddleware``."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        told = "A key of `overproof keys add`, or OVERPROOF_API_KEY of the server. /metrics takes an operator's."
        scheme = {"type": "http", "scheme": "bearer", "description": told}
        schema["components"]["securitySchemes"] = {"API key": scheme}
        schema["security"] = [{"API key": []}]
        for path in OPEN_PATHS:
            for operation in schema["paths"][path].values():
                operation["security"] = []
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


@contextmanager
def _count_failures(registry: ModelRegistry, served: ServedModel) -> Iterator[None]:
    """Tell the registry of a failure of the server; an error of the request, or a full queue, is none."""
    try:
        yield
    except (InputError, HTTPException, Busy):
        raise
    except Exception:
        registry.on_complete(served, True)
        raise


def _text_shadow(requests: list[EngineRequest]) -> ShadowRequest:
    async def complete_all(served: ServedModel) -> Any:
        return await _complete_all(served.engine, requests)

    async def few_tokens(served: ServedModel) -> TimedAnswer:
        """The next token; then, of a prompt that every version has read by now, the time of a few."""
        prompt, engine = requests[0][0], served.engine
        answer = (await engine.complete(prompt, Sampling(1))).text
        timed = await engine.complete(prompt, Sampling(TIMED_TOKENS))
        return TimedAnswer(answer, timed.seconds, timed.completion_tokens)

    return ShadowRequest(complete_all, few_tokens)


def _rows_shadow(task: ArrayTask, request: Any, is_short: bool) -> ShadowRequest:
    async def answers(served: ServedModel) -> Any:
        return await _answer_rows(task, request, served, is_short)

    async def compare(served: ServedModel) -> TimedAnswer:
        start_s = time.perf_counter()
        answer = await answers(served)
        return TimedAnswer(answer, time.perf_counter() - start_s, len(answer))

    return ShadowRequest(answers, compare, task.agree)


async def _answer_rows(task: ArrayTask, request: Any, served: ServedModel, is_short: bool) -> list[dict[str, Any]]:
    """Rows are read as this version's model takes them; where there may be many, not in the event loop."""
    details = served.model.overproof.details
    folder = served.folder if served.is_open else await asyncio.to_thread(lambda: served.folder)
    read = partial(task.inputs, request, details, folder)
    inputs_BD = read() if is_short else await asyncio.to_thread(read)
    return list(task.answers(await served.engine.logprobs(inputs_BD), details))


def _parse(request: type[RequestT], body: dict[str, Any]) -> RequestT:
    """The body as the request of a task, which the model that it names decides.

    Raises:
        RequestValidationError: it is not such a request; answered as those of every other route.
    """
    try:
        return request.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None


def _one_of(requests: list[type[BaseModel]]) -> dict[str, Any]:
    """The body for /docs: one of these."""
    schemas = [request.model_json_schema() for request in dict.fromkeys(requests)]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"anyOf": schemas}}}}}


async def _complete_all(
    engine: AsyncEngine, requests: list[EngineRequest], on_work: OnWork = ignore_work
) -> list[Generation]:
    """Every choice; where one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(engine.complete(*request, on_work)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _unless_disconnected(http: HttpRequest, work: asyncio.Future[ResultT]) -> ResultT:
    """The result of the work, which is cancelled when the client disconnects."""
    disconnected = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((work, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HTTPException(CLIENT_CLOSED_REQUEST, "the client went away")
        return work.result()
    finally:
        work.cancel()
        disconnected.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _first(events: AsyncGenerator[str]) -> str:
    return await anext(events)


async def _prepend(first: str, events: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _add_error_handlers(app: FastAPI, requests: set[type[BaseModel]]) -> None:
    """Give every error one shape and one message; fields of these requests are named in it."""
    fields = {name for request in requests for name in request.model_fields}

    @app.exception_handler(InputError)
    async def on_input_error(_: HttpRequest, error: InputError) -> JSONResponse:
        field = str(error).partition(":")[0].partition(".")[0]
        return error_response(400, str(error), param=field if field in fields else None, code=error.code)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"][1:]]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not JSON: {first['ctx']['error']}")
        if first["type"] == "extra_forbidden":
            near = suggest_name(path[0], fields) if len(path) == 1 and len(path[0]) <= LONGEST_GUESSED else ""
            return error_response(400, f"{'.'.join(path)}: unknown field{near}; leave it out", param=path[0])
        message = first["msg"].removeprefix("Value error, ")
        if path:
            return error_response(400, f"{'.'.join(path)}: {message[0].lower()}{message[1:]}", param=path[0])
        if first["type"] == "value_error":  # of several fields
            return error_response(400, message)
        return error_response(400, "expected a JSON object as the body, with Content-Type: application/json")

    @app.exception_handler(HTTPException)
    async def on_http_exception(_: HttpRequest, error: HTTPException) -> Response:
        kind = ERROR_TYPES.get(error.status_code, "invalid_request_error")
        return error_response(error.status_code, error.detail, kind, headers=dict(error.headers or {}))

    @app.exception_handler(Busy)
    async def on_busy(_: HttpRequest, __: Busy) -> JSONResponse:
        return error_response(
            429, "every replica is busy; ask again in a second", "rate_limit_error", headers=RETRY_HEADERS
        )
