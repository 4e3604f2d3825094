"""Ranks of one machine, forked from a process that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama
import transformers.models.vit.modeling_vit  # noqa: F401

from overproof.train.deepspeed_engine import import_deepspeed

import_deepspeed("cpu")


def load_cpu_adam() -> None:
    """Compile DeepSpeed's CPU Adam, if it is not yet, and load it."""
    import cpuinfo
    from deepspeed.ops.op_builder import CPUAdamBuilder

    cpuinfo.get_cpu_info()
    CPUAdamBuilder().load(verbose=False)


def run_groups(work: Callable[..., None], groups: Mapping[int, tuple[Path, Any]]) -> None:
    """Run ``work(folder, rank, world, given)`` on every rank of groups of these sizes, side by side.

    Raises:
        SystemExit: a rank failed; the others are ended.
    """
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_run, args=(work, folder, rank, world, given), daemon=True)
        for world, (folder, given) in groups.items()
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    running = list(ranks)
    while running and not any(process.exitcode for process in ranks):
        wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
    for process in running:
        process.kill()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"ranks ended with {[process.exitcode for process in ranks]}")


def _run(work: Callable[..., None], folder: Path, rank: int, world: int, given: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    work(folder, rank, world, given)
    dist.destroy_process_group()
