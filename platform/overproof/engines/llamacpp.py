"""Language models in llama.cpp, inside this process (`xllamacpp`)."""

from __future__ import annotations

import atexit
import secrets
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overproof.config.base import KvCache
from overproof.engines.base import (
    Cancelled,
    Completion,
    EngineSettings,
    LogitsReader,
    PromptReading,
    PromptScore,
    Sampling,
    TextScorer,
    Token,
    ToolSyntax,
)
from overproof.engines.chat_template import GgufChatTemplate
from overproof.engines.gguf_tokens import align_logprobs, incomplete_utf8_tail, read_gguf_header
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.engines.llamacpp_memory import batch_tokens, context_memory, rearranged_memory
from overproof.engines.llamacpp_prompt import LlamaCppPrompts
from overproof.engines.llamacpp_scorer import LlamaCppScorer
from overproof.engines.llamacpp_server import LlamaCppDraft, LlamaCppHttp, check_reply, server_params, start_server
from overproof.engines.llamacpp_stream import LlamaCppPieces
from overproof.engines.prompt_limits import InFlight, PromptLimits, require_unicode
from overproof.engines.special_names import SpecialNames, is_marked
from overproof.models.sizes import ModelSize

DRAFT_TOKENS = 3  # that a draft guesses at a time; llama.cpp's own default


_engines: weakref.WeakSet[LlamaCpp] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """llama.cpp calls back into Python while it generates, and would abort a process whose interpreter has ended."""
    for engine in list(_engines):
        engine.close()


class LlamaCpp:
    """One GGUF file, decoding up to ``slots`` sequences at once; more callers wait for a slot.

    llama.cpp's server loop runs in this process. Its own HTTP port is on loopback, behind a key that only this
    object knows; it is used only for tokenisation, chat templates and the liveness check. A sequence that decodes
    alone gives the same numbers each time; sequences that share a step may differ in the last digits. Prompts stay
    cached between calls only with ``reuse_prefix``.

    A draft guesses tokens, and the model reads several guesses at once (speculative decoding, arXiv 2211.17192). A
    guess is taken where it is what the model's own sampler took, by its own seed: the text and its distribution are
    the model's, at any temperature. Last digits are those of shared steps, which in q8_0 and q4_0 files are no
    others. llama.cpp reports no log-probabilities of such text (ggml-org/llama.cpp issue 27972): such requests
    take turns at one slot without the draft.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 1,
        slots: int = 1,
        context_length: int | None = None,
        reuse_prefix: bool = False,
        max_prompt_tokens: int | None = None,
        draft: Path | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        kv_cache: KvCache = "f16",
    ) -> None:
        """Load a file, and perhaps a draft's.

        Raises:
            InputError: one is missing or no GGUF language model, the context is longer than the model's, the draft has
                another vocabulary, or ``draft_tokens`` is below 1.
        """
        header = read_gguf_header(path)
        self._limits = PromptLimits.of_model(header, path, context_length, max_prompt_tokens)
        self.context_length = self._limits.context_length
        self.chats = header.chat_template is not None
        self._header, self._pieces = header, header.pieces
        self._special = SpecialNames(header.silent_names)
        self._template = GgufChatTemplate(header)
        self._reuse_prefix = reuse_prefix
        self._in_flight = InFlight()
        self._prompts = LlamaCppPrompts(path, self.context_length, threads, self._pieces, kv_cache)
        self._stats_lock = threading.Lock()
        self.drafted = self.accepted = 0  # guesses of the draft in completions so far, and those that were right
        key = secrets.token_urlsafe(32)
        drafting = None if draft is None else LlamaCppDraft.of(draft, draft_tokens, header)
        self._server: Any = start_server(
            path, server_params(path, threads, slots, self.context_length, key, drafting, kv_cache)
        )
        self._http = LlamaCppHttp(self._server.listening_address, key)
        self._undrafted, self._undrafted_http = self._server, self._http
        if drafting is not None:
            drafting.require_drafting(self._http)
            self._undrafted = start_server(
                path, server_params(path, threads, 1, self.context_length, key, kv_cache=kv_cache)
            )
            self._undrafted_http = LlamaCppHttp(self._undrafted.listening_address, key)
        _engines.add(self)

    def complete(
        self, prompt: str | Sequence[int], sampling: Sampling, cancelled: threading.Event | None = None
    ) -> Completion:
        """Continue a prompt until done. See ``TextEngine``; where log-probabilities are asked for and tokens end inside
        a character, of which llama.cpp reports none, prompt and text are read once more.

        Raises:
            InputError: the prompt is empty or too long, an id is not in the vocabulary, or a setting is out of range.
            Cancelled: it was.
        """
        with self._in_flight.call():
            request = self._request(prompt, sampling)
            n_probs = 0 if sampling.logprobs is None else max(1, sampling.logprobs)
            extra = {"stop": list(sampling.stop), "n_probs": n_probs, "return_tokens": True, "verbose": True}
            server, http = (self._undrafted, self._undrafted_http) if n_probs else (self._server, self._http)
            body = {**request, **extra}
            reply = check_reply(
                server.handle_completions(body) if cancelled is None else http.complete(body, cancelled)
            )
            choice, details, timings = reply["choices"][0], reply["__verbose"], reply["timings"]
            with self._stats_lock:
                self.drafted += timings.get("draft_n", 0)
                self.accepted += timings.get("draft_n_accepted", 0)
            tokens: list[int] = details["tokens"]
            text: str = choice["text"]
            generated = b"".join(self._pieces[t] for t in tokens)
            unfinished = incomplete_utf8_tail(generated)
            if unfinished and details["stop_type"] != "word":
                text = text[: -len(generated[-unfinished:].decode(errors="replace"))]
            told = None
            if sampling.logprobs is not None:
                try:
                    told = self._token_logprobs(request["prompt"], tokens, choice, sampling.logprobs, cancelled)
                except Cancelled:
                    raise Cancelled(len(request["prompt"]), len(tokens)) from None
            return Completion(
                text=text,
                tokens=tokens,
                token_logprobs=told,
                finish_reason=choice["finish_reason"],
                prompt_tokens=len(request["prompt"]),
                first_token_s=timings["prompt_ms"] / 1e3,
                decode_s=timings["predicted_ms"] / 1e3,
            )

    def validate(self, prompt: str | Sequence[int], sampling: Sampling) -> None:
        """Raise where ``complete`` would, without generating.

        Raises:
            InputError: as ``complete``.
        """
        with self._in_flight.call():
            self._request(prompt, sampling)

    def read_prompt(self, prompt: str | Sequence[int], sampling: Sampling, cancelled: threading.Event) -> PromptReading:
        """The prompt's tokens, and their log-probabilities where asked for: the model's own, by its own kernels.

        Raises:
            InputError: as ``complete``.
            Cancelled: it was.
        """
        with self._in_flight.call():
            ids = self._request(prompt, sampling)["prompt"]
            top = sampling.logprobs
            try:
                scores = None if top is None else self._prompts.score(ids, top, cancelled)
            except Cancelled:
                raise Cancelled(len(ids)) from None
            return self._header.reading(prompt, ids, scores)

    def stream(self, prompt: str | Sequence[int], sampling: Sampling) -> LlamaCppPieces:
        """Continue a prompt piece by piece.

        Raises:
            InputError: as ``complete``, before the first piece.
        """
        with self._in_flight.call():
            request = self._request(prompt, sampling)

        def run(callback: Any) -> None:
            with self._in_flight.call():
                self._server.handle_completions({**request, "stream": True, "timings_per_token": True}, callback)

        return LlamaCppPieces(run, len(request["prompt"]), sampling.stop)

    def tool_syntax(self) -> ToolSyntax:
        """See ``TextEngine``."""
        with self._in_flight.call():
            return self._template.tool_syntax

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Messages as a prompt, by the template in the file.

        Raises:
            InputError: there is none, it does not take these messages, or it knows no tools.
        """
        with self._in_flight.call():
            return self._template.render(messages, tools)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as llama.cpp splits it, with no start token added.

        Raises:
            InputError: the text is not valid Unicode.
        """
        with self._in_flight.call():
            return self._tokenize(require_unicode(text), start=False)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; broken characters are replaced."""
        return self._header.text(ids)

    def check(self) -> None:
        """Return when llama.cpp's loop is alive; raise when it is not."""
        with self._in_flight.call():
            self._http.request("GET", "/health")

    def close(self) -> None:
        """Wait for the calls in progress, then free the model. llama.cpp must not be torn down during a call."""
        self._in_flight.close()
        self._prompts.close()
        self._template.close()
        self._server = self._undrafted = None

    def _request(self, prompt: str | Sequence[int], sampling: Sampling) -> dict[str, Any]:
        ids, max_tokens = self._limits.resolve(prompt, sampling, lambda text: self._tokenize(text, start=True))
        request = {
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_k": 0,  # llama.cpp truncates the distribution unless told not to
            "min_p": 0.0,
            "top_p": sampling.top_p,
            "cache_prompt": self._reuse_prefix,
        }
        if sampling.seed is not None:
            request["seed"] = sampling.seed
        if sampling.presence_penalty or sampling.frequency_penalty:
            request["presence_penalty"] = sampling.presence_penalty
            request["frequency_penalty"] = sampling.frequency_penalty
            request["repeat_last_n"] = self.context_length  # of the whole text, not of the last 64 tokens
        if sampling.logit_bias:
            request["logit_bias"] = [[token, bias] for token, bias in sampling.logit_bias.items()]
        if sampling.grammar is not None:
            request["grammar"] = sampling.grammar
        return request

    def _tokenize(self, text: str, start: bool) -> list[int]:
        if is_marked(text):
            ids = self._special.tokens(text, lambda part: self._tokens_of(part, start=False, names=False))
            return [*self._header.start_ids, *ids] if start else ids
        return self._tokens_of(text, start, names=True)

    def _tokens_of(self, text: str, start: bool, names: bool) -> list[int]:
        """Of a text in which the names of special tokens are those, or text."""
        body = {"content": text, "add_special": start, "parse_special": names}
        ids: list[int] = self._http.request("POST", "/tokenize", body)["tokens"]
        return ids

    def _token_logprobs(
        self,
        prompt: list[int],
        tokens: list[int],
        choice: dict[str, Any],
        top: int,
        cancelled: threading.Event | None,
    ) -> list[Token]:
        reported = align_logprobs(tokens, (choice["logprobs"] or {"content": []})["content"], self._pieces)
        read = list[PromptScore]()
        if None in reported:
            first = len(prompt) + reported.index(None)
            read = self._prompts.score(prompt + tokens, top, cancelled, first)
        before = len(tokens) - len(read)
        return [
            Token(token, self._pieces[token], read[place - before].logprob, read[place - before].top)
            if entry is None
            else Token(
                entry["id"],
                self._pieces[entry["id"]],
                entry["logprob"],
                tuple((e["id"], self._pieces[e["id"]], e["logprob"]) for e in entry["top_logprobs"][:top]),
            )
            for place, (token, entry) in enumerate(zip(tokens, reported, strict=True))
        ]


class LlamaCppLoader:
    """See ``EngineLoader``."""

    kv_caches: tuple[KvCache, ...] = ("f16", "q8_0")

    def require(self) -> None:
        """It is a dependency of this package."""

    def load(self, path: Path, settings: EngineSettings) -> LlamaCpp:
        return LlamaCpp(
            path,
            threads=settings.threads,
            slots=settings.slots,
            context_length=settings.context_length,
            kv_cache=settings.kv_cache,
            reuse_prefix=settings.reuse_prefix,
            max_prompt_tokens=settings.max_prompt_tokens,
            draft=settings.draft,
            draft_tokens=settings.draft_tokens,
        )

    def scorer(self, path: Path, positions: int, threads: int, kv_cache: KvCache = "f16") -> TextScorer:
        """See ``ScoringLoader``."""
        return LlamaCppScorer(path, positions, threads, kv_cache)

    def logits(self, path: Path, positions: int, threads: int, kv_cache: KvCache = "f16") -> LogitsReader:
        """See ``ScoringLoader``."""
        return LlamaCppLogits(path, positions, threads, kv_cache)

    def scoring_memory(self, size: ModelSize, positions: int) -> int:
        """See ``ScoringLoader``: of the format that takes most."""
        told = batch_tokens(positions, size.outputs)
        return context_memory(size, positions, told) + rearranged_memory(size)


ENGINE = LlamaCppLoader()
