"""Scoring of given rows of tokens in llama.cpp, against torch, and against llama.cpp's own rate of reading prompts.

    .venv/bin/python benchmarks/scoring.py [--layers 4] [--positions 128] [--rows 48] [--threads 1] [--repeats 5]

Prints one Markdown table. The model is a Llama with fresh weights, 768 wide, with a vocabulary of 8,192 (31 million
parameters with 4 layers). `score` gives the log-probability of every token and the likeliest one at every place, as
evaluation asks for them; `prompt` has llama.cpp's server read the same rows as prompts, each of which asks for logits
at its last place alone, and generates one token. Every run is a process of its own; its model is loaded and has read
one row before the clocks start. Shares are of tokens a CPU second, which other work on the machine moves less. torch
computes in fp32 with the f16 file's weights.

A prompt needs less arithmetic: neither logits at its other places, nor their feed-forward in the last layer. The share
of a score's multiplications by weights that a prompt has is printed above the table: the share of its own prompt rate
that scoring can have.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import child, interleaved, machine, median, spread, table

BATCH_LOGITS = 1 << 23  # as evaluation has torch take them


def prompt_share(layers: int, hidden: int, intermediate: int, key_width: int, vocabulary: int) -> float:
    """Multiplications by weights of a prompt's place, as a share of those of a place that is scored."""
    attention, feed_forward = 2 * hidden * (hidden + key_width), 3 * hidden * intermediate
    prompt_place = layers * attention + (layers - 1) * feed_forward
    return prompt_place / (prompt_place + feed_forward + hidden * vocabulary)


class Clocks:
    """Wall and CPU seconds of this process inside the block."""

    def __enter__(self) -> Clocks:
        self.wall_s, self.cpu_s = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s, self.cpu_s = time.perf_counter() - self.wall_s, time.process_time() - self.cpu_s


def score(way: str, file: Path, rows: list[np.ndarray], threads: int) -> Clocks:
    """Score the rows."""
    from overproof.engines.llamacpp_scorer import LlamaCppScorer

    if way == "torch":
        import torch

        from overproof.export.gguf_file import read_gguf
        from overproof.tasks.torch_scorer import TorchScorer

        torch.set_num_threads(threads)
        model = read_gguf(file)
        scorer: Any = TorchScorer(model, max(1, BATCH_LOGITS // (len(rows[0]) * model.config.vocab_size)))
    else:
        scorer = LlamaCppScorer(file, len(rows[0]) - 1, threads)
    list(scorer.score(rows[:1]))
    with Clocks() as clocks:
        nats = sum(float(found.nats_P.sum()) for found in scorer.score(rows))
    assert np.isfinite(nats)
    return clocks


def prompt(file: Path, rows: list[np.ndarray], threads: int) -> Clocks:
    """Have the server read the rows."""
    from overproof.engines.base import Sampling
    from overproof.engines.llamacpp import LlamaCpp

    engine = LlamaCpp(file, threads)
    engine.complete(rows[0][:-1].tolist(), Sampling(1))
    with Clocks() as clocks:
        for row in rows:
            engine.complete(row[:-1].tolist(), Sampling(1))
    engine.close()
    return clocks


def once(way: str, file: str, rows_file: str, threads: int) -> None:
    """One run: prints tokens a second, and tokens a CPU second."""
    rows = list(np.load(rows_file))
    clocks = prompt(Path(file), rows, threads) if way == "prompt" else score(way, Path(file), rows, threads)
    tokens = sum(len(row) - 1 for row in rows)
    print(json.dumps({"wall": tokens / clocks.wall_s, "cpu": tokens / clocks.cpu_s}))


def main() -> None:
    if sys.argv[1:2] == ["once"]:
        once(*sys.argv[2:5], threads=int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (("layers", 4), ("positions", 128), ("rows", 48), ("threads", 1), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    from forge import HUGGING_FACE, LLAMA, VOCABULARY, forge_text  # which the runs have no use for

    from overproof.data.manifest import TOKENIZER
    from overproof.export.gguf_file import FILE_TYPES, export_gguf

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        forge_text(root, LLAMA.model_copy(update={"layers": asked.layers}))
        files = {format: root / f"{format}.gguf" for format in FILE_TYPES}
        for format, file in files.items():
            export_gguf(root / HUGGING_FACE, root / TOKENIZER, file, format, "forged")
        rows = np.random.default_rng(0).integers(1, VOCABULARY, (asked.rows, asked.positions + 1))
        np.save(root / "rows.npy", rows)
        ways = [("torch", "f16"), *((way, format) for format in files for way in ("llama.cpp", "prompt"))]
        runs = {
            f"{way} {format}": partial(
                child, [sys.executable, __file__, "once", way, files[format], root / "rows.npy", asked.threads],
                asked.threads,
            )
            for way, format in ways
        }  # fmt: skip
        found = interleaved(asked.repeats, runs)
    torch_rate = median(found["torch f16"], "cpu")
    key_width = LLAMA.hidden_size // LLAMA.heads * LLAMA.kv_heads
    bound = prompt_share(asked.layers, LLAMA.hidden_size, LLAMA.intermediate_size, key_width, VOCABULARY)
    print(f"{asked.layers} layers, {asked.rows} rows of {asked.positions} tokens; {machine(asked.threads)}; medians of")
    print(f"{asked.repeats}. A prompt has {bound:.2f} of the multiplications of a score.\n")

    def line(name: str, title: str, own: str) -> tuple[str, ...]:
        rates = (spread(found[name], clock, 0) for clock in ("wall", "cpu"))
        return (title, *rates, f"{median(found[name], 'cpu') / torch_rate:.2f}", own)

    lines = [line("torch f16", "score, torch fp32", "")]
    for format in files:
        share = median(found[f"llama.cpp {format}"], "cpu") / median(found[f"prompt {format}"], "cpu")
        lines.append(line(f"llama.cpp {format}", f"score, llama.cpp {format}", f"{share:.2f}"))
        lines.append(line(f"prompt {format}", f"prompt, llama.cpp {format}", ""))
    table(("what", "tokens/s", "tokens a CPU second", "of torch's", "of its own prompt rate"), lines)


if __name__ == "__main__":
    main()
