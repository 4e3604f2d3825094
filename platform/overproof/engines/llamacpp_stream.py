"""Streamed completions of llama.cpp, whose callbacks become an iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from overproof.engines.base import Piece
from overproof.engines.detokenizer import StopFilter
from overproof.engines.llamacpp_server import check_reply

RunStream = Callable[
    [Callable[[dict[str, Any]], bool]], None
]  # calls back with each chunk until done, or until the callback returns True


class LlamaCppPieces:
    """A completion being generated in a thread of its own."""

    def __init__(self, run: RunStream, prompt_tokens: int, stops: Sequence[str]) -> None:
        self._chunks: SimpleQueue[dict[str, Any] | BaseException | None] = SimpleQueue()
        self._cancelled = threading.Event()
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._filter = StopFilter(stops)
        self._ended = False
        threading.Thread(target=self._produce, args=(run,), daemon=True, name="llama.cpp stream").start()

    def __iter__(self) -> LlamaCppPieces:
        return self

    def __next__(self) -> Piece:
        while not self._ended:
            chunk = self._chunks.get()
            if chunk is None or isinstance(chunk, BaseException):
                self._ended = True
                if chunk is None:
                    break
                raise chunk
            self.completion_tokens = check_reply(chunk)["timings"]["predicted_n"]
            if self._cancelled.is_set():
                continue  # it ends when llama.cpp has: its slot is not free before
            piece = self._piece(chunk)
            if piece is not None:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Generate no further; llama.cpp stops at its next token that ends a character, and then the iterator ends."""
        self._cancelled.set()

    def _produce(self, run: RunStream) -> None:
        def callback(chunk: dict[str, Any]) -> bool:  # true asks llama.cpp to stop
            self._chunks.put(chunk)
            return self._cancelled.is_set()

        try:
            run(callback)
        except BaseException as error:
            self._chunks.put(error)
        else:
            self._chunks.put(None)

    def _piece(self, chunk: dict[str, Any]) -> Piece | None:
        choice = chunk["choices"][0]
        text, stopped = self._filter.push(choice["text"])
        if stopped:
            self._ended = True
            self.close()
            return Piece(text, "stop", self.prompt_tokens, self.completion_tokens)
        if choice["finish_reason"] is not None:
            self._ended = True
            return Piece(
                text + self._filter.flush(), choice["finish_reason"], self.prompt_tokens, self.completion_tokens
            )
        return Piece(text, None, self.prompt_tokens, self.completion_tokens) if text else None
