"""What tasks have in common whose rows are one array each: places that count, test units, scoring, and the probe.

Shapes: B rows, P places, D states, U test units, V outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overproof.tasks.base import FileScores, Metric, Tell

if TYPE_CHECKING:
    from torch import Tensor

    from overproof.config import Evaluate
    from overproof.engines.probe import Say
    from overproof.export.base import Format
    from overproof.tasks.array_evaluation import Judge

    Batch = dict[str, Tensor]


class RowsTask:
    """See ``Task`` and ``ArrayTask``."""

    column: str  # of a row, the array that an engine is asked
    judged_columns: tuple[str, ...] = ()  # of a row, what ``judge`` needs beside a batch's
    speed: str
    test_unit: str
    expects_answers = False
    counted: str | None = None

    def check_export(self, data: Any, format: Format) -> tuple[str, ...]:
        """Rows are arrays: what made them is the package's own part."""
        del data, format
        return ()

    def judge(self, root: Path) -> Judge:
        """How answers on the data set at ``root`` are judged: the first choice against the label."""
        from overproof.tasks.array_evaluation import first_choices

        del root
        return first_choices

    def segments(self, batch: Batch, states_BPD: Tensor) -> Tensor:
        """Every place counts, and sees every other."""
        import torch

        del batch
        return torch.ones(states_BPD.shape[:2], dtype=torch.bool, device=states_BPD.device)

    def units(self, root: Path, most: int | None) -> NDArray[np.int64]:
        from overproof.tasks.array_evaluation import array_units

        return array_units(root, most)

    def clusters(self, root: Path, units: NDArray[np.int64]) -> NDArray[np.int64]:
        from overproof.tasks.array_evaluation import row_clusters

        return row_clusters(root, units)

    def score(
        self, file: Path, root: Path, units: NDArray[np.int64], settings: Evaluate, engine: str, format: Format,
        tell: Tell,
    ) -> FileScores:  # fmt: skip
        from overproof.tasks.array_evaluation import score_arrays

        del format
        return score_arrays(
            file, root, units, engine, self.column, self.judge(root), tell, self.judged_columns, settings.score_s
        )

    def probe(
        self, file: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        from overproof.tasks.array_evaluation import measure_arrays

        reference = format.read_back(file)
        return measure_arrays(
            file, root, settings, engine, self.column, reference, self.speed, f"{self.test_unit}s", say
        )

    def divergence(
        self, file: Path, teacher: Path, root: Path, settings: Evaluate, engine: str, format: Format, say: Say
    ) -> dict[str, Metric]:
        del format
        from overproof.tasks.divergence import array_divergence

        return array_divergence(file, teacher, root, settings, engine, self.column, self.divergences, say)

    def divergences(self, teacher_BV: NDArray[np.float32], found_BV: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of each row (B), between distributions over the outputs, whose log-probabilities are given."""
        from overproof.tasks.divergence import of_distributions

        return of_distributions(teacher_BV, found_BV)
