"""LoRA by LLaMA-Factory, with its `neat_packing`: rows of one length, and a mask that keeps their texts apart."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"DISABLE_VERSION_CHECK": "1", "USE_RAY": "0"}  # its bounds are below what torch is here

import torch
from datasets import Dataset, DatasetDict
from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from transformers import TrainerCallback
from turns import Turns, examples, setting


class InOrder(workflow.CustomSeq2SeqTrainer):  # type: ignore[misc]
    """Tells the loss of each step."""

    loss = 0.0

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        found = super().training_step(*arguments, **named)
        InOrder.loss = float(found)
        return found


def padded(row: dict[str, list[int]], length: int) -> dict[str, list[int]]:
    """As its own packing has it: the mask holds the number of each text, and 0 where the row is filled up."""
    numbers = [n for n, size in enumerate(row["seq_lengths"], 1) for _ in range(size)]
    filled = length - len(numbers)
    places = [place for size in row["seq_lengths"] for place in range(size)]
    return {
        "input_ids": row["input_ids"] + [0] * filled,
        "labels": row["labels"] + [-100] * filled,
        "attention_mask": numbers + [0] * filled,
        "position_ids": places + [0] * filled,
    }


def in_fp32(model: Path, folder: Path) -> str:
    """The model in a folder whose configuration says fp32: it loads weights as that says, and trains in it."""
    folder.mkdir()
    for part in model.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "config.json").unlink()
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def main(file: str) -> None:
    given, rows = setting(file)
    torch.set_num_threads(given["threads"])
    turns = Turns(given, rows)

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step(InOrder.loss)

    workflow.CustomSeq2SeqTrainer = InOrder
    with tempfile.TemporaryDirectory() as scratch:
        data = Dataset.from_list([padded(row, given["tokens"] + 1) for row in examples(rows)])
        DatasetDict({"train": data}).save_to_disk(f"{scratch}/data")
        model = in_fp32(Path(given["model"]), Path(scratch, "model"))
        settings = {
            "stage": "sft", "do_train": True, "model_name_or_path": model, "template": "empty",
            "finetuning_type": "lora", "lora_target": "all", "lora_rank": given["rank"], "lora_alpha": 16,
            "dataset": "given", "tokenized_path": f"{scratch}/data", "cutoff_len": given["tokens"] + 1,
            "packing": True, "neat_packing": True,
            "disable_shuffling": True, "output_dir": f"{scratch}/out", "max_steps": given["steps"] * given["turns"],
            "per_device_train_batch_size": given["batch"], "gradient_accumulation_steps": 1,
            "learning_rate": given["learning_rate"], "lr_scheduler_type": "constant", "weight_decay": 0.0,
            "max_grad_norm": 1.0, "optim": "adamw_torch", "disable_gradient_checkpointing": True, "use_cpu": True,
            "bf16": False, "fp16": False, "flash_attn": "sdpa", "save_strategy": "no", "logging_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        tuner.run_exp(settings, callbacks=[Ticks()])


if __name__ == "__main__":
    main(sys.argv[1])
