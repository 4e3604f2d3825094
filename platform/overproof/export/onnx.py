"""ONNX for ONNX Runtime, for models that take one array a row; the file itself is written in ``onnx_file``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from overproof.config.export import Calibration, FormatSection
from overproof.data.manifest import TOKENIZER, Manifest
from overproof.export.base import OWN_BYTES, Difference, ExportContext
from overproof.registry import FAMILIES, TASKS

if TYPE_CHECKING:
    from overproof.tasks.base import ArrayTask

STATIC = "int8-static"
CHECKED_ROWS = 2
SINGLE_PRECISION_NATS = 1e-4  # measured on small models: 1e-6


class Onnx(FormatSection):
    """ONNX for ONNX Runtime, for models that take one array a row.

    ``int8`` measures the range of each activation as it runs, ``int8-static`` beforehand, on ``calibration.rows`` train
    rows; weights are rounded alike, each output channel by itself. Convolutions compute in int8 in the second alone.
    """

    kind: Literal["onnx"] = "onnx"
    formats: tuple[Literal["int8", "int8-static"], ...] = Field(("int8",), min_length=1)
    full_range: bool = Field(
        False,
        description="Weights of eight bits in place of seven: where every processor that serves has AVX-512 VNNI, "
        "AVX-VNNI or ARM's products; AVX2's overflow.",
    )
    calibration: Calibration = Calibration()

    @property
    def trained_roundings(self) -> tuple[str, ...]:
        """Of seven bits alone."""
        return () if self.full_range or "int8" not in self.formats else ("int8",)

    @property
    def calibration_rows(self) -> int:
        return self.calibration.rows * (STATIC in self.formats)


class OnnxFormat:
    """See ``Format``."""

    section = Onnx
    suffix = ".onnx"
    unquantised = "fp32"
    engines: Mapping[str, str] = {"onnxruntime": OWN_BYTES}
    library = "onnx"
    further_families = ""
    drafting_engine = None

    @property
    def families(self) -> tuple[str, ...]:
        from overproof.models.base import ArrayFamily

        return tuple(kind for kind, family in FAMILIES.items() if isinstance(family, ArrayFamily))

    def check_tokenizer(self, text: str, where: object) -> tuple[str, ...]:
        """It holds no tokenizer."""
        del text, where
        return ()

    def check_template(self, settings: Any, directory: str | None) -> None:
        """It holds no chat template."""

    def check_model(
        self, config: Mapping[str, Any], positions: int, where: object, variants: Sequence[str] = ()
    ) -> None:
        """Of its families every model: what is written is the graph of what torch computes."""

    def write(self, source: Path, file: Path, variant: str, context: ExportContext, unquantised: Path) -> None:
        from overproof.export.onnx_file import export_onnx
        from overproof.export.onnx_int8 import quantize_onnx, quantize_onnx_static

        settings: Onnx = context.settings
        if variant == self.unquantised:
            export_onnx(source, file)
        elif variant == STATIC:
            quantize_onnx_static(unquantised, file, _calibration_rows(context), settings.full_range)
        else:
            quantize_onnx(unquantised, file, settings.full_range)

    def difference(self, source: Path, file: Path) -> Difference:
        import numpy as np
        import torch

        from overproof.export.onnx_file import flat_classifier

        classifier = flat_classifier(source)
        inputs_BD = classifier.family.sample_rows(classifier.model.config, CHECKED_ROWS, np.random.default_rng(0))
        with torch.inference_mode():
            expected_BV = classifier(torch.from_numpy(inputs_BD)).numpy()
        reference = self.read_back(file)
        found_BV = np.concatenate([reference(row_D[None]) for row_D in inputs_BD])  # each as short as it is
        nats = float((np.exp(expected_BV) * np.abs(expected_BV - found_BV)).sum(1).max())
        return Difference(nats, SINGLE_PRECISION_NATS, positions=1)

    def require_same_weights(self, file: Path, unquantised: Path) -> None:
        """See ``WeighedFormat``."""
        from overproof.export.onnx_int8 import require_same_numbers

        require_same_numbers(file, unquantised)

    def read_back(self, file: Path) -> Any:
        """ONNX's own evaluator of the file: a function of flat rows (B, D) that gives log-probabilities (B, V)."""
        from overproof.export.onnx_file import Reference

        return Reference(file)

    def companions(self, context: ExportContext) -> Mapping[str, Path]:
        """The tokenizer, where rows are of tokens: requests hold text."""
        return {} if context.tokenizer is None else {TOKENIZER: context.tokenizer}


def _calibration_rows(context: ExportContext) -> Iterator[Any]:
    """The first train rows, each (1, D)."""
    import numpy as np

    from overproof.export.calibration import CalibrationRows

    assert context.prepared is not None
    manifest = Manifest.read(context.prepared)
    task = cast("ArrayTask", TASKS[manifest.task])
    for batch in CalibrationRows(context.prepared, context.seed, context.settings.calibration.rows).batches():
        for row in batch[task.column].numpy():
            yield row.reshape(1, -1).astype(np.float32)


FORMAT = OnnxFormat()
