"""The interfaces of engines. The gate measures a file through the same engine that later serves it.

Shapes: B rows in a batch, D numbers in a row, V outputs; of a row of tokens P places, each of which predicts the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from overproof.config.base import KvCache

if TYPE_CHECKING:
    from overproof.models.sizes import ModelSize

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued. Temperature 0 takes the likeliest token each time."""

    max_tokens: int  # 0 where only the prompt is read
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = (
        None  # how many of the likeliest tokens to report at each place; None reports no log-probabilities
    )
    presence_penalty: float = 0.0  # taken off the logit of every token that occurred
    frequency_penalty: float = 0.0  # taken off it for each time that it occurred
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of token ids
    grammar: str | None = None  # which the text must follow, in llguidance's Lark
    echo: bool = False  # whether the prompt is told, too: see ``read_prompt``


@dataclass(frozen=True)
class Token:
    """A generated token, its log-probability (nats, before temperature and every sampler), and the likeliest ones."""

    id: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]  # id, bytes, log-probability; likeliest first


@dataclass(frozen=True)
class PromptScore:
    """What a model says of a token that a prompt has: its log-probability (nats), and the likeliest ones."""

    logprob: float
    top: tuple[tuple[int, bytes, float], ...]  # as a ``Token`` has them


@dataclass(frozen=True)
class PromptReading:
    """A prompt as a model reads it.

    ``pieces`` are the bytes of the text that each token stands for, and join to it; a start token stands for none.
    """

    text: str
    ids: list[int]
    pieces: list[bytes]
    scores: list[PromptScore] | None  # of every token but the first, where log-probabilities were asked for


@dataclass(frozen=True)
class Completion:
    """A finished completion.

    ``tokens`` are all ids generated, with a closing end-of-text token and the tokens of a stop string; ``text`` ends
    before those, and before a character that the last token left unfinished. ``token_logprobs`` lines up with
    ``tokens``. Times are the engine's own, without queueing: ``first_token_s`` reads the prompt and samples the first
    token, ``decode_s`` samples the others.
    """

    text: str
    tokens: list[int]
    token_logprobs: list[Token] | None  # where log-probabilities were asked for
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_s: float
    decode_s: float


@dataclass(frozen=True)
class Piece:
    """Part of a streamed completion, with the tokens so far. The last one has a finish reason, and may have no text."""

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class ToolSyntax:
    """How an assistant's message calls a tool: this, its name, this, its arguments as a JSON object, and this."""

    before_name: str
    before_arguments: str
    after: str


class Cancelled(RuntimeError):
    """A request ended because nobody wants it any more; with the tokens that were read and generated until then."""

    def __init__(self, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        super().__init__("the request was cancelled")
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens


class PieceStream(Iterator[Piece], Protocol):
    """A completion being generated; the texts join to what ``complete`` gives."""

    prompt_tokens: int
    completion_tokens: int  # so far, and in the end also those that came after it was closed

    def __iter__(self) -> Self: ...

    def close(self) -> None:
        """Generate no further: the iterator ends when the engine has. May be called from any thread, at any time."""


@runtime_checkable
class TextEngine(Protocol):
    """A language model. Every method may be called from several threads."""

    context_length: int  # most tokens of prompt and completion together
    chats: bool  # whether the model has a chat template

    def complete(self, prompt: str | Sequence[int], sampling: Sampling, cancelled: Event | None = None) -> Completion:
        """Continue a prompt, given as text or token ids, until done.

        Raises:
            InputError: the prompt is empty or too long, an id is not in the vocabulary, or a setting is out of range.
            Cancelled: ``cancelled`` was set meanwhile; the work ends then, where the engine can end it.
        """

    def validate(self, prompt: str | Sequence[int], sampling: Sampling) -> None:
        """Raise where ``complete`` would, without generating."""

    def read_prompt(self, prompt: str | Sequence[int], sampling: Sampling, cancelled: Event) -> PromptReading:
        """The prompt's tokens, with the log-probability of each where ``sampling.logprobs`` asks for them.

        Raises:
            InputError: as ``complete``, or this engine tells no log-probabilities of prompts.
            Cancelled: ``cancelled`` was set meanwhile; the work ends then.
        """

    def stream(self, prompt: str | Sequence[int], sampling: Sampling) -> PieceStream:
        """Continue a prompt piece by piece; pieces carry no log-probabilities.

        Raises:
            InputError: as ``complete``, before the first piece.
        """

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Messages as a prompt that asks for the assistant's next one, by the model's own template.

        They have ``role`` and ``content``, and where tools were called ``tool_calls`` or ``tool_call_id``; tools and
        calls are as OpenAI has them, but for arguments, which are an object.

        Raises:
            InputError: the model has no template, it does not take these messages, or it knows no tools.
        """

    def tool_syntax(self) -> ToolSyntax:
        """How the model's template writes a call.

        Raises:
            InputError: it knows no tools, or writes calls otherwise than with arguments in JSON.
        """

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as the engine itself splits it, with no start token added."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; broken characters are replaced."""

    def check(self) -> None:
        """Return when the engine is alive, raise when it is not. Quick, and does not wait for a free slot."""

    def close(self) -> None:
        """Wait for the calls in progress, then free the model."""


@runtime_checkable
class ArrayEngine(Protocol):
    """A model that takes one array of numbers a row. Every method may be called from several threads."""

    width: int  # D: numbers in a row

    def logprobs(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities of the outputs in nats, shape (B, V).

        Raises:
            InputError: the rows have another width than the model takes.
        """

    def check(self) -> None:
        """Return when the engine is alive, raise when it is not."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True)
class PlaceScores:
    """What a language model says of a row of tokens, place by place."""

    nats_P: NDArray[np.float64]  # of the token that follows: its log-probability, negative
    choices_P: NDArray[np.int32]  # the likeliest token
    choice_nats_P: NDArray[np.float64]  # and its nats

    @classmethod
    def joined(cls, parts: Sequence[PlaceScores]) -> PlaceScores:
        """Of a row whose parts these are, in order."""
        return cls(
            np.concatenate([part.nats_P for part in parts]),
            np.concatenate([part.choices_P for part in parts]),
            np.concatenate([part.choice_nats_P for part in parts]),
        )


class TextScorer(Protocol):
    """A language model that reads given tokens: what a file is judged by. For one thread."""

    def score(self, rows: Iterable[NDArray[Any]]) -> Iterator[PlaceScores]:
        """The scores of each row, in order, from all its tokens; every token but the first is predicted."""

    def close(self) -> None:
        """Free the model."""


class LogitsReader(Protocol):
    """A language model that reads given tokens and tells all of its logits. For one thread."""

    def batches(self, tokens_S: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
        """Those after each token of a row, some places (P, V) after the other; each is gone when the next comes."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True)
class EngineSettings:
    """How a model is loaded; an engine takes what it has a use for."""

    threads: int = 1
    slots: int = 1  # sequences decoded at once
    kv_cache: KvCache = "f16"
    context_length: int | None = None  # of a sequence; None: the model's own
    reuse_prefix: bool = False  # keep prompts between calls
    max_prompt_tokens: int | None = None
    draft: Path | None = None  # a model that guesses tokens
    draft_tokens: int = 3  # guessed at a time


class EngineLoader(Protocol):
    """What the registry has of an engine."""

    kv_caches: tuple[KvCache, ...]  # how it can keep keys and values, first by default; none of a model without

    def require(self) -> None:
        """Return where the engine is installed.

        Raises:
            InputError: it is not, and what to do.
        """

    def load(self, path: Path, settings: EngineSettings) -> TextEngine | ArrayEngine:
        """A model in the engine.

        Raises:
            InputError: it cannot be loaded.
        """


@runtime_checkable
class ScoringLoader(EngineLoader, Protocol):
    """An engine that tells the log-probabilities of given texts, so that a file is judged by what is served.

    What an engine without it serves is judged by torch over the weights of the file, dequantised.
    """

    def scorer(self, path: Path, positions: int, threads: int, kv_cache: KvCache = "f16") -> TextScorer:
        """A model that reads rows of ``positions`` places at most.

        Raises:
            InputError: it cannot be loaded.
        """

    def logits(self, path: Path, positions: int, threads: int, kv_cache: KvCache = "f16") -> LogitsReader:
        """The same, with all of its logits."""

    def scoring_memory(self, size: ModelSize, positions: int) -> int:
        """Bytes that such a model takes, beside libraries and what is mapped from its file."""
