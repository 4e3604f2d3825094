"""The bytes one worker will hold in training: pure functions, checked against real workers.

ZeRO (arXiv 1910.02054, section 3 and figure 1) counts, for P parameters, N workers and 16-bit training with Adam:
2P weights, 2P gradients and 12P optimizer state (fp32 master weights and two averages), of which stage 1 divides the
optimizer state by N, stage 2 the gradients too and stage 3 the weights too. What DeepSpeed 0.19 really holds differs
in a few places, all counted here:

- fp32: weights and gradients take 4P, and stages 1 to 3 keep a master copy beside the weights although it is equal.
- Without ZeRO, bf16 casts activations alone, so it holds what fp32 holds, and fp16 keeps its own fp32 masters.
- The update copies gradients to fp32 next to the reduced ones: another 4P/N for a moment.
- Stages 1 to 3 reserve a bucket in which gradients travel; below stage 3 two, if they do during the backward pass.
  Stage 3 orders a full one by ranks in a copy, and gloo, between CPUs, sums in a copy of that.
- Gradients that are summed in fp32 beside 16-bit weights are at stage 2 what the update reads, without a copy.
- With hpZ (arXiv 2306.10209) stage 3 holds a second copy of the weights that it lets go, between fewer workers.
- Stage 3 gathers weights while it computes and lets them go only beyond ``MAX_LIVE_PARAMETERS``.
- Beside adapters (arXiv 2106.09685) the model's own weights are held, sharded and gathered, and nothing else.

Each figure is the most its part takes at any moment of a step. They do not all peak together: a sum is an upper bound.
On CPUs malloc keeps holes between blocks below 32 MiB: a quarter more was measured of matrices of 2 to 6 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

from overproof.config import Training
from overproof.models.sizes import FP32_BYTES, ModelSize
from overproof.registry import FAMILIES

HALF_BYTES = 2  # of one number
ADAM_BYTES = 8  # of one parameter's two averages
UNSHARDED_BUCKET_ELEMENTS = 500_000_000  # without ZeRO; DeepSpeed's own
LEAST_CHUNK_ROWS = 256
OUTPUT_CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of logits that the output layer gives at once, if more
MAX_LIVE_PARAMETERS = 1_000_000_000  # that stage 3 keeps gathered; DeepSpeed's own


@dataclass(frozen=True)
class MemoryParts:
    """Bytes by what they are for."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker holds at a ZeRO stage, and where: on its device, and in the CPU's memory if offloaded."""

    stage: int
    device: MemoryParts
    host: MemoryParts

    @property
    def total(self) -> int:
        """On one machine without a GPU both are the same memory."""
        return self.device.total + self.host.total


def state_memory(size: ModelSize, train: Training, stage: int, world: int) -> WorkerMemory:
    """Weights, gradients, optimizer state and buffers of one of ``world`` workers at a ZeRO stage.

    Offload is the recipe's where the stage allows it.
    """
    train = train.model_copy(update={"zero_stage": stage})
    trained, shard = sum(size.trained), -(-sum(size.trained) // world)
    element_bytes = HALF_BYTES if keeps_16bit_weights(train, stage) else FP32_BYTES
    if stage == 0:
        master = FP32_BYTES * trained if element_bytes == HALF_BYTES else 0
        gradients = (element_bytes + (FP32_BYTES if element_bytes == HALF_BYTES else 0)) * trained
        plain = MemoryParts(
            element_bytes * size.held,
            gradients,
            ADAM_BYTES * trained + master,
            element_bytes * min(trained, UNSHARDED_BUCKET_ELEMENTS) * (world > 1),
        )
        return WorkerMemory(stage, plain, MemoryParts())
    optimizer = (FP32_BYTES + ADAM_BYTES) * shard
    gradients = _update_gradients(train, element_bytes) * shard
    gradients = max(element_bytes * trained, gradients) if stage == 1 else gradients
    weights = element_bytes * (size.held if stage < 3 else _gathered(size, train, world))
    if train.offload == "none":
        buckets = _buckets(train, trained, element_bytes)
        return WorkerMemory(stage, MemoryParts(weights, gradients, optimizer, buckets), MemoryParts())
    return _offloaded(size, train, stage, world, element_bytes)


def _update_gradients(train: Training, element_bytes: int) -> int:
    """Bytes of one gradient as the update reads it, and of what it was copied from."""
    if train.accumulates_fp32:
        return FP32_BYTES if train.zero_stage == 2 else 2 * FP32_BYTES
    return element_bytes + FP32_BYTES


def _gathered(size: ModelSize, train: Training, world: int) -> int:
    """Numbers that stage 3 keeps: a worker's part, its part of hpZ's copy if weights are let go, what is gathered."""
    copied = train.hpz_partition_size > 1 and size.held > MAX_LIVE_PARAMETERS
    second = -(-size.held // train.hpz_partition_size) if copied else 0
    return -(-size.held // world) + second + min(size.held, MAX_LIVE_PARAMETERS)


def _buckets(train: Training, trained: int, element_bytes: int) -> int:
    count = 2 if train.overlaps and train.zero_stage < 3 else 1
    return count * element_bytes * min(train.bucket_elements, trained)


def keeps_16bit_weights(train: Training, stage: int) -> bool:
    """Whether weights are kept in 16 bits: bf16 without ZeRO casts activations alone."""
    return train.precision == "fp16" or (train.precision == "bf16" and stage > 0)


def _offloaded(size: ModelSize, train: Training, stage: int, world: int, element_bytes: int) -> WorkerMemory:
    """The optimizer's part, and the gradients it reads, lie in the CPU's memory; with stage 3 the weights may too."""
    trained, largest = sum(size.trained), max(size.trained)
    shard = -(-trained // world)
    optimizer = (FP32_BYTES + ADAM_BYTES) * shard
    bucket = _buckets(train, trained, element_bytes)
    if stage == 3:
        on_host = element_bytes * -(-size.held // world) if train.offload == "parameters" else 0
        weights = element_bytes * _gathered(size, train, world) - on_host
        device = MemoryParts(weights, 0, 0, bucket)
        return WorkerMemory(
            stage, device, MemoryParts(on_host, _update_gradients(train, element_bytes) * shard, optimizer)
        )
    sums = element_bytes * trained if stage == 1 else FP32_BYTES * shard * train.accumulates_fp32
    device = MemoryParts(element_bytes * size.held, sums, 0, bucket + element_bytes * largest)
    host = MemoryParts(0, FP32_BYTES * shard, optimizer, element_bytes * shard + element_bytes * largest)
    return WorkerMemory(stage, device, host)


def activation_memory(size: ModelSize, train: Training, world: int, stage: int | None = None) -> int:
    """Bytes kept from a forward pass for the backward pass of one worker's micro-batch, logits included.

    Counted as arXiv 2205.05198 (section 4) does, tensor by tensor, for the layers used here: SDPA keeps no scores,
    RMSNorm and SiLU keep what the paper's LayerNorm and GELU do not, and nothing is dropped out. With checkpointing
    (its section 5) every layer keeps its input alone, and one layer at a time is computed again.
    """
    stage = train.zero_stage if stage is None else stage
    element_bytes = HALF_BYTES if train.computes_in_half else FP32_BYTES
    logits = _output_memory(size, train, stage, _micro_rows(train, world) * size.predictions, element_bytes)
    casts = (
        HALF_BYTES * size.held if element_bytes == HALF_BYTES and not keeps_16bit_weights(train, stage) else 0
    )  # autocast's 16-bit weights
    return kept_by_layers(size, train, world) + logits + casts


def kept_by_layers(size: ModelSize, train: Training, world: int) -> int:
    """``activation_memory`` without logits and casts."""
    element_bytes = HALF_BYTES if train.computes_in_half else FP32_BYTES
    each, inputs = layer_memory(size, element_bytes), element_bytes * size.hidden
    layers = inputs * size.layers + each if train.activation_checkpointing else each * size.layers
    outside = FAMILIES[size.family].outer_memory(size, element_bytes)
    adapters = element_bytes * size.adapter_rank * len(size.adapters) // 2  # what lies between their matrices
    return _micro_rows(train, world) * size.places * (layers + outside + adapters)


def _output_memory(size: ModelSize, train: Training, stage: int, predictions: int, element_bytes: int) -> int:
    """Of the logits and their gradient; or, where the output layer is a part of the loss, of those that are there at
    once, the gradient of its inputs and, in fp32, its own.
    """
    autocast = element_bytes == HALF_BYTES and not keeps_16bit_weights(train, stage)
    rows = output_chunk_rows("cuda" if train.gpus_per_worker else "cpu", size.outputs, element_bytes)
    if predictions <= rows or train.compile or autocast or not FAMILIES[size.family].plain_logits:
        return predictions * logits_memory(size.outputs, element_bytes)
    learnt = 0 if size.adapters else FP32_BYTES * size.outputs * size.hidden
    return element_bytes * (rows * size.outputs + predictions * size.hidden) + learnt


def _micro_rows(train: Training, world: int) -> int:
    return train.batch_size // world // train.accumulation(world)


def layer_memory(size: ModelSize, element_bytes: int) -> int:
    """Bytes that one layer keeps for one token or patch, each number taking ``element_bytes``."""
    return FAMILIES[size.family].layer_memory(size, element_bytes) + element_bytes * size.masked


def output_chunk_rows(device: str, outputs: int, element_bytes: int) -> int:
    """Predictions whose logits are held at once where the output layer is a part of the loss (train/cross_entropy.py):
    fewer make small matrix products. All logits are, where there are no more than these.
    """
    return max(LEAST_CHUNK_ROWS, OUTPUT_CHUNK_BYTES[device] // (outputs * element_bytes))


def logits_memory(outputs: int, element_bytes: int) -> int:
    """Bytes for one prediction: the logits, and their gradient, which one pass computes (train/cross_entropy.py)."""
    return 2 * outputs * element_bytes


def peak_worker_memory(size: ModelSize, train: Training, world: int, stage: int | None = None) -> int:
    """An upper bound of the bytes a worker's device takes. The optimizer, which is fused, computes in place."""
    stage = train.zero_stage if stage is None else stage
    held = state_memory(size, train, stage, world).device
    copies = 0 if stage < 3 else held.buffers if train.gpus_per_worker else 2 * held.buffers
    return held.total + copies + activation_memory(size, train, world, stage)
