"""What a cache of few bytes keeps of dense distillation: (plain - cached) / (plain - dense), in held-out bits per byte.

    .venv/bin/python benchmarks/bytes_per_token.py [--seeds 3] [--top-k 8 17] [--sampled 2x35] [--weight 0.9]

Prints one Markdown table. Plain students learn from the labels, dense ones from the whole distribution of a teacher
that runs at every step, the others from a cache of it; all start from the same weights and read the same rows. About
10 minutes with the defaults on two cores, and 3 more where the store has no teacher yet.
"""

from __future__ import annotations

import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from measuring import machine, say, table
from students import Teaching, Trial, cache, made, options, scores, text, train

from overproof.artifacts import Artifact
from overproof.config import Cache, Recipe

PROCESSES, ZSTD_LEVEL = 2, 3


@dataclass(frozen=True)
class Stored:
    """A cache and what its files take for each prediction."""

    parents: dict[str, Artifact]
    file_bytes: float
    zstd_bytes: float  # if the files were compressed whole


def schemes(recipe: Recipe, top_k: list[int], sampled: list[str]) -> dict[str, Cache]:
    """The caches to compare, by name."""
    kept = {f"top {k}": {"kind": "topk", "k": k} for k in top_k}
    pairs = {text: text.split("x") for text in sampled}
    drawn = {f"top {k}, {n} draws": {"kind": "sampled", "k": k, "draws": n} for k, n in pairs.values()}
    return {name: cache(recipe, scheme=scheme, temperatures=[1.0]) for name, scheme in (kept | drawn).items()}


def stored(recipe: Recipe) -> Stored:
    """Make a cache and measure its files."""
    parents = made(recipe, "cache")
    root = parents["cache"].local()
    files = [file.read_bytes() for file in sorted(root.glob("*.parquet"))]
    positions = parents["cache"].record.metrics["positions"]
    compressed = [pa.Codec("zstd", ZSTD_LEVEL).compress(content) for content in files]
    return Stored(parents, sum(map(len, files)) / positions, sum(map(len, compressed)) / positions)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--top-k", type=int, nargs="*", default=[8, 17])
    parser.add_argument("--sampled", nargs="*", default=["2x35"], help="the likeliest x draws from the others")
    parser.add_argument("--weight", type=float, default=0.9, help="share of the teacher's loss")
    given = parser.parse_args()
    recipe = text(given)
    caches = {}
    for name, scheme in schemes(recipe, given.top_k, given.sampled).items():
        say(f"capturing {name}")
        caches[name] = stored(recipe.model_copy(update={"cache": scheme}))
    any_parents = next(iter(caches.values())).parents
    student = recipe.sweep.students[0].model_copy(update={"teacher_weight": given.weight})
    recipe = recipe.model_copy(update={"sweep": recipe.sweep.model_copy(update={"students": (student,)})})
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        trials: dict[str, Trial] = {}
        for seed in range(given.seeds):  # the kinds in turn
            kinds: list[tuple[str, Teaching, dict[str, Artifact]]] = [
                ("plain", "none", any_parents), ("dense", "live", any_parents),
                *((name, "cached", each.parents) for name, each in caches.items()),
            ]  # fmt: skip
            for name, teaching, parents in kinds:
                out = str(Path(scratch) / f"{name}-{seed}".replace(" ", "-"))
                trials[f"{name}/{seed}"] = Trial(recipe, parents, teaching, seed, out)
        for name, _ in zip(trials, pool.map(train, trials.values()), strict=True):
            say(f"trained {name}")
        say("scoring")
        found = scores(any_parents, {name: trial.out for name, trial in trials.items()}, given.documents)
    bits = {name: [found[f"{name}/{seed}"].bits_per_byte for seed in range(given.seeds)]
            for name in ("plain", "dense", *caches)}  # fmt: skip
    print(f"{machine(given.threads)}; {given.seeds} seeds, {given.steps} steps of {recipe.sweep.batch_size} rows, "
          f"teacher's weight {given.weight:g}; teacher {found['teacher'].bits_per_byte:.4f} bits per byte on "
          f"{given.documents} held-out documents; medians (least to most)\n")  # fmt: skip
    head = ("targets", "bytes a token, files", "through zstd", "held-out bits per byte", "kept of dense's gain")
    table(head, [line(name, values, bits, caches.get(name)) for name, values in bits.items()])


def line(name: str, values: list[float], bits: dict[str, list[float]], own: Stored | None) -> list[str]:
    parts = [(p - v) / (p - d) for p, v, d in zip(bits["plain"], values, bits["dense"], strict=True)]
    kept = f"{statistics.median(parts):.1%} ({min(parts):.1%} to {max(parts):.1%})" if own else ""
    sizes = [f"{own.file_bytes:.1f}", f"{own.zstd_bytes:.1f}"] if own else ["", ""]
    return [name, *sizes, f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})", kept]


if __name__ == "__main__":
    main()
