"""Requests of llama.cpp on two threads, alone and beside busy processes: its threads spin, or sleep, in a wait.

    .venv/bin/python benchmarks/waiting.py FILE.gguf [--threads 2] [--busy 2] [--prompt 32] [--new 16] [--seconds 3]
        [--repeats 5]

Prints one Markdown table. Between the operations of a layer llama.cpp's threads wait for each other, by OpenMP. GNU's
OpenMP spins in such a wait (300,000 rounds, unless it is told otherwise): a thread that waits burns the core that the
one it waits for has lost. The product has it sleep after 1,000 (``engines/llamacpp_library.py``). Each run is a
process of its own that answers requests one after another for some seconds, one at least, after one that does not
count; the busy processes loop in Python at the same priority.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from measuring import child, interleaved, machine, median, spread, table

SPINS = "300000"  # rounds, as GNU's OpenMP has it where nothing is said and there are as many cores as threads
WAYS: dict[str, dict[str, str]] = {
    "OpenMP's own: 300,000 rounds": {"GOMP_SPINCOUNT": SPINS},
    "1,000 rounds: as the product has it": {},
    "none": {"OMP_WAIT_POLICY": "passive"},
}


def once(file: str, threads: int, prompt: int, new: int, seconds: float) -> None:
    """One run: prints the medians of its requests."""
    from overproof.engines.base import Sampling
    from overproof.engines.llamacpp import LlamaCpp

    engine, number = LlamaCpp(Path(file), threads), 1000
    engine.complete(list(range(number, number + prompt)), Sampling(2))
    answers, began_s, cpu_s = [], time.perf_counter(), time.process_time()
    while not answers or time.perf_counter() - began_s < seconds:
        number += 1
        answers.append(engine.complete(list(range(number, number + prompt)), Sampling(new)))
    cpu_s, tokens = time.process_time() - cpu_s, sum(prompt + len(answer.tokens) for answer in answers)
    print(json.dumps({
        "prompt_ms": 1000 * statistics.median(answer.first_token_s for answer in answers),
        "token_ms": 1000 * statistics.median(answer.decode_s / (len(answer.tokens) - 1) for answer in answers),
        "cpu_ms": 1000 * cpu_s / tokens,
    }), flush=True)  # fmt: skip
    engine.close()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that want a core each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(others: int, way: str, command: list[object], threads: int) -> dict[str, float]:
    with busy(others):
        return child(command, threads, **WAYS[way])


def main() -> None:
    if sys.argv[1:2] == ["once"]:
        once(sys.argv[2], *map(int, sys.argv[3:6]), seconds=float(sys.argv[6]))
        return
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("file", type=Path)
    for name, value in (("threads", 2), ("busy", 2), ("prompt", 32), ("new", 16), ("seconds", 3), ("repeats", 5)):
        options.add_argument(f"--{name}", type=int, default=value)
    given = options.parse_args()
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    command: list[object] = [sys.executable, __file__, "once", given.file.absolute()]
    command += [given.threads, given.prompt, given.new, given.seconds]
    loads = {"nothing": 0} | ({f"{given.busy} busy processes": given.busy} if given.busy else {})
    runs = {
        f"{load}/{way}": partial(run, others, way, command, given.threads)
        for load, others in loads.items()
        for way in WAYS
    }
    found = interleaved(given.repeats, runs)
    print(f"{machine(given.threads)}; prompts of {given.prompt} tokens, {given.new} generated; medians of "
          f"{given.repeats} (least to most); load average {os.getloadavg()[0]:.1f} at the end\n")  # fmt: skip
    lines = []
    for load in loads:
        first = found[f"{load}/{next(iter(WAYS))}"]
        for way in WAYS:
            own = found[f"{load}/{way}"]
            figures = (spread(own, key, digits) for key, digits in (("prompt_ms", 0), ("token_ms", 1), ("cpu_ms", 1)))
            shares = (f"{median(own, key) / median(first, key):.2f}" for key in ("prompt_ms", "token_ms"))
            lines.append((load, way, *figures, *shares))
    head = (
        "beside",
        "threads wait",
        "prompt, ms",
        "a token, ms",
        "CPU ms a token",
        "prompt ÷ spinning",
        "token ÷ spinning",
    )
    table(head, lines)


if __name__ == "__main__":
    main()
