"""What a server in front of a language model costs: overproof's, llama.cpp's own, Hugging Face's, and none.

    .venv/bin/python benchmarks/serving_text.py [--repeats 5] [--threads 1] [--streams 8] [--tokens 64] [--waves 2]
                                                [--firsts 30] [--only NAME...] [--peers /tmp/overproof-peers]

Prints one Markdown table. The model is a Llama of 82 million parameters with fresh weights, q8_0 for llama.cpp and fp32
for Hugging Face, so between those two rows and the others more differs than the server. All take the likeliest token,
and no text ends early. Each server is started for its turn alone and warmed; clients are one process for all of them
(`clients.py`). Throughput is of --waves times --streams prompts of 64 tokens, always --streams at once, no prompt
twice; the first token is of --firsts requests one after the other, with prompts of 8 tokens, for reading a longer one
takes so much longer than the server that the server is lost in the noise. `generate` pads a batch of --streams prompts,
which starts and ends together. CPU is the server's, with every process of Ray's. About ten minutes; needs the
environment that `benchmarks/peers.py` makes, or makes it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import peers
from forge import HUGGING_FACE, forge_text, texts
from measuring import interleaved, machine, median, spread, table
from serving import Server, ours, theirs
from tokenizers import Tokenizer

from overproof.data.manifest import TOKENIZER
from overproof.models.decoder import LEAST_POSITIONS

PROMPT, FIRST_PROMPT, FIRST_TOKENS = 63, 7, 4  # behind the token that starts every text
ENGINE, STREAMED, LLAMA_CPP = "the engine, called directly", "the same, streamed", "llama.cpp's own server"
OVERPROOF, GENERATE, GENERATE_ALONE = "overproof", "`generate`, one batch", "`generate`, text by text"
TRANSFORMERS, TRANSFORMERS_CB = "`transformers serve`", "`transformers serve --continuous-batching`"
PAGE, BATCH_TOKENS = 32, 512  # of `transformers serve`; llama.cpp reads as many tokens of prompts at once
WHOLE_VOCABULARY = {"top_k": 0, "min_p": 0.0}  # as overproof asks llama.cpp


class Prompts:
    """Pieces of the standard library, none given twice: a server may keep what it has read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._texts, self._ids, self._at = tokenizer, iter(texts()), list[int](), 0

    def take(self, count: int, tokens: int) -> list[str]:
        return [self._next(tokens) for _ in range(count)]

    def _next(self, tokens: int) -> str:
        while True:
            while self._at + tokens > len(self._ids):
                self._ids, self._at = self._tokenizer.encode(next(self._texts), add_special_tokens=False).ids, 0
            ids = self._ids[self._at : self._at + tokens]
            self._at += tokens
            text: str = self._tokenizer.decode(ids)
            if self._tokenizer.encode(text, add_special_tokens=False).ids == ids:
                return text


def plan(prompts: list[str], tokens: int, clients: int, stream: bool = True, **more: Any) -> dict[str, Any]:
    usage = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    bodies = [{"prompt": p, "max_tokens": tokens, "temperature": 0, **usage, **more} for p in prompts]
    return {"method": "POST", "path": "/v1/completions", "bodies": bodies, "clients": clients, "stream": stream}


def once(
    start: Callable[[], AbstractContextManager[Server]],
    prompts: dict[str, list[str]],
    given: argparse.Namespace,
    whole: bool = False,
    first_tokens: int = FIRST_TOKENS,
    **more: Any,
) -> dict[str, Any]:
    with start() as server:
        server.ask(plan(prompts["warming"], FIRST_TOKENS, given.streams, **more))
        first = server.ask(plan(prompts["first"], first_tokens, 1, **more))
        found = server.ask(plan(prompts["waves"], given.tokens, given.streams, stream=not whole, **more))
    expected = len(prompts["waves"]) * given.tokens
    if found["tokens"] != expected:
        sys.exit(f"{found['tokens']} tokens came; expected {expected}")
    per = 1000 / found["tokens"]
    return {
        "tokens_per_s": found["tokens"] / found["wall_s"],
        "first_ms": 1e3 * statistics.median(first["first_s"]),
        "server_cpu_s": per * found["server_cpu_s"],
        "client_cpu_s": per * found["cpu_s"],
    }


def rounds(prompts: Prompts, given: argparse.Namespace) -> Iterator[dict[str, list[str]]]:
    """The prompts of each repeat, the same for all servers."""
    while True:
        yield {
            "warming": prompts.take(given.streams, PROMPT),
            "first": prompts.take(given.firsts, FIRST_PROMPT),
            "waves": prompts.take(given.waves * given.streams, PROMPT),
        }


def measured(folder: Path, given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    package, model = forge_text(folder), folder / HUGGING_FACE
    python, threads = peers.transformers_serve(given.peers.absolute()), given.threads
    gguf, log = package / "model.gguf", folder / "log"
    serve = [python, "-m", "transformers.cli.transformers", "serve", model, "--device", "cpu", "--dtype", "float32"]
    serve += ["--host", "127.0.0.1", "--port", "{port}"]
    # Left to itself it takes 9 GB for its cache, and 40 s before its first token; this is the cache that llama.cpp has.
    pages = ["--cb-block-size", PAGE, "--cb-num-blocks", LEAST_POSITIONS * given.streams // PAGE]
    pages += ["--cb-max-batch-tokens", BATCH_TOKENS]
    engine = partial(ours, "engine.py", gguf, threads, given.streams, threads=threads)
    hugging_face = partial(theirs, path="/health", threads=threads, log=log)
    starts: dict[str, tuple[Callable[[], AbstractContextManager[Server]], dict[str, Any]]] = {
        ENGINE: (engine, {"whole": True}),
        STREAMED: (engine, {}),
        OVERPROOF: (partial(ours, "over_http.py", package, threads, given.streams, 1, threads=threads), {}),
        LLAMA_CPP: (partial(ours, "llama_cpp.py", gguf, threads, given.streams, threads=threads), WHOLE_VOCABULARY),
        GENERATE: (partial(ours, "generate.py", model, threads, given.streams, threads=threads), {"first_tokens": 1}),
        GENERATE_ALONE: (partial(ours, "generate.py", model, threads, 1, threads=threads), {"first_tokens": 1}),
        TRANSFORMERS: (partial(hugging_face, serve), {}),
        TRANSFORMERS_CB: (partial(hugging_face, [*serve, "--continuous-batching", *pages]), {}),
    }
    if given.only:
        starts = {name: found for name, found in starts.items() if any(part in name for part in given.only)}
    drawn = rounds(Prompts(Tokenizer.from_file(str(folder / TOKENIZER))), given)
    prompts = [next(drawn) for _ in range(given.repeats)]

    def turn(name: str) -> Callable[[], dict[str, Any]]:
        (start, more), mine = starts[name], iter(prompts)
        return lambda: once(start, next(mine), given, **more)

    return interleaved(given.repeats, {name: turn(name) for name in starts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--waves", type=int, default=2)
    parser.add_argument("--firsts", type=int, default=30)
    parser.add_argument("--only", nargs="*", help="parts of the names of rows; the first row is what others divide by")
    parser.add_argument("--peers", type=Path, default=Path("/tmp/overproof-peers"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measured(Path(scratch), given)
    best = next(iter(found.values()))
    print(f"{machine(given.threads)}; {given.streams} streams of {given.tokens} tokens; medians of {given.repeats}\n")
    lines = []
    for name, rows in found.items():
        pairs = [
            {
                "ratio": row["tokens_per_s"] / base["tokens_per_s"],
                "more_ms": row["first_ms"] - base["first_ms"],
            }
            for row, base in zip(rows, best, strict=True)
        ]
        lines.append(
            [
                name,
                f"{median(rows, 'tokens_per_s'):.1f}",
                spread(pairs, "ratio", 3),
                f"{median(rows, 'first_ms'):.1f}",
                spread(pairs, "more_ms", 1),
                f"{median(rows, 'server_cpu_s'):.2f}",
                f"{median(rows, 'client_cpu_s'):.2f}",
            ]
        )
    head = ("server", "tokens/s", "÷ engine", "first token, ms", "more than the engine, ms")
    table((*head, "CPU s for 1,000 tokens", "clients' CPU s"), lines)


if __name__ == "__main__":
    main()
