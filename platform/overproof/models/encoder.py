"""Encoders of text with a classifier on top: what their families have in common.

A row is one array of token ids; past the end of its text stands ``PADDING``, so that no second array need say where
that is. As float32 it is exact: the largest vocabulary is far below 2**24.

Shapes: B rows, D tokens in a row, V classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from overproof.config.base import Count
from overproof.config.models import LayeredModel
from overproof.errors import InputError
from overproof.models.base import BaseNames, DataShape, LayerNames, class_order
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TASKS = ("text_classification", "multi_label_text_classification")
CLASSIFIER = "ForSequenceClassification"
PADDING = -1  # in place of a token
MULTI_LABEL = "multi_label_classification"  # the problem type, as transformers names it


class Encoder(LayeredModel):
    """An encoder of text, from its configuration; its vocabulary, classes and length of rows are the data's."""

    hidden_size: Count = Field(description="Width of the residual stream.")
    intermediate_size: Count = Field(description="Width of the feed-forward layer.")
    layers: Count = Field(description="Encoder layers.")
    heads: Count = Field(description="Attention heads; divides hidden_size.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden_size {self.hidden_size}")
        return self


class Dimensions(NamedTuple):
    """What the tensors of an encoder follow from."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    positions: int  # entries of the table of positions
    segments: int  # embeddings of first and second texts; a row has one text
    classes: int
    relative: int = 0  # entries of the table of relative positions
    kernel: int = 0  # tokens under the convolution beside the first layer


@dataclass(frozen=True)
class EncoderFamily:
    """A family by its data; see ``ModelFamily``, ``ArrayFamily`` and ``BaseFamily``."""

    kind: str
    section: type[Encoder]
    prefix: str  # of its classes in transformers
    bases: tuple[str, ...]  # architectures without a classifier, after the prefix
    names: LayerNames
    base: BaseNames
    tensors: Callable[[Dimensions], tuple[int, ...]]  # numbers in each
    settings: Mapping[str, Any] = field(default_factory=dict)  # of a model that is built here: nothing is dropped out
    fields: Mapping[str, str] = field(default_factory=dict)  # of config.json, by BERT's name
    segments: int = 2
    reserved_positions: int = 0  # first entries of the table of positions that no token has
    tasks: tuple[str, ...] = TASKS
    attention: str | None = "sdpa"
    varlen: bool = False
    plain_logits: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}{name}" for name in (CLASSIFIER, *self.bases))

    def configuration(self, section: Encoder, shape: DataShape) -> Any:
        import transformers

        sizes = {
            "vocab_size": shape.details["vocabulary"],
            "hidden_size": section.hidden_size,
            "intermediate_size": section.intermediate_size,
            "num_hidden_layers": section.layers,
            "num_attention_heads": section.heads,
            "max_position_embeddings": shape.details["sequence_length"] + self.reserved_positions,
        }
        return getattr(transformers, f"{self.prefix}Config")(
            **{self.fields.get(name, name): value for name, value in sizes.items()},
            **{"pad_token_id": shape.details["padding"], **self.settings},
            **_labels(shape),
            **self.own_settings(section, shape),
            initializer_range=section.initializer_range,
            attn_implementation=self.attention,
        )

    def own_settings(self, section: Any, shape: DataShape) -> dict[str, Any]:
        """What the configuration of a section has beside an encoder's."""
        del section, shape
        return {}

    def require(self, config: Mapping[str, Any]) -> None:
        """Look at what a directory's configuration has beside an encoder's.

        Raises:
            InputError: the family does not cover it.
        """

    def model_class(self) -> type[PreTrainedModel]:
        import transformers

        found: type[PreTrainedModel] = getattr(transformers, f"{self.prefix}{CLASSIFIER}")
        return found

    def untied(self, config: Any, names: list[str]) -> list[str]:
        del config
        return names

    def size(self, section: Encoder, shape: DataShape) -> ModelSize:
        return self._size(self.dimensions(section, shape), shape)

    def dimensions(self, section: Any, shape: DataShape) -> Dimensions:
        return Dimensions(
            section.hidden_size, section.intermediate_size, section.layers, section.heads,
            shape.details["vocabulary"], shape.details["sequence_length"] + self.reserved_positions, self.segments,
            len(shape.details["classes"]),
        )  # fmt: skip

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        """Of the model as it is fitted to the data, whatever else lies in the directory."""
        del tensors
        return self._size(self.directory_dimensions(config, shape), shape)

    def directory_dimensions(self, config: Mapping[str, Any], shape: DataShape) -> Dimensions:
        def read(name: str) -> int:
            """BERT's name first: a student of fewer layers is asked about by it."""
            return int(config[name if name in config else self.fields.get(name, name)])

        self.require(config)
        self._check(read("max_position_embeddings"), read("vocab_size"), shape)
        return Dimensions(
            read("hidden_size"), read("intermediate_size"), read("num_hidden_layers"), read("num_attention_heads"),
            read("vocab_size"), shape.details["sequence_length"] + self.reserved_positions,
            int(config.get("type_vocab_size", self.segments)), len(shape.details["classes"]),
        )  # fmt: skip

    def _size(self, dimensions: Dimensions, shape: DataShape) -> ModelSize:
        h, d = dimensions.hidden, dimensions
        return ModelSize(
            family=self.kind, hidden=h, intermediate=d.intermediate, layers=d.layers, heads=d.heads, query_width=h,
            key_width=h, places=d.positions - self.reserved_positions, outputs=shape.outputs,
            predictions=shape.positions, tensors=self.tensors(d), relative=d.relative,
            looked_up=d.vocabulary * h,
        )  # fmt: skip

    def _check(self, positions: int, vocabulary: int, shape: DataShape) -> None:
        longest, length = positions - self.reserved_positions, int(shape.details["sequence_length"])
        if length > longest:
            raise InputError(
                f"config.json: the model takes {longest} tokens at most; data.sequence_length is {length}: lower it"
            )
        if int(shape.details["vocabulary"]) > vocabulary:
            raise InputError(
                f"config.json: the model has {vocabulary} embeddings; the data's tokenizer has "
                f"{shape.details['vocabulary']} entries: expected the model's own tokenizer.json in data.tokenizer"
            )

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Two norms and their means, q k v, attention out and in, two of the feed-forward."""
        return element_bytes * (8 * size.hidden + 2 * size.intermediate) + FP32_BYTES * size.heads + 4 * element_bytes

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return 2 * element_bytes * size.hidden

    def width(self, config: Any) -> int:
        return int(config.max_position_embeddings) - self.reserved_positions

    def padding(self, config: Any) -> float | None:
        del config
        return float(PADDING)

    def sample_rows(self, config: Any, rows: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """The first as long as a row may be, the others shorter."""
        width = self.width(config)
        tokens_BD = generator.integers(0, config.vocab_size, (rows, width))
        lengths_B = np.r_[width, generator.integers(1, width + 1, rows - 1)]
        tokens_BD[np.arange(width) >= lengths_B[:, None]] = PADDING
        return tokens_BD.astype(np.float32)

    def flat_logprobs(self, model: Any, inputs_BD: Tensor) -> Tensor:
        """Of classes, or of each label being there where a text may have several."""
        logits_BV: Tensor = model(**encoder_inputs(inputs_BD.long())).logits
        if model.config.problem_type == MULTI_LABEL:
            return label_logits(logits_BV).log_softmax(-1)[..., 1]
        return logits_BV.log_softmax(-1)

    def fitted(self, config: Any, shape: DataShape) -> Any:
        self.require(config.to_dict())
        self._check(config.max_position_embeddings, config.vocab_size, shape)
        changed = copy.deepcopy(config)
        changed.max_position_embeddings = shape.details["sequence_length"] + self.reserved_positions
        for name, value in _labels(shape).items():
            setattr(changed, name, value)
        return changed

    def output_order(self, config: Any, shape: DataShape) -> list[int] | None:
        """By the names of the classes, and by whether a text has one of them or several."""
        several = [kind == MULTI_LABEL for kind in (config.problem_type, _labels(shape)["problem_type"])]
        if several[0] != several[1]:
            return None
        return class_order([name for _, name in sorted(config.id2label.items())], shape.details["classes"])


def encoder_inputs(tokens_BD: Tensor) -> dict[str, Tensor]:
    """Rows as the models of transformers take them: no place that is masked has a part in the logits."""
    return {"input_ids": tokens_BD.clamp(min=0), "attention_mask": (tokens_BD != PADDING).long()}


def label_logits(logits_BV: Tensor) -> Tensor:
    """Of V labels that may each be there or not, as V predictions of two outputs: (B, V, 2), absent and there.

    Their softmax is the sigmoid, their cross-entropy the binary one, their divergence that of Bernoulli distributions.
    """
    import torch

    return torch.stack([torch.zeros_like(logits_BV), logits_BV], -1)


def _labels(shape: DataShape) -> dict[str, Any]:
    """What transformers is told of the outputs; how a text has them is left open where it has one."""
    classes = shape.details["classes"]
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
        "problem_type": shape.details.get("problem_type"),
    }
