"""Preparing text: bytes in a core-second, whole and beside what the tokenizer alone takes for the same text.

    .venv/bin/python benchmarks/ingest_text.py [--mb 100] [--files 4] [--vocabulary 32000] [--repeats 5]

Prints one Markdown table. The text is made (see `made_text.py`) and its tokenizer is trained on a part of it before.
The tokenizer alone runs in a process for each core, with its share of the files: where cores share caches and memory,
each does less while all are busy, as they are under `prepare`. That runs on a cluster of its own with as many CPUs as
there are cores; its CPU seconds are those of every process while the stage runs, the start of the workers among them
and that of the cluster not. The memory is the driver's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from made_text import documents, write_lines
from measuring import HERE, TreeCpu, child, interleaved, machine, median, spread, table

TRAINED_BYTES = 10_000_000  # of text, for the tokenizer
BATCH = 256  # texts that the tokenizer alone is given at once
SAMPLE_S = 0.25
RECIPE = HERE.parent / "jobs/recipes/stdlib-lm.yaml"


def tokenise_on_each_core(source: Path, tokenizer_json: Path) -> dict[str, Any]:
    """The tokenizer alone."""
    cores, files = os.cpu_count() or 1, sorted(source.iterdir())
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        found = list(pool.map(tokenise, [files[core::cores] for core in range(cores)], [tokenizer_json] * cores))
    return {key: sum(each[key] for each in found) for key in ("cpu_s", "bytes")}


def tokenise(files: Sequence[Path], tokenizer_json: Path) -> dict[str, Any]:
    """The texts of some files, a batch in memory at a time."""
    from tokenizers import Tokenizer

    from overproof.data.tokenization import encode

    tokenizer, spent_s, size_bytes = Tokenizer.from_file(str(tokenizer_json)), 0.0, 0
    for file in files:
        with file.open() as lines:
            texts = (json.loads(line)["text"] for line in lines)
            while batch := list(islice(texts, BATCH)):
                size_bytes += sum(len(text.encode()) for text in batch)
                began_s = time.process_time()
                encode(tokenizer, batch)
                spent_s += time.process_time() - began_s
    return {"cpu_s": spent_s, "bytes": size_bytes}


def prepare(source: Path, tokenizer_json: Path) -> dict[str, Any]:
    """The whole stage."""
    import psutil
    import ray

    from overproof.artifacts import Store
    from overproof.config import load_recipe
    from overproof.data.prepare import prepare as prepare_stage
    from overproof.data.tokenization import END
    from overproof.stage_context import StageContext, no_progress

    with tempfile.TemporaryDirectory() as store:
        data = (
            f"data={{kind: language_modeling, source: {{kind: jsonl, path: {source}}}, "
            f"tokenizer: {{kind: file, path: {tokenizer_json}, end_token: '{END}'}}}}"
        )
        recipe = load_recipe(RECIPE, (f"store={store}", data))
        draft = Store(store).new_writer(recipe.name, "prepare", "0" * 8, {}, {})
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        process, most, over = psutil.Process(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_S):
                most[0] = max(most[0], process.memory_full_info().uss)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        began_s = time.monotonic()
        with TreeCpu() as cpu:
            prepare_stage(StageContext(recipe, {}, draft, no_progress))
        wall_s = time.monotonic() - began_s
        over.set()
        watcher.join()
        ray.shutdown()
    return {"cpu_s": cpu.seconds, "wall_s": wall_s, "driver_mb": most[0] / 1e6}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mb", type=int, default=100)
    options.add_argument("--files", type=int, default=4)
    options.add_argument("--vocabulary", type=int, default=32_000)
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    from overproof.data.tokenization import train_bpe

    with tempfile.TemporaryDirectory() as scratch:
        source, tokenizer_json = Path(scratch, "texts"), Path(scratch, "tokenizer.json")
        write_lines(source, given.mb * 1_000_000, given.files)
        train_bpe(documents(TRAINED_BYTES, 0), given.vocabulary).save(str(tokenizer_json))
        call = partial(child, threads=1)
        command = [sys.executable, __file__, "run", source, tokenizer_json]
        found = interleaved(
            given.repeats,
            {
                "the tokenizer alone": lambda: call([*command, "tokenizer"]),
                "prepare": lambda: call([*command, "prepare"]),
            },
        )
    size_mb = found["the tokenizer alone"][0]["bytes"] / 1e6
    for rows in found.values():
        for row in rows:
            row["mb_per_s"] = size_mb / row["cpu_s"]
    alone = median(found["the tokenizer alone"], "mb_per_s")
    print(f"{size_mb:,.0f} MB in {given.files} files; medians of {given.repeats}, and all between; {machine(1)}\n")
    table(
        ("what", "MB per core-second", "÷ the tokenizer alone", "wall, s", "driver, MB"),
        [
            (
                name,
                spread(rows, "mb_per_s", 2),
                f"{median(rows, 'mb_per_s') / alone:.2f}",
                *(f"{median(rows, key):,.0f}" if key in rows[0] else "" for key in ("wall_s", "driver_mb")),
            )
            for name, rows in found.items()
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        folder, file, what = sys.argv[2:]
        ran = (
            tokenise_on_each_core(Path(folder), Path(file))
            if what == "tokenizer"
            else prepare(Path(folder), Path(file))
        )
        print(json.dumps(ran))
    else:
        main()
