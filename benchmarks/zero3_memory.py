"""What a rank holds in memory at ZeRO stage 3, from drawing or reading a model to writing it, beside the formulas.

    .venv/bin/python benchmarks/zero3_memory.py [--ranks 2 4] [--layers 16] [--hidden 768] [--vocabulary 16384]
        [--bucket 500000000] [--mapped] [--json]

Prints one Markdown table, in MB: of every phase the most anonymous memory (RssAnon of /proc/PID/status, looked at every
5 ms from outside) of any rank, without what it held before, and what models/zero_memory.py and models/stage_memory.py
say. The ranks are processes of this machine, over gloo, in fp32 on one thread each; 137 million parameters by default.
`whole` is what every rank would hold of the weights if it built all of the model. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measuring import machine, say, table
from stage_memory import anonymous, multiply

from overproof.artifacts import Artifact, Store
from overproof.config import CheckpointPolicy, Pretrained, Train
from overproof.data.manifest import MANIFEST, Manifest, Split, shard_schema
from overproof.data.parquet_writer import write_shard
from overproof.data.token_parts import text_columns
from overproof.models import zero_memory
from overproof.models.base import shape_of
from overproof.models.llama import Llama
from overproof.models.sizes import FP32_BYTES, ModelSize, model_size
from overproof.models.stage_memory import checkpoint_memory
from overproof.stage_context import no_progress
from overproof.train import deepspeed_engine, heap
from overproof.train.checkpoint import Checkpoints
from overproof.train.checkpoint_writer import NoSignal
from overproof.train.heap import mapped_blocks
from overproof.train.metrics import ThroughputMeter
from overproof.train.rank_files import newest_sound_together
from overproof.train.rank_trainer import RankTrainer, read_rank_rows
from overproof.train.train_job import ResumePoint, SupervisedSpec, TrainJob

LENGTH, ROWS, STEPS = 16, 32, 2
LIVE = 20_000_000  # parameters that stage 3 keeps gathered here, of DeepSpeed's billion: or it would keep this model
SAMPLE_S = 0.005
PHASES = ("start", "built", "read", "trained", "written", "restored")


def prepared(store: Store, vocabulary: int) -> Artifact:
    """Rows of counting."""
    draft = store.new_writer("counting", "prepare", "a" * 64, {}, {})
    columns, splits = text_columns(LENGTH, vocabulary), {}
    with draft.directory() as root:
        for split in ("train", "validation", "test"):
            tokens_BS = (np.arange(ROWS)[:, None] + np.arange(LENGTH + 1)).astype(np.int32)
            values = {
                "sample_id": np.arange(ROWS),
                "document": np.full(ROWS, 0 if split != "train" else -1, np.int32),
                "tokens": tokens_BS,
                "length": np.full(ROWS, LENGTH, np.int32),
            }
            shard = write_shard(str(root), f"{split}/00000.parquet", values, shard_schema(columns), 8, ROWS * LENGTH)
            splits[split] = Split(shards=(shard,), rows=ROWS, predictions=ROWS * LENGTH, documents=1)
        manifest = Manifest(splits=splits, rows_per_group=8, task="language_modeling", columns=columns,
                            positions=LENGTH, outputs=vocabulary)  # fmt: skip
        (root / MANIFEST).write_text(manifest.model_dump_json())
        (root / "tokenizer.json").write_text("{}")
    return draft.commit({}, 0.0)


def job_of(store: Store, data: Artifact, model: Any, world: int, bucket: int) -> TrainJob:
    train = Train(model=model, steps=STEPS, batch_size=world, learning_rate=1e-4, workers=world, zero_stage=3,
                  bucket_elements=bucket, validate_every=STEPS, validation_rows=world,
                  checkpoint=CheckpointPolicy(every_steps=1))  # fmt: skip
    draft = store.new_writer(f"ranks-{world}", "train", "b" * 64, {}, {})
    checkpoints = Checkpoints(draft.workspace, draft.fingerprint, draft.config, draft.parents, train.checkpoint)
    checkpoints.claim_folder()
    return TrainJob(train, 0, data, draft, checkpoints, no_progress, SupervisedSpec(train.model))


def keep_less_gathered() -> None:
    """Have DeepSpeed let go of what it gathers beyond ``LIVE``."""
    original = deepspeed_engine.deepspeed_config

    def config(*arguments: Any) -> dict[str, Any]:
        found = original(*arguments)
        found["zero_optimization"] |= {
            "stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE, "stage3_prefetch_bucket_size": 0,
        }  # fmt: skip
        return found

    deepspeed_engine.deepspeed_config = config


@contextmanager
def group(rank: int, world: int, rendezvous: Path) -> Iterator[None]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    multiply()
    yield
    dist.destroy_process_group()


def train_rank(
    is_mapped: bool, job: TrainJob, rank: int, world: int, rendezvous: Path, enter: Callable[[str], None]
) -> None:
    """A rank from the first step to the model's directory."""
    if is_mapped:
        heap.HIGHEST_BYTES = heap.MAPPED_BYTES
    with group(rank, world, rendezvous):
        keep_less_gathered()
        enter("start")
        enter("built")
        resume = ResumePoint(attempt="0" * 8)
        with mapped_blocks(), deepspeed_engine.sharded_construction(job.train, world, job.spec.sharding):
            built = job.spec.model(Manifest.read(job.prepared), job.seed)
        enter("trained")
        del built
        trainer = RankTrainer(job, resume, rank, world)
        meter = ThroughputMeter(job, trainer.manifest, world)
        trainer.train(read_rank_rows(job, resume, rank, world), NoSignal(), meter, ())
        enter("written")
        trainer.write_model("model")


def resume_rank(job: TrainJob, rank: int, world: int, rendezvous: Path, enter: Callable[[str], None]) -> None:
    """A rank that reads a directory, and one that goes on from a checkpoint."""
    with group(rank, world, rendezvous):
        keep_less_gathered()
        enter("start")
        enter("read")
        read = SupervisedSpec(Pretrained(path=f"{job.draft.uri}/model"))
        with mapped_blocks(), deepspeed_engine.sharded_construction(job.train, world, read.sharding):
            model = read.model(Manifest.read(job.prepared), job.seed)
        enter("restored")
        del model
        checkpoint = newest_sound_together(job.checkpoints, no_progress)
        assert checkpoint
        RankTrainer(job, ResumePoint(checkpoint), rank, world)


def measure(work: Callable[..., None], job: TrainJob, world: int, rendezvous: Path) -> dict[str, int]:
    """The most bytes of any rank in each phase, beside what it held at the start."""
    context = multiprocessing.get_context("fork")
    phases = context.Array("i", world)

    def run(rank: int) -> None:
        work(job, rank, world, rendezvous, lambda phase: phases.__setitem__(rank, PHASES.index(phase)))

    ranks = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    peaks = [dict[str, int]() for _ in ranks]
    while any(process.is_alive() for process in ranks):
        for process, number, peak in zip(ranks, phases[:], peaks, strict=True):
            name = PHASES[number]
            peak[name] = max(peak.get(name, 0), anonymous(process.pid))
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.kill()
            raise SystemExit(f"ranks ended with {[process.exitcode for process in ranks]}")
        time.sleep(SAMPLE_S)
    return {name: max(peak.get(name, 0) - peak["start"] for peak in peaks) for name in peaks[0] if name != "start"}


def formulas(size: ModelSize, train: Train, world: int) -> dict[str, int]:
    """What the package says of each phase."""
    zero_memory.MAX_LIVE_PARAMETERS = LIVE
    shard, tensor = FP32_BYTES * -(-size.held // world), FP32_BYTES * max(size.tensors)
    held = zero_memory.state_memory(size, train, 3, world)
    copy = checkpoint_memory(size, train, world)
    return {
        "built": shard + 2 * tensor,
        "read": shard + 2 * tensor,
        "trained": zero_memory.peak_worker_memory(size, train, world) + copy,
        "written": held.total + copy + 2 * tensor,
        "restored": held.total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--bucket", type=int, default=500_000_000, help="bucket_elements of the training")
    parser.add_argument(
        "--mapped",
        action="store_true",
        help="train with every block mapped by itself: without the holes that malloc keeps",
    )
    parser.add_argument("--json", action="store_true", help="print the bytes instead")
    given = parser.parse_args()
    heads = given.hidden // 64
    llama = Llama(hidden_size=given.hidden, intermediate_size=8 * given.hidden // 3 // 32 * 32, layers=given.layers,
                  heads=heads, kv_heads=heads)  # fmt: skip
    deepspeed_engine.import_deepspeed("cpu")
    rows, found = [], []
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(f"{scratch}/store")
        data = prepared(store, given.vocabulary)
        size = model_size(llama, shape_of(Manifest.read(data)))
        for world in given.ranks:
            job = job_of(store, data, llama, world, given.bucket)
            measured = measure(partial(train_rank, given.mapped), job, world, Path(scratch, f"trained-{world}"))
            measured |= measure(resume_rank, job, world, Path(scratch, f"resumed-{world}"))
            said = formulas(size, job.train, world)
            whole = FP32_BYTES * size.held
            for phase in PHASES[1:]:
                values = (said[phase], measured[phase], whole)
                found.append({"ranks": world, "phase": phase, "said": values[0], "measured": values[1], "whole": whole})
                said_MB, measured_MB, whole_MB = (f"{value / 1e6:,.0f}" for value in values)
                ratio = f"{said[phase] / measured[phase]:.2f}"
                rows.append([str(world), phase, said_MB, measured_MB, ratio, whole_MB])
                say(f"{rows[-1]}")
    if given.json:
        print(json.dumps(found))
        return
    print(f"{machine(1)}; {size.parameters / 1e6:,.0f}M parameters\n")
    table(("ranks", "phase", "formula", "measured", "formula ÷ measured", "the weights whole"), rows)


if __name__ == "__main__":
    sys.exit(main())
