"""An S3 server that fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


@dataclass(frozen=True)
class Answer:
    """An error of S3."""

    status: str
    code: str
    message: str


FULL = Answer("507 Insufficient Storage", "XMinioStorageFull", "Storage backend has reached its minimum free space.")
BROKEN = Answer("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again.")
SLOW_DOWN = Answer("503 Slow Down", "SlowDown", "Please reduce your request rate.")
UNKNOWN_KEY = Answer("403 Forbidden", "InvalidAccessKeyId", "The Access Key Id you provided does not exist.")


@dataclass
class Faults:
    """What is wrong with the server now, which a test changes; how often it was, and what it was asked."""

    answer: Answer | None = None
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")  # that it answers
    each: int = 1  # of such requests
    wait_s: float = 0.0  # before any answer
    count: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)  # methods and paths, in their order


@contextmanager
def faulty_bucket(uri: str) -> Iterator[tuple[str, Faults]]:
    """The bucket of ``uri``, which this process serves, at another address, where faults can be set."""
    served, faults, numbers = DomainDispatcherApplication(create_backend_app), Faults(), count(1)

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        fault, asked = faults.answer, environ["REQUEST_METHOD"] in faults.methods
        faults.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        time.sleep(faults.wait_s)
        if fault is None or not asked or next(numbers) % faults.each:
            found: Iterable[bytes] = served(environ, start_response)
            return found
        faults.count += 1
        start_response(fault.status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>".encode()]

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    head, mark, query = uri.partition("endpoint_override=")
    try:
        yield f"{head}{mark}127.0.0.1:{server.server_port}{query[query.index('&') :]}", faults
    finally:
        server.shutdown()
        server.server_close()
