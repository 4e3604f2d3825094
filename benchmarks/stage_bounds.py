"""What each stage of a run took, beside the least that its arithmetic takes on this machine.

    python benchmarks/stage_bounds.py STORE/NAME/package-0a1b2c3d

Walks from a package of a language model to the artifacts it came from. A model of P numbers takes 2P floating-point
operations for each token of a forward pass and 6P in training (arXiv 2001.08361, section 2.1); the machine is asked how
fast it multiplies matrices, on all its cores, and how fast it reads memory, which every decoded token does with the
whole file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from overproof.shrink.estimate import machine_flops

STAGES = ("prepare", "train", "cache", "sweep", "compress", "evaluate", "gate", "report", "package")
READ_MB, TRIES = 512, 30  # the best try counts: others use the machine, too


def lineage(package: Path) -> dict[str, Path]:
    """The artifacts that a package came from, itself included, by stage."""
    found, waiting = dict[str, Path](), [package]
    while waiting:
        folder = waiting.pop()
        record = json.loads((folder / "artifact.json").read_text())
        found[record["stage"]] = folder
        waiting += [folder.parent / f"{stage}-{print_[:8]}" for stage, print_ in record["parents"].items()]
    return found


def read_rate() -> float:
    """Bytes a second that this machine reads from memory, the best of a few times."""
    numbers = np.ones(READ_MB << 18, np.float32)
    seconds = []
    for _ in range(TRIES):
        began_s = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began_s)
    return numbers.nbytes / min(seconds)


def operations(found: dict[str, Path], records: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations of the stages that calculate."""
    train, sweep = records["train"]["config"]["train"], records["sweep"]["config"]["sweep"]
    teacher = records["train"]["metrics"]["parameters"]
    prepared = records["prepare"]["metrics"]
    positions = prepared["predictions"]["train"] / prepared["rows"]["train"]
    trials = json.loads((found["sweep"] / "trials.json").read_text())["trials"]
    kept = next(trial for trial in trials if trial["status"] == "finished")
    batches = [(trial["parameters"], trial["steps"]) for trial in trials] + [(kept["parameters"], sweep["steps"])]
    units = pq.read_table(found["evaluate"] / "units.parquet").to_pandas()
    scored = units.groupby("export")["predictions"].sum()
    sizes = {trial["name"]: trial["parameters"] for trial in trials}
    return {
        "train": 6.0 * teacher * train["steps"] * train["batch_size"] * positions,
        "cache": 2.0 * teacher * records["cache"]["metrics"]["positions"],
        "sweep": sum(6.0 * size * steps * sweep["batch_size"] * positions for size, steps in batches),
        "evaluate": sum(2.0 * size_of(name, sizes, teacher) * count for name, count in scored.items()),
    }


def size_of(export: str, sizes: dict[str, int], teacher: int) -> int:
    """Parameters of an exported file, which is named by its student and perhaps a format."""
    return max((size for name, size in sizes.items() if export.startswith(name)), default=teacher)


def decoded_bytes(found: dict[str, Path], records: dict[str, Any]) -> float:
    """What the engine reads to write the tokens that are timed."""
    settings = records["evaluate"]["config"]["evaluate"]
    report = json.loads((found["evaluate"] / "report.json").read_text())
    timed = [m for m in report["measured"] if "decode_tokens_per_s" in m["metrics"]]
    return sum(m["size_bytes"] * settings["decode_tokens"] * m["metrics"]["latency_p50_s"]["n"] for m in timed)


def main(package: Path) -> None:
    """Print a table."""
    found = lineage(package)
    records = {stage: json.loads((folder / "artifact.json").read_text()) for stage, folder in found.items()}
    if (kind := records["prepare"]["config"]["data"]["kind"]) != "language_modeling":
        raise SystemExit(f"{package}: of {kind}; expected a language model, whose numbers are all multiplied")
    flops_per_s, bytes_per_s = max(machine_flops() for _ in range(TRIES)), read_rate()
    bounds = {stage: work / flops_per_s for stage, work in operations(found, records).items()}
    bounds["evaluate"] += decoded_bytes(found, records) / bytes_per_s
    print(f"This machine: {flops_per_s / 1e9:,.0f} GFLOP/s in fp32, {bytes_per_s / 1e9:,.1f} GB/s read\n")
    print("| stage | s | arithmetic bound, s | times the bound |\n|---|---|---|---|")
    for stage in (stage for stage in STAGES if stage in found):
        seconds, bound = records[stage]["seconds"], bounds.get(stage, 0.0)
        shown = f"{bound:,.1f} | {seconds / bound:.1f}" if bound else " | "
        print(f"| {stage} | {seconds:,.1f} | {shown} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
