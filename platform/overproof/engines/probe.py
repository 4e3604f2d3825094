"""Ask the serving engine itself, in a process of its own: ``python -m overproof.engines.probe FOLDER``.

The process holds the engine and little else (no torch, no Ray), so its resident memory is what a replica's engine
costs. Reads ``request.json`` from the folder and writes ``answer.json`` there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from overproof.engines.order_statistics import median_half_width
from overproof.engines.probe_messages import (
    AnswersRequest,
    ArrayAnswer,
    ArrayRequest,
    DraftAnswer,
    DraftRequest,
    GeneratedAnswer,
    GeneratedAnswers,
    Message,
    ProbeCompletion,
    TextAnswer,
    TextRequest,
    TimedRequest,
)
from overproof.errors import InputError
from overproof.registry import ENGINES
from overproof.subprocesses import run_module

if TYPE_CHECKING:
    from overproof.engines.base import TextEngine

WARM_UP_TOKENS = 8
TIMEOUT_S = 7200
CHAT_TIMEOUT_S = 600  # more, for each chat
FEWEST_CHATS = 2  # answered, however long they take
FEWEST = 3  # requests timed, however long they take
STREAM_ROUNDS, STREAM_S = 3, 5.0  # of requests at once: so many, or one that ends after so long
LOOK_EVERY = 10  # requests between two looks at p50's interval
PROGRESS = "progress"  # a file of the folder
CONTENTION_S = 0.1
NOTE_S = 0.5  # at least, between two writings of it: a request may take microseconds
Say = Callable[[str], None]

_folder: str | None = None  # of the request that this process answers
_noted_s = -NOTE_S  # when the last note was left


def probe_draft(request: DraftRequest, say: Say) -> DraftAnswer:
    """Run a request in a fresh process; ``say`` is told about once a second how far it is."""
    return DraftAnswer.model_validate_json(_ask(request, request.threads, say))


def probe_text(request: TextRequest, say: Say) -> TextAnswer:
    """Run a request in a fresh process; ``say`` is told about once a second how far it is."""
    return TextAnswer.model_validate_json(_ask(request, request.threads, say))


def probe_answers(request: AnswersRequest, say: Say) -> GeneratedAnswers:
    """Run a request in a fresh process; ``say`` is told about once a second how far it is."""
    timeout_s = TIMEOUT_S + CHAT_TIMEOUT_S * len(request.chats)
    return GeneratedAnswers.model_validate_json(_ask(request, request.threads, say, timeout_s))


def probe_arrays(request: ArrayRequest, say: Say) -> ArrayAnswer:
    """Run a request in a fresh process; ``say`` is told about once a second how far it is."""
    return ArrayAnswer.model_validate_json(_ask(request, request.threads, say))


def _ask(request: Message, threads: int, say: Say, timeout_s: float = TIMEOUT_S) -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "request.json").write_text(request.model_dump_json(), encoding="utf-8")
        note_file = Path(folder, PROGRESS)
        began_s = time.monotonic()

        def poll() -> None:
            where = (note_file.read_text(encoding="utf-8") if note_file.exists() else "") or "loading"
            say(f"{where}, {time.monotonic() - began_s:.0f} s")

        done = run_module(
            "overproof.engines.probe", folder, timeout_s=timeout_s, poll=poll, OMP_NUM_THREADS=str(threads)
        )
        if done.returncode != 0:
            raise RuntimeError(f"the serving engine ended with {done.returncode}: {done.stderr[-2000:]}")
        return Path(folder, "answer.json").read_text(encoding="utf-8")


def _timed(request: TimedRequest, latency_s: list[float]) -> Iterator[int]:
    """Numbers of the requests to time, whose seconds the caller adds to ``latency_s``: ``timed_requests`` at most,
    after ``probe_s`` seconds no more than ``FEWEST``, and none once p50 is known well enough.
    """
    began_s, narrow = time.monotonic(), request.narrow
    for number in range(request.timed_requests):
        if number >= FEWEST and time.monotonic() - began_s > request.probe_s:
            return
        looks = narrow is not None and number >= request.fewest_requests and number % LOOK_EVERY == 0
        if looks and median_half_width(latency_s) <= narrow * float(np.median(latency_s)):  # type: ignore[operator]
            return
        _tell(f"request {number + 1} of {request.timed_requests}")
        yield number


def _tell(where: str) -> None:
    """Leave a note of how far the probe is for the process that waits: whole, and seldom beside timed requests."""
    global _noted_s
    if _folder is None or time.monotonic() - _noted_s < NOTE_S:
        return
    _noted_s = time.monotonic()
    part = Path(_folder, f"{PROGRESS}.part")
    part.write_text(where, encoding="utf-8")
    part.replace(Path(_folder, PROGRESS))


def _resident_mb() -> float:
    return float(sum(each.memory_info().rss for each in _own_processes())) / 1e6


def _own_processes() -> list[psutil.Process]:
    """This one, and those that an engine runs in."""
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


class _Contention:
    """How many cores the threads of this process lacked, since other processes kept them busy, from here on: over what
    is timed, and a moment before and after it, as the kernel counts in hundredths of a second.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._began = threads, (time.monotonic(), _busy_s(), _own_s(), _waited_s())
        time.sleep(CONTENTION_S)

    def cores(self) -> float:
        """So far."""
        time.sleep(CONTENTION_S)
        now = time.monotonic(), _busy_s(), _own_s(), _waited_s()
        seconds, busy_s, own_s, waited_s = (after - before for after, before in zip(now, self._began, strict=True))
        others = max(0.0, busy_s - own_s) / seconds
        return max(waited_s / seconds, others + self._threads - (psutil.cpu_count() or 1), 0.0)


def _busy_s() -> float:
    """CPU seconds of all processes of this machine, since it started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own_s() -> float:
    return float(sum(sum(each.cpu_times()[:2]) for each in _own_processes()))


def _waited_s() -> float:
    """Seconds that threads of the own processes were ready to run and stood in line for a core, by Linux's own count;
    0 where the kernel keeps none.
    """
    waited_ns = 0
    for process in _own_processes():
        for file in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
                waited_ns += int(file.read_text().split()[1])
    return waited_ns / 1e9


def _text_engine(
    request: TextRequest | AnswersRequest, slots: int = 1, context_length: int | None = None
) -> TextEngine:
    """A request's file in its engine."""
    from overproof.engines.base import EngineSettings, TextEngine

    settings = EngineSettings(
        threads=request.threads, slots=slots, kv_cache=request.kv_cache, context_length=context_length
    )
    engine = ENGINES[request.engine].load(Path(request.file), settings)
    assert isinstance(engine, TextEngine)
    return engine


def _measure_text(request: TextRequest) -> TextAnswer:
    from overproof.engines.base import Sampling

    before_mb = _resident_mb()
    engine = _text_engine(request)
    prompts = request.timed_prompts
    engine.complete(prompts[0], Sampling(WARM_UP_TOKENS))
    latency_s, first_token_s, tokens_per_s = list[float](), list[float](), list[float]()
    contention = _Contention(request.threads)
    for i in _timed(request, latency_s):
        began = time.perf_counter()
        done = engine.complete(prompts[i % len(prompts)], Sampling(request.decode_tokens))
        latency_s.append(time.perf_counter() - began)
        first_token_s.append(done.first_token_s)
        if len(done.tokens) > 1:
            tokens_per_s.append((len(done.tokens) - 1) / done.decode_s)
    contended_cores = contention.cores()
    resident_mb = _resident_mb()
    answers = []
    for number, prompt in enumerate(request.prompts):
        _tell(f"parity prompt {number + 1} of {len(request.prompts)}")
        done = engine.complete(prompt, Sampling(request.probe_tokens, logprobs=0))
        assert done.token_logprobs is not None
        answers.append(ProbeCompletion(tokens=done.tokens, logprobs=[token.logprob for token in done.token_logprobs]))
    _tell(f"splitting {len(request.texts)} texts")
    splits = [engine.tokenize(text) for text in request.texts]
    context_length = engine.context_length
    engine.close()
    return TextAnswer(
        before_mb=before_mb,
        resident_mb=resident_mb,
        contended_cores=contended_cores,
        latency_s=latency_s,
        first_token_s=first_token_s,
        tokens_per_s=tokens_per_s,
        answers=answers,
        splits=splits,
        streams_tokens_per_s=_streams(request, context_length) if request.streams > 1 else [],
    )


def _streams(request: TextRequest, most: int) -> list[float]:
    """Tokens a second of ``streams`` requests at once, with room for as many, a round after the other."""
    from overproof.engines.base import Sampling

    prompts, streams = request.timed_prompts, range(request.streams)
    longest = min(most, max(map(len, prompts)) + request.decode_tokens)
    engine = _text_engine(request, slots=request.streams, context_length=longest)

    def generated(number: int, tokens: int) -> int:
        return len(engine.complete(prompts[number % len(prompts)], Sampling(tokens)).tokens)

    rates, began_s = list[float](), time.monotonic()
    with ThreadPoolExecutor(request.streams) as pool:
        list(pool.map(lambda number: generated(number, WARM_UP_TOKENS), streams))
        while len(rates) < STREAM_ROUNDS and (not rates or time.monotonic() - began_s < STREAM_S):
            _tell(f"{request.streams} requests at once, round {len(rates) + 1} of {STREAM_ROUNDS}")
            round_s = time.perf_counter()
            tokens = sum(pool.map(lambda number: generated(number, request.decode_tokens), streams))
            rates.append(tokens / (time.perf_counter() - round_s))
    engine.close()
    return rates


def _generate_answers(request: AnswersRequest) -> GeneratedAnswers:
    from overproof.engines.base import Sampling

    engine = _text_engine(request)
    answers, began_s = list[GeneratedAnswer](), time.monotonic()
    for number, (messages, tools) in enumerate(zip(request.chats, request.tools, strict=True)):
        is_over = request.limit_s is not None and time.monotonic() - began_s > request.limit_s
        if is_over and number >= FEWEST_CHATS:
            break
        _tell(f"answer {number + 1} of {len(request.chats)}")
        try:
            done = engine.complete(engine.chat_prompt(messages, tools), Sampling(request.answer_tokens))
        except InputError as error:
            answers.append(GeneratedAnswer(text="", finish_reason=None, refusal=str(error)))
        else:
            answers.append(GeneratedAnswer(text=done.text, finish_reason=done.finish_reason))
    engine.close()
    return GeneratedAnswers(answers=answers)


def _measure_arrays(request: ArrayRequest) -> ArrayAnswer:
    from overproof.engines.base import ArrayEngine, EngineSettings

    before_mb = _resident_mb()
    engine = ENGINES[request.engine].load(Path(request.file), EngineSettings(threads=request.threads))
    assert isinstance(engine, ArrayEngine)
    rows_BD, timed_BD = (np.array(rows, np.float32) for rows in (request.rows, request.timed_rows))
    logprobs = [engine.logprobs(row_D[None])[0].tolist() for row_D in rows_BD]  # warms up too
    latency_s: list[float] = []
    contention = _Contention(request.threads)
    for i in _timed(request, latency_s):
        began = time.perf_counter()
        engine.logprobs(timed_BD[i % len(timed_BD)][None])
        latency_s.append(time.perf_counter() - began)
    contended_cores = contention.cores()
    resident_mb = _resident_mb()
    engine.close()
    return ArrayAnswer(
        before_mb=before_mb,
        resident_mb=resident_mb,
        contended_cores=contended_cores,
        latency_s=latency_s,
        logprobs=logprobs,
    )


def _measure_draft(request: DraftRequest) -> DraftAnswer:
    from overproof.engines.base import Completion, Sampling
    from overproof.engines.llamacpp import LlamaCpp

    def rate(run: list[Completion]) -> float:
        return sum(len(done.tokens) - 1 for done in run) / sum(done.decode_s for done in run)

    model, draft = Path(request.file), Path(request.draft)
    alone = LlamaCpp(model, request.threads, kv_cache=request.kv_cache)
    drafted = LlamaCpp(
        model, request.threads, draft=draft, draft_tokens=request.draft_tokens, kv_cache=request.kv_cache
    )
    for engine in (alone, drafted):
        engine.complete(request.prompts[0], Sampling(WARM_UP_TOKENS))
    identical, rates = [True] * len(request.prompts), []
    for repeat in range(request.repeats):
        _tell(f"run {repeat + 1} of {request.repeats}, with and without the draft")
        both = [
            [engine.complete(prompt, Sampling(request.new_tokens)) for engine in (alone, drafted)]
            for prompt in request.prompts
        ]
        identical = [same and one.tokens == two.tokens for same, (one, two) in zip(identical, both, strict=True)]
        if any(len(done.tokens) > 1 for done, _ in both):  # a model may end every answer at once
            rates.append([rate([done[which] for done in both]) for which in (0, 1)])
    alone.close()
    drafted.close()
    return DraftAnswer(
        identical=identical,
        drafted=drafted.drafted,
        accepted=drafted.accepted,
        alone_tokens_per_s=[one for one, _ in rates],
        drafted_tokens_per_s=[two for _, two in rates],
    )


def main(folder: str) -> None:
    """Answer the request in a folder."""
    global _folder
    _folder = folder
    text = Path(folder, "request.json").read_text(encoding="utf-8")
    answer: Message
    match json.loads(text)["kind"]:
        case "text":
            answer = _measure_text(TextRequest.model_validate_json(text))
        case "answers":
            answer = _generate_answers(AnswersRequest.model_validate_json(text))
        case "draft":
            answer = _measure_draft(DraftRequest.model_validate_json(text))
        case _:
            answer = _measure_arrays(ArrayRequest.model_validate_json(text))
    Path(folder, "answer.json").write_text(answer.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
