"""LoRA by TRL's SFTTrainer, without padding: the texts of a batch in one row, kept apart by their positions."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from turns import Turns, examples, setting


class InOrder(SFTTrainer):  # type: ignore[misc]
    """Rows come as they were given; tells the loss of each step."""

    loss = 0.0

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        found = super().training_step(*arguments, **named)
        self.loss = float(found)
        return found


def main(file: str) -> None:
    given, rows = setting(file)
    torch.set_num_threads(given["threads"])
    turns = Turns(given, rows)
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    adapters = LoraConfig(r=given["rank"], lora_alpha=16.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch, max_steps=given["steps"] * given["turns"], per_device_train_batch_size=given["batch"],
            learning_rate=given["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            optim="adamw_torch", use_cpu=True, bf16=False, gradient_checkpointing=False, padding_free=True,
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip

        class Ticks(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turns.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.step(trainer.loss)

        trainer = InOrder(
            model, args=settings, train_dataset=Dataset.from_list(examples(rows)), peft_config=adapters,
            processing_class=AutoTokenizer.from_pretrained(given["model"]), callbacks=[Ticks()],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
