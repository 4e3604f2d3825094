"""Whether distillation is worth it: students against controls at equal steps and at equal compute, and what they keep.

    .venv/bin/python benchmarks/worth.py [--seeds 3] [--shares 8 1] [--tasks digits text]

Prints one Markdown table. A control starts from the same weights and has no teacher. At equal compute it trains for as
many more steps, on further rows, as its CPU seconds a step allow for what distillation cost beyond it: the divergence,
the reading of the cache, and the student's share of the teacher's seconds over the cached rows; --shares say how many
students use a cache. The teacher's training is not counted, for it is there, nor is the start of Ray, which any sweep
pays. Gains are of means over seeds, with intervals of 95 % over held-out documents or images that both are scored on.
About 20 minutes, and 4 more where the store has no teachers yet.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, say, table
from students import (
    Scores,
    Teaching,
    Trial,
    digits,
    llama,
    made,
    options,
    scores,
    text,
    train,
    vit,
)  # fmt: skip

from overproof.artifacts import Artifact
from overproof.config import Recipe, Student
from overproof.evaluate.metrics import Bootstrap, percentiles, resampled_sums
from overproof.models.hf_directory import count_parameters, load_model
from overproof.models.llama import Llama
from overproof.models.vit import Vit

PROCESSES = 2
DIGITS_STEPS = 150
BOOTSTRAP = Bootstrap(samples=2000, confidence=0.95, seed=0)
SHAPES: dict[str, list[Llama | Vit]] = {  # about 10, 30 and 60 % of the teacher
    "digits": [vit(32), vit(40, 2), vit(48, 3)],
    "text": [
        llama({"hidden_size": width, "intermediate_size": inner, "layers": 2, "heads": heads, "kv_heads": heads})
        for width, inner, heads in ((64, 192, 2), (128, 384, 4), (192, 640, 6))
    ],
}
PUBLISHED = "DistilBERT, 60 % of BERT (published, arXiv 1910.01108)"


def recipe_of(task: str, given: argparse.Namespace) -> Recipe:
    if task == "text":
        return text(given)
    return digits(argparse.Namespace(**{**vars(given), "steps": min(given.steps, DIGITS_STEPS)}))


def with_student(recipe: Recipe, shape: Llama | Vit, weight: float, steps: int) -> Recipe:
    temperature = recipe.sweep.students[0].temperature
    student = Student(name="only", model=shape, temperature=temperature, teacher_weight=weight)
    changes = {"students": (student,), "steps": steps, "validate_every": steps}
    return recipe.model_copy(update={"sweep": recipe.sweep.model_copy(update=changes)})


class Task:
    """The students and controls of one task."""

    def __init__(self, name: str, given: argparse.Namespace, pool: ProcessPoolExecutor, scratch: Path) -> None:
        self.name, self.given, self.pool, self.scratch = name, given, pool, scratch
        self.recipe = recipe_of(name, given)
        self.parents: dict[str, Artifact] = made(self.recipe, "cache")
        self.folders: dict[str, str] = {}
        self.trained: dict[str, dict[str, Any]] = {}

    def train(self, wanted: Iterable[tuple[int, Teaching, int]]) -> None:
        """Students (shape, teaching, steps) of every seed, if they are not there yet."""
        trials: dict[str, Trial] = {}
        for shape, teaching, steps in wanted:
            own = with_student(self.recipe, SHAPES[self.name][shape], self.given.weight, steps)
            for seed in range(self.given.seeds):
                key = f"{shape}-{teaching}-{steps}-{seed}"
                if key not in self.folders:
                    self.folders[key] = str(self.scratch / f"{self.name}-{key}")
                    trials[key] = Trial(own, self.parents, teaching, seed, self.folders[key])
        for key, found in zip(trials, self.pool.map(train, trials.values()), strict=True):
            say(f"{self.name}: trained {key}")
            self.trained[key] = found

    def cpu_s(self, shape: int, teaching: Teaching) -> float:
        """Of a training of the sweep's steps: the median over seeds."""
        keys = [f"{shape}-{teaching}-{self.recipe.sweep.steps}-{seed}" for seed in range(self.given.seeds)]
        return statistics.median(self.trained[key]["cpu_s"] for key in keys)

    def lines(self) -> list[list[str]]:
        steps, shapes = self.recipe.sweep.steps, range(len(SHAPES[self.name]))
        self.train((shape, teaching, steps) for shape in shapes for teaching in ("cached", "none"))  # type: ignore[misc]
        against: dict[tuple[int, str], int] = {}
        for shape in shapes:
            against[shape, "equal steps"] = steps
            for share in self.given.shares:
                all_s = self.cpu_s(shape, "cached") + self.parents["cache"].record.metrics["teacher_seconds"] / share
                name = f"equal compute, cache shared by {share}"
                against[shape, name] = round(steps * max(1.0, all_s / self.cpu_s(shape, "none")))
        self.train((shape, "none", longer) for (shape, _), longer in against.items())
        say(f"{self.name}: scoring")
        found = scores(self.parents, self.folders, self.given.documents)
        teacher_size = count_parameters(load_model(self.parents["train"].local() / "model"))
        lines = []
        for (shape, name), longer in against.items():
            students = [found[f"{shape}-cached-{steps}-{seed}"] for seed in range(self.given.seeds)]
            controls = [found[f"{shape}-none-{longer}-{seed}"] for seed in range(self.given.seeds)]
            size = self.trained[f"{shape}-cached-{steps}-0"]["parameters"]
            about = f"{size / 1000:,.0f}k, {size / teacher_size:.0%} of the teacher"
            gain = gained(students, controls, self.name == "text")
            lines.append(
                [self.name, about, name, f"{longer / steps:.2f}", self.quality(students), self.quality(controls), gain,
                 self.kept(students, found["teacher"]), self.kept(controls, found["teacher"])]
            )  # fmt: skip
        return lines

    def quality(self, own: list[Scores]) -> str:
        if self.name == "text":
            return f"{np.mean([each.bits_per_byte for each in own]):.4f}"
        return f"{np.mean([each.accuracy for each in own]):.2%}"

    def kept(self, own: list[Scores], teacher: Scores) -> str:
        accuracy = np.mean([each.accuracy for each in own]) / teacher.accuracy
        if self.name == "digits":
            return f"{accuracy:.1%}"
        bits = teacher.bits_per_byte / np.mean([each.bits_per_byte for each in own])
        return f"{accuracy:.1%} ({bits:.1%})"


def gained(students: list[Scores], controls: list[Scores], is_text: bool) -> str:
    """How much better: bits per byte less, or points of accuracy more; its interval, and least and most of a seed."""

    def gain(student: Any, control: Any, size: Any) -> Any:
        return (1 - student / control) if is_text else (student - control) / size

    columns = [np.mean([each.nats if is_text else each.right for each in group], 0) for group in (students, controls)]
    columns_UC = np.stack([*columns, students[0].size_bytes], 1)
    low, high = percentiles(gain(*resampled_sums(columns_UC, BOOTSTRAP).T), len(columns_UC), BOOTSTRAP.confidence)
    seeds = [
        gain(a.nats.sum(), b.nats.sum(), 1) if is_text else gain(a.right.sum(), b.right.sum(), len(a.right))
        for a, b in zip(students, controls, strict=True)
    ]
    around = "" if low is None or high is None else f" [{low:+.2%}, {high:+.2%}]"
    return f"{gain(*columns_UC.sum(0)):+.2%}{around}, seeds {min(seeds):+.2%} to {max(seeds):+.2%}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--shares", type=int, nargs="+", default=[8, 1], help="students that use the cache")
    parser.add_argument("--weight", type=float, default=0.75, help="share of the teacher's loss")
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for name in given.tasks:
            lines += Task(name, given, pool, Path(scratch)).lines()
    print(
        f"{machine(given.threads)}; {given.seeds} seeds, means; text: bits per byte, {given.documents} test documents; "
        "digits: accuracy; kept: of the teacher's accuracy (for text of the next token; in brackets its bits per byte "
        "over theirs)\n"
    )
    head = ("task", "student", "control", "its steps, times", "distilled", "control's", "better by",
            "kept by distilled", "by control")  # fmt: skip
    table(head, [*lines, ["GLUE", PUBLISHED, "", "", "", "", "", "97 %", ""]])


if __name__ == "__main__":
    main()
