"""Trains without Ray, killed and started again as told, and prints what came of it. Run by test_resume.py.

python resume_ranks.py FOLDER CASES
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forked import load_cpu_adam
from tiny_data import digits_like, settings, text_like

from overproof.artifacts import Artifact, Store
from overproof.errors import InputError
from overproof.stage_context import ProgressEvent, StepTrained, no_progress
from overproof.train.checkpoint import Checkpoints
from overproof.train.local_launcher import LocalWorkers, WorkersDied
from overproof.train.train_job import SupervisedSpec, TrainJob

SEED = 3
BROKEN_ROW = 37
PRINT = "b" * 64


@dataclass(frozen=True)
class KillAt:
    """A progress that ends its own process, as a power cut would."""

    step: int

    def __call__(self, event: ProgressEvent) -> None:
        if isinstance(event, StepTrained) and event.done == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def job_of(store: Store, prepared: Artifact, name: str, train: dict[str, Any]) -> TrainJob:
    draft = store.new_writer(name, "train", PRINT, {"train": train}, {"prepare": prepared.record.fingerprint})
    plan = settings(**train)
    checkpoints = Checkpoints(draft.workspace, PRINT, draft.config, draft.parents, plan.checkpoint)
    return TrainJob(plan, SEED, prepared, draft, checkpoints, no_progress, SupervisedSpec(plan.model, plan.lora))


def run(store: Store, prepared: Artifact, case: dict[str, Any]) -> dict[str, Any]:
    """Every attempt of a case; the last one ends by itself."""
    job = job_of(store, prepared, case["name"], case["train"])
    starts = []
    for attempt in case["attempts"]:
        kill = attempt.get("kill")
        group = LocalWorkers.start(replace(job, progress=KillAt(kill)) if kill else job, attempt["world"])
        starts.append(group.resume.step)
        try:
            metrics = group.join()
            assert not kill
        except WorkersDied:
            assert kill
        except InputError as error:
            return {"error": str(error), "starts": starts, "committed": job.checkpoints.committed_step()}
    folder = Path(job.draft.uri)
    return {
        "starts": starts,
        "rows": [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()],
        "weights": hashlib.sha256((folder / "model/model.safetensors").read_bytes()).hexdigest(),
        "model": str(folder / "model"),
        "checkpoint": str(job.checkpoints.all_committed()[-1].uri),
        "kept": sorted(path.name.partition("-")[0] for path in Path(job.checkpoints.uri).glob("0*")),
        "metrics": metrics,
    }


def run_all(folder: Path, cases: list[dict[str, Any]], data: Mapping[str, Callable[[Path], object]]) -> None:
    """Every case, on data that are made once, and what came of each, for ``rank_results.run_cases``."""
    store, prepared = Store(str(folder / "store")), dict[str, Artifact]()
    for name, make in data.items():
        draft = store.new_writer(name, "prepare", "a" * 64, {}, {})
        with draft.directory() as root:
            make(root)
        prepared[name] = draft.commit({}, 0.0)
    results = {case["name"]: run(store, prepared[case["data"]], case) for case in cases}
    (folder / "results.json").write_text(json.dumps(results))


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    if any("offload" in case["train"] for case in cases):
        load_cpu_adam()
    if any("lora" in case["train"] for case in cases):
        import peft  # noqa: F401  seconds, which each rank would take that is forked without it
    run_all(folder, cases, {"text": text_like, "broken": lambda root: digits_like(root, BROKEN_ROW)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
