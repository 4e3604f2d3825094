"""A trial that takes another's state: Tune unpickles nothing that lies beside it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from ray import tune
from ray.train._internal.session import _TrainingResult

from overproof.distill.student_trainer import STATE_FILES
from overproof.distill.tune_trial import TuneTrial


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


class Recording(TuneTrial):
    """Says which files it was given instead of loading them."""

    def setup(self, config: dict[str, Any]) -> None:
        self.given: dict[str, bytes] = {}

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        self.given = {file.name: file.read_bytes() for file in Path(checkpoint).iterdir()}


def test_files_beside_a_state_are_not_unpickled(tmp_path: Path) -> None:
    for name in STATE_FILES:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "_dict_checkpoint.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    trial = Recording()
    trial.restore(_TrainingResult(tune.Checkpoint.from_directory(str(tmp_path)), {"training_iteration": 3}))
    assert trial.given == {name: name.encode() for name in STATE_FILES}
    assert trial.iteration == 3
    assert not (tmp_path / "ran").exists()
