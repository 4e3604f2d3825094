"""What a model family is, and what a model's call gives.

Shapes: B rows, P predictions in a row (1 for classifiers), V outputs, D numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from overproof.config.models import ModelSection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from overproof.config.training import ZeroSettings
    from overproof.data.manifest import Manifest
    from overproof.models.gguf_layout import GgufLayout
    from overproof.models.sizes import ModelSize

    Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Prediction:
    """A model's outputs for a batch, what they should be, and which of them count, or how much.

    A mean over them is the sum of each times its mask, by the number of those that count: weights whose mean is 1 leave
    it what it is, however rows are shared between workers.
    """

    logits_BPV: Tensor
    targets_BP: Tensor
    mask_BP: Tensor  # bool, or weights of 0 and more


@dataclass(frozen=True)
class DataShape:
    """What a model must fit: the task, V outputs, P predictions in a row, and what else the task says of a row."""

    task: str
    outputs: int
    positions: int
    details: Mapping[str, Any] = field(default_factory=dict)  # such as the height of images; see the task
    bos_id: int | None = None  # of a tokenizer, as the manifest has them
    end_id: int | None = None
    apart: bool = False  # whether rows hold several texts, none of which sees another


@dataclass(frozen=True)
class FusedAttention:
    """One module of a layer that gives queries, keys and values together."""

    name: str  # from a layer
    split: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]  # of the configuration and what the module gives


def shape_of(manifest: Manifest) -> DataShape:
    """What a model of prepared data must fit."""
    return DataShape(
        manifest.task, manifest.outputs, manifest.positions, manifest.details, manifest.bos_id, manifest.end_id,
        manifest.apart,
    )  # fmt: skip


@dataclass(frozen=True)
class LayerNames:
    """Where a family keeps its parts, as names of modules: what layer dropping, pruning and feature losses go by."""

    layers: str  # the list of equal layers, from the whole model
    embeddings: str  # from the whole model
    output: str  # the layer that gives the logits, from the whole model
    feed_forward: tuple[str, ...]  # from a layer
    queries: str | None = None  # from a layer; None where there is none, or the three are one module
    keys: str | None = None
    values: str | None = None
    fused: FusedAttention | None = None
    attention_output: str | None = None  # from a layer; None where heads cannot be taken away by themselves
    width_goes: bool = False  # whether channels between layers can be: norms are of their mean square alone
    linear: bool = True  # whether matrices of layers are nn.Linear; Conv1D has them by input and output
    intermediate: str = "intermediate_size"  # a configuration's name of the feed-forward layer's channels
    per_layer: tuple[str, ...] = ()  # settings of a configuration that have one entry a place
    own_settings: tuple[str, ...] = ()  # the same, of one entry a layer: it takes it to its new place
    first_stays: bool = False  # whether the first layer lacks a part of the others

    @property
    def has_attention(self) -> bool:
        """Whether queries, keys and values can be looked at."""
        return self.queries is not None or self.fused is not None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of a convolutional model that stay or go together, with names of modules from the whole model."""

    channels: int
    measured: str  # gives them, (B, C, H, W)
    given_by: tuple[str, ...]  # convolutions, and the norms behind them
    read_by: tuple[str, ...]  # convolutions, or the output layer


@dataclass(frozen=True)
class BaseNames:
    """Where a directory may differ from a model of the data's classes beside its output layer, as names of modules from
    the whole model.
    """

    optional: tuple[str, ...]  # what a base may lack, which is then made anew, or have beside, which is left out
    positions: str | None  # the table of positions, which is cut to the length of the rows


class ModelFamily(Protocol):
    """One architecture. Methods import torch and transformers themselves: a recipe is read without either."""

    section: type[ModelSection] | None  # of a recipe; None where models come from directories alone
    tasks: tuple[str, ...]  # kinds of the tasks that it may be trained for
    architectures: tuple[str, ...]  # names in config.json, or patterns (``*``; ``!`` leaves out), that tell a directory
    names: LayerNames
    attention: str | None  # transformers' implementation that computes all of it; None leaves it to transformers
    varlen: bool  # whether ``models/varlen.py`` computes it as well
    plain_logits: bool  # whether they are what a linear output layer gives, and nothing is done to them

    def configuration(self, section: Any, shape: DataShape) -> Any:
        """The Hugging Face configuration of a section of this family, for data of this shape.

        Raises:
            InputError: they do not go together.
        """

    def model_class(self) -> type[PreTrainedModel]:
        """Built from a configuration, or loaded from a directory."""

    def untied(self, config: Any, names: list[str]) -> list[str]:
        """Of the names in a model's state, those that are written: tied weights once, and no constants."""

    def size(self, section: Any, shape: DataShape) -> ModelSize:
        """How large a model of this section is, without building it."""

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        """The same of a directory: its config.json, and the numbers in each tensor.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or is no number.
        """

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Bytes that one layer keeps for one place from the forward pass to the backward pass."""

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """The same outside the layers, without the logits themselves."""


@runtime_checkable
class GgufFamily(Protocol):
    """What a family has beside whose models llama.cpp runs, and so can be exported to GGUF."""

    gguf: GgufLayout

    def configuration_class(self) -> Any:
        """Of transformers, without the model's code and torch."""


@runtime_checkable
class ArrayFamily(Protocol):
    """What a family has beside whose models take one array of numbers a row, and so can be exported to ONNX."""

    def width(self, config: Any) -> int:
        """D: numbers in a row of a model of this configuration."""

    def padding(self, config: Any) -> float | None:
        """What stands past the end of a row that is shorter than others; None where all are of one length."""

    def sample_rows(self, config: Any, rows: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """Rows (B, D) that such a model may be asked about, drawn at random: exports are checked on them."""

    def flat_logprobs(self, model: Any, inputs_BD: Tensor) -> Tensor:
        """Log-probabilities (B, V) of rows whose numbers lie flat, in the order in which a shard has them."""


@runtime_checkable
class BaseFamily(Protocol):
    """What a family has beside whose directories may hold a base: weights that were trained for other outputs."""

    base: BaseNames

    def fitted(self, config: Any, shape: DataShape) -> Any:
        """A directory's configuration, changed for data of this shape.

        Raises:
            InputError: the model cannot take such rows.
        """

    def output_order(self, config: Any, shape: DataShape) -> list[int] | None:
        """Which of the directory's outputs stands for each of the data's; None where they are not the same."""


@runtime_checkable
class ConvolutionalFamily(Protocol):
    """What a family has beside whose models are stages of convolutions with batch norm, which can lose channels.

    A configuration is the content of a config.json.
    """

    def narrowed(self, config: Mapping[str, Any], hidden_sizes: tuple[int, ...]) -> dict[str, Any]:
        """The configuration of what is left where stages keep so many channels.

        Raises:
            InputError: there are not as many, or such a model would not be a part of it.
        """

    def tensors(self, config: Mapping[str, Any]) -> Mapping[str, int]:
        """Numbers in each parameter, by name."""

    def channel_groups(self, config: Mapping[str, Any]) -> Sequence[ChannelGroup]:
        """All that can go; those of a narrower configuration are as many, in the same order."""

    def require_training(self, settings: ZeroSettings, where: str) -> None:
        """Look whether its models can be trained so.

        Raises:
            InputError: they cannot.
        """


@runtime_checkable
class ComposedFamily(Protocol):
    """What a family has beside whose models are made of others, each of a family of its own."""

    members: str  # what they are, in words
    combines: tuple[str, ...]  # what of theirs can be averaged

    def accepts(self, family: ModelFamily) -> bool:
        """Whether models of a family can be members."""

    def alike(self, config: Any, family: Any) -> dict[str, Any]:
        """What must be the same of each member, of this configuration and family; by what it is called."""

    def settings(self, configs: Sequence[Any]) -> dict[str, Any]:
        """Of the whole, from its members' configurations."""

    def parts_of(self, config: Any) -> Sequence[tuple[Any, Any]]:
        """The configuration of each, and its family."""

    def parts(self, model: Any) -> Sequence[PreTrainedModel]:
        """Those of a model."""

    def renewed(self, model: Any, parts: Sequence[PreTrainedModel]) -> PreTrainedModel:
        """The model with others in their place."""


def class_order(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """The place of each class among a classifier's ``names``; None where they are not the same classes.

    Names as transformers gives them to unnamed classes (LABEL_0) are those of classes that are called by their numbers
    (0), and of no others: that there are as many does not say which is which.
    """
    unnamed = [f"LABEL_{number}" for number in range(len(names))]
    told = [str(number) for number in range(len(names))] if list(names) == unnamed else list(names)
    if sorted(told) != sorted(classes) or len(set(told)) != len(told):
        return None
    return [told.index(name) for name in classes]
