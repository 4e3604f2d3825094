"""What a training measures of itself, step by step, and the learning curve that it writes down."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from overproof.data.manifest import Manifest
from overproof.models.hf_directory import Batch
from overproof.registry import TASKS
from overproof.stage_context import StepTrained
from overproof.train.loop import CurveRow
from overproof.train.train_job import TrainJob
from overproof.units import format_count

ROWS_HASH = "rows_hash"  # of a step: the sum of ``data.order.rows_hash`` over the ranks, of the rows that came
RATE_STEPS = 20  # the speed that is shown is the mean over so many steps
# AMD gives 280 W for the 64 cores of an EPYC 7763 (its data sheet); a busy core is charged its share. Nothing is
# measured: other processors draw other powers, and memory, disks and idle cores are left out.
WATTS_PER_CORE = 280 / 64


class MetricsLogger:
    """The learning curve on disk, JSON Lines for machines and TensorBoard events for people; call it with each row."""

    def __init__(self, file: Path, events: Path | None = None) -> None:
        """``events`` is a folder for TensorBoard event files, or None for none."""
        from torch.utils.tensorboard import SummaryWriter

        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file.open("w", encoding="utf-8", buffering=1)
        self.events = SummaryWriter(str(events)) if events else None

    def __call__(self, row: CurveRow) -> None:
        self.file.write(json.dumps(row) + "\n")
        if self.events:
            for name, value in row.items():
                if name == "validation_loss":
                    self.events.add_scalar("validation/loss", value, int(row["step"]))
                elif name not in ("step", ROWS_HASH):
                    self.events.add_scalar(f"train/{name}", value, int(row["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.events:
            self.events.close()


class ThroughputMeter:
    """What the steps of one rank cost: speed, waiting for data, memory, an estimate of energy."""

    def __init__(self, job: TrainJob, manifest: Manifest, world: int) -> None:
        self.job, self.manifest, self.world = job, manifest, world
        self._step_seconds: list[float] = []
        self._data_wait_s, self._total_data_wait_s = 0.0, 0.0
        self._last_s, self._last_cpu_s = time.monotonic(), time.process_time()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time they are waited for is counted."""
        while True:
            began_s = time.monotonic()
            batch = next(batches, None)
            self._data_wait_s += time.monotonic() - began_s
            if batch is None:
                return
            yield batch

    def measure(self, row: CurveRow) -> CurveRow:
        """The row with what its step cost; a validation's row passes as it is.

        Adds ``tokens_per_s`` (or ``images_per_s``: the task's unit) of the whole group, ``data_wait_s``,
        ``memory_bytes`` (this rank's peak so far, on the GPU where there is one) and, for the group as this rank has
        it, ``cpu_s`` and
        ``energy_estimate_j``: CPU time at ``WATTS_PER_CORE``, and the power that each GPU's driver gives.
        """
        now_s, cpu_s = time.monotonic(), time.process_time()
        step_s, busy_s = now_s - self._last_s, cpu_s - self._last_cpu_s
        self._last_s, self._last_cpu_s = now_s, cpu_s
        if "validation_loss" in row:
            return row
        self._step_seconds.append(step_s)
        data_wait_s, self._data_wait_s = self._data_wait_s, 0.0
        self._total_data_wait_s += data_wait_s
        return {
            **row,
            self._rate_name: self.job.train.batch_size * self.manifest.positions / step_s,
            "data_wait_s": data_wait_s,
            "memory_bytes": float(peak_memory()),
            "cpu_s": busy_s * self.world,
            "energy_estimate_j": (busy_s * WATTS_PER_CORE + step_s * gpu_watts()) * self.world,
        }

    def report(self, row: CurveRow) -> None:
        """Tell how far the training is; on rank 0 alone."""
        if "validation_loss" in row:
            return
        per_step = self.job.train.batch_size * self.manifest.positions
        rate = per_step / statistics.mean(self._step_seconds[-RATE_STEPS:])
        loss = f"loss {row['loss']:.2f}" if "loss" in row else "step left out"
        note = (
            f"{loss} · {_format_rate(rate)} {TASKS[self.manifest.task].unit}s/s · {format_count(self.world, 'worker')}"
        )
        step, steps = int(row["step"]), self.job.train.steps
        self.job.progress(StepTrained("train", step, steps, note, row.get("loss"), self.world))

    def metrics(self, curve: Sequence[CurveRow]) -> dict[str, Any]:
        """What the whole training came to, over all attempts; seconds a step and data wait are this attempt's."""
        count = self.job.train.steps * self.job.train.batch_size

        def last(name: str) -> float | None:
            return next((row[name] for row in reversed(curve) if name in row), None)

        seconds = self._step_seconds
        return {
            f"{TASKS[self.manifest.task].unit}s": count * self.manifest.positions,
            "train_loss": last("loss"),
            "validation_loss": last("validation_loss"),
            "seconds_per_step": statistics.median(seconds) if seconds else None,
            "data_wait": self._total_data_wait_s / sum(seconds) if seconds else None,
            "skipped_steps": sum("skipped" in row for row in curve),
            "energy_estimate_j": sum(row.get("energy_estimate_j", 0.0) for row in curve),
        }

    @property
    def _rate_name(self) -> str:
        return f"{TASKS[self.manifest.task].unit}s_per_s"


def gpu_watts() -> float:
    """What this process's GPU draws now; 0 without one or where its driver does not say."""
    if not torch.cuda.is_available():
        return 0.0
    try:
        return torch.cuda.power_draw() / 1000
    except (ImportError, RuntimeError):
        return 0.0


def peak_memory() -> int:
    """The most memory this process held, bytes: on its GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _format_rate(rate: float) -> str:
    return f"{rate / 1000:.0f}k" if rate >= 10_000 else f"{rate:,.0f}"
