"""The whole loop on this machine: seconds and memory of a first run, of a second, and after one edit.

    .venv/bin/python benchmarks/loop.py [RECIPE]

Prints one Markdown table. Memory is the sum of proportional set sizes (shared pages counted once) over the run's
process tree, sampled twice a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[1]
SAMPLE_S = 0.5


@dataclass(frozen=True)
class Measured:
    """One command: wall seconds until serving or the end, CPU seconds of the tree, peak memory."""

    wall_s: float
    serving_s: float | None
    cpu_s: float
    peak_gib: float
    skipped: int


def measure(command: list[str]) -> Measured:
    """Run a command and watch its process tree."""
    began = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with tempfile.NamedTemporaryFile("w") as log, Path(log.name).open() as said_so_far:
        root = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY)
        peak, cpu, serving = 0, dict[int, float](), None
        while root.poll() is None:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                    times = process.cpu_times()
                    cpu[process.pid] = times.user + times.system
                except psutil.Error:
                    continue
            peak = max(peak, total)
            if serving is None and "starting Ray Serve" in said_so_far.read():
                serving = time.monotonic() - began
            time.sleep(SAMPLE_S)
        said = Path(log.name).read_text()
    if root.returncode != 0:
        sys.exit(said)
    return Measured(time.monotonic() - began, serving, sum(cpu.values()), peak / 2**30, said.count("done before"))


def main() -> None:
    recipe = sys.argv[1] if len(sys.argv) > 1 else "jobs/recipes/stdlib-lm.yaml"
    with tempfile.TemporaryDirectory() as store:
        overproof = [sys.executable, "-m", "overproof.cli.main"]
        common = [recipe, "--set", f"store={store}", "--set", "serve.port=0"]
        runs = {
            "first run": measure([*overproof, "demo", *common]),
            "nothing changed": measure([*overproof, "demo", *common]),
            "sweep.final_fraction edited": measure([*overproof, "demo", *common, "--set", "sweep.final_fraction=0.03"]),
        }
    print(f"{Path(recipe).stem}, {os.cpu_count()} cores\n")
    print("| run | wall s | serving stage reached s | CPU s | peak GiB | stages skipped |\n|---|---|---|---|---|---|")
    for name, m in runs.items():
        reached = "" if m.serving_s is None else f"{m.serving_s:.1f}"
        print(f"| {name} | {m.wall_s:.1f} | {reached} | {m.cpu_s:.0f} | {m.peak_gib:.1f} | {m.skipped} |")


if __name__ == "__main__":
    main()
