"""Residual multilayer perceptrons for rows of a table, after the ResNet of Gorishniy et al. (arXiv 2106.11959).

A row is one array: a number for each numeric column, the number of its category for each other one; a missing value is
not a number. Standardising, marking what is missing and looking categories up are part of the model, and of its file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from overproof.config.base import Count
from overproof.config.models import LayeredModel
from overproof.errors import InputError
from overproof.models.base import DataShape, LayerNames
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Mlp(LayeredModel):
    """A residual multilayer perceptron for rows of a table, from its configuration."""

    kind: Literal["mlp"] = "mlp"
    hidden_size: Count = Field(description="Width of the residual stream.")
    intermediate_size: Count = Field(description="Width inside a layer.")
    layers: Count = Field(description="Residual layers.")


class MlpFamily:
    """See ``ModelFamily`` and ``ArrayFamily``."""

    section = Mlp
    tasks = ("tabular_classification", "tabular_regression")
    architectures = ("TabularMlp",)
    attention = "sdpa"
    varlen = False
    plain_logits = False
    names = LayerNames(layers="layers", embeddings="embeddings", output="head", feed_forward=("up", "down"))

    def configuration(self, section: Mlp, shape: DataShape) -> Any:
        from overproof.models.mlp_module import TabularMlpConfig

        columns = shape.details["columns"]
        return TabularMlpConfig(
            hidden_size=section.hidden_size,
            intermediate_size=section.intermediate_size,
            num_hidden_layers=section.layers,
            num_labels=shape.outputs,
            means=[column["mean"] for column in columns],
            deviations=[column["deviation"] for column in columns],
            categories=[len(column["categories"]) for column in columns],
            embedding_widths=[embedding_width(len(c["categories"])) for c in columns if c["categories"]],
            initializer_range=section.initializer_range,
        )

    def model_class(self) -> type[PreTrainedModel]:
        from overproof.models.mlp_module import TabularMlp

        return TabularMlp

    def untied(self, config: Any, names: list[str]) -> list[str]:
        del config
        return names

    def size(self, section: Mlp, shape: DataShape) -> ModelSize:
        h, f, outputs = section.hidden_size, section.intermediate_size, shape.outputs
        categories = [len(column["categories"]) for column in shape.details["columns"]]
        tables = [(count + 1) * embedding_width(count) for count in categories if count]
        width = sum(embedding_width(count) if count else 2 for count in categories)
        layer = (h, h, f * h, f, h * f, h)  # norm, up, down
        return ModelSize(
            family="mlp", hidden=h, intermediate=f, layers=section.layers, heads=1, query_width=h, key_width=h,
            places=1, outputs=outputs, predictions=1,
            tensors=(*tables, h * width, h, *layer * section.layers, h, h, outputs * h, outputs),
        )  # fmt: skip

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        counts = [len(column["categories"]) for column in shape.details["columns"]]
        if config["categories"] != counts:
            raise InputError(
                f"config.json: the model takes {len(config['categories'])} columns with {config['categories']} "
                f"categories (0 is a number); the data has {len(counts)} with {counts}"
            )
        h, f, layers = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        return ModelSize(
            family="mlp", hidden=h, intermediate=f, layers=layers, heads=1, query_width=h, key_width=h, places=1,
            outputs=tensors["head.bias"], predictions=1, tensors=tuple(tensors.values()),
        )  # fmt: skip

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """The layer's input, its norm, both sides of the activation, and the norm's mean and deviation in fp32."""
        kept: int = element_bytes * (2 * size.hidden + 2 * size.intermediate) + 2 * FP32_BYTES
        return kept

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return 2 * element_bytes * size.hidden

    def width(self, config: Any) -> int:
        return len(config.categories)

    def padding(self, config: Any) -> float | None:
        del config
        return None

    def sample_rows(self, config: Any, rows: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """Numbers as far from their means as the train rows', and every category."""
        columns = [
            generator.integers(0, count, rows) if count else generator.normal(mean, deviation, rows)
            for count, mean, deviation in zip(config.categories, config.means, config.deviations, strict=True)
        ]
        return np.stack(columns, axis=1).astype(np.float32)

    def flat_logprobs(self, model: Any, inputs_BD: Tensor) -> Tensor:
        logprobs_BV: Tensor = model(features=inputs_BD).logits.log_softmax(-1)
        return logprobs_BV


def embedding_width(categories: int) -> int:
    """Numbers that stand for a category: the square root of how many there are, rounded up, and 2 at least."""
    return max(2, math.ceil(math.sqrt(categories)))


FAMILY = MlpFamily()
