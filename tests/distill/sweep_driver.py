"""Drives a sweep that was pickled, and kills itself once so many steps are made. Run by test_sweep_resume.py.

python sweep_driver.py ADDRESS CONTEXT STEPS
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sys
from pathlib import Path

import ray

from overproof.distill.sweep import sweep


def main(address: str, pickled: Path, steps: int) -> None:
    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if task == "sweep" and done >= steps:
            os.kill(os.getpid(), signal.SIGKILL)

    ray.init(address=address, log_to_driver=False)
    sweep(dataclasses.replace(pickle.loads(pickled.read_bytes()), progress=progress))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
