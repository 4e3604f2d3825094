"""Several classifiers as one model: a directory that `overproof ensemble` writes, a teacher as it is, and one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from overproof.errors import InputError
from overproof.models.base import ArrayFamily, DataShape, LayerNames, ModelFamily
from overproof.models.sizes import ModelSize, family_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class _Member(ModelFamily, ArrayFamily, Protocol):
    """What a family of a member is."""


class EnsembleFamily:
    """See ``ModelFamily`` and ``ArrayFamily``: what holds of its members holds of it."""

    section = None
    tasks = (
        "image_classification", "text_classification", "multi_label_text_classification", "tabular_classification",
        "tabular_regression",
    )  # fmt: skip
    architectures = ("OverproofEnsemble",)
    attention = "sdpa"
    varlen = False
    plain_logits = False
    names = LayerNames(layers="layers", embeddings="embeddings", output="", feed_forward=())

    def configuration(self, section: Any, shape: DataShape) -> Any:
        del section, shape
        raise InputError("train.model: an ensemble is read from the directory that `overproof ensemble` writes")

    def model_class(self) -> type[PreTrainedModel]:
        from overproof.models.ensemble_module import OverproofEnsemble

        return OverproofEnsemble

    def untied(self, config: Any, names: list[str]) -> list[str]:
        """Of each member what its own family writes."""
        found = list[str]()
        for number, (settings, family) in enumerate(self.parts_of(config)):
            prefix = f"members.{number}."
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            found += [f"{prefix}{name}" for name in family.untied(settings, own)]
        return found

    def size(self, section: Any, shape: DataShape) -> ModelSize:
        del section, shape
        raise InputError("train.model: an ensemble is read from the directory that `overproof ensemble` writes")

    def directory_size(self, config: Mapping[str, Any], tensors: Mapping[str, int], shape: DataShape) -> ModelSize:
        """All members'; of the widths the largest."""
        sizes = list[ModelSize]()
        for number, settings in enumerate(config["members"]):
            _, family = family_of(settings, "members")
            prefix = f"members.{number}."
            own = {name.removeprefix(prefix): size for name, size in tensors.items() if name.startswith(prefix)}
            sizes.append(family.directory_size(settings, own, shape))
        widest = max(sizes, key=lambda size: size.hidden + size.intermediate)
        return replace(
            widest, family="ensemble", layers=sum(size.layers for size in sizes),
            tensors=tuple(numbers for size in sizes for numbers in size.tensors),
            looked_up=sum(size.looked_up for size in sizes), kept=sum(size.kept for size in sizes),
            peak=max(size.peak for size in sizes),
            multiplied_again=sum(size.multiplied_again for size in sizes),
        )  # fmt: skip

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """As a layer of an encoder, and an equal part of what members keep whose layers are not alike."""
        kept = 8 * size.hidden + 2 * size.intermediate + 4 - (-size.kept // size.layers)
        return element_bytes * kept + 4 * size.heads

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return 2 * element_bytes * size.hidden

    def width(self, config: Any) -> int:
        (settings, family), *_ = self.parts_of(config)
        return family.width(settings)

    def padding(self, config: Any) -> float | None:
        (settings, family), *_ = self.parts_of(config)
        return family.padding(settings)

    def sample_rows(self, config: Any, rows: int, generator: np.random.Generator) -> NDArray[np.float32]:
        (settings, family), *_ = self.parts_of(config)
        return family.sample_rows(settings, rows, generator)

    def flat_logprobs(self, model: Any, inputs_BD: Tensor) -> Tensor:
        import torch

        from overproof.models.encoder import MULTI_LABEL
        from overproof.models.ensemble_module import absent, combined

        asked = zip(self.parts_of(model.config), model.members, strict=True)
        logprobs_MBV = [family.flat_logprobs(member, inputs_BD) for (_, family), member in asked]
        if model.config.problem_type != MULTI_LABEL:
            return combined(logprobs_MBV, model.config.weights, model.config.combine)
        both_MBV2 = [torch.stack([absent(there_BV), there_BV], -1) for there_BV in logprobs_MBV]
        return combined(both_MBV2, model.config.weights, model.config.combine)[..., 1]

    def parts_of(self, config: Any) -> Sequence[tuple[Any, _Member]]:
        found = list[tuple[Any, _Member]]()
        for settings in config.members:
            _, family = family_of(settings, "members")
            model_class: Any = family.model_class()
            found.append((model_class.config_class.from_dict(dict(settings)), family))  # type: ignore[arg-type]
        return found

    def parts(self, model: Any) -> Sequence[PreTrainedModel]:
        return list(model.members)

    def renewed(self, model: Any, parts: Sequence[PreTrainedModel]) -> PreTrainedModel:
        from torch import nn

        model.members = nn.ModuleList(parts)
        model.config.members = [part.config.to_dict() | {"architectures": [type(part).__name__]} for part in parts]
        model.config.id2label = parts[0].config.id2label
        found: PreTrainedModel = model
        return found


FAMILY = EnsembleFamily()
