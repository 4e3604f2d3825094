"""Ranks of a real process group that train and count the bytes of every tensor they hold.

Run by test_memory.py: python memory_ranks.py FOLDER WORLD CASES
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from forked import load_cpu_adam, run_groups
from torch import Tensor

from overproof.config import Lora, Train
from overproof.data.manifest import Manifest
from overproof.models.adapters import add_adapters
from overproof.models.hf_directory import build_model
from overproof.registry import TASKS
from overproof.train.checkpoint_writer import TensorCopies
from overproof.train.deepspeed_engine import DeepSpeedEngine
from overproof.train.objective import CrossEntropy

STEPS = 2  # Adam's averages exist after the first
GRADIENTS = ("averaged_gradients", "grad_partitions_flat_buffer", "offload_gradient_dict")
MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups", "fp32_groups_flat")
BUFFERS = (
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "temp_grad_buffer_for_cpu_offload",
    "temp_grad_buffer_for_gpu_offload",
)


def flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from flat(each)


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by address; two views of one storage count once."""
    found = (tensor.untyped_storage() for tensor in flat(tensors) if not tensor.is_meta)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.data_ptr()}


def held(engine: DeepSpeedEngine) -> dict[str, dict[int, int]]:
    """Bytes by address of each kind now; a storage belongs to the first kind that owns it."""
    optimizer, module = engine.engine.optimizer, engine.engine.module
    attributes = vars(optimizer)
    parameters = list(module.parameters())
    shards = [getattr(p, name) for p in parameters for name in ("ds_tensor", "ds_secondary_tensor") if hasattr(p, name)]
    masters = [attributes[name] for name in MASTERS if name in attributes]
    buckets = [bucket.buffer for bucket in attributes.get("ipg_buckets", {}).values()]
    kinds = {
        "weights": [parameters, shards],
        "buffers": [buckets, [attributes.get(name) for name in BUFFERS]],
        "optimizer": [masters, [dict(state) for state in getattr(optimizer, "optimizer", optimizer).state.values()]],
        "gradients": [
            [p.grad for p in parameters if p.grad is not None],
            [master.grad for master in flat(masters) if master.grad is not None],
            [attributes.get(name) for name in GRADIENTS],
        ],
    }
    seen = set[int]()
    found = {}
    for kind, tensors in kinds.items():
        found[kind] = {address: size for address, size in storages(tensors).items() if address not in seen}
        seen |= set(found[kind])
    return found


def live() -> list[Tensor]:
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def measure(train: Train, manifest: Manifest, before: int, lora: Lora | None) -> dict[str, Any]:
    """The most bytes of each kind over the moments of a step, and all tensors after it."""
    model = build_model(train.model, manifest, 0)  # type: ignore[arg-type]
    if lora is not None:
        add_adapters(model, lora, 0)
    engine = DeepSpeedEngine(model, train)
    inner = getattr(engine.engine.optimizer, "optimizer", engine.engine.optimizer)
    largest: dict[str, int] = {}

    def look(*_: Any) -> None:
        for kind, sizes in held(engine).items():
            largest[kind] = max(sum(sizes.values()), largest.get(kind, 0))

    class Objective(CrossEntropy):
        def loss(self, model: Any, batch: Any) -> Any:
            found = super().loss(model, batch)
            look()
            return found

    def travelling(flat_gradients: Tensor, parts: Any) -> Any:  # without ZeRO gradients travel as one copy
        largest["buffers"] = max(largest.get("buffers", 0), flat_gradients.untyped_storage().nbytes())
        return unflatten(flat_gradients, parts)

    unflatten, engine.engine.unflatten = engine.engine.unflatten, travelling
    if train.zero_stage < 3:  # the last gradient of a backward pass; stage 3 has its own hooks there
        first = next(weight for weight in engine.engine.module.parameters() if weight.requires_grad)
        first.register_post_accumulate_grad_hook(look)
    layer = next(m for m in engine.engine.module.modules() if type(m).__name__.endswith("DecoderLayer"))
    layer.register_full_backward_hook(look)
    engine_step, inner_step = engine.engine.step, inner.step

    def step(*args: Any, **kwargs: Any) -> Any:
        look()
        return engine_step(*args, **kwargs)

    def update(*args: Any, **kwargs: Any) -> Any:
        look()
        return inner_step(*args, **kwargs)

    engine.engine.step = step
    rows = train.batch_size // train.most
    for number in range(STEPS):
        if number == STEPS - 1:
            inner.step = update
        tokens = torch.randint(0, manifest.outputs, (rows, manifest.positions + 1))
        engine.step(
            Objective(TASKS[manifest.task].predict),
            {"tokens": tokens, "length": torch.full((rows,), manifest.positions)},
        )
    look()
    claimed = {address: size for sizes in held(engine).values() for address, size in sizes.items()}
    every = sum((storages(live()) | claimed).values())
    found = {"parts": largest, "unclaimed": every - sum(claimed.values()) - before}
    found["checkpoint"] = checkpoint_bytes(engine, lora)
    engine.engine.destroy()
    return found


def checkpoint_bytes(engine: DeepSpeedEngine, lora: Lora | None) -> int:
    """Of the copy that a checkpoint is written from."""
    engine.train = engine.train.model_copy(update={"lora": lora})
    copies, state = TensorCopies(), list[Any]()
    engine.save(lambda name, value: state.append(copies.copy(name, value)))
    return sum(storages(state).values())


def measure_cases(folder: Path, rank: int, world: int, cases: list[dict[str, Any]]) -> None:
    del world
    manifest = Manifest.model_validate(cases[0]["manifest"])
    for case in cases:
        gc.collect()
        lora = Lora.model_validate(case["lora"]) if case["lora"] else None
        found = measure(Train.model_validate(case["train"]), manifest, sum(storages(live()).values()), lora)
        (folder / f"{case['name']}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    load_cpu_adam()
    run_groups(measure_cases, {int(sys.argv[2]): (Path(sys.argv[1]), json.loads(sys.argv[3]))})
