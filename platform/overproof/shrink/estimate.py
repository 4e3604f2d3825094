"""About how long a recipe will take on this machine, and what it will hold, before anything was measured.

A model of P numbers takes 2P floating-point operations for each token, patch or row of a forward pass, and 6P in a step
of training (arXiv 2001.08361, section 2.1). How fast this machine is shows when it multiplies matrices for a moment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from overproof.cluster.machine import available_cpus
from overproof.errors import InputError
from overproof.models import stage_memory
from overproof.models.sizes import FP32_BYTES, ModelSize
from overproof.shrink.choice import Asked, ProposedRecipe, find, write
from overproof.shrink.students import SizedStudent
from overproof.units import format_bytes, format_seconds

EDGE, MEASURED_S = 512, 0.1  # of the matrices
HALVINGS = 7  # until the share of the steps is known that fits into a time
SHARE = 0.6  # of what multiplying matrices reaches, that training reaches: measured on two cores, models of 1M to 135M
STEP_S = 0.02  # what a step takes beside its arithmetic
STARTS_S = {"prepare": 8, "train": 15, "cache": 8, "sweep": 20, "compress": 8, "evaluate": 12}  # measured likewise
PROBE_S = 3  # of an engine asked about a file
STREAMS_S = 5  # of one asked by several at once
READ_BYTES_PER_S = 10e9  # of weights, once for each token that is written


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, and bytes that a process holds at most, with libraries and mapped weights, by what it does."""

    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    flops_per_s: float

    @property
    def total_s(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())

    @property
    def stages(self) -> str:
        """For people: each with its time."""
        return ", ".join(f"{stage} {format_seconds(s)}" for stage, s in self.seconds.items())

    def lines(self) -> tuple[str, str]:
        """For people."""
        held = ", ".join(f"{what} {format_bytes(bytes_)}" for what, bytes_ in self.memory.items())
        total = format_seconds(self.total_s)
        rate = f"this machine multiplies matrices at {self.flops_per_s / 1e9:,.0f} GFLOP/s"
        return f"about {total} ({self.stages}): {rate}", held


def choose_within(asked: Asked, flops_per_s: float) -> tuple[ProposedRecipe, Estimate]:
    """Look at the model and the data, and write a recipe with as many steps as ``--max-minutes`` leaves on a machine of
    that speed.

    Raises:
        InputError: something is missing, cannot be used, or must be said by a flag; no student is within the budget; or
            what is left beside the steps takes longer.
    """
    found = find(asked)

    def written(share: float) -> tuple[ProposedRecipe, Estimate]:
        choice = write(asked, found, share)
        return choice, estimate(choice, flops_per_s)

    def is_within(needed: Estimate) -> bool:
        return asked.max_minutes is None or needed.total_s <= 60 * asked.max_minutes

    whole = written(1.0)
    if is_within(whole[1]):
        return whole
    fits = written(0.0)
    if not is_within(needed := fits[1]):
        raise InputError(
            f"--max-minutes {asked.max_minutes:g}: the shortest trainings would leave it at about "
            f"{format_seconds(needed.total_s)} ({needed.stages}); give --max-minutes "
            f"{math.ceil(needed.total_s / 60)}, or a smaller model or fewer data"
        )
    least, most = 0.0, 1.0
    for _ in range(HALVINGS):
        share = (least + most) / 2
        if is_within((shorter := written(share))[1]):
            fits, least = shorter, share
        else:
            most = share
    return fits


def machine_flops() -> float:
    """Floating-point operations a second, multiplying matrices in fp32."""
    a = np.ones((EDGE, EDGE), np.float32)
    a @ a  # starts the threads
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < MEASURED_S:
        a @ a
        count += 1
    return 2 * EDGE**3 * count / (time.perf_counter() - began)


def estimate(choice: ProposedRecipe, flops_per_s: float) -> Estimate:
    """About what a recipe takes on a machine of that speed."""
    recipe, chosen = choice.recipe, choice.students
    train, sweep, data = recipe.train, recipe.sweep, recipe.data
    cores = available_cpus()

    def rate(cpus: float) -> float:
        return SHARE * flops_per_s * min(cpus, cores) / cores

    taught = [c.size for c in chosen.students]
    compressed = [*taught, chosen.teacher] if recipe.compress.teacher else taught
    rows = choice.rows * (1 - data.validation_fraction - data.test_fraction)
    cached = min(recipe.rows_cached or rows, rows) if recipe.reads_cache else 0
    together = min(len(taught), sweep.concurrent_trials) * sweep.cpus_per_trial
    work = {
        "prepare": 0.0,
        "train": _training(chosen.teacher, train.steps, train.batch_size, rate(train.cpus_per_worker)),
        "cache": cached * _pass(chosen.teacher) / rate(recipe.cache.actors * recipe.cache.cpus_per_actor),
        "sweep": sum(_training(size, sweep.steps, sweep.batch_size, rate(together)) for size in taught)
        + _training(taught[0], sweep.steps, sweep.batch_size, rate(sweep.cpus_per_trial)),  # the control, alone
        "compress": sum(map(_pass, compressed)) * recipe.compress.calibration_rows / rate(cores),
        "evaluate": _evaluation(choice, rate(recipe.evaluate.threads)),
    }
    weights = FP32_BYTES * chosen.teacher.parameters
    memory = {"the teacher that teaches": weights + stage_memory.capture_memory(chosen.teacher, recipe.cache)}
    if train.steps:
        memory["a worker that trains it"] = stage_memory.teacher_memory(chosen.teacher, train, train.fewest)
    memory["a trial of the largest student"] = stage_memory.student_memory(taught[0], recipe.sweep)
    held = {what: float(stage_memory.LIBRARIES_BYTES + bytes_) for what, bytes_ in memory.items()}
    return Estimate({stage: STARTS_S[stage] + seconds for stage, seconds in work.items()}, held, flops_per_s)


def _pass(size: ModelSize) -> float:
    """Floating-point operations of one row's forward pass."""
    return 2.0 * size.multiplied * size.places


def _training(size: ModelSize, steps: int, batch_size: int, rate: float) -> float:
    return steps * (STEP_S + 3 * batch_size * _pass(size) / rate)


def _evaluation(choice: ProposedRecipe, rate: float) -> float:
    """Every file scored on the test rows, and its engine asked."""
    recipe, chosen = choice.recipe, choice.students
    settings, tested = recipe.evaluate, choice.rows * recipe.data.test_fraction
    if settings.max_documents is not None:
        tested = min(tested, settings.max_documents * choice.rows_per_unit)
    files: list[tuple[ModelSize, float]] = [(chosen.teacher, chosen.teacher_mb), _unquantised(chosen.students[0])]
    if recipe.compress.teacher:
        larger = chosen.teacher.parameters / chosen.students[0].size.parameters
        files += [(chosen.teacher, larger * chosen.students[0].mb[variant]) for variant in chosen.variants]
    for student in chosen.students:
        files += [_unquantised(student), *((student.size, student.mb[variant]) for variant in chosen.variants)]
    seconds = 0.0
    for size, mb in files:
        written = settings.timed_requests * settings.decode_tokens * mb * 1e6 / READ_BYTES_PER_S if recipe.writes else 0
        streams = STREAMS_S if recipe.writes and settings.streams > 1 else 0
        seconds += tested * _pass(size) / rate + PROBE_S + min(written, settings.probe_s) + streams
    return seconds


def _unquantised(student: SizedStudent) -> tuple[ModelSize, float]:
    return student.size, 2 * student.size.parameters / 1e6
