"""Endpoints of teachers, over real HTTP: overproof's own server, which can be made to answer otherwise, and vLLM's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from overproof.engines.llamacpp import LlamaCpp
from overproof.engines.vllm_server import QUIET_ENVIRONMENT
from overproof.files import file_sha256
from overproof.package.private_copy import PrivateCopy
from overproof.serve.api_keys import hash_key
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.middleware import Access
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel
from overproof.serve.responses import ModelInfo, Provenance
from overproof.serve.routes import build_app
from single_model import listening

KEY = "a-key-of-the-test"
VLLM_START_S = 600


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
def own_server(file: Path, key: str | None = KEY, max_tokens: int = 32) -> Iterator[OwnServer]:
    """A server of a GGUF file, called `teacher` there, which asks for a key."""
    proof = Provenance(
        task="language_modeling", details={}, package="made/package-0", candidate="teacher", format="f16",
        sha256=file_sha256(file), size_bytes=file.stat().st_size, verdict=[], parents={},
    )  # fmt: skip
    engine, made = LlamaCpp(file), OwnServer()
    no_copy = partial(PrivateCopy, file.parent)  # of a language model nothing else is read
    served = ServedModel(
        ModelInfo(id="teacher", created=0, overproof=proof), ThreadedEngine(engine, 4), max_tokens, no_copy
    )
    app = build_app(SingleModel(served), Access(hash_key(key) if key else None))
    app.add_middleware(BaseHTTPMiddleware, dispatch=made.between)
    with listening(app) as address:
        made.url = f"{address}/v1"
        yield made
    engine.close()


@contextmanager
def vllm_server(python: str, directory: Path, log: Path) -> Iterator[str]:
    """The address of vLLM's server of a Hugging Face directory, called `teacher` there, which asks for ``KEY``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = QUIET_ENVIRONMENT | os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # which is of this environment
    arguments = {
        "model": directory, "served-model-name": "teacher", "host": "127.0.0.1", "port": port, "dtype": "float32",
        "api-key": KEY, "generation-config": "vllm", "max-num-seqs": 4,
    }  # fmt: skip
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline_s = time.monotonic() + VLLM_START_S
        while not _is_healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False
