"""llama.cpp's server as `xllamacpp` runs it: its parameters, its replies, and its HTTP port."""

from __future__ import annotations

import json
import select
import threading
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from overproof.config.base import KvCache
from overproof.engines.gguf_tokens import GgufHeader, read_gguf_header
from overproof.engines.llamacpp_library import xllamacpp
from overproof.engines.prompt_limits import require_wanted
from overproof.errors import InputError

TIMEOUT_S = 10
MAX_CONNECTIONS = 2
CANCEL_POLL_S = 0.05


@dataclass(frozen=True)
class LlamaCppDraft:
    """A small model with the vocabulary of a large one, which guesses the next ``tokens`` of its text."""

    path: Path
    tokens: int

    @classmethod
    def of(cls, path: Path, tokens: int, model: GgufHeader) -> LlamaCppDraft:
        """A draft for a model.

        Raises:
            InputError: it has another vocabulary, which llama.cpp would not refuse, or ``tokens`` is below 1.
        """
        if tokens < 1:
            raise InputError(f"draft_tokens: found {tokens}; expected 1 or more")
        if read_gguf_header(path).vocabulary_sha256 != model.vocabulary_sha256:
            raise InputError(f"{path}: has another vocabulary than the model; expected one with the same tokenizer")
        return cls(path, tokens)

    def require_drafting(self, http: LlamaCppHttp) -> None:
        """Check that a server drafts: one that cannot load the draft runs without it.

        Raises:
            InputError: it does not.
        """
        if not all(slot["speculative"] for slot in http.request("GET", "/slots")):
            raise InputError(f"{self.path}: llama.cpp does not take it as a draft; expected a whole GGUF file")


def server_params(
    path: Path,
    threads: int,
    slots: int,
    context_length: int,
    key: str,
    draft: LlamaCppDraft | None = None,
    kv_cache: KvCache = "f16",
) -> Any:
    """Parameters of a server for one file that logs nothing, and whose HTTP port needs the key."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context_length * slots  # divided between the slots
    params.n_parallel = slots
    if kv_cache != "f16":
        params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kv_cache.upper()}")
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    params.cache_ram_mib = 0  # else up to 8 GiB of past prompts
    params.fit_params = False
    params.ui = params.endpoint_slots = False
    params.chat_template = "{{ messages }}"  # else it reads the file's, natively: a hostile one ends this process
    params.endpoint_metrics = True  # which ``start_server`` waits for
    params.api_keys = [key]
    params.n_threads_http = slots + MAX_CONNECTIONS + 1  # a completion has a connection of its own
    if draft is not None:
        params.endpoint_slots = True  # which report whether it drafts
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        drafting = params.speculative.draft
        drafting.mparams.path = str(draft.path)
        drafting.n_max = draft.tokens
        drafting.cpuparams.n_threads = drafting.cpuparams_batch.n_threads = threads
    return params


def start_server(path: Path, params: Any) -> Any:
    """A running server.

    Raises:
        InputError: llama.cpp cannot load the file.
    """
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise InputError(f"{path}: llama.cpp cannot load it: {error}; expected a whole GGUF file") from None
    # Answered by the server's loop, which runs then: a server that is freed before its loop runs waits for it for ever.
    server.handle_metrics()
    return server


def check_reply(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply, raised where it is an error."""
    if "error" in reply:
        error = reply["error"]
        if "grammar" in error["message"]:
            raise InputError("grammar: llama.cpp cannot read it; expected GBNF whose first rule is root")
        raise (InputError if error["code"] == 400 else RuntimeError)(f"llama.cpp: {error['message']}")
    return reply


class LlamaCppHttp:
    """A client of llama.cpp's HTTP port, for what the binding has no call for, and for completions that can be stopped.

    Each call has its own connection: one that stays open would occupy one of the server's few threads.
    """

    def __init__(self, address: str, key: str) -> None:
        self._address = address.removeprefix("http://")
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "Connection": "close"}
        self._connection_slots = threading.Semaphore(MAX_CONNECTIONS)

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON reply to one request."""
        with self._connection_slots, closing(HTTPConnection(self._address, timeout=TIMEOUT_S)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            reply = connection.getresponse()
            content = json.loads(reply.read())
        if reply.status != HTTPStatus.OK:
            raise RuntimeError(f"llama.cpp answered {reply.status} at {path}: {content}")
        return content

    def complete(self, body: dict[str, Any], cancelled: threading.Event) -> dict[str, Any]:
        """A completion as the binding gives it. When it is cancelled the connection is closed, which llama.cpp sees
        before its next token, whatever the tokens are.

        Raises:
            RuntimeError: it was cancelled.
        """
        with closing(HTTPConnection(self._address)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            answered = select.poll()
            answered.register(connection.sock, select.POLLIN)
            while not answered.poll(CANCEL_POLL_S * 1000):
                require_wanted(cancelled)
            reply: dict[str, Any] = json.loads(connection.getresponse().read())
        return reply
