"""Parts of a training step on the CPU, against what one writes with torch and numpy: update, loss, cached indices.

    .venv/bin/python benchmarks/step_parts.py [--repeats 9] [--threads 1]

Prints one Markdown table: milliseconds, medians of repeats in turn (least to most), and for the loss the most memory
that a process took beside the logits. That both give the same indices is checked. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import child, interleaved, machine, spread, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from overproof.distill.target_codec import pack, unpack
from overproof.train.cross_entropy import mean_cross_entropy

SHAPES = [(512, 512)] * 80 + [(512,)] * 18 + [(4096, 256)] * 2  # 23 million numbers in 100 tensors
PREDICTIONS, HIDDEN, OUTPUTS = 1024, 256, 50_000
BITS, ROWS, TOKENS, KEPT = 15, 16, 256, 32


def update(fused: bool) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1, fused=fused)

    def run() -> float:
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began

    return run


def plain(logits_BPV: Tensor, targets_BP: Tensor, mask_BP: Tensor) -> Tensor:
    nll_N = cross_entropy(logits_BPV.float().flatten(0, 1), targets_BP.flatten(), reduction="none")
    return (nll_N.view_as(targets_BP) * mask_BP).sum() / (mask_BP > 0).sum()


def loss(ours: bool, dtype: torch.dtype) -> Callable[[], float]:
    torch.manual_seed(0)
    hidden_NH = torch.randn(PREDICTIONS, HIDDEN, dtype=dtype, requires_grad=True)
    output_VH = torch.randn(OUTPUTS, HIDDEN, dtype=dtype).mul_(0.05).requires_grad_()
    targets_BP, mask_BP = torch.randint(0, OUTPUTS, (1, PREDICTIONS)), torch.ones(1, PREDICTIONS)

    def run() -> float:
        logits_BPV = (hidden_NH @ output_VH.T)[None]
        leaf_BPV = logits_BPV.detach().requires_grad_()
        given = (leaf_BPV, targets_BP, mask_BP)
        began = time.perf_counter()
        (mean_cross_entropy(*given) if ours else plain(*given)).backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - began

    return run


def pack_bit_by_bit(values_BN: np.ndarray, bits: int) -> np.ndarray:
    each_BNH = (values_BN[..., None] >> np.arange(bits)) & 1
    return np.packbits(each_BNH.reshape(len(values_BN), -1).astype(np.uint8), axis=1, bitorder="little")


def unpack_by_three_bytes(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    first_N = np.arange(count) * bits
    byte_N, shift_N = first_N >> 3, first_N & 7
    wide = np.pad(packed, ((0, 0), (0, 2))).astype(np.int32)
    three_BN = wide[:, byte_N] | wide[:, byte_N + 1] << 8 | wide[:, byte_N + 2] << 16
    return (three_BN >> shift_N & (1 << bits) - 1).astype(np.int64)


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    def measured() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return measured


def most_memory_mb() -> float:
    """Resident memory of this process at its largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def peak_mb(ours: bool, dtype: str) -> int:
    """Of a process of its own that does nothing else."""
    return int(child([sys.executable, __file__, "--loss", dtype, *(["--ours"] if ours else [])], 1)["mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loss", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.loss:
        dtype = getattr(torch, given.loss)
        run = loss(given.ours, dtype)
        logits_mb = PREDICTIONS * OUTPUTS * dtype.itemsize / 1e6
        Path("/proc/self/clear_refs").write_text("5")  # the most memory so far counts no more
        before = most_memory_mb()
        run()
        print(json.dumps({"mb": most_memory_mb() - before - logits_mb}))
        return
    values_BN = np.random.default_rng(0).integers(0, 1 << BITS, (ROWS, TOKENS * KEPT))
    packed = pack(values_BN, BITS)
    count = values_BN.shape[1]
    assert np.array_equal(packed, pack_bit_by_bit(values_BN, BITS))
    assert np.array_equal(unpack(packed, count, BITS), unpack_by_three_bytes(packed, count, BITS))
    parts = {
        "AdamW, 23M numbers in 100 tensors": (update(True), update(False)),
        **{
            f"loss and its gradient, {PREDICTIONS:,} predictions of {OUTPUTS:,} outputs, {name}": (
                loss(True, dtype), loss(False, dtype),
            )
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        },
        f"packing {BITS} bits, {ROWS * TOKENS:,} tokens, {KEPT} each": (
            timed(partial(pack, values_BN, BITS)), timed(partial(pack_bit_by_bit, values_BN, BITS)),
        ),
        "unpacking them": (
            timed(partial(unpack, packed, count, BITS)), timed(partial(unpack_by_three_bytes, packed, count, BITS)),
        ),
    }  # fmt: skip
    runs = {
        f"{who}/{name}": run for name, pair in parts.items() for who, run in zip(("ours", "plain"), pair, strict=True)
    }
    found = interleaved(given.repeats, {name: lambda run=run: {"ms": 1000 * run()} for name, run in runs.items()})
    print(f"{machine(given.threads)}; medians of {given.repeats} in turn (least to most)\n")
    lines = []
    for name in parts:
        own, other = found[f"ours/{name}"], found[f"plain/{name}"]
        dtype = "float32" if name.endswith("fp32") else "bfloat16" if name.endswith("bf16") else None
        memory = [peak_mb(ours, dtype) if dtype else "" for ours in (True, False)]
        lines.append((name, spread(own, "ms", 1), spread(other, "ms", 1), *memory))
    table(("part", "ours, ms", "plain, ms", "ours, MB", "plain, MB"), lines)


if __name__ == "__main__":
    main()
