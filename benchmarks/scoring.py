"""Scoring of given rows of tokens in llama.cpp, against torch, and against llama.cpp's own rates of reading them.

    .venv/bin/python benchmarks/scoring.py [--layers 4] [--positions 128] [--rows 48] [--threads 1] [--repeats 5]
        [--gguf f16=FILE q8_0=FILE q4_0=FILE] [--text PREPARED] [--documents 12] [--document-rows 3]

Prints Markdown. Without --gguf the model is a Llama with fresh weights, 768 wide, with a vocabulary of 8,192 (31
million parameters with 4 layers). `score` gives the log-probability of every token and the likeliest one at every
place, as evaluation asks for them. Two rates of llama.cpp's own stand beside it, of the same rows in the same batches,
each row from an empty cache: `decode` is llama_decode with the logits of every place, which are then left where they
are, as llama-perplexity asks for them; `prompt` asks for those of a row's last place alone, which is what llama-bench
times as `pp`. All are loaded once, in one process, and take the same rows in turn; the first turn of each does not
count. Shares are of tokens a CPU second, which other work on the machine moves less, and medians of the turns' shares.
torch computes in fp32 with the f16 file's weights.

A prompt needs less arithmetic: neither logits at its other places, nor their feed-forward in the last layer. The share
of a score's multiplications by weights that a prompt has is printed above the table: the share of the prompt rate that
scoring can have.

With --text, an artifact of the stage `prepare`, a second table says how long a verdict takes: both engines score the
first rows of some test documents by the f16 file and by each other one, and the product's bootstrap gives the interval
of what is kept of the f16 file's quality. Seconds are those documents' tokens, twice, at the rates of the first table;
llama.cpp's are scaled by the square of its interval's width over torch's, as the tokens are that the same width takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import interleaved, machine, median, say, spread, table

BATCH_LOGITS = 1 << 23  # as evaluation has torch take them
FIRST = "f16"  # what torch reads, and what the other files are held against


def prompt_share(layers: int, hidden: int, intermediate: int, key_width: int, vocabulary: int) -> float:
    """Multiplications by weights of a prompt's place, as a share of those of a place that is scored."""
    attention, feed_forward = 2 * hidden * (hidden + key_width), 3 * hidden * intermediate
    prompt_place = layers * attention + (layers - 1) * feed_forward
    return prompt_place / (prompt_place + feed_forward + hidden * vocabulary)


def scorer(way: str, file: Path, positions: int, threads: int) -> Any:
    """See ``TextScorer``."""
    if way != "torch":
        from overproof.engines.llamacpp_scorer import LlamaCppScorer

        return LlamaCppScorer(file, positions, threads)
    import torch

    from overproof.export.gguf_file import read_gguf
    from overproof.tasks.torch_scorer import TorchScorer

    torch.set_num_threads(threads)
    model = read_gguf(file)
    return TorchScorer(model, max(1, BATCH_LOGITS // (positions * model.config.vocab_size)))


def score(found: Any, rows: list[np.ndarray]) -> None:
    """Score the rows."""
    assert np.isfinite(sum(float(scores.nats_P.sum()) for scores in found.score(rows)))


def read(engine: Any, wanted_S: np.ndarray, rows: list[np.ndarray]) -> None:
    """Have llama.cpp read the rows, for the logits of the places that are wanted."""
    for row in rows:
        for logits_PV in engine.batches(row[:-1], wanted_S):
            assert logits_PV.shape[1] == engine.outputs


def timed(run: Callable[[list[np.ndarray]], None], rows: list[np.ndarray]) -> dict[str, float]:
    """Tokens a second, and tokens a CPU second."""
    tokens, wall_s, cpu_s = sum(len(row) - 1 for row in rows), time.perf_counter(), time.process_time()
    run(rows)
    return {"wall": tokens / (time.perf_counter() - wall_s), "cpu": tokens / (time.process_time() - cpu_s)}


def forged(root: Path, layers: int) -> dict[str, Path]:
    """Files of a Llama with fresh weights."""
    from forge import HUGGING_FACE, LLAMA, forge_text  # which the runs have no use for

    from overproof.data.manifest import TOKENIZER
    from overproof.export.gguf_file import export_gguf

    forge_text(root, LLAMA.model_copy(update={"layers": layers}))
    files = {format: root / f"{format}.gguf" for format in ("f32", "f16", "q8_0", "q4_0")}
    for format, file in files.items():
        export_gguf(root / HUGGING_FACE, root / TOKENIZER, file, format, "forged")
    return files


def widths(prepared: Path, scorers: dict[str, dict[str, Any]], documents: int, rows: int) -> Any:
    """Half the width of the interval of what each other file keeps, by each engine; and how many tokens were scored."""
    from overproof.data.parquet_reader import Shards
    from overproof.evaluate.metrics import Bootstrap, PerExampleSums, quality_metrics
    from overproof.registry import TASKS
    from overproof.tasks.text_evaluation import TestDocuments

    of = TestDocuments.of(prepared, documents)
    starts = np.unique(of.places, return_index=True)[1]
    full = of.lengths == of.lengths.max()
    parts = [slice(at, at + rows) for at in starts]
    whole = [of.sample_ids[at] for at in parts if full[at].sum() == rows and np.ptp(of.places[at]) == 0]
    tokens_RS = Shards(prepared, "test").take(np.concatenate(whole))["tokens"]
    count = rows * (tokens_RS.shape[1] - 1)
    size_U = np.full(len(whole), float(count))
    found: dict[str, dict[str, float]] = {}
    for engine, files in scorers.items():
        sums = {}
        for format, opened in files.items():
            say(f"{engine} scores {len(whole)} documents by {format}")
            nats = np.array([float(scores.nats_P.sum()) for scores in opened.score(list(tokens_RS))])
            sums[format] = PerExampleSums(nats.reshape(-1, rows).sum(1), size_U, size_U, size_U)
        _, comparisons = quality_metrics(TASKS["language_modeling"].quality, sums, Bootstrap(2000, 0.95, 0))
        kept = {c.name: c for c in comparisons if c.against == FIRST}
        found[engine] = {name: (c.kept_high - c.kept_low) / 2 for name, c in kept.items()}  # type: ignore[operator]
    return found, len(whole), count * len(whole)


def main() -> None:
    from overproof.engines.llamacpp_logits import LlamaCppLogits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("positions", 128), ("rows", 48), ("threads", 1), ("repeats", 5),
                        ("documents", 12), ("document-rows", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gguf", nargs="+", default=[], metavar="FORMAT=FILE", help="f16 among them")
    parser.add_argument("--text", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        given = {format: Path(file).absolute() for format, _, file in (each.partition("=") for each in asked.gguf)}
        files = given or forged(root, asked.layers)
        vocabulary, bound = shape(files[FIRST])
        rows = list(np.random.default_rng(0).integers(1, vocabulary, (asked.rows, asked.positions + 1)))
        every_S = np.ones(asked.positions, bool)
        last_S = np.arange(asked.positions) == asked.positions - 1
        dequantised = [format for format in files if format == FIRST or asked.text]
        scorers = {
            way: {format: scorer(way, files[format], asked.positions, asked.threads) for format in formats}
            for way, formats in (("torch", dequantised), ("llama.cpp", list(files)))
        }
        runs: dict[str, Callable[[list[np.ndarray]], None]] = {
            f"torch {FIRST}": partial(score, scorers["torch"][FIRST])
        }
        for format, file in files.items():
            engine = LlamaCppLogits(file, asked.positions, asked.threads)
            runs |= {
                f"llama.cpp {format}": partial(score, scorers["llama.cpp"][format]),
                f"decode {format}": partial(read, engine, every_S),
                f"prompt {format}": partial(read, engine, last_S),
            }
        for run in runs.values():
            run(rows[:1])
        found = interleaved(asked.repeats, {name: partial(timed, run, rows) for name, run in runs.items()})
        print(f"{asked.rows} rows of {asked.positions} tokens; {machine(asked.threads)}; medians of {asked.repeats}")
        print(f"(least to most); load average {os.getloadavg()[0]:.1f} at the end. A prompt has {bound:.2f} of the")
        print("multiplications of a score.\n")

        def cpu(way: str, format: str) -> float:
            return median(found[f"{way} {format}"], "cpu")

        def share(own: str, other: str) -> str:
            return (
                f"{statistics.median(a['cpu'] / b['cpu'] for a, b in zip(found[own], found[other], strict=True)):.2f}"
            )

        def line(way: str, format: str, title: str) -> tuple[str, ...]:
            rates = (spread(found[f"{way} {format}"], clock, 0) for clock in ("wall", "cpu"))
            others = ("decode", "prompt") if way == "llama.cpp" else ()
            own = [share(f"{way} {format}", f"{other} {format}") for other in others] or ["", ""]
            return (title, *rates, share(f"{way} {format}", f"torch {FIRST}"), *own)

        lines = [line("torch", FIRST, "score, torch fp32")]
        for format in files:
            titles = {"llama.cpp": "score, llama.cpp", "decode": "decode", "prompt": "prompt"}
            lines += [line(way, format, f"{title} {format}") for way, title in titles.items()]
        table(("what", "tokens/s", "tokens a CPU second", "of torch's", "of decode", "of prompt"), lines)
        if asked.text is None:
            return
        half_widths, documents, tokens = widths(asked.text, scorers, asked.documents, asked.document_rows)
        print(f"\n{documents} documents, {tokens:,} tokens of them; half the width of the interval at 95 %\n")
        lines = []
        for format in (name for name in files if name != FIRST):
            by_torch, by_llama = (half_widths[engine][format] for engine in ("torch", "llama.cpp"))
            torch_s = 2 * tokens / cpu("torch", FIRST)
            needed = tokens * (by_llama / by_torch) ** 2
            llama_s = needed / cpu("llama.cpp", FIRST) + needed / cpu("llama.cpp", format)
            widths_said = (f"{by_torch:.5f}", f"{by_llama:.5f}")
            lines.append((format, *widths_said, f"{torch_s:.1f}", f"{llama_s:.1f}", f"{llama_s / torch_s:.2f}"))
        table(
            ("file", "torch's", "llama.cpp's", "torch, CPU s", "llama.cpp, CPU s to torch's width", "of torch's"), lines
        )


def shape(file: Path) -> tuple[int, float]:
    """A file's vocabulary, and the share of a score's multiplications that a prompt has."""
    from overproof.export.gguf_file import read_gguf

    config = read_gguf(file).config
    key_width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, key_width, config.vocab_size)
    return config.vocab_size, prompt_share(*sizes)


if __name__ == "__main__":
    main()
