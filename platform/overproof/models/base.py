"""What a model family is, and what a model's call gives.

Shapes: B rows, P predictions in a row (1 for classifiers), V outputs, D numbers in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from overproof.config.models import ModelSection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from overproof.data.manifest import Manifest
    from overproof.models.sizes import ModelSize

    Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Prediction:
    """A model's outputs for a batch, what they should be, and which of them count."""

    logits_BPV: Tensor
    targets_BP: Tensor
    mask_BP: Tensor  # bool


@dataclass(frozen=True)
class DataShape:
    """What a model must fit: the task, V outputs, P predictions in a row, and what else the task says of a row."""

    task: str
    outputs: int
    positions: int
    details: Mapping[str, Any] = field(default_factory=dict)  # such as the height of images; see the task


def shape_of(manifest: Manifest) -> DataShape:
    """What a model of prepared data must fit."""
    return DataShape(manifest.task, manifest.outputs, manifest.positions, manifest.details)


@dataclass(frozen=True)
class LayerNames:
    """Where a family keeps its parts, as names of modules: what layer dropping, pruning and feature losses go by."""

    layers: str  # the list of equal layers, from the whole model
    embeddings: str  # from the whole model
    feed_forward: tuple[str, ...]  # from a layer
    queries: str | None = None  # from a layer; None where there is no attention
    keys: str | None = None
    values: str | None = None


class ModelFamily(Protocol):
    """One architecture. Methods import torch and transformers themselves: a recipe is read without either."""

    section: type[ModelSection]
    tasks: tuple[str, ...]  # kinds of the tasks that it may be trained for
    architectures: tuple[str, ...]  # names in config.json by which a directory is known
    names: LayerNames

    def configuration(self, section: Any, shape: DataShape) -> Any:
        """The Hugging Face configuration of a section of this family, for data of this shape.

        Raises:
            InputError: they do not go together.
        """

    def model_class(self) -> type[PreTrainedModel]:
        """Built from a configuration, or loaded from a directory."""

    def untied(self, config: Any, names: list[str]) -> list[str]:
        """Of the names in a model's state, those that are written: tied weights are written once."""

    def size(self, section: Any, shape: DataShape) -> ModelSize:
        """How large a model of this section is, without building it."""

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        """The same of a directory: its config.json, and the numbers in each tensor.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or is no number.
        """

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Bytes that one layer keeps for one place from the forward pass to the backward pass."""

    def outer_memory(self, element_bytes: int) -> int:
        """The same outside the layers, for each feature of the residual stream."""


@runtime_checkable
class ArrayFamily(Protocol):
    """What a family has beside whose models take one array of numbers a row, and so can be exported to ONNX."""

    def width(self, config: Any) -> int:
        """D: numbers in a row of a model of this configuration."""

    def flat_logits(self, model: Any, inputs_BD: Tensor) -> Tensor:
        """Logits (B, V) of rows whose numbers lie flat, in the order in which a shard has them."""
