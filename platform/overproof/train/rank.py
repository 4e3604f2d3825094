"""One rank in training: its model and engine, the loop over its rows, and on rank 0 the artifact."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from overproof.data.manifest import TOKENIZER, Manifest
from overproof.data.read import BATCH_COLUMNS, Columns, Shards
from overproof.errors import InputError
from overproof.models import build, load, parameters, save, to_tensors
from overproof.recipe import Pretrained
from overproof.train.curve import Curve
from overproof.train.engine import ZeroEngine
from overproof.train.loop import Row, fit, shares, validation_ids, validation_loss
from overproof.train.objective import CrossEntropy
from overproof.train.worker import Job

RECENT_STEPS = 20  # behind the speed that is shown


class Trainee:
    """A rank's model, ready to train."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        """Raises:
        InputError: the starting model cannot be used.
        """
        self.job, self.rank, self.world = job, rank, world
        self.root = job.prepared.local()
        self.manifest = Manifest.read(self.root)
        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
        torch.manual_seed(job.seed + rank)
        start = job.train.model
        self.model = load(Path(start.path)) if isinstance(start, Pretrained) else build(start, self.manifest, job.seed)
        self.parameters = parameters(self.model)  # before ZeRO-3 takes them apart
        self.engine = ZeroEngine(self.model, job.train)
        self.held_out = Shards(self.root, "validation")
        ids = validation_ids(self.held_out.rows, job.train.validation_rows)
        self.parts = shares(ids, job.train.batch_size // world, rank, world)

    def fit(self, rows: Iterator[Columns]) -> dict[str, Any] | None:
        """Train to the end. Rank 0 writes model/, curve.jsonl and events/ and gives back metrics."""
        job, text = self.job, self.manifest.kind == "text"
        names = BATCH_COLUMNS[self.manifest.kind]
        batches = (to_tensors({name: columns[name] for name in names}) for columns in rows)
        watch = Watch(job, self.manifest)
        with ExitStack() as stack:
            reports: list[Callable[[Row], None]] = []
            if self.rank == 0:
                folder = _existing(stack.enter_context(job.draft.directory()))
                reports = [watch, stack.enter_context(Curve(folder / "curve.jsonl", folder / "events"))]

            def report(row: Row) -> None:
                for each in reports:
                    each(row)

            fit(self.engine, CrossEntropy(), job.train, batches, self.validate, report)
            state = self.engine.state_dict()
            if self.rank > 0:
                return None
            save(state, self.model.config, folder / "model", self.root / TOKENIZER if text else None)
        return {"parameters": self.parameters, "steps": job.train.steps, **watch.metrics()}

    def validate(self) -> float:
        """The validation loss over all ranks; the same rows each time."""
        batches = (to_tensors(self.held_out.take(part)) for part in self.parts)
        with self.engine.evaluating() as model:
            return validation_loss(model, batches, self.engine.total)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: not on the node of rank 0; on a cluster of several nodes the store must be a folder that "
            "they share, or a URI such as s3://bucket/store"
        )
    return folder


@dataclass
class Watch:
    """Follows the rows on rank 0: speed, progress, and the last losses."""

    job: Job
    manifest: Manifest
    losses: dict[str, float | None] = field(default_factory=lambda: {"loss": None, "validation_loss": None})
    seconds: list[float] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)

    def __call__(self, row: Row) -> None:
        self.losses.update({name: row[name] for name in self.losses.keys() & row.keys()})
        if "loss" in row:
            self.seconds.append(time.monotonic() - self.seen)
            per_step = self.job.train.batch_size * self.manifest.positions
            rate = per_step / statistics.mean(self.seconds[-RECENT_STEPS:])
            unit = "tok/s" if self.manifest.kind == "text" else "images/s"
            note = f"loss {row['loss']:.2f} · {_short(rate)} {unit}"
            self.job.progress("train", int(row["step"]), self.job.train.steps, note)
        self.seen = time.monotonic()

    def metrics(self) -> dict[str, Any]:
        rows = self.job.train.steps * self.job.train.batch_size
        return {
            **({"tokens": rows * self.manifest.positions} if self.manifest.kind == "text" else {"rows": rows}),
            "train_loss": self.losses["loss"],
            "validation_loss": self.losses["validation_loss"],
            "seconds_per_step": statistics.median(self.seconds) if self.seconds else None,
        }


def _short(rate: float) -> str:
    return f"{rate / 1000:.0f}k" if rate >= 10_000 else f"{rate:,.0f}"
