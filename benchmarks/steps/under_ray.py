"""A training under Ray Train with two workers, on a cluster of its own.

    under_ray.py WHO FOLDER ZERO_STAGE STEPS

WHO is `ours` (the product's train stage) or `stock` (read_parquet, streaming_split, iter_torch_batches and a bare
DeepSpeed loop). Prints JSON: seconds of every step; and from when the process of rank 0 was up to its first batch and
to the end of its first step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.data import DataContext

from overproof.artifacts import Store
from overproof.config import Train, load_recipe
from overproof.data.manifest import Manifest
from overproof.stage_context import ProgressEvent, StageContext, TaskProgress

SEED = 1
LISTS = "lists"  # the rows as others would keep them, see rows.py
CPUS = 4
RECIPE = Path(__file__).parents[2] / "jobs" / "recipes" / "stdlib-lm.yaml"


class Notes:
    """A progress that writes down when each word came, and from which process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, event: ProgressEvent) -> None:
        if not isinstance(event, TaskProgress):
            return
        word = {"done": event.done, "at": time.time(), "pid": os.getpid(), "up": psutil.Process().create_time()}
        with self.file.open("a") as out:
            out.write(json.dumps(word) + "\n")


def ours(folder: Path, train: Train, scratch: Path) -> dict[str, Any]:
    from overproof.train import ray_trainer

    store = Store(str(scratch / "store"))
    draft = store.new_writer("bench", "prepare", "a" * 64, {}, {})
    with draft.directory() as root:
        shutil.copyfile(folder / "manifest.json", root / "manifest.json")
        for split in ("train", "validation"):
            shutil.copytree(folder / split, root / split, copy_function=os.link)
        (root / "tokenizer.json").write_text("{}")
    prepared = draft.commit({}, 0.0)
    recipe = load_recipe(RECIPE).model_copy(update={"train": train, "seed": SEED})
    own = store.new_writer("bench", "train", "b" * 64, {}, {})
    notes = Notes(scratch / "notes.jsonl")
    began = time.time()
    metrics = ray_trainer.train_teacher(StageContext(recipe, {"prepare": prepared}, own, notes))
    words = [json.loads(line) for line in notes.file.read_text().splitlines()]
    first = next(word for word in words if word["done"] == 1)
    curve = [json.loads(line) for line in (Path(own.uri) / "curve.jsonl").read_text().splitlines()]
    positions = train.batch_size * Manifest.read(folder).positions
    return {
        "steps": [positions / row["tokens_per_s"] for row in curve if "tokens_per_s" in row],
        "data_wait": metrics["data_wait"],
        "first_batch_s": metrics["first_batch_s"],
        "first_step_s": first["at"] - first["up"],
        "start_s": first["at"] - began,
    }


def stock_loop(settings: dict[str, Any]) -> None:
    began = time.monotonic()
    up = psutil.Process().create_time()
    context, train = ray.train.get_context(), Train.model_validate_json(settings["train"])
    rank, world = context.get_world_rank(), context.get_world_size()
    share = train.batch_size // world
    batches = ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=share, drop_last=True)
    arriving = iter(batches)
    head = next(arriving)
    first_batch_s = time.monotonic() - began
    import torch
    from torch.nn.functional import cross_entropy

    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    import deepspeed

    from overproof.models.hf_directory import build_model
    from overproof.train.optim import deepspeed_config

    deepspeed.ops.__compatible_ops__ = {}
    torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    model = build_model(train.model, Manifest.read(Path(settings["folder"])), SEED)  # type: ignore[arg-type]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=deepspeed_config(train, world),
        dist_init_required=False,
    )
    ends, first = [time.perf_counter()], 0.0
    for step in range(train.steps):
        tokens = (head if step == 0 else next(arriving))["tokens"].long().to(engine.device)
        logits = engine(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        ends.append(time.perf_counter())
        first = first or time.time()
    steps = [after - before for before, after in pairwise(ends)]
    if rank == 0:
        found = {"steps": steps, "first_batch_s": first_batch_s, "first_step_s": first - up}
        Path(settings["out"]).write_text(json.dumps({**found, "start_s": first - settings["began"]}))


def stock(folder: Path, train: Train, scratch: Path) -> dict[str, Any]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    out = scratch / "found.json"
    settings = {"train": train.model_dump_json(), "folder": str(folder), "out": str(out), "began": time.time()}
    TorchTrainer(
        stock_loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(num_workers=2, use_gpu=train.gpus_per_worker > 0),
        run_config=RunConfig(name="stock", storage_path=str(scratch / "ray")),
        datasets={"train": ray.data.read_parquet(str(folder / LISTS), shuffle="files").select_columns(["tokens"])},
    ).fit()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main(who: str, folder: Path, stage: int, steps: int) -> None:
    train = Train.model_validate_json((folder / "train.json").read_text())
    train = train.model_copy(
        update={"zero_stage": stage, "steps": steps, "validate_every": max(1, steps), "validation_rows": 8}
    )
    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=True, dashboard_port=0, log_to_driver=False,
        object_store_memory=512 << 20,
    )  # fmt: skip
    DataContext.get_current().enable_progress_bars = False
    makers = {"ours": ours, "stock": stock}
    with tempfile.TemporaryDirectory() as scratch:
        found = partial(makers[who], folder, train)(Path(scratch))
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]))
