"""Checkpoints: the pause of a save beside a synchronous one, and what becomes of damaged files.

    .venv/bin/python benchmarks/checkpoints.py [--repeats 5] [--damages 1000] [--width 512]

One rank trains a Llama of the given width. A synchronous save is the same save waited for: serialised, hashed,
written and committed before the next step. The two are interleaved. Prints two Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from overproof.config import CheckpointPolicy, Train
from overproof.data.manifest import Manifest, Split
from overproof.models.hf_directory import build_model, count_parameters
from overproof.models.llama import Llama
from overproof.registry import TASKS
from overproof.stage_context import TrainingResumed
from overproof.train.checkpoint import Checkpoints
from overproof.train.checkpoint_writer import AsyncCheckpointWriter
from overproof.train.deepspeed_engine import DeepSpeedEngine
from overproof.train.objective import CrossEntropy

VOCABULARY, LENGTH, ROWS = 2048, 64, 2
STEPS_BETWEEN = 4
KINDS = ("bit flipped", "cut short", "bytes zeroed", "grown", "deleted")


def manifest() -> Manifest:
    """What a model has to know of data."""
    split = Split(shards=(), rows=0, predictions=0, documents=0)
    return Manifest(task="language_modeling", columns=(), splits={"train": split}, rows_per_group=1, positions=LENGTH,
                    outputs=VOCABULARY)  # fmt: skip


def engine(width: int) -> DeepSpeedEngine:
    """One rank under ZeRO 2."""
    meeting = Path(tempfile.mkdtemp()) / "rendezvous"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    model = Llama(hidden_size=width, intermediate_size=3 * width, layers=6, heads=8, kv_heads=8)
    train = Train(model=model, steps=10_000, batch_size=ROWS, learning_rate=1e-4, workers=1, zero_stage=2)
    return DeepSpeedEngine(build_model(model, manifest(), 0), train)


def pauses(trained: DeepSpeedEngine, found: Checkpoints, repeats: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds the loop stood still, by kind; and of each step made meanwhile."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1))
    batch = {"tokens": tokens, "length": torch.full((ROWS,), LENGTH)}
    saver = AsyncCheckpointWriter(found, "bench000", 0, 1)
    taken: dict[str, list[float]] = {"overproof": [], "synchronous": []}
    steps: list[float] = []
    step = 0
    for _ in range(repeats + 1):  # the first of each kind warms up
        for kind, seconds in taken.items():
            for _ in range(STEPS_BETWEEN):
                began = time.monotonic()
                trained.step(CrossEntropy(TASKS["language_modeling"].predict), batch)
                steps.append(time.monotonic() - began)
            saver.wait()
            step += STEPS_BETWEEN
            began = time.monotonic()
            saver.save(step, None, trained.save, {})
            if kind == "synchronous":
                saver.wait()
            seconds.append(time.monotonic() - began)
    saver.wait()
    return {kind: seconds[1:] for kind, seconds in taken.items()}, steps


def damage(file: Path, kind: str, dice: random.Random) -> None:
    """Do one bad thing to a file."""
    content = bytearray(file.read_bytes())
    place = dice.randrange(len(content))
    match kind:
        case "bit flipped":
            content[place] ^= 1 << dice.randrange(8)
        case "cut short":
            del content[place:]
        case "bytes zeroed":
            content[place : place + 64] = bytes(byte ^ 0xFF for byte in content[place : place + 64])
        case "grown":
            content += dice.randbytes(1 + place % 64)
        case "deleted":
            file.unlink()
            return
    file.write_bytes(content)


def damages(found: Checkpoints, count: int, dice: random.Random) -> tuple[Counter[str], Counter[str]]:
    """How often each kind was tried, and caught: the checkpoint before was chosen, with a line that says so."""
    tried, caught = Counter[str](), Counter[str]()
    newest = found.all_committed()[-1]
    files = sorted(Path(newest.uri).iterdir())
    listed = [file for file in files if file.name in newest.files or file.name == "checkpoint.json"]
    for index in range(count):
        file, kind = dice.choice(listed), KINDS[index % len(KINDS)]
        before = file.read_bytes()
        damage(file, kind, dice)
        resumed: list[TrainingResumed] = []
        kept = found.newest_sound(resumed.append)
        tried[kind] += 1
        caught[kind] += bool(kept and kept.step < newest.step and len(resumed) == 1)
        file.write_bytes(before)
    return tried, caught


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trained = engine(options.width)
        found = Checkpoints(f"{folder}/work", "f" * 64, {}, {}, CheckpointPolicy(keep_last=2))
        found.claim_folder()
        taken, steps = pauses(trained, found, options.repeats)
        size = sum(entry.size_bytes for entry in found.all_committed()[-1].files.values())
        count = count_parameters(trained.engine.module)
        print(f"{count / 1e6:.1f}M parameters, {size / 1e6:.0f} MB a checkpoint, "
              f"median step {statistics.median(steps):.2f} s\n")  # fmt: skip
        print("| save | pause s, median | least | most | of a synchronous one |\n|---|---|---|---|---|")
        whole = statistics.median(taken["synchronous"])
        for kind, seconds in taken.items():
            middle = statistics.median(seconds)
            print(f"| {kind} | {middle:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {middle / whole:.1%} |")
    with tempfile.TemporaryDirectory() as folder:
        small = Checkpoints(f"{folder}/work", "f" * 64, {}, {}, CheckpointPolicy(keep_last=2))
        small.claim_folder()
        saver = AsyncCheckpointWriter(small, "bench000", 0, 1)
        for step in (1, 2):
            state = {"weights": torch.randn(20_000), "step": step}
            saver.save(step, None, lambda write, state=state: write("state.pt", state), {"curve.jsonl": b"{}\n" * 50})  # type: ignore[misc]
            saver.wait()
        tried, caught = damages(small, options.damages, random.Random(0))
    print("\n| damage to the newest checkpoint | tried | caught before reading |\n|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {tried[kind]} | {caught[kind]} |")
    print(f"| all | {tried.total()} | {caught.total()} |")


if __name__ == "__main__":
    main()
