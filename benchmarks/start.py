"""The start of a training: seconds from workers up to the first batch and to the first optimizer step.

    .venv/bin/python benchmarks/start.py [--repeats 5] [--threads 1] [--stage 2]

Prints one Markdown table. For torchrun the count begins when it is launched, under Ray when the process of rank 0 is up
(and, in the last column, when the stage is called on a running cluster). About 2.5 minutes for each repeat.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from measuring import HERE, child, interleaved, machine, median, table
from setting import torchrun, write_setting

STEPS = 5


def bare(folder: Path, stage: int, threads: int) -> dict[str, Any]:
    began = time.time()
    found = torchrun(Path(sys.executable), folder, stage, STEPS, 1, ["bare"], threads)
    return {"first_step_s": found["bare"][0]["first"] - began}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--stage", type=int, default=2)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_setting(folder, given.threads)
        script = HERE / "steps" / "under_ray.py"
        runs = {
            who: partial(child, [sys.executable, script, who, folder, given.stage, STEPS], given.threads)
            for who in ("ours", "stock")
        }
        found = interleaved(given.repeats, {"torchrun": partial(bare, folder, given.stage, given.threads), **runs})
    print(f"{machine(given.threads)}, 2 ranks, ZeRO {given.stage}; medians of {given.repeats}\n")
    names = {
        "torchrun": "torchrun + DeepSpeed",
        "ours": "ours under Ray",
        "stock": "stock Ray Data + Ray Train + DeepSpeed",
    }
    lines = []
    for who, rows in found.items():
        cells = [f"{median(rows, key):.1f}" if key in rows[0] else "" for key in ("first_batch_s", "first_step_s")]
        ratio = median(rows, "first_step_s") / median(found["torchrun"], "first_step_s")
        lines.append(
            [names[who], *cells, f"{ratio:.2f}", f"{median(rows, 'start_s'):.1f}" if who != "torchrun" else ""]
        )
    table(("who", "first batch, s", "first step, s", "÷ torchrun", "stage called to first step, s"), lines)


if __name__ == "__main__":
    main()
