"""A client of endpoints that tell what their model says of the tokens of a prompt, or write on from them, and a scorer
that asks one.

The request is OpenAI's completion with `echo` and `logprobs`, and vLLM's `return_tokens_as_token_ids`, by which tokens
are named `token_id:N` (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html): vLLM and ``overproof
serve`` answer it alike.

Shapes: P places of a row, each of which predicts the token after it; K likeliest tokens told of each.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from overproof.addresses import is_loopback
from overproof.config import Served
from overproof.engines.base import PlaceScores
from overproof.errors import InputError

TOKEN_NAME = "token_id:"
BUSY = (408, 429, 502, 503, 504)  # statuses of what may be asked again
CONNECT_TIMEOUT_S = 10.0
UNCHANGED = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}  # else vLLM takes the model's own defaults
FIRST_WAIT_S, MOST_WAIT_S = 0.25, 8.0  # between two tries; each is twice the one before
TELL_EVERY_S = 5.0  # at most, of what is waited for


@dataclass(frozen=True)
class PromptLogprobs:
    """What an endpoint says of one prompt, in nats; nothing predicts the first token."""

    ids: list[int]  # P + 1
    logprobs_P: NDArray[np.float64]
    top_P: list[dict[int, float]]  # by token: the likeliest, and the one that is there

    def likeliest(self, count: int, outputs: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of each place the ``count`` likeliest of ``outputs`` tokens and their log-probabilities, (P, K) each.

        Raises:
            InputError: fewer are told.
        """
        ranked = [sorted((-v, i) for i, v in top.items() if i < outputs)[:count] for top in self.top_P]
        if (fewest := min(map(len, ranked), default=count)) < count:
            raise InputError(f"the endpoint tells {fewest} of the {count} likeliest tokens of cache.scheme.k; lower it")
        found_PK2 = np.array(ranked, np.float64).reshape(-1, count, 2)
        return found_PK2[..., 1].astype(np.int64), -found_PK2[..., 0]


class Endpoint:
    """A served model. Every method may be called from several threads."""

    def __init__(self, served: Served, tell: Callable[[str], None] = lambda _: None) -> None:
        """``tell`` hears of an endpoint that is waited for.

        Raises:
            InputError: the variable that ``key_env`` names holds no key.
        """
        self.served, self._tell, self._told_s = served, tell, -math.inf
        key = None if served.key_env is None else os.environ.get(served.key_env, "").strip()
        if served.key_env is not None and not key:
            raise InputError(
                f"train.model.key_env: {served.key_env} is not set; expected the API key in it, on every node"
            )
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(served.timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=not is_loopback(
                httpx.URL(served.url).host
            ),  # proxies of the environment are for what is elsewhere
        )

    def model_entry(self) -> dict[str, Any]:
        """The model as the endpoint lists it.

        Raises:
            InputError: it lists no such model, or cannot be asked.
        """
        listed = self._ask("GET", "models", None, "")
        entries = {entry["id"]: entry for entry in listed["data"]} if isinstance(listed.get("data"), list) else {}
        if self.served.model not in entries:
            raise InputError(
                f"{self.served.url}: serves {', '.join(entries) or 'nothing'}; expected {self.served.model!r}, as "
                "train.model.model has it"
            )
        return dict(entries[self.served.model])

    def read(self, prompts: Sequence[str | Sequence[int]], top: int) -> list[PromptLogprobs]:
        """What it says of these prompts, with the ``top`` likeliest tokens at each place.

        Raises:
            InputError: it cannot be asked, tells no such thing, or reads other tokens than the ids that it was given.
        """
        body = {
            "model": self.served.model,
            "prompt": list(prompts),
            "max_tokens": 0,
            "temperature": 0,
            "echo": True,
            "logprobs": top,
            "return_tokens_as_token_ids": True,
        }
        longest = max(map(len, prompts))
        limits = (
            f"; it was asked for the {top} likeliest tokens (cache.scheme.k) of prompts of up to {longest} tokens "
            "(data.sequence_length): vLLM's own limits are --max-logprobs and --max-model-len"
        )
        reply = self._ask("POST", "completions", body, limits)
        try:
            found = [_parse(choice["logprobs"]) for choice in sorted(reply["choices"], key=lambda c: c["index"])]
            if len(found) != len(prompts):
                raise ValueError(f"{len(found)} answers to {len(prompts)} prompts")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.served.url}: tells no log-probabilities of a prompt's tokens by their ids ({error!r}); "
                "expected vLLM, overproof serve, or another that answers echo, logprobs and return_tokens_as_token_ids"
            ) from None
        for prompt, told in zip(prompts, found, strict=True):
            if not isinstance(prompt, str) and told.ids != list(prompt):
                raise InputError(
                    f"{self.served.url}: was asked about tokens {prompt[:4]}… and tells of {told.ids[:4]}…"
                )
        return found

    def read_rows(self, rows: Iterable[Sequence[int]], top: int) -> Iterator[PromptLogprobs]:
        """What it says of each row, in their order; several requests are in flight.

        Raises:
            InputError: as ``read``.
        """
        remaining, pending = iter(rows), deque[Future[list[PromptLogprobs]]]()
        with ThreadPoolExecutor(self.served.concurrent_requests) as pool:
            try:
                while chunk := list(islice(remaining, self.served.rows_per_request)):
                    pending.append(pool.submit(self.read, chunk, top))
                    if len(pending) > self.served.concurrent_requests:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for request in pending:
                    request.cancel()

    def write(self, prompt: Sequence[int], tokens: int, temperature: float, seed: int) -> tuple[list[int], bool]:
        """So many tokens after a prompt, or fewer where a token ends the text, and whether one did: it is among them or
        not, as the endpoint has it. Temperature 0 takes the likeliest.

        Raises:
            InputError: it cannot be asked, or does not tell the tokens.
        """
        body = {
            "model": self.served.model,
            "prompt": [list(prompt)],
            "max_tokens": tokens,
            "temperature": temperature,
            "seed": seed,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            **UNCHANGED,
        }
        limits = (
            f"; it was asked for {tokens} tokens after {len(prompt)} (data.sequence_length): vLLM's own limit is "
            "--max-model-len, that of overproof serve max_tokens"
        )
        reply = self._ask("POST", "completions", body, limits)
        try:
            (choice,) = reply["choices"]
            ids = [_token_id(name) for name in choice["logprobs"]["tokens"]]
            is_ended = choice["finish_reason"] == "stop"
            if not (is_ended and len(ids) <= tokens) and len(ids) != tokens:
                raise ValueError(f"{len(ids)} tokens of {tokens}, ended by {choice['finish_reason']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.served.url}: does not tell what it writes by the ids of its tokens ({error!r}); expected "
                "vLLM, overproof serve, or another that answers logprobs and return_tokens_as_token_ids"
            ) from None
        return ids, is_ended

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def _ask(self, method: str, path: str, body: Any, limits: str) -> dict[str, Any]:
        url, began_s, wait_s = f"{self.served.url}/{path}", time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                reply = self._http.request(method, url, json=body)
            except httpx.TransportError as error:
                fault, after = f"does not answer ({error or type(error).__name__})", ""
            else:
                if reply.status_code not in BUSY:
                    return self._content(url, reply, limits)
                fault, after = f"answers {reply.status_code}", reply.headers.get("retry-after", "")
            spent_s = time.monotonic() - began_s
            if spent_s >= self.served.retry_s:
                raise InputError(
                    f"{url}: {fault}, since {spent_s:.0f} s; expected an endpoint that is up: run again then"
                )
            if time.monotonic() - self._told_s >= TELL_EVERY_S:
                self._told_s = time.monotonic()
                self._tell(f"{url} {fault}; asked again for up to {self.served.retry_s - spent_s:.0f} s")
            time.sleep(max(random.uniform(0.5, 1) * wait_s, min(float(after) if after.isdecimal() else 0, MOST_WAIT_S)))
            wait_s = min(2 * wait_s, MOST_WAIT_S)

    def _content(self, url: str, reply: httpx.Response, limits: str) -> dict[str, Any]:
        try:
            content = reply.json()
        except ValueError:
            content = None
        if reply.is_success and isinstance(content, dict):
            return content
        if reply.status_code in (401, 403):
            key = self.served.key_env
            sent = f"{key} holds no key of it" if key else "none was sent: name the variable that holds one as key_env"
            raise InputError(f"{url}: asks for another API key ({reply.status_code}); {sent}")
        error = content.get("error", content) if isinstance(content, dict) else reply.text
        message = str(error.get("message", error) if isinstance(error, dict) else error)[:300]
        if reply.status_code == 404 or reply.is_success:
            limits = "; expected an OpenAI-compatible endpoint: train.model.url up to /v1, such as http://HOST:8000/v1"
        raise InputError(f"{url}: answers {reply.status_code}: {message}{limits}")


def _parse(told: Any) -> PromptLogprobs:
    ids = [_token_id(name) for name in told["tokens"]]
    logprobs, tops = told["token_logprobs"][1:], told["top_logprobs"][1:]
    if len(logprobs) != len(ids) - 1 or len(tops) != len(ids) - 1 or not all(map(math.isfinite, logprobs)):
        raise ValueError("not one finite number for each token but the first")
    named = zip(ids[1:], logprobs, tops, strict=True)
    return PromptLogprobs(
        ids,
        np.array(logprobs, np.float64),
        [{_token_id(name): float(value) for name, value in top.items()} | {id_: value} for id_, value, top in named],
    )


def _token_id(name: str) -> int:
    if not name.startswith(TOKEN_NAME):
        raise ValueError(f"a token is named {name!r}")
    return int(name.removeprefix(TOKEN_NAME))


class EndpointScorer:
    """See ``TextScorer``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def score(self, rows: Iterable[NDArray[Any]]) -> Iterator[PlaceScores]:
        for told in self._endpoint.read_rows((row.tolist() for row in rows), 1):
            best = [min((-value, id_) for id_, value in top.items()) for top in told.top_P]
            nats, choices = zip(*best, strict=True)
            yield PlaceScores(-told.logprobs_P, np.array(choices, np.int32), np.array(nats))

    def close(self) -> None:
        self._endpoint.close()
