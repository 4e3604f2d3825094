"""Language models in vLLM, in a process of its own environment: for nodes with GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from overproof.data.manifest import TOKENIZER
from overproof.engines.base import Completion, EngineSettings, FinishReason, Piece, Sampling, Token
from overproof.engines.detokenizer import Detokenizer
from overproof.engines.gguf_tokens import read_gguf_header
from overproof.engines.prompt_limits import InFlight, PromptLimits, require_unicode
from overproof.engines.vllm_server import VllmServer, vllm_python
from overproof.errors import InputError

Reported = tuple[str, float, Mapping[str, float]]  # token, log-probability, those of the likeliest; by name


class Vllm:
    """One GGUF file, its weights unpacked to half precision, decoding up to ``slots`` sequences at once.

    vLLM is given token ids and gives token ids: texts are split by the tokenizer beside the file, and made from the
    bytes of its tokens, as llama.cpp makes them. Sequences that share a step may differ in the last digits. Penalties
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
            InputError: the file is missing or no GGUF language model, its tokenizer is not beside it, the context is
                longer than the model's, or there is no vLLM.
        """
        header, tokenizer = read_gguf_header(path), path.with_name(TOKENIZER)
        self._room = PromptLimits.of(header, path, context_length, max_prompt_tokens)
        self.context_length = self._room.context_length
        self.chats = header.template is not None
        self._header = header
        if not tokenizer.is_file():
            raise InputError(f"{tokenizer}: missing; expected the tokenizer beside its model")
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._calls = InFlight()
        self._server = VllmServer(path, threads, slots, self.context_length, reuse_prefix)

    def complete(self, prompt: str | Sequence[int], sampling: Sampling) -> Completion:
        """Continue a prompt until done. See ``TextEngine``; the times are from the call, so they include a wait.

        Raises:
            InputError: the prompt is empty or too long, an id is not in the vocabulary, or a setting is out of range.
        """
        began_s = time.perf_counter()
        request = self._request(prompt, sampling)
        steps, times_s = list[_Step](), list[float]()
        for step in self._steps(request, sampling.stop):
            steps.append(step)
            times_s.append(time.perf_counter())
        likeliest, reason = sampling.logprobs, steps[-1].finish_reason
        assert reason is not None
        reported = [each for step in steps for each in step.reported]
        return Completion(
            text="".join(step.text for step in steps),
            tokens=[token for step in steps for token in step.tokens],
            taken=None if likeliest is None else [self._token(each, likeliest) for each in reported],
            finish_reason=reason,
            prompt_tokens=len(request["prompt"]),
            first_token_s=times_s[0] - began_s,
            decode_s=times_s[-1] - times_s[0],
        )

    def accept(self, prompt: str | Sequence[int], sampling: Sampling) -> None:
        """Return where ``complete`` would begin.

        Raises:
            InputError: as ``complete``.
        """
        self._request(prompt, sampling)

    def stream(self, prompt: str | Sequence[int], sampling: Sampling) -> VllmPieces:
        """Continue a prompt piece by piece.

        Raises:
            InputError: as ``complete``, before the first piece.
        """
        request = self._request(prompt, sampling)
        return VllmPieces(self._steps(request, sampling.stop), len(request["prompt"]))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages as a prompt, by the template in the file.

        Raises:
            InputError: there is none, or it does not take these messages.
        """
        try:
            # A text that is asked gets its start token anyway.
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, bos_token="", eos_token=self._header.end
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InputError(f"messages: the model's chat template does not take them: {error}") from None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with no start token added.

        Raises:
            InputError: the text is not valid Unicode.
        """
        ids: list[int] = self._tokenizer.encode(require_unicode(text), add_special_tokens=False).ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; broken characters are replaced."""
        return self._header.text(ids)

    def check(self) -> None:
        """Return when vLLM says that it is well; raise when it does not."""
        with self._calls.one():
            if not self._server.answers():
                raise RuntimeError("vLLM does not answer")

    def close(self) -> None:
        """Wait for the calls in progress, then end vLLM."""
        self._calls.end()
        self._server.close()

    @cached_property
    def _template(self) -> Template:
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        sandbox.globals["raise_exception"] = _refuse
        return sandbox.from_string(self._header.chat_template())

    def _request(self, prompt: str | Sequence[int], sampling: Sampling) -> dict[str, Any]:
        ids, most = self._room.take(prompt, sampling, lambda text: [self._header.start, *self.tokenize(text)])
        request = {
            "prompt": ids,
            "max_tokens": most,
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
        """What is generated, up to a stop string; generation ends with the generator."""
        written = Detokenizer(self._header.pieces, stops)
        with self._calls.one():
            for said in self._server.stream(request):
                for choice in said["choices"]:
                    step = _step(choice, written)
                    yield step
                    if step.finish_reason is not None:
                        return
        raise RuntimeError("vLLM ended a text before its end")

    def _token(self, reported: Reported, likeliest: int) -> Token:
        name, logprob, top = reported
        ranked = sorted(((value, _id(other)) for other, value in top.items()), key=lambda pair: (-pair[0], pair[1]))
        return Token(
            _id(name),
            self._header.pieces[_id(name)],
            logprob,
            tuple((id_, self._header.pieces[id_], value) for value, id_ in ranked[:likeliest]),
        )


@dataclass(frozen=True)
class _Step:
    """Tokens, their text so far as it may be shown, what vLLM reports of each, and why they ended, if they did."""

    text: str
    tokens: list[int]
    reported: list[Reported]
    finish_reason: FinishReason | None


def _step(choice: dict[str, Any], written: Detokenizer) -> _Step:
    text, tokens = "", list[int]()
    for token in choice["token_ids"] or ():
        tokens.append(token)
        text += written.push(token)
        if written.stopped:
            break
    reason: FinishReason | None = "stop" if written.stopped else choice["finish_reason"]
    found = choice["logprobs"] or {"tokens": (), "token_logprobs": (), "top_logprobs": ()}
    reported = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    return _Step(text if reason is None else text + written.flush(), tokens, list(reported)[: len(tokens)], reason)


class VllmPieces:
    """A completion being generated."""

    def __init__(self, steps: Generator[_Step], prompt_tokens: int) -> None:
        self._steps = steps
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._closed = threading.Event()

    def __iter__(self) -> VllmPieces:
        return self

    def __next__(self) -> Piece:
        while not self._closed.is_set():
            step = next(self._steps)
            self._tokens += len(step.tokens)
            if step.text or step.finish_reason is not None:
                return Piece(step.text, step.finish_reason, self._prompt_tokens, self._tokens)
        self._steps.close()
        raise StopIteration

    def close(self) -> None:
        """Generate no further; vLLM hears of it at its next token."""
        self._closed.set()


def _id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _refuse(message: str) -> None:
    raise TemplateError(message)


class VllmLoader:
    """See ``EngineLoader``."""

    computes_with = "the file's weights unpacked to fp16, not its own bytes"

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
