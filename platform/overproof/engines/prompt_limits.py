"""Checks of a request before it reaches a language engine, and the calls that an engine has in progress."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from overproof.engines.base import Cancelled, Sampling
from overproof.engines.gguf_tokens import GgufHeader
from overproof.errors import InputError

MAX_SEED = 2**32 - 2  # the next one means "random" to llama.cpp

CONTEXT_EXCEEDED = "context_length_exceeded"  # as OpenAI calls it: clients fall back to a larger model


@dataclass(frozen=True)
class PromptLimits:
    """The lengths that a model takes, in tokens, and the size of its vocabulary."""

    context_length: int  # of prompt and completion together
    max_prompt_tokens: int
    vocabulary_size: int
    max_characters: int  # of a prompt; no text that fits is longer

    @classmethod
    def of_model(
        cls, header: GgufHeader, where: object, context_length: int | None, max_prompt_tokens: int | None
    ) -> PromptLimits:
        """The limits of a model, with the context and the prompt length narrowed where given.

        Raises:
            InputError: the context is longer than the model's.
        """
        context = header.context_length if context_length is None else context_length
        if not 2 <= context <= header.context_length:
            raise InputError(f"{where}: context length {context}; expected 2 to the model's {header.context_length}")
        prompt_tokens = min(context - 1, max_prompt_tokens or context)
        return cls(context, prompt_tokens, len(header.pieces), context * header.max_token_characters)

    def resolve(
        self, prompt: str | Sequence[int], sampling: Sampling, tokenize: Callable[[str], list[int]]
    ) -> tuple[list[int], int]:
        """The prompt's token ids, and how many tokens may follow; ``tokenize`` puts the start token before a text's.

        Raises:
            InputError: the prompt is empty or too long, an id is not in the vocabulary, or a setting is out of range.
        """
        if isinstance(prompt, str) and len(prompt) > self.max_characters:  # first, for long texts take long to tokenize
            raise self._too_long(f"{len(prompt)} characters; {self.context_length} tokens hold fewer")
        ids = tokenize(require_unicode(prompt)) if isinstance(prompt, str) else list(prompt)
        if not prompt:
            raise InputError("prompt: empty; expected text or token ids")
        self._check_ids("prompt", ids)
        if len(ids) > self.max_prompt_tokens:
            raise self._too_long(f"{len(ids)} tokens long; expected at most {self.max_prompt_tokens}")
        check_sampling(sampling)
        self._check_ids("logit_bias", list(sampling.logit_bias))
        return ids, min(sampling.max_tokens, self.context_length - len(ids))

    def _too_long(self, found: str) -> InputError:
        """Clients that fall back to a larger model look for the code, and those that see the message alone for it and
        OpenAI's words in that: LangChain and LiteLLM.
        """
        return InputError(
            f"prompt: {found}. This model's maximum context length is {self.context_length} tokens, with the answer "
            f"({CONTEXT_EXCEEDED})",
            CONTEXT_EXCEEDED,
        )

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        if not all(0 <= i < self.vocabulary_size for i in ids):
            bad = next(i for i in ids if not 0 <= i < self.vocabulary_size)
            raise InputError(f"{field}: found token id {bad}; expected 0 to {self.vocabulary_size - 1}")


def require_context(file: object, positions: int, context_length: int) -> None:
    """Look whether rows of so many places lie within the context up to which a file's figures mean something.

    Raises:
        InputError: they do not.
    """
    if positions > context_length:
        raise InputError(
            f"{file}: rows of {positions} tokens, and its context (context_length) is of {context_length}: past it, "
            "what an engine computes is not the model's. Prepare data with data.sequence_length "
            f"{context_length} at most"
        )


def require_wanted(cancelled: threading.Event | None, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
    """Look whether somebody still waits for a request.

    Raises:
        Cancelled: it was cancelled.
    """
    if cancelled is not None and cancelled.is_set():
        raise Cancelled(prompt_tokens, completion_tokens)


def require_unicode(text: str) -> str:
    """The text.

    Raises:
        InputError: it is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: {error.reason} at character {error.start}; expected valid Unicode") from None
    return text


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings that an engine would take to mean something else.

    Raises:
        InputError: one is out of range.
    """
    if sampling.max_tokens < (0 if sampling.echo else 1):
        raise InputError(f"max_tokens: found {sampling.max_tokens}; expected 1 or more, or 0 with echo")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InputError(f"temperature: found {sampling.temperature}; expected 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p: found {sampling.top_p}; expected more than 0, at most 1")
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        raise InputError(f"seed: found {sampling.seed}; expected 0 to {MAX_SEED}")
    if isinstance(sampling.stop, str) or not all(sampling.stop):
        raise InputError(f"stop: found {sampling.stop!r}; expected strings that are not empty")


class InFlight:
    """The calls of an engine that are in progress, from any thread."""

    def __init__(self) -> None:
        self._count = 0
        self._open = True
        self._changed = threading.Condition()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call while it runs; RuntimeError where the engine is closed."""
        with self._changed:
            if not self._open:
                raise RuntimeError("the engine is closed")
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let no more calls begin, and wait for those in progress."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: self._count == 0)
