"""Language models in vLLM, in a process of its own environment: for nodes with GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from overproof.data.manifest import TOKENIZER
from overproof.engines.base import (
    Completion,
    EngineSettings,
    FinishReason,
    Piece,
    PromptReading,
    Sampling,
    Token,
    ToolSyntax,
)
from overproof.engines.chat_template import GgufChatTemplate
from overproof.engines.detokenizer import Detokenizer
from overproof.engines.gguf_tokens import read_gguf_header
from overproof.engines.prompt_limits import InFlight, PromptLimits, require_unicode, require_wanted
from overproof.engines.special_names import SpecialNames, is_marked
from overproof.engines.vllm_server import VOCABULARY, VllmServer, unpacked_directory, vllm_python
from overproof.errors import InputError

TokenReport = tuple[str, float, Mapping[str, float]]  # token's name, log-probability, those of the likeliest by name


class Vllm:
    """One file, decoding up to ``slots`` sequences at once: a GGUF file's weights are unpacked to half precision, those
    in compressed-tensors are computed with as they are.

    vLLM takes and gives token ids: texts are split by the tokenizer beside the file, and joined from the bytes of its
    tokens, as llama.cpp does. Sequences that share a step may differ in the last digits. Penalties
    count the tokens that were generated, not those of the prompt.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 1,
        slots: int = 1,
        context_length: int | None = None,
        reuse_prefix: bool = False,
        max_prompt_tokens: int | None = None,
    ) -> None:
        """Start vLLM on a file.

        Raises:
            InputError: the file is missing or no language model, its tokenizer is not beside it, the context is longer
                than the model's, or there is no vLLM.
        """
        folder = unpacked_directory(path)
        vocabulary, tokenizer = folder / VOCABULARY, folder / TOKENIZER
        header = read_gguf_header(vocabulary if vocabulary.is_file() else path)
        self._limits = PromptLimits.of_model(header, path, context_length, max_prompt_tokens)
        self.context_length = self._limits.context_length
        self.chats = header.chat_template is not None
        self._header, self._template = header, GgufChatTemplate(header)
        self._tokenizer, self._plain = (Tokenizer.from_file(str(tokenizer)) for _ in range(2))
        self._plain.encode_special_tokens = True  # as text
        self._special = SpecialNames(header.silent_names)
        self._in_flight = InFlight()
        self._server = VllmServer(folder, threads, slots, self.context_length, reuse_prefix, path)

    def complete(
        self, prompt: str | Sequence[int], sampling: Sampling, cancelled: threading.Event | None = None
    ) -> Completion:
        """Continue a prompt until done. See ``TextEngine``; the times are from the call, so they include a wait.

        Raises:
            InputError: the prompt is empty or too long, an id is not in the vocabulary, or a setting is out of range.
            Cancelled: it was.
        """
        began_s = time.perf_counter()
        request = self._request(prompt, sampling)
        steps, times_s = list[_Step](), list[float]()
        with closing(self._steps(request, sampling.stop)) as generated:
            for step in generated:
                steps.append(step)
                require_wanted(cancelled, len(request["prompt"]), sum(len(each.tokens) for each in steps))
                times_s.append(time.perf_counter())
        top, reason = sampling.logprobs, steps[-1].finish_reason
        assert reason is not None
        reports = [report for step in steps for report in step.reports]
        return Completion(
            text="".join(step.text for step in steps),
            tokens=[token for step in steps for token in step.tokens],
            token_logprobs=None if top is None else [self._token(report, top) for report in reports],
            finish_reason=reason,
            prompt_tokens=len(request["prompt"]),
            first_token_s=times_s[0] - began_s,
            decode_s=times_s[-1] - times_s[0],
        )

    def validate(self, prompt: str | Sequence[int], sampling: Sampling) -> None:
        """Raise where ``complete`` would, without generating.

        Raises:
            InputError: as ``complete``.
        """
        self._request(prompt, sampling)

    def read_prompt(self, prompt: str | Sequence[int], sampling: Sampling, cancelled: threading.Event) -> PromptReading:  # noqa: ARG002
        """The prompt's tokens.

        Raises:
            InputError: as ``complete``, or log-probabilities are asked for.
        """
        return self._header.reading(prompt, self._request(prompt, sampling)["prompt"], None)

    def stream(self, prompt: str | Sequence[int], sampling: Sampling) -> VllmPieces:
        """Continue a prompt piece by piece.

        Raises:
            InputError: as ``complete``, before the first piece.
        """
        request = self._request(prompt, sampling)
        return VllmPieces(self._steps(request, sampling.stop), len(request["prompt"]))

    def tool_syntax(self) -> ToolSyntax:
        """See ``TextEngine``."""
        return self._template.tool_syntax

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Messages as a prompt, by the template in the file.

        Raises:
            InputError: there is none, it does not take these messages, or it knows no tools.
        """
        return self._template.render(messages, tools)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with no start token added.

        Raises:
            InputError: the text is not valid Unicode.
        """
        if not is_marked(require_unicode(text)):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        return self._special.tokens(text, lambda part: list(self._plain.encode(part, add_special_tokens=False).ids))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; broken characters are replaced."""
        return self._header.text(ids)

    def check(self) -> None:
        """Return when vLLM is healthy, raise when it is not."""
        with self._in_flight.call():
            if not self._server.is_healthy():
                raise RuntimeError("vLLM is not healthy")

    def close(self) -> None:
        """Wait for the calls in progress, then end vLLM."""
        self._in_flight.close()
        self._template.close()
        self._server.close()

    def _request(self, prompt: str | Sequence[int], sampling: Sampling) -> dict[str, Any]:
        ids, max_tokens = self._limits.resolve(
            prompt, sampling, lambda text: [*self._header.start_ids, *self.tokenize(text)]
        )
        if sampling.echo and sampling.logprobs is not None:
            raise InputError("echo: found with logprobs; vLLM's are asked for of generated tokens only: leave one out")
        request = {
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "logprobs": sampling.logprobs,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
        }
        if sampling.logit_bias:
            request["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        if sampling.grammar is not None:
            request["structured_outputs"] = {"grammar": sampling.grammar}
        return request

    def _steps(self, request: dict[str, Any], stops: Sequence[str]) -> Generator[_Step]:
        """Generate up to a stop string; closing the generator ends generation."""
        detokenizer = Detokenizer(self._header.pieces, stops)
        with self._in_flight.call():
            for event in self._server.stream(request):
                for choice in event["choices"]:
                    step = _step(choice, detokenizer)
                    yield step
                    if step.finish_reason is not None:
                        return
        raise RuntimeError("vLLM ended a text before its end")

    def _token(self, report: TokenReport, count: int) -> Token:
        name, logprob, top = report
        ranked = sorted(
            ((value, _token_id(other)) for other, value in top.items()), key=lambda pair: (-pair[0], pair[1])
        )
        return Token(
            _token_id(name),
            self._header.pieces[_token_id(name)],
            logprob,
            tuple((id_, self._header.pieces[id_], value) for value, id_ in ranked[:count]),
        )


@dataclass(frozen=True)
class _Step:
    """Tokens that vLLM generated at once: their text, as far as it may be sent, and the report of each."""

    text: str
    tokens: list[int]
    reports: list[TokenReport]
    finish_reason: FinishReason | None


def _step(choice: dict[str, Any], detokenizer: Detokenizer) -> _Step:
    text, tokens = "", list[int]()
    for token in choice["token_ids"] or ():
        tokens.append(token)
        text += detokenizer.push(token)
        if detokenizer.stopped:
            break
    reason: FinishReason | None = "stop" if detokenizer.stopped else choice["finish_reason"]
    found = choice["logprobs"] or {"tokens": (), "token_logprobs": (), "top_logprobs": ()}
    reported = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    return _Step(text if reason is None else text + detokenizer.flush(), tokens, list(reported)[: len(tokens)], reason)


class VllmPieces:
    """A completion being generated."""

    def __init__(self, steps: Generator[_Step], prompt_tokens: int) -> None:
        self._steps = steps
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._closed = threading.Event()

    def __iter__(self) -> VllmPieces:
        return self

    def __next__(self) -> Piece:
        while not self._closed.is_set():
            step = next(self._steps)
            self.completion_tokens += len(step.tokens)
            if step.text or step.finish_reason is not None:
                return Piece(step.text, step.finish_reason, self.prompt_tokens, self.completion_tokens)
        self._steps.close()
        raise StopIteration

    def close(self) -> None:
        """Generate no further; vLLM stops at its next token."""
        self._closed.set()


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


class VllmLoader:
    """See ``EngineLoader``."""

    kv_caches = ("f16",)

    def require(self) -> None:
        vllm_python()

    def load(self, path: Path, settings: EngineSettings) -> Vllm:
        return Vllm(
            path,
            threads=settings.threads,
            slots=settings.slots,
            reuse_prefix=settings.reuse_prefix,
            max_prompt_tokens=settings.max_prompt_tokens,
        )


ENGINE = VllmLoader()
