"""overproof's engine called from threads of this process: what a server can reach at best.

    python engine.py GGUF THREADS SLOTS

Prints ``{"url": ""}`` when it is ready, and an answer to each line of its standard input, which is a plan as
``clients.py`` takes it; ``stream`` says which of the engine's two calls is made.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from overproof.engines.base import Sampling
from overproof.engines.llamacpp import LlamaCpp


def run(engine: LlamaCpp, plan: dict[str, Any]) -> dict[str, Any]:
    def ask(body: dict[str, Any]) -> tuple[float, float, int]:
        began_s, sampling = time.perf_counter(), Sampling(max_tokens=body["max_tokens"], temperature=0.0)
        if plan["stream"]:
            first_s, tokens = 0.0, 0
            for piece in engine.stream(body["prompt"], sampling):
                first_s = first_s or time.perf_counter() - began_s
                tokens = piece.completion_tokens
        else:
            done = engine.complete(body["prompt"], sampling)
            first_s, tokens = done.first_token_s, len(done.tokens)
        return first_s, time.perf_counter() - began_s, tokens

    began_s = time.perf_counter()
    with ThreadPoolExecutor(plan["clients"]) as pool:
        asked = list(pool.map(ask, plan["bodies"]))
    first_s, whole_s, tokens = zip(*asked, strict=True)
    wall_s = time.perf_counter() - began_s
    return {"wall_s": wall_s, "cpu_s": 0.0, "tokens": sum(tokens), "first_s": first_s, "whole_s": whole_s}


def main() -> None:
    file, (threads, slots) = Path(sys.argv[1]), map(int, sys.argv[2:])
    engine = LlamaCpp(file, threads, slots, reuse_prefix=True)
    print(json.dumps({"url": ""}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
