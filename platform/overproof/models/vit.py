"""Vision transformers (arXiv 2010.11929), for images of any size and number of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from overproof.config.base import Count
from overproof.config.models import LayeredModel
from overproof.errors import InputError
from overproof.models.base import DataShape, LayerNames
from overproof.models.sizes import FP32_BYTES, ModelSize

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Vit(LayeredModel):
    """A vision transformer, from its configuration; its images are the data's."""

    kind: Literal["vit"] = "vit"
    hidden_size: Count = Field(description="Width of the residual stream.")
    intermediate_size: Count = Field(description="Width of the feed-forward layer.")
    layers: Count = Field(description="Encoder layers.")
    heads: Count = Field(description="Attention heads; divides hidden_size.")
    patch_size: Count = Field(2, description="Patch edge in pixels; divides the height and the width of the images.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden_size {self.hidden_size}")
        return self


class VitFamily:
    """See ``ModelFamily`` and ``ArrayFamily``."""

    section = Vit
    tasks = ("image_classification",)
    architectures = ("ViTForImageClassification",)
    attention = "sdpa"
    varlen = False
    plain_logits = False
    names = LayerNames(
        layers="vit.layers",
        embeddings="vit.embeddings",
        output="classifier",
        feed_forward=("mlp.fc1", "mlp.fc2"),
        queries="attention.q_proj",
        keys="attention.k_proj",
        values="attention.v_proj",
    )

    def configuration(self, section: Vit, shape: DataShape) -> Any:
        from transformers import ViTConfig

        _patches(section, shape)
        return ViTConfig(
            hidden_size=section.hidden_size,
            intermediate_size=section.intermediate_size,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            image_size=_edges(shape),
            patch_size=section.patch_size,
            num_channels=shape.details["channels"],
            num_labels=shape.outputs,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=section.initializer_range,
            attn_implementation="sdpa",
        )

    def model_class(self) -> type[PreTrainedModel]:
        from transformers import ViTForImageClassification

        return ViTForImageClassification  # type: ignore[no-any-return]

    def untied(self, config: Any, names: list[str]) -> list[str]:
        del config
        return names

    def size(self, section: Vit, shape: DataShape) -> ModelSize:
        h, f, patch, outputs = section.hidden_size, section.intermediate_size, section.patch_size, shape.outputs
        places = _patches(section, shape) + 1  # and the class token
        layer = (h * h, h) * 4 + (f * h, f, h * f, h) + (h, h) * 2  # q k v o, two of the feed-forward, two norms
        pixels = int(shape.details["channels"]) * patch * patch
        return ModelSize(
            family="vit", hidden=h, intermediate=f, layers=section.layers, heads=section.heads, query_width=h,
            key_width=h, places=places, outputs=outputs, predictions=1,
            tensors=(h, places * h, h * pixels, h, *layer * section.layers, h, h, outputs * h, outputs),
        )  # fmt: skip

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        h, f, layers, heads = (
            int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        )
        height, width = _image_size(config["image_size"])
        patch = int(config["patch_size"])
        del shape
        return ModelSize(
            family="vit", hidden=h, intermediate=f, layers=layers, heads=heads, query_width=h, key_width=h,
            places=(height // patch) * (width // patch) + 1, outputs=tensors["classifier.bias"], predictions=1,
            tensors=tuple(tensors.values()),
        )  # fmt: skip

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """Two norms and their means, q k v, attention out and in, two of the feed-forward."""
        return element_bytes * (8 * size.hidden + 2 * size.intermediate) + FP32_BYTES * size.heads + 4 * element_bytes

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return 2 * element_bytes * size.hidden

    def width(self, config: Any) -> int:
        height, width = _image_size(config.image_size)
        return int(config.num_channels) * height * width

    def padding(self, config: Any) -> float | None:
        del config
        return None

    def sample_rows(self, config: Any, rows: int, generator: np.random.Generator) -> NDArray[np.float32]:
        return generator.random((rows, self.width(config)), np.float32)

    def flat_logprobs(self, model: Any, inputs_BD: Tensor) -> Tensor:
        images_BCHW = inputs_BD.reshape(-1, model.config.num_channels, *_image_size(model.config.image_size))
        logprobs_BV: Tensor = model(pixel_values=images_BCHW).logits.log_softmax(-1)
        return logprobs_BV


def _image_size(edges: Any) -> tuple[int, int]:
    """Height and width, as transformers has them: one number for a square."""
    height, width = (edges, edges) if isinstance(edges, int) else edges
    return int(height), int(width)


def _edges(shape: DataShape) -> int | list[int]:
    height, width = int(shape.details["height"]), int(shape.details["width"])
    return height if height == width else [height, width]


def _patches(section: Vit, shape: DataShape) -> int:
    height, width = int(shape.details["height"]), int(shape.details["width"])
    if height % section.patch_size or width % section.patch_size:
        raise InputError(
            f"model.patch_size {section.patch_size} does not divide images of {height} x {width} pixels; expected a "
            "divisor of both"
        )
    return (height // section.patch_size) * (width // section.patch_size)


FAMILY = VitFamily()
