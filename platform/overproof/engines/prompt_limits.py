"""What a language model is asked, held against what it takes before its engine hears of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from overproof.engines.base import Sampling
from overproof.engines.gguf_tokens import GgufHeader
from overproof.errors import InputError

LARGEST_SEED = 2**32 - 2  # the next one means "random" to llama.cpp


@dataclass(frozen=True)
class PromptLimits:
    """How long prompts may be, in tokens, and which tokens there are."""

    context_length: int  # of prompt and completion together
    prompt: int
    vocabulary: int
    characters: int  # no prompt that fits is longer

    @classmethod
    def of(
        cls, header: GgufHeader, where: object, context_length: int | None, max_prompt_tokens: int | None
    ) -> PromptLimits:
        """The room in a model.

        Raises:
            InputError: the context is longer than the model's.
        """
        length = header.context_length if context_length is None else context_length
        if not 2 <= length <= header.context_length:
            raise InputError(f"{where}: context length {length}; expected 2 to the model's {header.context_length}")
        prompt = min(length - 1, max_prompt_tokens or length)
        return cls(length, prompt, len(header.pieces), length * header.longest)

    def take(
        self, prompt: str | Sequence[int], sampling: Sampling, tokenize: Callable[[str], list[int]]
    ) -> tuple[list[int], int]:
        """The prompt's ids, and the most tokens that may follow; ``tokenize`` puts the start token before a text's.

        Raises:
            InputError: the prompt is empty or too long, an id is not in the vocabulary, or a setting is out of range.
        """
        if isinstance(prompt, str) and len(prompt) > self.characters:  # which take long to split
            raise InputError(f"prompt: {len(prompt)} characters; {self.context_length} tokens hold fewer")
        ids = tokenize(require_unicode(prompt)) if isinstance(prompt, str) else list(prompt)
        if not prompt:
            raise InputError("prompt: empty; expected text or token ids")
        self._check_ids("prompt", ids)
        if len(ids) > self.prompt:
            raise InputError(
                f"prompt: {len(ids)} tokens long; expected at most {self.prompt}, "
                f"and the model's context holds {self.context_length} with the answer"
            )
        check_sampling(sampling)
        self._check_ids("logit_bias", list(sampling.logit_bias))
        return ids, min(sampling.max_tokens, self.context_length - len(ids))

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        if not all(0 <= i < self.vocabulary for i in ids):
            bad = next(i for i in ids if not 0 <= i < self.vocabulary)
            raise InputError(f"{field}: found token id {bad}; expected 0 to {self.vocabulary - 1}")


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
    """Refuse settings that an engine would take otherwise than they are meant.

    Raises:
        InputError: one is out of range.
    """
    if sampling.max_tokens < 1:
        raise InputError(f"max_tokens: found {sampling.max_tokens}; expected 1 or more")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InputError(f"temperature: found {sampling.temperature}; expected 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p: found {sampling.top_p}; expected more than 0, at most 1")
    if sampling.seed is not None and not 0 <= sampling.seed <= LARGEST_SEED:
        raise InputError(f"seed: found {sampling.seed}; expected 0 to {LARGEST_SEED}")
    if isinstance(sampling.stop, str) or not all(sampling.stop):
        raise InputError(f"stop: found {sampling.stop!r}; expected strings that are not empty")


class InFlight:
    """The calls of an engine that are in progress, from any thread."""

    def __init__(self) -> None:
        self._count = 0
        self._open = True
        self._changed = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call; RuntimeError where the engine is closed."""
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

    def end(self) -> None:
        """Wait for those in progress; there are no more."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: self._count == 0)
