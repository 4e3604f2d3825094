"""Documents that share a row: what keeping them apart does to the quality, and what it costs a step.

    .venv/bin/python benchmarks/documents.py [--corpus functions|files] [--positions 128] [--batch 8] [--steps 440]
        [--seeds 3] [--documents 300] [--threads 1]

Prints Markdown. The data, the tokenizer and the teacher are those of jobs/recipes/stdlib-lm.yaml: its files as they
are, or, as a corpus of short documents, every function of 60 to 4,000 characters in them as a document of its own. Both
ways are prepared from the same text, into rows of the same tokens. For each seed a model is trained each way, from the
same weights on the same rows, a step of one and a step of the other in turn; then both are written as GGUF (f16) and
llama.cpp scores whole test documents, each read by itself, as the gate has them scored. Differences are of the bits per
byte, apart less across, in per cent of the latter, paired by seed.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from measuring import HERE, machine, say, table

from overproof.artifacts import Store
from overproof.config import Recipe, load_recipe
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.data.parquet_reader import Shards
from overproof.data.prepare import prepare
from overproof.data.sources import StdlibSource, list_files
from overproof.export.gguf_file import export_gguf
from overproof.models.hf_directory import build_model, save_model, to_tensors
from overproof.registry import FORMATS, TASKS
from overproof.stage_context import StageContext, no_progress
from overproof.train.engine import TorchEngine
from overproof.train.objective import CrossEntropy

RECIPE = HERE.parent / "jobs" / "recipes" / "stdlib-lm.yaml"
WAYS = {"across": True, "apart": False}  # by data.cross_document_attention
SHORTEST, LONGEST = 60, 4000  # characters of a function


def functions(node: ast.AST, source: str) -> Iterator[str]:
    """The functions and methods below a node, but for those within others."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_source_segment(source, inner) or ""
            if SHORTEST <= len(text) <= LONGEST:
                yield text
        else:
            yield from functions(inner, source)


def write_functions(path: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    with path.open("w", encoding="utf-8") as lines:
        for file in list_files(StdlibSource()).files:
            try:
                source = (root / file.name).read_text(encoding="utf-8")
                tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue
            lines.writelines(json.dumps({"text": text}) + "\n" for text in functions(tree, source))


def prepared(recipe: Recipe) -> Path:
    """The artifact of the stage `prepare`, in a store of its own."""
    draft = Store(recipe.store).new_writer(recipe.name, "prepare", "0" * 64, {}, {})
    return draft.commit(prepare(StageContext(recipe, {}, draft, no_progress)), 0.0).local()


def train_both(recipe: Recipe, roots: dict[str, Path], seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The models of both ways, and the median CPU seconds of a step."""
    shards = {way: Shards(root, "train") for way, root in roots.items()}
    manifests = {way: each.manifest for way, each in shards.items()}
    settings, order = recipe.train, next(iter(manifests.values())).order(seed)
    models = {way: build_model(settings.model, manifest, seed) for way, manifest in manifests.items()}
    engines = {way: TorchEngine(model, settings, seed=seed) for way, model in models.items()}
    objective, spent = CrossEntropy(TASKS[recipe.data.kind].predict), {way: list[float]() for way in roots}
    for step in range(settings.steps):
        for way in list(roots) if step % 2 else list(roots)[::-1]:
            batch = to_tensors(shards[way].take(order.step_rows(step, settings.batch_size)))
            began = time.process_time()
            loss = engines[way].step(objective, batch)["loss"]
            spent[way].append(time.process_time() - began)
        if step % 40 == 0:
            say(f"seed {seed}, step {step}: loss {loss:.3f}")
    return models, {way: statistics.median(seconds) for way, seconds in spent.items()}


def bits_per_byte(recipe: Recipe, model: Any, root: Path, file: Path, documents: int) -> float:
    """Of whole test documents, as the gate has them scored."""
    task, format = TASKS[recipe.data.kind], FORMATS[recipe.compress.kind]
    save_model(model, model.config, file.with_suffix(""), root / TOKENIZER)
    export_gguf(file.with_suffix(""), root / TOKENIZER, file, "f16", "documents")
    units = task.units(root, documents)
    scores = task.score(file, root, units, recipe.evaluate, recipe.engine, format, lambda _: None)
    return float(task.quality.value(scores.total.sum(), scores.size.sum()))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--corpus", choices=("functions", "files"), default="functions")
    for name, default in (("positions", 128), ("batch", 8), ("steps", 440), ("seeds", 3), ("documents", 300)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--threads", type=int, default=1)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="warning")
    with tempfile.TemporaryDirectory() as folder:
        source = "{kind: stdlib}"
        if asked.corpus == "functions":
            write_functions(Path(folder) / "functions.jsonl")
            source = f"{{kind: jsonl, path: {folder}/functions.jsonl}}"
        recipes = {
            way: load_recipe(RECIPE, (
                f"data.source={source}", f"data.sequence_length={asked.positions}", f"train.batch_size={asked.batch}",
                f"data.cross_document_attention={json.dumps(across)}", f"train.steps={asked.steps}",
                f"store={folder}/{way}", f"evaluate.threads={asked.threads}",
            ))
            for way, across in WAYS.items()
        }  # fmt: skip
        roots = {way: prepared(recipe) for way, recipe in recipes.items()}
        ray.shutdown()
        tokens = {way: Shards(root, "train", ("tokens",)) for way, root in roots.items()}
        rows = {way: each.take(np.arange(each.rows))["tokens"] for way, each in tokens.items()}
        assert np.array_equal(rows["across"], rows["apart"])
        start = Manifest.read(roots["apart"]).start_id
        begun = float((rows["apart"] == start).sum(1).mean())
        found = []
        for seed in range(asked.seeds):
            models, seconds = train_both(recipes["apart"], roots, seed)
            quality = {
                way: bits_per_byte(
                    recipes[way], model, roots[way], Path(folder) / f"{way}-{seed}.gguf", asked.documents
                )
                for way, model in models.items()
            }
            found.append((quality, seconds))
            say(f"seed {seed}: {quality}")
    print(
        f"{asked.corpus}, {asked.positions} tokens in a row, of which {begun:.2f} begin a document; {asked.steps} "
        f"steps of {asked.batch} rows; {machine(asked.threads)}.\n"
    )
    differences = [100 * (quality["apart"] / quality["across"] - 1) for quality, _ in found]
    ratios = [seconds["apart"] / seconds["across"] for _, seconds in found]
    table(
        ("seed", "across, bits/byte", "apart, bits/byte", "difference", "CPU of a step, apart ÷ across"),
        [
            *(
                (seed, f"{quality['across']:.4f}", f"{quality['apart']:.4f}", f"{difference:+.2f} %", f"{ratio:.3f}")
                for seed, ((quality, _), difference, ratio) in enumerate(zip(found, differences, ratios, strict=True))
            ),
            ("mean", "", "", f"{statistics.mean(differences):+.2f} %", f"{statistics.mean(ratios):.3f}"),
        ],
    )


if __name__ == "__main__":
    main()
