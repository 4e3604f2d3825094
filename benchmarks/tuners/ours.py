"""LoRA by the product's engine and loop: one rank of DeepSpeed, as its train stage has it with one worker."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from turns import Turns, setting

from overproof.config import Lora, Train
from overproof.models.adapters import add_adapters
from overproof.models.hf_directory import Batch, load_model, to_tensors
from overproof.registry import TASKS
from overproof.train.deepspeed_engine import DeepSpeedEngine
from overproof.train.loop import train_steps
from overproof.train.objective import CrossEntropy

COLUMNS = ("tokens", "position", "answer", "scale")


def main(file: str) -> None:
    given, rows = setting(file)
    steps: int = given["steps"] * given["turns"]
    torch.set_num_threads(given["threads"])
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on a launcher's word
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        train = Train.model_validate({
            "model": {"kind": "pretrained", "path": given["model"]}, "lora": {"rank": given["rank"]}, "workers": 1,
            "steps": steps, "batch_size": given["batch"], "learning_rate": given["learning_rate"],
            "schedule": "constant", "weight_decay": 0.0, "validate_every": 10**9, "zero_stage": 1,
        })  # fmt: skip
        model = load_model(Path(given["model"]))
        add_adapters(model, Lora(rank=given["rank"]), seed=0)
        engine, turns = DeepSpeedEngine(model, train), Turns(given, rows)

        def batches() -> Iterator[Batch]:
            for step in range(steps):
                part = slice(step * given["batch"], (step + 1) * given["batch"])
                yield to_tensors({name: rows[name][part] for name in COLUMNS})

        turns.begin()
        objective: Any = CrossEntropy(TASKS["chat"].predict, TASKS["chat"].counted)
        for row in train_steps(engine, objective, train, batches(), lambda: 0.0):
            if "loss" in row:
                turns.step(row["loss"])
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
