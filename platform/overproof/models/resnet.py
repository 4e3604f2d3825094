"""Residual networks of convolutions and batch norm (arXiv 1512.03385), for images of any size and number of channels.

transformers' ResNet takes images of any size, and its configuration names none; here it has ``image_size``, because
rows are flat. Running statistics of batch norm are buffers: they are written, read, exported and checkpointed with the
weights, and are no parameters; ``train/running_statistics.py`` says what becomes of them in training.

Shapes: B rows, C channels, H height, W width, V outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from overproof.config.base import Count
from overproof.config.models import StagedModel
from overproof.config.training import ZeroSettings
from overproof.errors import InputError
from overproof.models.base import BaseNames, ChannelGroup, DataShape, LayerNames, class_order
from overproof.models.sizes import ModelSize

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

REDUCTION = 4  # of a bottleneck's channels inside, which transformers fixes
STEM_KERNEL = 7
POOLED = 2  # halvings of an image's edges up to the first stage
INDEX_NUMBERS = 4  # of 16 bits, in the place that max pooling keeps of each number it gives
STEM, STAGES, HEAD = "resnet.embedder.embedder", "resnet.encoder.stages", "classifier.1"


class ResNet(StagedModel):
    """A residual network of convolutions, from its configuration; its images are the data's."""

    kind: Literal["resnet"] = "resnet"
    embedding_size: Count = Field(description="Channels of the stem, which gives a quarter of an image's edges.")
    hidden_sizes: tuple[Count, ...] = Field(
        min_length=1, description="Channels of each stage; all but the first halve the edges."
    )
    depths: tuple[Count, ...] = Field(min_length=1, description="Residual blocks of each stage.")
    layer_type: Literal["basic", "bottleneck"] = Field(
        "basic", description="Two 3x3 convolutions, or 1x1, 3x3 and 1x1 around a quarter of the channels."
    )
    downsample_in_first_stage: bool = Field(
        False, description="Whether the first stage halves the edges, too: not for small images."
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if len(self.depths) != len(self.hidden_sizes):
            raise ValueError(
                f"depths {list(self.depths)} and hidden_sizes {list(self.hidden_sizes)}: expected as many stages"
            )
        uneven = [size for size in self.hidden_sizes if size % REDUCTION]
        if self.layer_type == "bottleneck" and uneven:
            raise ValueError(
                f"hidden_sizes {list(self.hidden_sizes)}: found {uneven[0]}; expected multiples of {REDUCTION}: a "
                "bottleneck has a quarter of its stage's channels inside"
            )
        return self

    @property
    def stem_goes_on(self) -> bool:
        """Whether the first block adds to what the stem gives, so that both have the same channels."""
        return self.embedding_size == self.hidden_sizes[0] and not self.downsample_in_first_stage

    def narrowed(self, hidden_sizes: tuple[int, ...]) -> Self:
        """See ``StagedModel``. The stem's channels go with the first stage's where the first block adds to them."""
        found = super().narrowed(hidden_sizes)
        if self.stem_goes_on:
            return found.model_copy(update={"embedding_size": hidden_sizes[0]})
        if found.stem_goes_on:
            raise InputError(
                f"hidden_sizes {list(hidden_sizes)}: as many as embedding_size {self.embedding_size} in the first "
                "stage, whose first block would lack the shortcut that the teacher's has; expected another number"
            )
        return found


class ResNetFamily:
    """See ``ModelFamily``, ``ArrayFamily``, ``BaseFamily`` and ``ConvolutionalFamily``."""

    section = ResNet
    tasks = ("image_classification",)
    architectures = ("ResNetForImageClassification",)
    attention = None
    varlen = False
    plain_logits = False
    names = LayerNames(layers=STAGES, embeddings="resnet.embedder", output=HEAD, feed_forward=())
    base = BaseNames(optional=(), positions=None)

    def configuration(self, section: ResNet, shape: DataShape) -> Any:
        from transformers import ResNetConfig

        return ResNetConfig(
            num_channels=int(shape.details["channels"]),
            embedding_size=section.embedding_size,
            hidden_sizes=list(section.hidden_sizes),
            depths=list(section.depths),
            layer_type=section.layer_type,
            downsample_in_first_stage=section.downsample_in_first_stage,
            **_fitting(shape),
        )

    def model_class(self) -> type[PreTrainedModel]:
        from transformers import ResNetForImageClassification

        return ResNetForImageClassification  # type: ignore[no-any-return]

    def untied(self, config: Any, names: list[str]) -> list[str]:
        del config
        return names

    def size(self, section: ResNet, shape: DataShape) -> ModelSize:
        return _size(section, shape, _tensors(section, int(shape.details["channels"]), shape.outputs))

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        """Of the model as it is fitted to the data, whatever outputs the directory's has."""
        _require_channels(int(config["num_channels"]), shape)
        section, outputs = _section(config), len(shape.details["classes"])
        own = {name: numbers for name, numbers in tensors.items() if name.endswith((".weight", ".bias"))}
        own |= {f"{HEAD}.weight": outputs * section.hidden_sizes[-1], f"{HEAD}.bias": outputs}
        return _size(section, shape, own)

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """An equal part of what all stages and the stem keep, which are not alike: see ``_size``."""
        return element_bytes * -(-size.kept // size.layers)

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """What the output layer is given."""
        return element_bytes * size.hidden

    def width(self, config: Any) -> int:
        height, width = _image_size(config)
        return int(config.num_channels) * height * width

    def padding(self, config: Any) -> float | None:
        del config
        return None

    def sample_rows(self, config: Any, rows: int, generator: np.random.Generator) -> NDArray[np.float32]:
        return generator.random((rows, self.width(config)), np.float32)

    def flat_logprobs(self, model: Any, inputs_BD: Tensor) -> Tensor:
        images_BCHW = inputs_BD.reshape(-1, model.config.num_channels, *_image_size(model.config))
        logprobs_BV: Tensor = model(pixel_values=images_BCHW).logits.log_softmax(-1)
        return logprobs_BV

    def fitted(self, config: Any, shape: DataShape) -> Any:
        _require_channels(config.num_channels, shape)
        changed = copy.deepcopy(config)
        for name, value in _fitting(shape).items():
            setattr(changed, name, value)
        return changed

    def output_order(self, config: Any, shape: DataShape) -> list[int] | None:
        """By the names of the classes."""
        return class_order([name for _, name in sorted(config.id2label.items())], shape.details["classes"])

    def narrowed(self, config: Mapping[str, Any], hidden_sizes: tuple[int, ...]) -> dict[str, Any]:
        section = _section(config).narrowed(hidden_sizes)
        return {**config, "hidden_sizes": list(section.hidden_sizes), "embedding_size": section.embedding_size}

    def tensors(self, config: Mapping[str, Any]) -> dict[str, int]:
        return _tensors(_section(config), int(config["num_channels"]), len(config.get("id2label") or ()))

    def channel_groups(self, config: Mapping[str, Any]) -> tuple[ChannelGroup, ...]:
        """What each stage gives, which all its blocks add to; then what lies inside each block."""
        section = _section(config)
        return (*_streams(section), *_insides(section))

    def require_training(self, settings: ZeroSettings, where: str) -> None:
        """Batch norm in 16 bits would round its running statistics at every step, and a block that is computed again
        would count its rows twice.
        """
        if settings.precision == "fp16" or (settings.precision == "bf16" and settings.zero_stage > 0):
            raise InputError(
                f"{where}.precision: found {settings.precision!r} with zero_stage {settings.zero_stage}, which keeps "
                "batch norm's running statistics in 16 bits; expected fp32, or bf16 with zero_stage 0"
            )
        if settings.activation_checkpointing:
            raise InputError(
                f"{where}.activation_checkpointing: found true; expected false: blocks with batch norm are not "
                "computed again. Give a smaller micro_batch_size"
            )


def _fitting(shape: DataShape) -> dict[str, Any]:
    """What a configuration has of the data."""
    classes = shape.details["classes"]
    return {
        "image_size": [int(shape.details["height"]), int(shape.details["width"])],
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def _section(config: Mapping[str, Any]) -> ResNet:
    """Of a config.json.

    Raises:
        InputError: it is not one of a ResNet.
        KeyError: a field is missing.
    """
    names = ("embedding_size", "hidden_sizes", "depths", "layer_type", "downsample_in_first_stage")
    return ResNet.parse({name: config[name] for name in names}, "config.json")


def _image_size(config: Any) -> tuple[int, int]:
    """Height and width.

    Raises:
        InputError: the configuration names none, as those on the Hub do not.
    """
    found = config.to_dict().get("image_size")
    if found is None:
        raise InputError(
            "config.json: no image_size, so that rows of it are not known; expected a ResNet that was fitted to data: "
            "give it as train.model {kind: pretrained}"
        )
    height, width = found
    return int(height), int(width)


def _require_channels(channels: int, shape: DataShape) -> None:
    if channels != int(shape.details["channels"]):
        raise InputError(
            f"config.json: num_channels is {channels}, the images have {shape.details['channels']}; expected "
            f"data.channels: {channels}"
        )


# --- sizes ----------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """One of them, with the norm behind it."""

    module: str
    inputs: int
    outputs: int
    kernel: int  # edge
    halvings: int  # of the image's edges, up to what it gives
    activated: bool = True  # whether an activation follows, the block's own included


def _convolutions(section: ResNet, channels: int) -> Iterator[Convolution]:
    yield Convolution(STEM, channels, section.embedding_size, STEM_KERNEL, 1)
    inputs, halvings = section.embedding_size, POOLED
    for stage, (outputs, depth) in enumerate(zip(section.hidden_sizes, section.depths, strict=True)):
        for block in range(depth):
            name, before = _block(stage, block), halvings
            if block == 0:
                halvings += stage > 0 or section.downsample_in_first_stage
                if _has_shortcut(section, stage):
                    yield Convolution(f"{name}.shortcut", inputs, outputs, 1, halvings, activated=False)
            inside, layer = outputs // REDUCTION, f"{name}.layer"
            if section.layer_type == "basic":
                yield Convolution(f"{layer}.0", inputs, outputs, 3, halvings)
                yield Convolution(f"{layer}.1", outputs, outputs, 3, halvings)
            else:
                yield Convolution(f"{layer}.0", inputs, inside, 1, before)
                yield Convolution(f"{layer}.1", inside, inside, 3, halvings)
                yield Convolution(f"{layer}.2", inside, outputs, 1, halvings)
            inputs = outputs


def _tensors(section: ResNet, channels: int, outputs: int) -> dict[str, int]:
    """Numbers in each parameter, by name."""
    found = dict[str, int]()
    for each in _convolutions(section, channels):
        found[f"{each.module}.convolution.weight"] = each.outputs * each.inputs * each.kernel**2
        found |= {f"{each.module}.normalization.{part}": each.outputs for part in ("weight", "bias")}
    return found | {f"{HEAD}.weight": outputs * section.hidden_sizes[-1], f"{HEAD}.bias": outputs}


def _size(section: ResNet, shape: DataShape, tensors: Mapping[str, int]) -> ModelSize:
    """Beside the tensors upper bounds of the numbers of a row that lie ready for the backward pass: the image; what
    each convolution gives, as its norm is given it, and what each activation gives; and which pixels max pooling took.
    And of those that are there at once without one.
    """
    hidden = section.hidden_sizes[-1]
    channels, height, width = (int(shape.details[name]) for name in ("channels", "height", "width"))

    def pixels(halvings: int) -> int:
        """Of a convolution or pooling in steps of two pixels, whose padding is half its kernel."""
        return -(-height // (1 << halvings)) * -(-width // (1 << halvings))

    convolutions = list(_convolutions(section, channels))
    kept = channels * pixels(0) + (1 + INDEX_NUMBERS) * section.embedding_size * pixels(POOLED)
    kept += sum((1 + each.activated) * each.outputs * pixels(each.halvings) for each in convolutions)
    given = [channels * pixels(0), *(each.outputs * pixels(each.halvings) for each in convolutions)]
    kernels = [(tensors[f"{each.module}.convolution.weight"], pixels(each.halvings)) for each in convolutions]
    return ModelSize(
        family="resnet", hidden=hidden, intermediate=max(section.hidden_sizes), layers=len(section.hidden_sizes),
        heads=1, query_width=hidden, key_width=hidden, places=1, outputs=tensors[f"{HEAD}.bias"], predictions=1,
        tensors=tuple(tensors.values()), kept=kept,
        peak=max(2 * before + 3 * after for before, after in pairwise(given)),  # a sum or two, a norm, an activation
        multiplied_again=sum(n * (times - 1) for n, times in kernels),
    )  # fmt: skip


# --- channels -------------------------------------------------------------------------------------


def _block(stage: int, block: int) -> str:
    return f"{STAGES}.{stage}.layers.{block}"


def _has_shortcut(section: ResNet, stage: int) -> bool:
    """Whether a stage's first block has a convolution beside its layers."""
    return stage > 0 or not section.stem_goes_on


def _streams(section: ResNet) -> Iterator[ChannelGroup]:
    last = 1 if section.layer_type == "basic" else 2  # of a block's convolutions
    stages = len(section.hidden_sizes)
    for stage, (channels, depth) in enumerate(zip(section.hidden_sizes, section.depths, strict=True)):
        given = [f"{_block(stage, block)}.layer.{last}" for block in range(depth)]
        given += [f"{_block(stage, 0)}.shortcut"] if _has_shortcut(section, stage) else [STEM]
        read = [f"{_block(stage, block)}.layer.0" for block in range(_has_shortcut(section, stage), depth)]
        if stage + 1 < stages:
            read += [f"{_block(stage + 1, 0)}.{part}" for part in ("layer.0", "shortcut")]
        into = [f"{name}.convolution" for name in read] + ([HEAD] if stage + 1 == stages else [])
        yield ChannelGroup(channels, f"{STAGES}.{stage}", _with_norms(given), tuple(into))


def _insides(section: ResNet) -> Iterator[ChannelGroup]:
    for stage, (outputs, depth) in enumerate(zip(section.hidden_sizes, section.depths, strict=True)):
        basic = section.layer_type == "basic"
        for block in range(depth):
            for place in range(1 if basic else 2):
                name, after = (f"{_block(stage, block)}.layer.{number}" for number in (place, place + 1))
                channels = outputs if basic else outputs // REDUCTION
                yield ChannelGroup(channels, name, _with_norms([name]), (f"{after}.convolution",))


def _with_norms(names: list[str]) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("convolution", "normalization"))


FAMILY = ResNetFamily()
