"""What variants of a GGUF file lose at their sizes, on two texts that calibration has not seen, in llama.cpp.

    .venv/bin/python benchmarks/compression.py MODEL TEXTS [--other FOLDER] [--seeds 3] [--rows 128] [--length 256]
        [--documents 24] [--variants q4_0 q4_0-gptq mixed-gptq@q4_0 ...] [--once q6_k mixed-gptq@q6_k ...]
        [--peer PYTHON]

Prints two Markdown tables. MODEL is a Hugging Face directory of a decoder, such as jobs/smollm2.py makes. TEXTS is a
folder of text, of which `prepare` holds documents out (the first text) and the train split calibrates; the second text
is Python files of FOLDER, the standard library unless told. Each calibrated variant is written for each seed, which
draws other train rows; those of `--once` for the first alone. `mixed-gptq@q4_0` has the bytes of q4_0. "Closed" is the
share of q4_0's loss over f16 that a variant does not have. PYTHON has llm-compressor, which then quantises the model on
the same rows (see compression_peer.py). About 5 minutes for each calibrated file of a model of 135 million parameters,
on two cores.

The second table says, of each file of a mixed precision, what the best file of one recipe for all its layers loses at
no more bytes; and the area of MB and nats that either kind covers, up to a point 10 % beyond the worst of all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
from measuring import HERE, machine, median, say, spread, table
from numpy.typing import NDArray
from tokenizers import Tokenizer

from overproof.artifacts import Artifact, Store
from overproof.config import load_recipe
from overproof.data import tokenization
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.engines.llamacpp_scorer import LlamaCppScorer
from overproof.export.base import ExportContext
from overproof.export.calibration import CalibrationRows
from overproof.export.gguf import FORMAT, Gguf
from overproof.report.pareto import hypervolume
from overproof.stage_context import StageContext, no_progress

RECIPE = HERE.parent / "jobs/recipes/smollm2.yaml"
SINGLE = (
    "f16", "q4_0", "q4_0-imatrix", "q4_0-gptq", "q4_k_m", "q4_k_m-imatrix", "q4_k_m-gptq", "q5_k_m", "q5_k_m-imatrix",
    "q5_k_m-gptq", "q6_k", "q8_0",
)  # fmt: skip
MIXED = tuple(f"mixed-gptq@{size}" for size in SINGLE if size != "f16" and "-" not in size)
MARGIN = 0.1  # of the span, from the worst of all to the point that areas are measured up to
REFERENCE, PLAIN, PEER = "f16", "q4_0", "llm-compressor, W4A16, by transformers"
MOST_CHARACTERS = 2500  # of each file of the second text
Rows = list[NDArray[Any]]


def prepared_texts(model: Path, texts: Path, length: int, store: str) -> Artifact:
    """The first text, by the product's own stage."""
    sets = (
        f"store={store}", f"data.source={{kind: folder, path: {texts}}}", f"data.sequence_length={length}",
        f"data.tokenizer={{kind: file, path: {model}/tokenizer.json}}", f"train.model.path={model}",
    )  # fmt: skip
    recipe = load_recipe(RECIPE, sets)
    draft = Store(store).new_writer(recipe.name, "prepare", "0" * 64, {}, {})
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    metrics = prepare(StageContext(recipe, {}, draft, no_progress))
    ray.shutdown()
    return draft.commit(metrics, 0.0)


def test_rows(prepared: Artifact, documents: int) -> Rows:
    """Of the first test documents: tokens of each row, without padding."""
    shards = Shards(prepared, "test", ("document", "tokens", "length"))
    columns = shards.take(np.arange(shards.rows))
    chosen = columns["document"] < np.unique(columns["document"])[:documents][-1] + 1
    pairs = zip(columns["tokens"][chosen], columns["length"][chosen], strict=True)
    return [tokens[: length + 1].astype(np.int64) for tokens, length in pairs]


def other_rows(folder: Path, prepared: Artifact, documents: int) -> Rows:
    """Of Python files, packed as the product packs test documents."""
    manifest = Manifest.read(prepared)
    tokenizer, found = Tokenizer.from_file(str(manifest.tokenizer(prepared.local()))), []
    assert manifest.start_id is not None
    assert manifest.end_id is not None
    files = sorted(folder.glob("*.py"))[:: max(1, len(list(folder.glob("*.py"))) // documents)][:documents]
    texts = [file.read_text(encoding="utf-8")[:MOST_CHARACTERS] for file in files]
    for ids in tokenization.encode(tokenizer, texts):
        packed = tokenization.pack_document(ids, manifest.positions, manifest.start_id, manifest.end_id)
        found += [tokens[: length + 1].astype(np.int64) for tokens, length in zip(*packed, strict=True)]
    return found


def loss(file: Path, rows: Rows, threads: int) -> float:
    """Nats a token, in llama.cpp."""
    scorer = LlamaCppScorer(file, max(map(len, rows)), threads)
    nats = np.concatenate([scores.nats_P for scores in scorer.score(rows)])
    scorer.close()
    return float(nats.mean())


def peers_loss(python: str, model: Path, calibration: CalibrationRows, held_out: dict[str, Rows]) -> dict[str, float]:
    """Of llm-compressor's model."""
    rows = np.concatenate([batch["tokens"][:, :-1].numpy() for batch in calibration.batches()])
    texts = {f"{name}.{place}": row for name, found in held_out.items() for place, row in enumerate(found)}
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch, "rows.npz"), Path(scratch, "result.json")
        np.savez(given, calibration=rows, **texts)
        subprocess.run([python, HERE / "compression_peer.py", model, given, result], check=True, capture_output=True)
        found: dict[str, float] = json.loads(result.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--other", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--variants", nargs="+", choices=SINGLE + MIXED, default=SINGLE + MIXED)
    parser.add_argument("--once", nargs="+", choices=SINGLE + MIXED, default=())
    given = parser.parse_args()
    variants = list(dict.fromkeys((REFERENCE, PLAIN, *given.variants, *given.once)))
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepared_texts(given.model, given.texts, given.length, scratch)
        held_out = {
            "texts": test_rows(prepared, given.documents),
            "other": other_rows(given.other, prepared, given.documents),
        }
        tokens = ", ".join(f"{sum(len(row) - 1 for row in rows):,} tokens of {name}" for name, rows in held_out.items())
        files = {variant: Path(scratch, f"{variant}.gguf") for variant in variants}
        for variant in variants:
            for seed in range(given.seeds if "-" in variant and variant not in given.once else 1):
                name, _, size = variant.partition("@")
                mixed = {"as_large_as": size} if size else None
                settings = {"calibration": {"rows": given.rows}, "mixed": mixed, "formats": [name if size else PLAIN]}
                context = ExportContext(
                    Gguf.model_validate(settings), "compression", given.model, given.model / "tokenizer.json", prepared,
                    seed,
                )  # fmt: skip
                FORMAT.write(given.model, files[variant], name, context, files[REFERENCE])
                row = {name: loss(files[variant], rows, given.threads) for name, rows in held_out.items()}
                found[variant].append({**row, "mb": files[variant].stat().st_size / 1e6})
                say(f"{variant}, seed {seed}: {found[variant][-1]}")
        for seed in range(given.seeds if given.peer else 0):
            row = peers_loss(given.peer, given.model, CalibrationRows(prepared, seed, given.rows), held_out)
            found.setdefault(PEER, []).append(row)
            say(f"{PEER}, seed {seed}: {row}")
    print(f"{tokens}; {given.rows} rows of {given.length} calibrate; medians of {given.seeds} seeds; {machine(2)}\n")
    whole, plain = found[REFERENCE][0], found[PLAIN][0]
    for rows in found.values():
        for row in rows:
            for name in held_out:
                row[f"{name} closed"] = 1 - (row[name] - whole[name]) / (plain[name] - whole[name])
    table(
        ("variant", "MB", *(f"{name}, {what}" for name in held_out for what in ("nats a token", "closed, %"))),
        [
            (
                variant,
                f"{median(rows, 'mb'):.1f}",
                *(
                    text
                    for name in held_out
                    for text in (spread(rows, name, 4), f"{100 * median(rows, f'{name} closed'):.0f}")
                ),
            )
            for variant, rows in found.items()
        ],
    )
    print()
    if any("@" in variant for variant in found):
        frontiers({variant: rows for variant, rows in found.items() if variant != PEER}, list(held_out))


def frontiers(found: dict[str, list[dict[str, float]]], texts: list[str]) -> None:
    """Prints what mixed precision is worth at each size, and over all."""
    mb, whole = {variant: median(rows, "mb") for variant, rows in found.items()}, found.pop(REFERENCE)[0]
    mixed, single = (
        {variant: rows for variant, rows in found.items() if ("@" in variant) is of} for of in (True, False)
    )
    lines = []
    for variant, rows in mixed.items():
        fits = [name for name in single if mb[name] <= mb.get(variant.partition("@")[2], mb[variant])]
        line = [variant, f"{mb[variant]:.1f}"]
        for text in texts:
            best = min(fits, key=lambda name: median(single[name], text))
            own, others = (median(each, text) - whole[text] for each in (rows, single[best]))
            line += [f"{own:.4f}", f"{others:.4f} ({best})"]
        lines.append(line)
    table(("mixed", "MB", *(f"{text}, nats over f16{of}" for text in texts for of in ("", ": best single"))), lines)
    for text in texts:
        costs = {name: (mb[name], median(rows, text)) for name, rows in found.items()}
        least_2, most_2 = (of(np.array([*costs.values()]), axis=0) for of in (np.min, np.max))
        point_2 = most_2 + MARGIN * (most_2 - least_2)
        areas = [hypervolume(np.array([costs[name] for name in names]), point_2) for names in (mixed, single)]
        print(f"\n{text}: area of mixed {areas[0]:.3f}, of single {areas[1]:.3f} MB nats")


if __name__ == "__main__":
    main()
