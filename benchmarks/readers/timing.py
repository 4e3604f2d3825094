"""Times a reader in whatever environment it lives: needs torch alone.

    python READER.py VARIANT ROOT BATCH_SIZE EPOCHS CHECK

A variant is opened once and gives the batches of epoch 0, 1, ...: tensors of tokens (B, S) and lengths (B), int64.
The last line printed is JSON: rows, and CPU and wall seconds of the first epoch and, on average, of the later ones.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Epoch = Callable[[int], Batches]
Open = Callable[[Path, int], Epoch]


def main(variants: dict[str, Open], prepare: Callable[[Path], None] | None = None) -> None:
    torch.set_num_threads(1)
    name, root, batch_size, epochs, check = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    if name == "prepare":
        assert prepare
        began = time.process_time()
        prepare(root)
        print(json.dumps({"cpu_s": time.process_time() - began}))
        return
    found = []
    next(iter(variants[name](root, batch_size)(epochs)))  # what a process does but once: imports, allocations
    epoch = variants[name](root, batch_size)
    for index in range(epochs):
        rows, total = 0, 0
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for tokens, length in epoch(index):
            rows += len(tokens)
            if check:
                assert tokens.dtype == length.dtype == torch.int64, (tokens.dtype, length.dtype)
                total += int(tokens.sum() + length.sum())
        found.append((time.process_time() - cpu_s, time.perf_counter() - wall_s, rows, total))
    later = found[1:] or found
    print(
        json.dumps(
            {
                "rows": found[0][2],
                "total": found[0][3],
                "first_cpu_s": found[0][0],
                "first_wall_s": found[0][1],
                "later_cpu_s": sum(cpu_s for cpu_s, *_ in later) / len(later),
                "later_wall_s": sum(wall_s for _, wall_s, *_ in later) / len(later),
            }
        )
    )
