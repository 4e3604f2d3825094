"""The bytes that one process of a stage holds at most, on a machine without a GPU, beside ``LIBRARIES_BYTES``.

What no file backs is counted, and nothing else: weights that are kept in fp32 in their directory are mapped from there,
and take memory of the machine's that it can take back. ``benchmarks/stage_memory.py`` measures the same of real stages.

Each figure is the largest of the moments that may be: when the loss is known, and when the backward pass begins; the
optimizer, which is fused, computes in place. Beside them lies the copy that the newest checkpoint is written from.
Gradients count beside activations although these are gone when those are there: malloc keeps blocks below 32 MiB for
the next of their kind.
Not all of what it keeps is of use: into a hole of just its size glibc (before 2.38) does not put a block that is
aligned, as torch's are. What lies idle so was 0.4 to 0.9 of what the layers of a 135M Llama kept, and changes from run
to run; with each block mapped by itself (M_MMAP_THRESHOLD) there was none, and a step took a third more CPU time.
"""

from __future__ import annotations

from overproof.config import Cache, Dense, Optimization, Training
from overproof.models.sizes import FP32_BYTES, ModelSize
from overproof.models.zero_memory import (
    ADAM_BYTES,
    HALF_BYTES,
    activation_memory,
    kept_by_layers,
    layer_memory,
    state_memory,
)
from overproof.registry import FAMILIES

LIBRARIES_BYTES = 350_000_000  # of torch's CPU build and what is loaded with it: 320 to 393 MB measured, by stage
IDLE = 0.5  # as much of what layers keep lies idle in malloc's heap besides


def forward_memory(size: ModelSize, rows: int, logits: int = 1, element_bytes: int = FP32_BYTES) -> int:
    """A pass without gradients: a layer's arrays, which malloc keeps for the next, and some as large as the logits."""
    layer = max(size.places * layer_memory(size, element_bytes), element_bytes * size.peak)
    return rows * (layer + logits * size.predictions * size.outputs * element_bytes)


def torch_scoring_memory(size: ModelSize, positions: int) -> int:
    """A file's weights in fp32, and a row of ``positions`` places, whose logits are there three times."""
    del positions  # a row's, as the size has them
    return FP32_BYTES * size.parameters + forward_memory(size, 1, 3)


def capture_memory(size: ModelSize, cache: Cache) -> int:
    """The teacher looks at rows of the data; every log-probability is kept twice while it is put together. In bf16 the
    weights that it multiplies are no longer those of its file.
    """
    cast = HALF_BYTES * size.parameters if cache.precision == "bf16" else 0
    return cast + forward_memory(size, cache.batch_size, 3 if isinstance(cache.scheme, Dense) else 1)


def student_memory(size: ModelSize, sweep: Optimization) -> int:
    """A student that one process trains in fp32, from which a checkpoint is made at every validation."""
    weights, state = FP32_BYTES * size.parameters, (FP32_BYTES + ADAM_BYTES) * size.parameters
    family = FAMILIES[size.family]
    place = size.layers * layer_memory(size, FP32_BYTES) + family.outer_memory(size, FP32_BYTES)
    kept = sweep.batch_size * size.places * place
    logits = sweep.batch_size * size.predictions * size.outputs * FP32_BYTES
    copy = state if sweep.steps > sweep.validate_every else 0
    return state + max(copy + weights + _backward_memory(size, kept, logits), state)


def _backward_memory(size: ModelSize, kept: int, logits: int) -> int:
    """As the backward pass begins: the logits and their gradient, or that and the first of the output layer's."""
    return kept + max(2 * logits, logits + FP32_BYTES * size.outputs * size.hidden)


def teacher_memory(size: ModelSize, train: Training, world: int) -> int:
    """A worker that trains the teacher, or takes it over as it is, and at the end writes its directory."""
    if train.steps == 0:
        return FP32_BYTES * size.held + forward_memory(size, train.batch_size // world)
    parts = state_memory(size, train, train.zero_stage, world)
    held, gradients = parts.total, parts.device.gradients + parts.host.gradients
    activations = activation_memory(size, train, world) + int(IDLE * kept_by_layers(size, train, world))
    copy = checkpoint_memory(size, train, world)
    step = held + activations + (copy if train.steps > train.checkpoint.every_steps else 0)
    ranks = world if train.zero_stage == 3 else 1  # that share the weights which adapters are merged into
    merged = FP32_BYTES * -(-size.parameters // ranks) if size.adapters else 0
    travelling = 2 * FP32_BYTES * max(size.tensors)  # a tensor that is written, and parts of one that are sent
    return max(step, held - gradients + copy + merged + travelling)


def checkpoint_memory(size: ModelSize, train: Training, world: int) -> int:
    """The copy of a worker's part of a checkpoint: the optimizer's state with its masters; below stage 3 the weights
    that are trained, too.
    """
    trained, stage = sum(size.trained), train.zero_stage
    shard = -(-trained // world)
    if stage == 0:
        return (FP32_BYTES + ADAM_BYTES) * trained
    number = HALF_BYTES if train.computes_in_half else FP32_BYTES
    return number * (trained if stage < 3 else 0) + (FP32_BYTES + ADAM_BYTES) * shard
