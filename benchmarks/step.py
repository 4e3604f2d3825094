"""Seconds of a training step: ours against a bare torchrun + DeepSpeed loop and Hugging Face's Trainer with DeepSpeed.

    .venv/bin/python benchmarks/step.py [--peers FOLDER] [--stages 2 0] [--steps 40] [--repeats 5] [--batch 8]
        [--threads 1] [--ray]

Prints one Markdown table. The teacher of jobs/recipes/stdlib-lm.yaml, batches of 8 rows of 128 tokens, two ranks on
gloo. The three train in turn in the same two processes, in blocks of --steps; the first steps of a block do not
count. About 2 minutes for each ZeRO stage; `--ray` adds our whole train stage under Ray, of which the last --steps of
four times as many count, since Ray Data starts during the first; a minute for each repeat and stage.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import HERE, child, machine, median, say, table
from peers import hugging_face
from setting import torchrun, write_setting

WARMING_STEPS = 5
RAY_BLOCKS = 4
NAMES = {
    "ours": "ours, loop without Ray",
    "bare": "torchrun + DeepSpeed",
    "trainer": "Hugging Face Trainer + DeepSpeed",
    "ray": "ours, whole stage under Ray",
}


def measured(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every block: the median step in milliseconds."""
    return [{**block, "step_ms": 1000 * statistics.median(block["steps"][WARMING_STEPS:])} for block in blocks]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "overproof-peers")
    options.add_argument("--stages", type=int, nargs="+", default=[2, 0])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--batch", type=int, default=8, help="rows in a step: what a longer step leaves of it all")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--ray", action="store_true")
    given = options.parse_args()
    python, lines = hugging_face(given.peers.absolute()), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_setting(folder, given.threads, batch_size=given.batch)
        for stage in given.stages:
            say(f"ZeRO {stage}")
            who = ["ours", "bare", "trainer"]
            found = torchrun(python, folder, stage, given.steps, given.repeats, who, given.threads)
            if given.ray:
                command = [sys.executable, HERE / "steps" / "under_ray.py", "ours", folder, stage]
                runs = [child([*command, RAY_BLOCKS * given.steps], given.threads) for _ in range(given.repeats)]
                found["ray"] = [{**run, "steps": run["steps"][-given.steps :]} for run in runs]
            blocks = {name: measured(each) for name, each in found.items()}
            lines += [line(stage, name, blocks) for name in blocks]
    blocks_of = f"{given.repeats} blocks of {given.steps} steps of {given.batch} rows"
    print(f"{machine(given.threads)}, 2 ranks; {blocks_of}, medians\n")
    head = (
        "ZeRO",
        "who",
        "step, ms",
        "CPU of a rank, ms",
        "÷ torchrun",
        "÷ Trainer",
        "data wait",
    )
    table(head, lines)


def line(stage: int, name: str, blocks: dict[str, list[dict[str, Any]]]) -> list[str]:
    own = blocks[name]
    ratios = [
        statistics.median(a["step_ms"] / b["step_ms"] for a, b in zip(own, blocks[peer], strict=True))
        for peer in ("bare", "trainer")
    ]
    waits = [block[key] for block in own for key in ("waited", "data_wait") if key in block]
    return [
        str(stage),
        NAMES[name],
        f"{median(own, 'step_ms'):.1f}",
        f"{1000 * median(own, 'cpu_s'):.1f}" if "cpu_s" in own[0] else "",
        *(f"{ratio:.3f}" for ratio in ratios),
        f"{100 * statistics.median(waits):.2f} %" if waits else "",
    ]


if __name__ == "__main__":
    main()
