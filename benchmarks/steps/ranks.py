"""One of two ranks that train the same model in turn with our loop, a bare DeepSpeed loop and Hugging Face's Trainer.

    torchrun --nproc-per-node 2 ranks.py FOLDER ZERO_STAGE STEPS REPEATS WHO...

Rank 0 prints JSON: for each one of WHO, per repeat, the seconds of every step and of its CPU, when the first step was
over, and for ours the share of the time spent waiting for data. All use the same DeepSpeed settings, seed, rows and
threads; the peers' rows lie in memory as tensors, ours are read from the shards.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from overproof.config import Train
from overproof.data.manifest import Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards
from overproof.models.hf_directory import Batch, build_model, to_tensors
from overproof.registry import TASKS
from overproof.train.deepspeed_engine import DeepSpeedEngine
from overproof.train.loop import train_steps
from overproof.train.metrics import MetricsLogger
from overproof.train.objective import CrossEntropy
from overproof.train.optim import deepspeed_config, parameter_groups

SEED = 1
Block = Callable[[], dict[str, Any]]


class Clock:
    """Notes the end of each step."""

    def __init__(self) -> None:
        self.ends, self.cpu_s, self.first = [time.perf_counter()], time.process_time(), 0.0

    def __call__(self) -> None:
        self.ends.append(time.perf_counter())
        self.first = self.first or time.time()

    def found(self) -> dict[str, Any]:
        steps = [after - before for before, after in pairwise(self.ends)]
        return {"steps": steps, "cpu_s": (time.process_time() - self.cpu_s) / len(steps), "first": self.first}


def ours(root: Path, train: Train, steps: int) -> Block:
    """The product's engine, loop, reading and curve files (a validation costs nothing here)."""
    manifest = Manifest.read(root)
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = DeepSpeedEngine(build_model(train.model, manifest, SEED), train)  # type: ignore[arg-type]
    order, shards = Order(manifest.groups, manifest.rows_per_group, SEED), Shards(root, "train")
    waited = [0.0]

    def batches() -> Iterator[Batch]:
        planned = shards.steps(order, train.batch_size, 0, train.steps, rank, world)
        while True:
            began = time.perf_counter()
            batch = to_tensors(next(planned))
            waited[0] += time.perf_counter() - began
            yield batch

    objective = CrossEntropy(TASKS[manifest.task].predict)
    trained = train_steps(engine, objective, train, batches(), lambda: 0.0)
    curve = MetricsLogger(root / "curve.jsonl", root / "events") if rank == 0 else lambda _: None

    def block() -> dict[str, Any]:
        clock, waited[0] = Clock(), 0.0
        for row in islice((row for row in trained if "loss" in row), steps):
            curve(row)
            clock()
        return {**clock.found(), "waited": waited[0] / (clock.ends[-1] - clock.ends[0])}

    return block


def bare(root: Path, train: Train, steps: int) -> Block:
    """What one writes with DeepSpeed's tutorial at hand: no metrics, no schedule, no files."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # else a kernel that nobody uses is compiled first, for minutes
    engine, *_ = deepspeed.initialize(
        model=(model := build_model(train.model, Manifest.read(root), SEED)),  # type: ignore[arg-type]
        model_parameters=parameter_groups(model, train.weight_decay),  # the same optimizer's work
        config=peer_config(train),
        dist_init_required=False,
    )
    batches = in_memory(root, train, steps)

    def block() -> dict[str, Any]:
        clock = Clock()
        for batch in batches:
            tokens = batch["tokens"]
            logits = engine(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            clock()
        return clock.found()

    return block


def trainer(root: Path, train: Train, steps: int) -> Block:
    """Hugging Face's Trainer, told the same DeepSpeed settings; a new one for each block."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    manifest, world = Manifest.read(root), dist.get_world_size()
    batches = in_memory(root, train, steps)
    examples = [{"input_ids": r, "labels": r} for b in batches for r in b["tokens"][:, :-1]]
    # Trainer gives each rank its batches in turn: what one rank has, twice over, is as many steps for both.
    examples = [example for example in examples for _ in range(world)]
    accumulation = train.accumulation(world)
    settings = {
        "output_dir": str(root / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": train.batch_size // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.beta1,
        "adam_beta2": train.beta2,
        "max_grad_norm": train.clip_norm,
        "deepspeed": peer_config(train),
        "use_cpu": not torch.cuda.is_available(),
        "ddp_backend": dist.get_backend(),
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
    }

    def block() -> dict[str, Any]:
        clocks: list[Clock] = []

        class Ticks(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clocks.append(Clock())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clocks[0]()

        model = build_model(train.model, manifest, SEED)  # type: ignore[arg-type]
        AcceleratorState._reset_state()  # it refuses a second DeepSpeed training in one process otherwise
        Trainer(model, TrainingArguments(**settings), train_dataset=examples, callbacks=[Ticks()]).train()
        return clocks[0].found()

    return block


def peer_config(train: Train) -> dict[str, Any]:
    """Our settings; without ZeRO we clip outside DeepSpeed, which the peers leave to it."""
    return {**deepspeed_config(train, dist.get_world_size()), "gradient_clipping": train.clip_norm}


def in_memory(root: Path, train: Train, steps: int) -> list[Batch]:
    """This rank's tensors of the first steps."""
    manifest, rank, world = Manifest.read(root), dist.get_rank(), dist.get_world_size()
    order = Order(manifest.groups, manifest.rows_per_group, SEED)
    planned = Shards(root, "train").steps(order, train.batch_size, 0, steps, rank, world)
    return [to_tensors(columns) for columns in planned]


def main(folder: Path, stage: int, steps: int, repeats: int, names: list[str]) -> None:
    train = Train.model_validate_json((folder / "train.json").read_text())
    train = train.model_copy(update={"zero_stage": stage, "steps": repeats * steps})
    torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    makers = {"ours": ours, "bare": bare, "trainer": trainer}
    blocks = {name: makers[name](folder, train, steps) for name in names}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            dist.barrier()
            found[name].append(blocks[name]())
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
