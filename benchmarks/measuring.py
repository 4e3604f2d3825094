"""What the benchmarks share: CPU seconds of a process tree, medians, and one way to print a table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.2
HERE = Path(__file__).parent


class TreeCpu:
    """User and system seconds that this process and everything below it spend inside the block."""

    def __init__(self, root: psutil.Process | None = None) -> None:
        self.root = root or psutil.Process()
        self.spent: dict[tuple[int, float], float] = {}  # by process id and start
        self.before: dict[tuple[int, float], float] = {}
        self.over = threading.Event()

    def __enter__(self) -> TreeCpu:
        self._sample()
        self.before = dict(self.spent)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self._sample()

    @property
    def seconds(self) -> float:
        return sum(spent - self.before.get(key, 0) for key, spent in self.spent.items())

    def _watch(self) -> None:
        while not self.over.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        try:
            family = [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return
        for process in family:
            try:
                times, key = process.cpu_times(), (process.pid, process.create_time())
            except psutil.Error:
                continue
            self.spent[key] = times.user + times.system


def environment(threads: int, **more: str) -> dict[str, str]:
    """For a child: so many threads in every library, no network, and no cluster but its own."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**kept, **counts, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def child(command: Sequence[Any], threads: int, **more: str) -> dict[str, Any]:
    """Run a script to its end; gives the JSON that it printed last."""
    done = subprocess.run([*map(str, command)], env=environment(threads, **more), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return printed(done.stdout)


def printed(said: str) -> dict[str, Any]:
    """The last line that is a JSON object: Ray and torch may talk behind it."""
    found: dict[str, Any] = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith('{"')))
    return found


def interleaved(repeats: int, runs: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Every run in turn, ``repeats`` times over, each round the other way round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
            say(f"repeat {repeat + 1} of {repeats}: {name}")
            found[name].append(runs[name]())
    return found


def median(rows: Iterable[dict[str, Any]], key: str) -> float:
    return float(statistics.median(row[key] for row in rows))


def spread(rows: Iterable[dict[str, Any]], key: str, digits: int) -> str:
    """The median, and behind it the smallest and the largest."""
    values = [row[key] for row in rows]
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def machine(threads: int) -> str:
    return f"{os.cpu_count()} cores, {threads} {'thread' if threads == 1 else 'threads'} in every process"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
