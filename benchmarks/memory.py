"""What N replicas of one package hold in memory, and how often they hold its weights.

    .venv/bin/python benchmarks/memory.py [PACKAGE] [--replicas 1 2 4] [--format q8_0] [--layers 12] [--slots 1]
                                          [--repeats 5]

Prints one Markdown table. PACKAGE is a language model's; without one, a Llama with fresh weights is made in --format,
82 million parameters with 12 layers. The weights are the model's file as every replica maps it; its share of each (PSS,
where a page that n processes map counts as 1/n) is summed over the replicas, after they have answered. That is not all:
a format that llama.cpp rearranges for the processor (q4_0 with AVX2) lies a second time in every replica's own memory,
outside the file's mapping. What is no file's counts in the column of its own, with the cache of --slots contexts and
Python. The cluster is started anew for each count. Linux only.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from forge import LLAMA, forge_text
from measuring import interleaved, machine, spread, table
from serving import ours

from overproof.package.package import load_package, open_package
from overproof.package.trust import ANYONE

MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)\n")
REPLICA = re.compile(r"ray::ServeReplica:[^ ]*:model(\.|$)")  # Ray adds what it runs
MIB = 1024  # in KiB, as smaps counts


def replicas(root: int) -> list[psutil.Process]:
    """The processes below one that each hold an engine."""
    return [p for p in psutil.Process(root).children(recursive=True) if REPLICA.match(" ".join(p.cmdline()).strip())]


def shares(process: psutil.Process) -> Iterator[tuple[str, int]]:
    """Every mapping of a process: the file behind it, and the share in KiB."""
    file = ""
    with Path(f"/proc/{process.pid}/smaps").open() as lines:
        for line in lines:
            if found := MAPPING.fullmatch(line):
                file = found[1]
            elif line.startswith("Pss:"):
                yield file, int(line.split()[1])


def own_kib(process: psutil.Process) -> int:
    """The share of what no file backs."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Anon:"))


def once(package: Path, model: Path, count: int, slots: int) -> dict[str, Any]:
    body = {"prompt": "import os\n", "max_tokens": 8, "temperature": 0}
    plan = {"method": "POST", "path": "/v1/completions", "bodies": [body] * 8 * count, "clients": 2 * count * slots}
    with ours("over_http.py", package, 1, slots, count, threads=1) as server:
        server.ask({**plan, "stream": False})
        found = replicas(server.process.pid)
        if len(found) != count:
            raise SystemExit(f"{len(found)} replicas' processes; expected {count}")
        anonymous = [own_kib(p) for p in found]
        mapped = [
            (Path(file).name == model.name and Path(file).samefile(model), kib)
            for p in found
            for file, kib in shares(p)
        ]
    return {
        "weights_mib": sum(kib for of_model, kib in mapped if of_model) / MIB,
        "own_mib": sum(anonymous) / MIB / count,
        "total_mib": sum(kib for _, kib in mapped) / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", help="folder or URI")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--format", choices=("f16", "q8_0", "q4_0"), default="q8_0")
    parser.add_argument("--layers", type=int, default=LLAMA.layers)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.package is None:
            llama = LLAMA.model_copy(update={"layers": given.layers})
            opened = open_package(forge_text(Path(scratch), llama, given.format))
        else:
            opened = load_package(given.package, ANYONE)
        counts: dict[str, Callable[[], dict[str, Any]]] = {
            str(n): partial(once, opened.path, opened.model, n, given.slots) for n in given.replicas
        }
        found = interleaved(given.repeats, counts)
    size_mib = opened.measured.size_bytes / MIB**2
    print(f"{machine(1)}; {opened.content.model_format}, {size_mib:.0f} MiB; medians of {given.repeats}\n")
    lines = []
    for count, rows in found.items():
        pairs = [
            {
                "weights": row["weights_mib"] / one["weights_mib"],
                "total": row["total_mib"] / one["total_mib"],
            }
            for row, one in zip(rows, found[str(given.replicas[0])], strict=True)
        ]
        weights, total = (spread(rows, key, 0) for key in ("weights_mib", "total_mib"))
        ratios = [spread(pairs, key, 2) for key in ("weights", "total")]
        lines.append([count, weights, ratios[0], spread(rows, "own_mib", 0), total, ratios[1]])
    first = f"÷ {given.replicas[0]}"
    table(("replicas", "weights, MiB", first, "no file's, MiB each", "all memory, MiB", first), lines)


if __name__ == "__main__":
    main()
