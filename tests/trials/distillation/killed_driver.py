"""Drives a stage that was pickled, and kills itself once one of its parts is finished. Run by test_kills.py.

python killed_driver.py ADDRESS CONTEXT
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import ray

from overproof.distill import sweep, teacher_stages
from overproof.distill.sweep_state import SweepState
from overproof.stage_context import StageContext


def finished(context: StageContext) -> bool:
    """Whether a file is captured, or a student trained to the end."""
    if context.draft.stage != "sweep":
        return any(Path(context.draft.workspace).glob("*/*.parquet.json"))
    names, journal = Path(context.draft.workspace, "trials").glob("*"), SweepState(context.draft)
    return any(journal.checkpoints(name.name).committed_step() == context.recipe.sweep.steps for name in names)


def main(address: str, pickled: Path) -> None:
    context = pickle.loads(pickled.read_bytes())

    def progress(*_: Any) -> None:
        if finished(context):
            os.kill(os.getpid(), signal.SIGKILL)

    ray.init(address=address, log_to_driver=False)
    stages = {"generate": teacher_stages.generate_text, "cache": teacher_stages.cache_targets, "sweep": sweep.sweep}
    stages[context.draft.stage](dataclasses.replace(context, progress=progress))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
