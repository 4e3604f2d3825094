"""What a training costs, step by step: speed, waiting for data, memory, energy."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from overproof.data.manifest import Manifest
from overproof.models.hf_directory import Batch
from overproof.registry import TASKS
from overproof.train.loop import CurveRow
from overproof.train.train_job import TrainJob

RECENT_STEPS = 20  # behind the speed that is shown
# AMD gives 280 W for the 64 cores of an EPYC 7763 (its data sheet); a busy core is charged its share.
WATTS_PER_CORE = 280 / 64


class ThroughputMeter:
    """Follows the steps of one rank; on rank 0 it also tells the progress."""

    def __init__(self, job: TrainJob, manifest: Manifest, world: int) -> None:
        self.job, self.manifest, self.world = job, manifest, world
        self._seconds: list[float] = []
        self._waited_s, self._waited_in_all_s = 0.0, 0.0
        self._seen, self._cpu_s = time.monotonic(), time.process_time()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time they are waited for is counted."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def measure(self, row: CurveRow) -> CurveRow:
        """The row with what its step cost; a validation's row passes as it is.

        Adds ``tokens_per_s`` (or ``images_per_s``: the task's unit) of the whole group, ``data_wait_s``,
        ``memory_bytes`` (this rank's
        peak so far, on the GPU where there is one) and, for the group as this rank has it, ``cpu_s`` and the estimate
        ``energy_j``: CPU time at ``WATTS_PER_CORE``, and the power each GPU says it draws.
        """
        now, cpu_s = time.monotonic(), time.process_time()
        seconds, busy_s = now - self._seen, cpu_s - self._cpu_s
        self._seen, self._cpu_s = now, cpu_s
        if "validation_loss" in row:
            return row
        self._seconds.append(seconds)
        waited_s, self._waited_s = self._waited_s, 0.0
        self._waited_in_all_s += waited_s
        energy_j = (busy_s * WATTS_PER_CORE + seconds * gpu_watts()) * self.world
        return {
            **row,
            self._unit: self.job.train.batch_size * self.manifest.positions / seconds,
            "data_wait_s": waited_s,
            "memory_bytes": float(peak_memory()),
            "cpu_s": busy_s * self.world,
            "energy_j": energy_j,
        }

    def __call__(self, row: CurveRow) -> None:
        """Tell how far the training is."""
        if "validation_loss" in row:
            return
        per_step = self.job.train.batch_size * self.manifest.positions
        rate = per_step / statistics.mean(self._seconds[-RECENT_STEPS:])
        loss = f"loss {row['loss']:.2f}" if "loss" in row else "step left out"
        note = f"{loss} · {_short(rate)} {TASKS[self.manifest.task].unit}s/s · {self.world} workers"
        self.job.progress("train", int(row["step"]), self.job.train.steps, note)

    def metrics(self, rows: Sequence[CurveRow]) -> dict[str, Any]:
        """What the whole training came to, over all attempts; seconds a step and data wait are this attempt's."""
        count = self.job.train.steps * self.job.train.batch_size

        def last(name: str) -> float | None:
            return next((row[name] for row in reversed(rows) if name in row), None)

        return {
            f"{TASKS[self.manifest.task].unit}s": count * self.manifest.positions,
            "train_loss": last("loss"),
            "validation_loss": last("validation_loss"),
            "seconds_per_step": statistics.median(self._seconds) if self._seconds else None,
            "data_wait": self._waited_in_all_s / sum(self._seconds) if self._seconds else None,
            "skipped_steps": sum("skipped" in row for row in rows),
            "energy_j": sum(row.get("energy_j", 0.0) for row in rows),
        }

    @property
    def _unit(self) -> str:
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


def _short(rate: float) -> str:
    return f"{rate / 1000:.0f}k" if rate >= 10_000 else f"{rate:,.0f}"
