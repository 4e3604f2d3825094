"""Students trained by TRL's GKDTrainer off-policy: the teacher runs at every step; forward KL over all outputs.

    gkd.py SETTING.json

SETTING.json: {teacher, prepared, tokenizer, train: Sweep, seed, threads, students: {folder of the start: folder of the
result}}. Rows, order, batch, schedule, optimizer and starting weights are those of the product. Prints JSON: CPU
seconds of imports and loading, and of each training.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from overproof.config import Sweep
from overproof.data.parquet_reader import planned_shards
from overproof.models.hf_directory import load_model
from overproof.train.optim import ADAM_EPSILON, learning_rate, parameter_groups

IGNORED = -100


class InOrder(GKDTrainer):  # type: ignore[misc]
    """Rows come as they were planned; optimizer and schedule are handed in."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The first token is the prompt, and every other is a target."""
    tokens = torch.tensor([row["input_ids"] for row in rows])
    labels = tokens.clone()
    labels[:, 0] = IGNORED
    ones = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": ones, "labels": labels,
            "prompts": tokens[:, :1], "prompt_attention_mask": ones[:, :1]}  # fmt: skip


def rows(prepared: Path, settings: Sweep, seed: int) -> Dataset:
    shards = planned_shards(prepared)
    order = shards.manifest.order(seed).rows_at(0, settings.steps * settings.batch_size)
    return Dataset.from_dict({"input_ids": shards.take(order)["tokens"].tolist()})


def train(start: str, teacher: Any, tokenizer: Any, data: Dataset, settings: Sweep, scratch: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.config.use_cache = teacher.config.use_cache = False
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=1.0, betas=(settings.beta1, settings.beta2), eps=ADAM_EPSILON
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(settings, step))
    given = GKDConfig(
        output_dir=scratch,
        lmbda=0.0,  # rows of the data alone
        beta=0.0,  # forward KL
        seq_kd=False,
        temperature=1.0,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        max_grad_norm=settings.clip_norm,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
    )
    InOrder(
        model,
        teacher_model=teacher,
        args=given,
        data_collator=collate,
        train_dataset=data,
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    ).train()
    return model


def main(file: Path) -> None:
    setting = json.loads(file.read_text())
    torch.set_num_threads(setting["threads"])
    settings = Sweep.model_validate(setting["train"])
    teacher = load_model(Path(setting["teacher"]))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(setting["teacher"])
    tokenizer.pad_token = tokenizer.eos_token
    start_s, trained_s = time.process_time(), []
    for start, out in setting["students"].items():
        began = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            data = rows(Path(setting["prepared"]), settings, setting["seed"])
            model = train(start, teacher, tokenizer, data, settings, scratch)
        trained_s.append(time.process_time() - began)
        model.save_pretrained(out)
    print("\n" + json.dumps({"start_s": start_s, "trained_s": trained_s}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
