"""ONNX for ONNX Runtime, for models that take one array a row; the file itself is written in ``onnx_file``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from overproof.config.export import FormatSection
from overproof.data.manifest import TOKENIZER
from overproof.export.base import Difference, ExportContext
from overproof.registry import FAMILIES

CHECKED_ROWS = 2
SINGLE_PRECISION_NATS = 1e-4  # measured on small models: 1e-6


class Onnx(FormatSection):
    """ONNX for ONNX Runtime, for models that take one array a row; int8 is dynamic, per output channel."""

    kind: Literal["onnx"] = "onnx"
    formats: tuple[Literal["int8"], ...] = Field(("int8",), min_length=1)


class OnnxFormat:
    """See ``Format``."""

    section = Onnx
    suffix = ".onnx"
    unquantised = "fp32"
    engines = ("onnxruntime",)
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
        del context
        from overproof.export.onnx_file import export_onnx, quantize_onnx

        if variant == self.unquantised:
            export_onnx(source, file)
        else:
            quantize_onnx(unquantised, file)

    def difference(self, source: Path, file: Path) -> Difference:
        import numpy as np
        import torch

        from overproof.export.onnx_file import flat_classifier

        classifier = flat_classifier(source)
        inputs_BD = classifier.family.sample_rows(classifier.model.config, CHECKED_ROWS, np.random.default_rng(0))
        with torch.inference_mode():
            expected_BV = classifier(torch.from_numpy(inputs_BD)).numpy()
        found_BV = self.read_back(file)(inputs_BD)
        nats = float((np.exp(expected_BV) * np.abs(expected_BV - found_BV)).sum(1).max())
        return Difference(nats, SINGLE_PRECISION_NATS, positions=1)

    def read_back(self, file: Path) -> Any:
        """ONNX's own evaluator of the file: a function of flat rows (B, D) that gives log-probabilities (B, V)."""
        from overproof.export.onnx_file import Reference

        return Reference(file)

    def companions(self, context: ExportContext) -> Mapping[str, Path]:
        """The tokenizer, where rows are of tokens: requests hold text."""
        return {} if context.tokenizer is None else {TOKENIZER: context.tokenizer}


FORMAT = OnnxFormat()
