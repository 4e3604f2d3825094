"""What a probe of an engine is asked, and what it answers: JSON between two processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from overproof.config.base import KvCache
from overproof.engines.base import FinishReason


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TimedRequest(Message):
    """What every timing of a file's requests is asked with."""

    engine: str
    file: str
    threads: int
    timed_requests: int  # at most
    probe_s: float  # after which no further one is begun
    narrow: float | None = None  # nor once p50's interval is within this share of it
    fewest_requests: int = 20  # before the first look at that


class TextRequest(TimedRequest):
    """What to ask a language model."""

    kind: Literal["text"] = "text"
    kv_cache: KvCache = "f16"
    prompts: list[list[int]]  # for the parity probe
    probe_tokens: int
    texts: list[str]  # to split into tokens
    timed_prompts: list[list[int]]  # asked in turn; the first warms up, too
    decode_tokens: int
    streams: int = 1  # requests at once, at the end; 1: none


class ProbeCompletion(Message):
    """One greedy completion."""

    tokens: list[int]
    logprobs: list[float]


class TextAnswer(Message):
    """What a language model and its engine did."""

    before_mb: float  # resident before the file was loaded
    resident_mb: float  # and after the timed decoding
    contended_cores: float  # that its threads lacked while requests were timed
    latency_s: list[float]  # of each timed request, from the call to the whole answer
    first_token_s: list[float]  # of each timed request
    tokens_per_s: list[float]  # of each timed request that gave at least two tokens
    streams_tokens_per_s: list[float]  # of each round of requests at once, all together, reading prompts included
    answers: list[ProbeCompletion]
    splits: list[list[int]]  # token ids of each text


class AnswersRequest(Message):
    """What a language model is to answer, greedily."""

    kind: Literal["answers"] = "answers"
    kv_cache: KvCache = "f16"
    engine: str
    file: str
    threads: int
    chats: list[list[dict[str, Any]]]  # messages, as ``TextEngine.chat_prompt`` takes them
    tools: list[list[dict[str, Any]]]  # of each
    answer_tokens: int  # of an answer, at most
    limit_s: float | None = None  # after which no further one is begun, of ``FEWEST_CHATS``


class GeneratedAnswer(Message):
    """What it answered; an engine may refuse a chat, as it would refuse a client's."""

    text: str
    finish_reason: FinishReason | None  # None where it was refused
    refusal: str = ""


class GeneratedAnswers(Message):
    """The answers to the chats, or to the first of them."""

    answers: list[GeneratedAnswer]


class ArrayRequest(TimedRequest):
    """What to ask a model that takes one array a row."""

    kind: Literal["arrays"] = "arrays"
    rows: list[list[float | None]]  # for the parity probe; None is a missing number
    timed_rows: list[list[float | None]]  # in turn


class ArrayAnswer(Message):
    """What such a model and its engine did."""

    before_mb: float
    resident_mb: float
    contended_cores: float  # that its threads lacked while rows were timed
    latency_s: list[float]  # of each timed row, one at a time
    logprobs: list[list[float]]


class DraftRequest(Message):
    """A language model to time with a draft and without."""

    kind: Literal["draft"] = "draft"
    kv_cache: KvCache = "f16"
    file: str
    draft: str
    draft_tokens: int
    threads: int
    prompts: list[list[int]]
    new_tokens: int
    repeats: int


class DraftAnswer(Message):
    """What a language model did, alone and with a draft, in turn."""

    identical: list[bool]  # for each prompt, in every run
    drafted: int  # tokens that the draft guessed
    accepted: int  # and those of them that were right
    alone_tokens_per_s: list[float]  # of each run over all prompts, without reading them
    drafted_tokens_per_s: list[float]
