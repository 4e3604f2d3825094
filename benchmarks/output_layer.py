"""The output layer and its cross-entropy, forward and backward: in parts, against whole logits and their loss.

    .venv/bin/python benchmarks/output_layer.py [--repeats 3] [--threads 1] [--predictions 2048]
        [--shapes 256x4096 512x32000 ...]

Prints one Markdown table of widths by outputs: CPU seconds (least of the repeats) and the most memory that a process
took beside the layer and its input. fp32. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import child, machine, table
from step_parts import most_memory_mb
from torch import nn

from overproof.train.cross_entropy import linear_cross_entropy, mean_cross_entropy

SHAPES = ("256x4096", "512x32000", "512x64000", "1024x32000", "1024x128000")


def measured(parts: bool, predictions: int, hidden: int, outputs: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden_NH = torch.randn(predictions, hidden, requires_grad=True)
    layer = nn.Linear(hidden, outputs, bias=False)
    targets_BP, mask_BP = torch.randint(0, outputs, (1, predictions)), torch.ones(1, predictions)
    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far counts no more
    before, seconds = most_memory_mb(), []
    for _ in range(repeats):
        hidden_NH.grad = layer.weight.grad = None
        began = time.process_time()
        if parts:
            loss = linear_cross_entropy(hidden_NH, layer.weight, targets_BP, mask_BP)
        else:
            loss = mean_cross_entropy(layer(hidden_NH)[None], targets_BP, mask_BP)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.process_time() - began)
    return {"s": min(seconds), "mb": most_memory_mb() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--predictions", type=int, default=2048)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--way", choices=("parts", "whole"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.way:
        hidden, outputs = map(int, given.shapes[0].split("x"))
        print(json.dumps(measured(given.way == "parts", given.predictions, hidden, outputs, given.repeats)))
        return
    lines = []
    for shape in given.shapes:
        command = [sys.executable, __file__, "--threads", given.threads, "--predictions", given.predictions]
        command += ["--repeats", given.repeats, "--shapes", shape, "--way"]
        parts, whole = (child([*command, way], given.threads) for way in ("parts", "whole"))
        lines.append((shape, f"{parts['s']:.2f}", f"{whole['s']:.2f}", f"{parts['mb']:,.0f}", f"{whole['mb']:,.0f}"))
    print(f"{machine(given.threads)}; {given.predictions:,} predictions\n")
    table(("width x outputs", "parts, s", "whole, s", "parts, MB", "whole, MB"), lines)


if __name__ == "__main__":
    main()
