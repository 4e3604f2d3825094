"""One package in this process, as the HTTP API takes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from overproof.package.package import open_package
from overproof.package.private_copy import PrivateCopy
from overproof.serve.async_engine import ThreadedEngine
from overproof.serve.model_registry import SingleModel
from overproof.serve.response_builder import ServedModel, model_info


def one(package: Path, engine: Any, max_tokens: int = 32, calls: int = 4) -> SingleModel:
    """A registry of this package alone, answered by this engine."""
    info = model_info(open_package(package))
    return SingleModel(ServedModel(info, ThreadedEngine(engine, calls), max_tokens, partial(PrivateCopy, package)))


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address at which an application answers, at a port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", proxy_headers=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
