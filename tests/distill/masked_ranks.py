"""Ranks of a real process group: train a masked model under ZeRO, and go on from a checkpoint.

Run by test_masked_student.py, with tests/train among the modules: python masked_ranks.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import run_groups
from transformers import LlamaConfig, LlamaForCausalLM

from overproof.config import Masked, Train
from overproof.distill.masked_student import masked, sparse_matrices
from overproof.models.hf_directory import Batch
from overproof.registry import TASKS
from overproof.train.deepspeed_engine import DeepSpeedEngine
from overproof.train.objective import CrossEntropy
from overproof.train.zero_files import weight_parts

CASES: dict[str, dict[str, Any]] = {
    **{f"stage{stage}": {"zero_stage": stage} for stage in (2, 3)},
    "bf16": {"zero_stage": 3, "precision": "bf16", "activation_checkpointing": True, "micro_batch_size": 2},
}
STEPS = 3


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    )


def batch(step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {"tokens": torch.randint(0, 60, (4, 13), generator=generator), "length": torch.full((4,), 12)}


def train_cases(folder: Path, rank: int, world: int, given: Any) -> None:
    section = Masked(method="magnitude", pattern="2:4")
    start = sparse_matrices(section, model(), list, lambda *_: None)
    objective, found = CrossEntropy(TASKS["language_modeling"].predict), dict[str, list[int]]()
    for name, changes in CASES.items():
        settings = Train.model_validate(
            {"model": {"kind": "llama", "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2,
                       "kv_heads": 2},
             "steps": 2 * STEPS, "batch_size": 4 * world, "workers": world, "learning_rate": 3e-2,
             "weight_decay": 0.1, **changes}
        )  # fmt: skip
        for attempt in range(2):
            engine = DeepSpeedEngine(masked(model(), start), settings)
            if attempt:
                engine.load(folder / f"{name}-0", STEPS)
            for step in range(STEPS * attempt, STEPS * (1 + attempt)):
                engine.step(objective, batch(step, rank))()
            saved = folder / f"{name}-{attempt}"
            saved.mkdir(exist_ok=True)
            engine.save(lambda file, state, to=saved: torch.save(state, to / file))
            dist.barrier()
        weights = weight_parts(saved, range(world), world)
        zeros = {place: matrix.flatten() == 0 for place, matrix in start.items()}
        back = sum(int(weights[place][zero].count_nonzero()) for place, zero in zeros.items())
        stayed = sum(int((weights[place] == matrix.flatten())[~zeros[place]].sum()) for place, matrix in start.items())
        found[name] = [back, stayed]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_groups(train_cases, {2: (Path(sys.argv[1]), None)})
