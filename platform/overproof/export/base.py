"""What an export format is: what it writes, how that is read back, and which engines serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from overproof.config.export import FormatSection
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from overproof.artifacts import Artifact

TEACHER = "teacher"  # name of its unquantised file, and of what its variants were made from
MOST_FISHER_ROWS = 32  # of a calibration's: of a sum over a whole matrix the first few tell as much as all
BATCH_TOKENS = 1024  # that a model is calibrated on at once
OWN_BYTES = "the file's own bytes"  # what an engine computes with, in words of the report and the card


def calibration_memory(size: ModelSize, rows: int) -> int:
    """Bytes that a decoder takes that is calibrated, layer after layer, on so many rows."""
    logits = BATCH_TOKENS * size.outputs * FP32_BYTES
    sums = FP32_BYTES * (5 * size.hidden**2 + size.query_width**2 + size.intermediate**2)  # of a layer's inputs
    between = FP32_BYTES * size.predictions * rows * (2 * size.hidden + size.places)  # activations and masks
    inverted = 32 * max(size.hidden, size.query_width, size.intermediate) ** 2  # four matrices in fp64
    return FP32_BYTES * size.parameters + logits + sums + between + inverted


@dataclass(frozen=True)
class ExportContext:
    """What a format may need beside a model's directory."""

    settings: Any  # the recipe's section of this format
    recipe: str  # its name
    teacher: Path  # the teacher's directory
    tokenizer: Path | None  # tokenizer.json, where the rows are of tokens
    prepared: Artifact | None = None  # the data, for variants that are calibrated
    seed: int = 0  # of its order
    tell: Callable[[str], None] = lambda _: None  # hears what is done now


@dataclass(frozen=True)
class Difference:
    """How far an unquantised file, read by another than its writer, is from the model it was made from."""

    nats: float  # by which a log-probability differs, where it differs most: a mean by the model's own probabilities
    explained_nats: float  # the most that rounding explains
    positions: int  # places of the longest of these rows


class Format(Protocol):
    """One file format. Methods import torch and the like themselves: a recipe is read without."""

    section: type[FormatSection]
    suffix: str  # of its files, such as ".gguf"
    unquantised: str  # the variant that references are written in, such as "f16"
    engines: Mapping[str, str]  # by kind, the first the default: what each that serves it takes from a file
    library: str  # as the Hugging Face Hub names it
    further_families: str  # what would make it hold more families, as a message ends; empty where nothing does
    drafting_engine: str | None  # the engine that answers with a draft of this format, if one does

    @property
    def families(self) -> tuple[str, ...]:
        """Kinds of the model families that it can hold."""

    def check_tokenizer(self, text: str, where: object) -> Sequence[str]:
        """What engines of this format leave out of the tokenizer with this ``tokenizer.json``, in words: asked before
        anything is trained with it.

        Raises:
            InputError: files of this format cannot hold it.
        """

    def check_template(self, settings: Any, directory: str | None) -> None:
        """Return where the chat template that files would be written with, if any, works: the recipe's by the
        ``settings`` of this format, or that of the teacher's ``directory``.

        Raises:
            InputError: it does not.
        """

    def check_model(
        self, config: Mapping[str, Any], positions: int, where: object, variants: Sequence[str] = ()
    ) -> None:
        """Return where files of this format can hold, in these variants and unquantised, a model whose config.json has
        this content, and their engines then read rows of so many positions as the model does: asked before anything is
        trained. ``where`` is what a message calls the model's folder.

        Raises:
            InputError: they cannot; what was found, and what would do.
        """

    def write(self, source: Path, file: Path, variant: str, context: ExportContext, unquantised: Path) -> None:
        """Write a Hugging Face directory as one file of a variant; ``file`` appears when it is complete.

        ``unquantised`` is the same model's file in the unquantised variant, which is written first.

        Raises:
            InputError: the model or its tokenizer has a feature that the format does not cover.
        """

    def difference(self, source: Path, file: Path) -> Difference:
        """Of an unquantised file, and the Hugging Face directory it was made from."""

    def read_back(self, file: Path) -> Any:
        """What a file means, apart from any engine: a torch model, or a function of flat rows (B, D)."""

    def companions(self, context: ExportContext) -> Mapping[str, Path]:
        """Files that a package needs beside the model, by name."""


@runtime_checkable
class WeighedFormat(Protocol):
    """What a format has beside whose files can be held against each other, number by number."""

    def require_same_weights(self, file: Path, unquantised: Path) -> None:
        """Look whether a file of a variant holds the numbers of the unquantised one, as far as rounding moves them.

        Raises:
            RuntimeError: a tensor is missing, or is another.
        """


@runtime_checkable
class SizedFormat(Protocol):
    """What a format has beside that knows what writing takes."""

    def require_size(self, settings: Any, size: ModelSize, where: str) -> None:
        """Look whether a file of a model can be as small as the ``settings`` ask for, where they do.

        Raises:
            InputError: it cannot; the least there is.
        """

    def export_memory(self, settings: Any, size: ModelSize) -> int:
        """Bytes that writing and looking at a file takes at most, in the variants of the recipe's ``settings``, beside
        libraries and what is mapped from files.
        """
