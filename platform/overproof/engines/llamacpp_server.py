"""llama.cpp's server as `xllamacpp` runs it: its settings, its answers, and its HTTP port."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import xllamacpp

from overproof.engines.gguf_tokens import GgufHeader, read_gguf_header
from overproof.errors import InputError

TIMEOUT_S = 10
CONNECTIONS = 2


@dataclass(frozen=True)
class LlamaCppDraft:
    """A small model with the vocabulary of a large one, which guesses the next ``tokens`` of its text each time."""

    path: Path
    tokens: int

    @classmethod
    def of(cls, path: Path, tokens: int, model: GgufHeader) -> LlamaCppDraft:
        """A draft for a model.

        Raises:
            InputError: it has another vocabulary, which llama.cpp would not refuse, or is to guess no token.
        """
        if tokens < 1:
            raise InputError(f"draft_tokens: found {tokens}; expected 1 or more")
        if read_gguf_header(path).vocabulary != model.vocabulary:
            raise InputError(f"{path}: has another vocabulary than the model; expected one with the same tokenizer")
        return cls(path, tokens)

    def insist(self, http: LlamaCppHttp) -> None:
        """Hold a server to drafting: one that cannot load the draft goes on without.

        Raises:
            InputError: it does not draft.
        """
        if not all(slot["speculative"] for slot in http.ask("GET", "/slots")):
            raise InputError(f"{self.path}: llama.cpp does not take it as a draft; expected a whole GGUF file")


def server_params(
    path: Path, threads: int, slots: int, context_length: int, key: str, draft: LlamaCppDraft | None = None
) -> Any:
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
    if draft is not None:
        settings.endpoint_slots = True  # where it says whether it drafts
        settings.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        guesses = settings.speculative.draft
        guesses.mparams.path = str(draft.path)
        guesses.n_max = draft.tokens
        guesses.cpuparams.n_threads = guesses.cpuparams_batch.n_threads = threads
    return settings


def start_server(path: Path, settings: Any) -> Any:
    """A running server.

    Raises:
        InputError: llama.cpp cannot load the file.
    """
    try:
        return xllamacpp.Server(settings)
    except RuntimeError as error:
        raise InputError(f"{path}: llama.cpp cannot load it: {error}; expected a whole GGUF file") from None


def check_reply(reply: dict[str, Any]) -> dict[str, Any]:
    """An answer of llama.cpp, or its error raised."""
    if "error" in reply:
        error = reply["error"]
        if "grammar" in error["message"]:
            raise InputError("grammar: llama.cpp cannot read it; expected GBNF whose first rule is root")
        raise (InputError if error["code"] == 400 else RuntimeError)(f"llama.cpp: {error['message']}")
    return reply


class LlamaCppHttp:
    """llama.cpp's HTTP port, for what the binding has no call for.

    Each call has its own connection: one that stays open would keep one of the server's few threads.
    """

    def __init__(self, address: str, key: str) -> None:
        self._address = address.removeprefix("http://")
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "Connection": "close"}
        self._turn = threading.Semaphore(CONNECTIONS)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request and its JSON answer."""
        with self._turn, closing(HTTPConnection(self._address, timeout=TIMEOUT_S)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            reply = connection.getresponse()
            content = json.loads(reply.read())
        if reply.status != HTTPStatus.OK:
            raise RuntimeError(f"llama.cpp answered {reply.status} at {path}: {content}")
        return content
