"""The data and the settings that the benchmarks of steps and of starts share, and how they start two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import HERE, environment, printed
from rows import write_rows

from overproof.config import Train, load_recipe

RECIPE = HERE.parent / "jobs" / "recipes" / "stdlib-lm.yaml"
ROWS, ROWS_PER_GROUP, SEQUENCE, VOCABULARY = 8192, 16, 128, 2048


def write_setting(folder: Path, threads: int, **changes: Any) -> Train:
    """Random rows and the teacher of stdlib-lm.yaml; what the children read."""
    write_rows(folder, ROWS, SEQUENCE, ROWS_PER_GROUP, VOCABULARY)
    train = load_recipe(RECIPE).train.model_copy(
        update={"cpus_per_worker": threads, "validate_every": 10**9, **changes}
    )
    (folder / "train.json").write_text(train.model_dump_json())
    return train


def torchrun(python: Path, folder: Path, stage: int, steps: int, repeats: int, who: list[str], threads: int) -> Any:
    """Two ranks; gives what rank 0 printed."""
    command = [python, "-m", "torch.distributed.run", "--nproc-per-node", 2, HERE / "steps" / "ranks.py"]
    source = str(HERE.parent / "platform")
    done = subprocess.run(
        [*map(str, [*command, folder, stage, steps, repeats]), *who],
        env=environment(threads, PYTHONPATH=source, DS_ACCELERATOR=os.environ.get("DS_ACCELERATOR", "cpu")),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return printed(done.stdout)
