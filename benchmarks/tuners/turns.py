"""What every tuner of benchmarks/finetune.py shares: the rows, and turns of a few steps that are asked for in lines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

Rows = dict[str, Any]


def setting(file: str) -> tuple[dict[str, Any], Rows]:
    given = json.loads(Path(file).read_text())
    return given, dict(np.load(given["rows"]))


def examples(rows: Rows) -> list[dict[str, list[int]]]:
    """Each row without what fills it up: its tokens, their labels (-100 where none counts), and its texts' lengths."""
    found = []
    for tokens_S, answer_P, sizes in zip(rows["tokens"], rows["answer"], rows["sizes"], strict=True):
        lengths = sizes[sizes > 0].tolist()
        held = sum(lengths)
        counts_S = np.concatenate([[0], answer_P])[:held] > 0
        found.append({
            "input_ids": tokens_S[:held].tolist(),
            "labels": np.where(counts_S, tokens_S[:held], -100).tolist(),
            "seq_lengths": lengths,
        })  # fmt: skip
    return found


class Turns:
    """Waits for a line before each turn of so many steps, and prints what the turn took."""

    def __init__(self, given: dict[str, Any], rows: Rows) -> None:
        self._steps, self._turns = given["steps"], given["turns"]
        self._tokens = rows["sizes"].reshape(self._turns, -1).sum(1)  # of each turn
        self._done, self._losses = 0, list[float]()

    def begin(self) -> None:
        """Wait for the first line."""
        self._wait()

    def step(self, loss: float) -> None:
        """A step is over."""
        self._losses.append(loss)
        self._done += 1
        if self._done % self._steps:
            return
        wall_s, cpu_s = time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s
        tokens = int(self._tokens[self._done // self._steps - 1])
        loss = sum(self._losses) / len(self._losses)
        found = {"wall_ms": 1000 * wall_s / tokens, "cpu_ms": 1000 * cpu_s / tokens, "loss": loss}
        print("\n" + json.dumps(found), flush=True)
        self._losses.clear()
        if self._done < self._steps * self._turns:
            self._wait()

    def _wait(self) -> None:
        sys.stdin.readline()
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()
