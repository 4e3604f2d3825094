"""Ranks of real process groups, of one and of two: train every case given and write what they saw.

Run by test_engine.py: python engine_ranks.py FOLDER CASES
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from overproof.config import Train
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards
from overproof.errors import InputError
from overproof.models import zero_memory
from overproof.models.hf_directory import build_model, count_parameters, load_start, save_model, to_tensors
from overproof.models.safetensors_writer import TensorShape
from overproof.models.zero_parts import full_shape, model_parts
from overproof.registry import TASKS
from overproof.train import objective
from overproof.train.deepspeed_engine import CPU_ADAM, DeepSpeedEngine, sharded_construction
from overproof.train.engine import TorchEngine, TrainingEngine
from overproof.train.extension_lock import STALE_S
from overproof.train.loop import CurveRow, fit, shard_batches, validation_ids, validation_loss
from overproof.train.objective import CrossEntropy
from overproof.train.weights_writer import write_weights
from overproof.train.zero_files import weight_parts

SEED = 3
FILE_BYTES = 4000  # of the files that the ranks write: several waves of them


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


def train(engine: TrainingEngine, settings: Train, root: Path, rank: int, world: int) -> list[CurveRow]:
    """The rows ``fit`` reports; the global batches are the same at any world size."""
    manifest = Manifest.read(root)
    predict = TASKS[manifest.task].predict
    order, rows, held_out = (
        Order(manifest.groups, manifest.rows_per_group, SEED),
        Shards(root, "train"),
        Shards(root, "validation"),
    )
    batches = (
        to_tensors(rows.take(order.step_rows(step, settings.batch_size, rank, world))) for step in range(settings.steps)
    )
    parts = shard_batches(validation_ids(held_out.rows, settings.validation_rows), 4, rank, world)

    def validate() -> float:
        with engine.eval_mode() as model:
            batches = (to_tensors(held_out.take(part)) for part in parts)
            return validation_loss(model, predict, batches, engine.all_reduce)

    reported: list[CurveRow] = []
    fit(engine, CrossEntropy(predict), settings, batches, validate, reported.append)
    return reported


def read_in_parts(
    model: PreTrainedModel, settings: Train, folder: Path, manifest: Manifest, rank: int
) -> PreTrainedModel:
    """The same model out of a directory, taken apart as it is read."""
    if rank == 0:
        save_model(model, model.config, folder)
    dist.barrier()
    with sharded_construction(settings, dist.get_world_size(), "read"):
        return load_start(folder, manifest, SEED)


def draw_in_parts(
    model: PreTrainedModel, settings: Train, folder: Path, manifest: Manifest, rank: int
) -> PreTrainedModel:
    """The same model, drawn again and taken apart as it is drawn."""
    del model, folder, rank
    with sharded_construction(settings, dist.get_world_size(), "drawn"):
        return build_model(settings.model, manifest, SEED)  # type: ignore[arg-type]


def held(model: PreTrainedModel) -> int:
    """Numbers that a rank holds of a model that was taken apart."""
    return sum(p.numel() + p.ds_tensor.numel() for p in model.parameters())


def others(model: PreTrainedModel, whole: dict[str, torch.Tensor], rank: int) -> list[str]:
    """The weights of which the ranks' parts are not, to the last bit, these."""
    found: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, model_parts(model, rank))
    return [n for n, value in whole.items() if not torch.equal(torch.cat([p[n] for p in found]), value.flatten())]


def refusal(engine: DeepSpeedEngine, saved: Path, folder: Path, rank: int) -> str:
    """What is said of the same checkpoint once someone else has written files that run code; the good one is read."""
    engine.load(saved, engine.steps_done)
    forged = folder / f"forged-{saved.name}"
    if rank == 0:
        forged.mkdir()
        for file in saved.iterdir():
            torch.save({"module": Payload(folder / "ran")}, forged / file.name)
    dist.barrier()
    try:
        engine.load(forged, engine.steps_done)
    except InputError as error:
        return str(error)
    return ""


def said_before_a_lock(folder: Path, case: dict[str, Any]) -> str:
    """What an engine says that would compile where someone who was killed has left the lock."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    lock = folder / CPU_ADAM / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3 * STALE_S,) * 2)
    settings = Train.model_validate({**case["train"], "zero_stage": 2, "offload": "optimizer"})
    model = build_model(settings.model, Manifest.read(Path(case["root"])), SEED)  # type: ignore[arg-type]
    try:
        DeepSpeedEngine(model, settings, SEED)
    except InputError as error:
        return str(error)
    return ""


def train_cases(folder: Path, rank: int, world: int, cases: list[dict[str, Any]]) -> None:
    zero_memory.OUTPUT_CHUNK_BYTES["cpu"] = 1  # the least rows decide
    in_parts: list[str] = []  # by name, whose output layer was a part of the loss
    linear_cross_entropy = objective.linear_cross_entropy

    def noted(*given: Any) -> torch.Tensor:
        in_parts.append(case["name"])
        return linear_cross_entropy(*given)

    objective.linear_cross_entropy = noted
    compiler, parts, refused = {}, {}, {}
    for case in cases:
        settings = Train.model_validate(case["train"])
        root = Path(case["root"])
        manifest = Manifest.read(root)
        model = build_model(settings.model, manifest, SEED)  # type: ignore[arg-type]
        if settings.zero_stage == 3:
            whole, numbers = dict(model.state_dict()), count_parameters(model)
            make = read_in_parts if case["read"] else draw_in_parts
            model = make(model, settings, folder / "start", manifest, rank)
            parts[case["name"]] = [numbers, held(model), others(model, whole, rank)]
        zero_memory.LEAST_CHUNK_ROWS = case["output_rows"]
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = case["dropout"]
        zero = case["engine"] == "zero"
        engine = DeepSpeedEngine(model, settings, SEED) if zero else TorchEngine(model, settings)
        rows = train(engine, settings, root, rank, world)
        compiler[case["name"]] = "torch._dynamo.repro.after_dynamo" in sys.modules  # a part that any compiling needs
        if case["save"]:
            assert isinstance(engine, DeepSpeedEngine)
            saved = folder / case["name"]
            saved.mkdir(exist_ok=True)
            engine.save(lambda name, state, to=saved: torch.save(state, to / name))
            dist.barrier()
            refused[case["name"]] = refusal(engine, saved, folder, rank)
            names = {name: TensorShape(torch.float32, tuple(full_shape(p))) for name, p in model.named_parameters()}
            parts_of_rank = weight_parts(saved, range(rank, rank + 1), world)
            written = str(folder / f"{case['name']}-written")
            write_weights(parts_of_rank, names, written, engine.device, lambda *_: None, FILE_BYTES)
        if rank == 0:
            (folder / f"{case['name']}.json").write_text(json.dumps(rows))
            alone = isinstance(engine, TorchEngine)
            if alone or case["save"]:
                state = engine.model.state_dict() if alone else weight_parts(saved, range(world), world)
                torch.save(state, folder / f"{case['name']}.pt")
    if world == 1:
        (folder / "locked.json").write_text(json.dumps(said_before_a_lock(folder, cases[0])))
    (folder / f"parts.{rank}.json").write_text(json.dumps(parts))
    (folder / f"refused.{rank}.json").write_text(json.dumps(refused))
    (folder / f"in_parts.{rank}.json").write_text(json.dumps(sorted(set(in_parts))))
    (folder / f"compiler.{rank}.json").write_text(json.dumps(compiler))


if __name__ == "__main__":
    from forked import run_groups

    out, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    run_groups(train_cases, {int(world): (out / world, cases) for world, cases in given.items()})
