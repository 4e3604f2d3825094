"""Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B) of the loop without Ray, on the CPU or on one GPU.

    .venv/bin/python benchmarks/mfu.py [--preset tiny|small|1b] [--micro-batch 8] [--accumulation 1] [--checkpointing]
                                       [--compile] [--stage 2] [--steps 10] [--repeats 5] [--threads 1] [--largest]

Prints one Markdown table. The peak is the best rate of a square matrix product in the same number format, with the
same threads, measured here between the blocks of steps. `--largest` looks for the largest Llama that ZeRO-Offload
(arXiv 2101.06840) trains on the card. The preset 1b is a Llama of 1.0 billion parameters at bf16, for a GPU. On two
cores `tiny` takes seconds and `small` about 3 minutes; on a GPU `1b` about 4 with `--accumulation 8 --repeats 3`, and
`--largest` up to 15 more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from measuring import environment, say, table

from overproof.config import Train
from overproof.data.manifest import Manifest
from overproof.models.hf_directory import Batch, build_model, count_parameters
from overproof.models.llama import Llama
from overproof.registry import TASKS
from overproof.train.deepspeed_engine import DeepSpeedEngine
from overproof.train.loop import train_steps
from overproof.train.objective import CrossEntropy

VOCABULARY = 32_000
WARMING_STEPS = 3
OBJECTIVE = CrossEntropy(TASKS["language_modeling"].predict)
PRESETS = {
    "tiny": (Llama(hidden_size=64, intermediate_size=160, layers=2, heads=4, kv_heads=2), 32, "fp32"),
    "small": (Llama(hidden_size=256, intermediate_size=704, layers=4, heads=8, kv_heads=8), 256, "fp32"),
    "1b": (Llama(hidden_size=2048, intermediate_size=5632, layers=22, heads=32, kv_heads=4), 2048, "bf16"),
}
LARGEST_LAYERS = (48, 64, 96, 128, 192, 256)  # of a width of 4,096: 0.2 billion parameters a layer


def model_flops(model: torch.nn.Module, llama: Llama, sequence: int) -> float:
    """FLOP a token of a training step should take: 6 N + 12 L H Q T.

    N leaves the embedding out where it is only looked up; here it is tied to the output layer, which multiplies by it.
    """
    return 6 * count_parameters(model) + 12 * llama.layers * llama.hidden_size * sequence


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matrix product."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            left @ right
        _wait(device)
        count = 20 if device.type == "cuda" else 4
        began = time.perf_counter()
        for _ in range(count):
            left @ right
        _wait(device)
        best = max(best, 2 * size**3 * count / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def manifest_for(sequence: int) -> Manifest:
    """Only what a model is built from."""
    return Manifest(
        task="language_modeling", columns=(), splits={}, rows_per_group=1, positions=sequence, outputs=VOCABULARY,
    )  # fmt: skip


def train_settings(given: argparse.Namespace, llama: Llama, precision: str, steps: int, offload: str) -> Train:
    return Train.model_validate({
        "model": llama,
        "steps": steps,
        "batch_size": given.micro_batch * given.accumulation,
        "micro_batch_size": given.micro_batch,
        "learning_rate": 1e-4,
        "validate_every": steps + 1,
        "workers": 1,
        "zero_stage": 3 if offload == "parameters" else 2 if offload == "optimizer" else given.stage,
        "offload": offload,
        "precision": precision,
        "compile": given.compile,
        "activation_checkpointing": given.checkpointing or offload != "none",
        "cpus_per_worker": given.threads,
    })  # fmt: skip


def random_batches(size: int, sequence: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens_BS = torch.randint(0, VOCABULARY, (size, sequence + 1), generator=generator)
        yield {"tokens": tokens_BS, "length": torch.full((size,), sequence)}


def utilisation(given: argparse.Namespace) -> None:
    llama, sequence, precision = PRESETS[given.preset]
    train = train_settings(given, llama, precision, given.steps * given.repeats, "none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model(llama, manifest_for(sequence), 0)
    count, flops = count_parameters(model), model_flops(model, llama, sequence)
    engine = DeepSpeedEngine(model, train)
    trained = train_steps(engine, OBJECTIVE, train, random_batches(train.batch_size, sequence), lambda: 0.0)
    peaks, speeds = [], []
    for repeat in range(given.repeats):
        say(f"repeat {repeat + 1} of {given.repeats}")
        peaks.append(matmul_peak(device, dtype))
        seconds, seen = [], time.perf_counter()
        for _ in islice((row for row in trained if "loss" in row), given.steps):
            now = time.perf_counter()
            seconds.append(now - seen)
            seen = now
        speeds.append(train.batch_size * sequence / statistics.median(seconds[WARMING_STEPS:]))
    speed, peak = statistics.median(speeds), statistics.median(peaks)
    share = statistics.median(s * flops / p for s, p in zip(speeds, peaks, strict=True))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {given.threads} thread(s)"
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    row = [f"{count / 1e6:,.0f}M, {precision}", where, f"{speed:,.0f}", f"{speed * flops / 1e12:.3g}"]
    print(json.dumps([*row, f"{peak / 1e12:.3g}", f"{100 * share:.1f} %", f"{memory:.0f}" if memory else ""]))


def fits(given: argparse.Namespace, layers: int) -> None:
    """Three steps with offload; ends with an error where memory does not suffice."""
    llama = Llama(hidden_size=4096, intermediate_size=11_008, layers=layers, heads=32, kv_heads=8)
    sequence = 1024
    given.micro_batch, given.accumulation = 1, 1
    train = train_settings(given, llama, "bf16", 3, given.offload)
    model = build_model(llama, manifest_for(sequence), 0)
    count = count_parameters(model)
    engine = DeepSpeedEngine(model, train)
    list(train_steps(engine, OBJECTIVE, train, random_batches(1, sequence), lambda: 0.0))
    print(json.dumps([count, torch.cuda.max_memory_allocated()]))


def alone(given: argparse.Namespace) -> None:
    """A process group of one, in this process."""
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{scratch}/meeting", rank=0, world_size=1)
        if given.layers:
            fits(given, given.layers)
        else:
            utilisation(given)
        assert "ray" not in sys.modules
        dist.destroy_process_group()


def run(given: argparse.Namespace, *more: str) -> list[Any] | None:
    """This script again, as a rank; None where it fails."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--alone", *more],
        env=environment(given.threads, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    found: list[Any] | None = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    return found


def largest(given: argparse.Namespace, offload: str) -> str:
    """The largest Llama whose step the card and this machine's memory hold."""
    if not torch.cuda.is_available():
        return "not measured"
    best = "none"
    for layers in LARGEST_LAYERS:
        found = run(given, "--layers", str(layers), "--offload", offload)
        if found is None:
            break
        count, memory = map(int, found)
        best = f"{count / 1e9:.1f}B ({memory / 2**30:.0f} GiB on the card)"
    return best


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", choices=PRESETS, default="1b" if torch.cuda.is_available() else "small")
    options.add_argument("--micro-batch", type=int, default=8)
    options.add_argument("--accumulation", type=int, default=1)
    options.add_argument("--checkpointing", action="store_true")
    options.add_argument("--compile", action="store_true")
    options.add_argument("--stage", type=int, default=2)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--largest", action="store_true")
    options.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--offload", default="none", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.alone:
        alone(given)
        return
    found = run(given)
    if found is None:
        sys.exit("the measurement failed; its error stands above")
    lines = [found]
    if not torch.cuda.is_available():
        lines.append(["1,035M, bf16", "GPU", *["not measured"] * 5])
    print(f"medians of {given.repeats} blocks of {given.steps} steps, one process, no Ray\n")
    head = ("model", "where", "tokens/s", "model TFLOP/s", "peak of a matrix product, TFLOP/s", "utilisation", "GiB")
    table(head, lines)
    if given.largest or not torch.cuda.is_available():
        print()
        kinds = {"optimizer": "ZeRO-Offload (optimizer)", "parameters": "ZeRO-3 with parameters offloaded too"}
        table(("largest model on one card", ""), [(kinds[o], largest(given, o)) for o in kinds])


if __name__ == "__main__":
    main()
