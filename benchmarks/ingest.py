"""Reading a shuffled epoch: rows in a CPU-second, ours against `datasets`, torch's DataLoader and mosaicml-streaming.

    .venv/bin/python benchmarks/ingest.py [--peers FOLDER] [--sequence 128] [--tokens 12800000] [--batch 32]
                                          [--rows-per-group 16] [--repeats 5] [--no-ray]

Prints one Markdown table. Every reader gives int64 tensors of the same rows, in one process with one thread. Of each
peer several ways are tried once, and the best goes on to the repeats. The first epoch reads files that were written
before (Parquet; for `datasets` Arrow, for mosaicml-streaming MDS, whose making stands in a column of its own).
About 8 minutes for each sequence length at full size; half of it is Ray, which `--no-ray` leaves out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measuring import HERE, child, interleaved, machine, median, say, table
from peers import hugging_face, mosaic
from rows import write_rows

VOCABULARY = 2048
EPOCHS = 3
SHUFFLES = {
    "ours": "row groups, and rows in each",
    "ours_step_by_step": "row groups, and rows in each",
    "torch_map": "all rows; table in memory",
    "torch_rows": "row groups, rows of 8 mixed",
    "torch_batches": "row groups, rows of 8 mixed",
    "hf_arrow": "all rows",
    "hf_numpy": "all rows",
    "hf_torch": "all rows",
    "hf_loader": "all rows",
    "hf_buffered": "64 parts, buffer of 1,000 rows",
    "hf_streamed": "files, buffer of 1,000 rows",
    "mosaic_py1s": "all rows (py1s)",
    "mosaic_py1e": "all rows (py1e)",
    "ray_planned": "row groups, and rows in each; 2 consumers",
    "ray_stock": "files, buffer of 1,000 rows; 2 consumers",
}


def speed(row: dict[str, Any], when: str) -> float:
    return float(row["rows"] / row[f"{when}_cpu_s"])


def readers(root: Path, batch: int, folder: Path) -> dict[str, Callable[..., dict[str, Any]]]:
    """A call for each way to read: epochs and whether to add up the tokens; gives what the reader printed."""
    scripts = {"ours": "here", "torch": "here", "hf": "hf", "mosaic": "mosaic"}
    pythons = {"here": Path(sys.executable), "hf": hugging_face(folder), "mosaic": mosaic(folder)}

    def call(name: str, epochs: int, check: int = 0) -> dict[str, Any]:
        script = scripts[name.partition("_")[0]]
        return child([pythons[script], HERE / "readers" / f"{script}.py", name, root, batch, epochs, check], 1)

    named: dict[str, Callable[..., dict[str, Any]]] = {
        name: partial(call, name) for name in SHUFFLES if not name.startswith("ray")
    }
    for script in ("hf", "mosaic"):
        command = [pythons[script], HERE / "readers" / f"{script}.py", "prepare", root, 0, 0, 0]
        named[f"{script}_prepare"] = partial(child, command, 1)
    return named


def chosen(call: dict[str, Callable[..., dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The best way of each peer by its later epochs, and both of ours; all must have given the same tokens."""
    tried: dict[str, dict[str, Any]] = {}
    for name in SHUFFLES:
        if name in call:
            say(f"trying {name}")
            tried[name] = call[name](2, 1)
    totals = {name: row["total"] for name, row in tried.items()}
    if len(set(totals.values())) > 1:
        sys.exit(f"the readers gave different rows: {totals}")
    for name, row in tried.items():
        say(f"{name}: {speed(row, 'first'):,.0f} and {speed(row, 'later'):,.0f} rows per CPU-second")
    best = {
        peer: max((n for n in tried if n.startswith(peer)), key=lambda n: speed(tried[n], "later"))
        for peer in ("torch", "hf", "mosaic")
    }
    return {name: row for name, row in tried.items() if name.startswith("ours") or name in best.values()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "overproof-peers")
    options.add_argument("--sequence", type=int, default=128)
    options.add_argument("--tokens", type=int, default=12_800_000)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--rows-per-group", type=int, default=16)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--no-ray", action="store_true")
    given = options.parse_args()
    unit = given.batch * given.rows_per_group * 4  # whole batches, groups and shards, so that nobody drops a row
    rows = max(1, given.tokens // given.sequence // unit) * unit
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_rows(root, rows, given.sequence, given.rows_per_group, VOCABULARY)
        call = readers(root, given.batch, given.peers.absolute())
        prepared = {peer: call.pop(f"{peer}_prepare")()["cpu_s"] for peer in ("hf", "mosaic")}
        runs: dict[str, Callable[[], dict[str, Any]]] = {name: partial(call[name], EPOCHS) for name in chosen(call)}
        if not given.no_ray:
            for name in ("ray_planned", "ray_stock"):
                command = [sys.executable, HERE / "readers" / "ray_data.py", name, root, given.batch, EPOCHS]
                runs[name] = partial(child, command, 1)
        found = interleaved(given.repeats, runs)
    print_table(found, prepared, rows, given)


def print_table(
    found: dict[str, list[dict[str, Any]]], prepared: dict[str, float], rows: int, given: argparse.Namespace
) -> None:
    for several in found.values():
        for row in several:
            row |= {when: speed(row, when) for when in ("first", "later")}
            row["wall"] = row["rows"] / row["later_wall_s"]
    lines = []
    for name, several in found.items():
        ratios = [median(found["ours"], when) / median(several, when) for when in ("first", "later")]
        once = prepared.get(name.partition("_")[0])
        lines.append((
            name.replace("_", " "),
            SHUFFLES[name],
            "" if once is None else f"{once:.1f}",
            *(f"{median(several, key):,.0f}" for key in ("first", "later", "wall")),
            *(f"{ratio:.2f}" for ratio in ratios),
        ))  # fmt: skip
    print(
        f"{rows:,} rows of {given.sequence} tokens, {given.rows_per_group} in a row group, batches of {given.batch}; ",
        end="",
    )
    print(f"medians of {given.repeats}; {machine(1)}\n")
    head = ("reader", "shuffle", "made ready, CPU s", "first epoch, rows/CPU-s", "later, rows/CPU-s", "later, rows/s")
    table((*head, "ours, first ÷ it", "ours, later ÷ it"), lines)


if __name__ == "__main__":
    main()
