"""What it saves that the teacher runs once: a sweep on cached targets, beside a teacher that runs at every step.

    .venv/bin/python benchmarks/teacher_once.py [--peers FOLDER] [--seeds 3] [--trials 16] [--sampled 2x128]

Prints one Markdown table of CPU seconds. The sweep is the product's, its stages `cache` and `sweep` run under Ray: the
teacher, Ray, every process and the control (one training more) count. Against it, one training for each seed, in
turn: our own loop with the teacher live, and TRL's GKDTrainer off-policy; what --trials of them would take is that
times the median. Same starting weights, rows, batch, schedule, optimizer and threads; the loss is the forward KL alone.
About 15 minutes, and 3 more where the store has no teacher yet; with --large 35 and 10.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measuring import HERE, child, interleaved, machine, median, say, spread, table
from peers import trl
from students import SOURCES, Scores, Trial, cache, made, options, remade, scores, text, train

from overproof.artifacts import Artifact
from overproof.config import Recipe
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.models.hf_directory import build_model, count_parameters, load_model, save_model

NAMES = {
    "cached": "ours, teacher's targets cached",
    "live": "ours, teacher live, every output",
    "gkd": "TRL GKDTrainer, lmbda 0, beta 0",
}


def starts(recipe: Recipe, parents: dict[str, Artifact], seeds: int, scratch: Path) -> dict[int, Path]:
    """A folder of fresh weights for each seed."""
    root, shape = parents["prepare"].local(), recipe.sweep.students[0].model
    for seed in range(seeds):
        model = build_model(shape, Manifest.read(root), seed)  # type: ignore[arg-type]
        save_model(model, model.config, scratch / f"start-{seed}", root / TOKENIZER)
    return {seed: scratch / f"start-{seed}" for seed in range(seeds)}


def gkd(python: Path, recipe: Recipe, parents: dict[str, Artifact], start: Path, out: Path, threads: int) -> Any:
    setting = {
        "teacher": str(parents["train"].local() / "model"),
        "prepared": str(parents["prepare"].local()),
        "train": recipe.sweep.model_dump(),
        "seed": recipe.seed,
        "threads": threads,
        "students": {str(start): str(out)},
    }
    file = out.with_suffix(".json")
    file.write_text(json.dumps(setting))
    found = child([python, HERE / "sweeps" / "gkd.py", file], threads, PYTHONPATH=SOURCES)
    return {"cpu_s": found["trained_s"][0], "start_s": found["start_s"]}


def ours(trial: Trial) -> dict[str, Any]:
    """In a process of its own, as the peer is."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(train, trial).result()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "overproof-peers")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--sampled", default="2x128", help="outputs that the cache keeps for each token x its draws")
    given = parser.parse_args()
    python, base = trl(given.peers.absolute()), text(given)
    k, draws = given.sampled.split("x")
    kept = {"scheme": {"kind": "sampled", "k": k, "draws": draws}, "temperatures": [1.0]}
    only = base.sweep.students[0].model_copy(update={"teacher_weight": 1.0})
    names = [f"s{number:02d}" for number in range(given.trials)]
    settings = base.sweep.model_copy(update={"students": tuple(only.model_copy(update={"name": n}) for n in names)})
    recipe = base.model_copy(update={"cache": cache(base, **kept), "sweep": settings})
    say(f"a sweep of {given.trials}")
    whole = remade(recipe, ("cache", "sweep"))
    parents = made(recipe, "cache")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        begin = starts(recipe, parents, given.seeds, scratch)
        seeds = {who: iter(range(given.seeds)) for who in NAMES}

        def run(who: str) -> dict[str, Any]:
            seed = next(seeds[who])
            out = scratch / f"{who}-{seed}"
            if who == "gkd":
                return gkd(python, recipe, parents, begin[seed], out, given.threads)
            teaching = "live" if who == "live" else "cached"
            return ours(Trial(recipe, parents, teaching, seed, str(out)))

        runs: dict[str, Callable[[], dict[str, Any]]] = {who: lambda who=who: run(who) for who in NAMES}  # type: ignore[misc]
        found = interleaved(given.seeds, runs)
        say("scoring")
        folders = {f"{who}/{n}": str(scratch / f"{who}-{n}") for who in NAMES for n in range(given.seeds)}
        quality = scores(parents, folders, given.documents)
    teacher = count_parameters(load_model(parents["train"].local() / "model"))
    student = found["cached"][0]["parameters"]
    print(
        f"{machine(given.threads)}; teacher {teacher / 1e6:.2f}M, student {student / 1e6:.2f}M parameters; "
        f"{given.steps} steps of {settings.batch_size} rows; {given.seeds} trainings of each, medians (least to most); "
        f"the sweep once, {whole['wall_s']:.0f} s on the clock\n"
    )
    head = ("who", "CPU s of one training", f"CPU s of {given.trials} trials", "of a trial", "÷ our sweep",
            "held-out KL to the teacher, nats", "÷ live")  # fmt: skip
    table(head, [line(who, given.trials, found, whole["cpu_s"], quality) for who in NAMES])
    start_s = median(found["gkd"], "start_s")
    print(
        f"\nOf the peers {given.trials} times the median and one start ({start_s:.0f} s of imports for TRL, "
        "none counted for our live teacher); of ours measured, with Ray and the control."
    )


def line(who: str, trials: int, found: dict[str, list[Any]], whole_s: float, quality: dict[str, Scores]) -> list[str]:
    one_s = statistics.median(row["cpu_s"] for row in found[who])
    start_s = statistics.median(row.get("start_s", 0.0) for row in found[who])
    all_s = whole_s if who == "cached" else start_s + trials * one_s
    kls = [quality[f"{who}/{seed}"].kl for seed in range(len(found[who]))]
    ratios = [kl / quality[f"live/{seed}"].kl for seed, kl in enumerate(kls)]
    return [
        NAMES[who],
        spread(found[who], "cpu_s", 1),
        f"{all_s:.0f}",
        f"{all_s / trials:.1f}",
        f"{all_s / whole_s:.2f}",
        f"{statistics.median(kls):.4f} ({min(kls):.4f} to {max(kls):.4f})",
        f"{statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})",
    ]


if __name__ == "__main__":
    main()
