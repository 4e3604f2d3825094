"""llama.cpp's server as `xllamacpp` runs it: its settings, its answers, and its HTTP port."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import xllamacpp

from overproof.errors import InputError

TIMEOUT_S = 10
CONNECTIONS = 2


def settings_of(path: Path, threads: int, slots: int, context_length: int, key: str) -> Any:
    """A silent server for one file, whose HTTP port answers only to the key."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = context_length * slots  # divided between the slots
    settings.n_parallel = slots
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = -1
    settings.cache_ram_mib = 0  # else up to 8 GiB of past prompts
    settings.fit_params = False
    settings.ui = settings.endpoint_slots = False
    settings.api_keys = [key]
    return settings


def checked(reply: dict[str, Any]) -> dict[str, Any]:
    """An answer of llama.cpp, or its error raised."""
    if "error" in reply:
        error = reply["error"]
        if "grammar" in error["message"]:
            raise InputError("grammar: llama.cpp cannot read it; expected GBNF whose first rule is root")
        raise (InputError if error["code"] == 400 else RuntimeError)(f"llama.cpp: {error['message']}")
    return reply


class Http:
    """llama.cpp's HTTP port, for what the binding has no call for.

    Each call has its own connection: one that stays open would keep one of the server's few threads.
    """

    def __init__(self, address: str, key: str) -> None:
        self._address = address.removeprefix("http://")
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "Connection": "close"}
        self._turn = threading.Semaphore(CONNECTIONS)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request and its JSON answer."""
        with self._turn, closing(HTTPConnection(self._address, timeout=TIMEOUT_S)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            reply = connection.getresponse()
            content: dict[str, Any] = json.loads(reply.read())
        if reply.status != HTTPStatus.OK:
            raise RuntimeError(f"llama.cpp answered {reply.status} at {path}: {content}")
        return content
