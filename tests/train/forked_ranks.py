"""Ranks of process groups, forked from one process in which the imports are paid once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any


def run_forked(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Call ``target`` in a process for each of ``arguments``, side by side; the first that fails ends them all."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  # once, for all of them

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=target, args=given) for given in arguments]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        wait([rank.sentinel for rank in ranks if rank.is_alive()])
        if any(rank.exitcode not in (None, 0) for rank in ranks):  # the others would wait for it
            for rank in ranks:
                rank.kill()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(f"ranks ended with {[rank.exitcode for rank in ranks]}")
