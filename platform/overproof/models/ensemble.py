"""Several classifiers as one model: a directory that `overproof ensemble` writes, a teacher as it is, and one file.

``Ensemble`` is what ensembles of other models share with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from overproof.errors import InputError
from overproof.models.base import ArrayFamily, DataShape, LayerNames, ModelFamily
from overproof.models.sizes import ModelSize, family_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Ensemble:
    """See ``ModelFamily`` and ``ComposedFamily``: what holds of its members holds of it."""

    section = None
    kind: str  # in the registry
    tasks: tuple[str, ...]
    architectures: tuple[str, ...]
    members: str
    combines: tuple[str, ...]
    attention = "sdpa"
    varlen = False
    plain_logits = False
    names = LayerNames(layers="layers", embeddings="embeddings", output="", feed_forward=())

    def configuration(self, section: Any, shape: DataShape) -> Any:
        del section, shape
        raise InputError("train.model: an ensemble is read from the directory that `overproof ensemble` writes")

    def model_class(self) -> type[PreTrainedModel]:
        from overproof.models import ensemble_module

        found: type[PreTrainedModel] = getattr(ensemble_module, self.architectures[0])
        return found

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
            widest, family=self.kind, layers=sum(size.layers for size in sizes),
            tensors=tuple(numbers for size in sizes for numbers in size.tensors),
            looked_up=sum(size.looked_up for size in sizes), kept=sum(size.kept for size in sizes),
            peak=max(size.peak for size in sizes),
            multiplied_again=sum(size.multiplied_again for size in sizes),
        )  # fmt: skip

    def parts_of(self, config: Any) -> Sequence[tuple[Any, Any]]:
        found = list[tuple[Any, Any]]()
        for settings in config.members:
            _, family = family_of(settings, "members")
            model_class: Any = family.model_class()
            found.append((model_class.config_class.from_dict(dict(settings)), family))
        return found

    def settings(self, configs: Sequence[Any]) -> dict[str, Any]:
        """Of the whole, from its members' configurations."""
        raise NotImplementedError

    def parts(self, model: Any) -> Sequence[PreTrainedModel]:
        return list(model.members)

    def renewed(self, model: Any, parts: Sequence[PreTrainedModel]) -> PreTrainedModel:
        from torch import nn

        model.members = nn.ModuleList(parts)
        model.config.members = [part.config.to_dict() | {"architectures": [type(part).__name__]} for part in parts]
        for name, value in self.settings([part.config for part in parts]).items():
            setattr(model.config, name, value)
        found: PreTrainedModel = model
        return found


class EnsembleFamily(Ensemble):
    """See ``ArrayFamily``, too."""

    kind = "ensemble"
    tasks = (
        "image_classification", "text_classification", "multi_label_text_classification", "tabular_classification",
        "tabular_regression",
    )  # fmt: skip
    architectures = ("OverproofEnsemble",)
    members = "classifiers of the same classes, in the same order, that read the same rows"
    combines = ("probabilities", "logits", "votes")

    def accepts(self, family: ModelFamily) -> bool:
        return isinstance(family, ArrayFamily)

    def alike(self, config: Any, family: Any) -> dict[str, Any]:
        told = {name: getattr(config, name) for name in ("num_labels", "problem_type", "id2label")}
        return told | {"numbers in a row": family.width(config), "end of a row": family.padding(config)}

    def settings(self, configs: Sequence[Any]) -> dict[str, Any]:
        return {name: getattr(configs[0], name) for name in ("problem_type", "id2label")}

    def layer_memory(self, size: ModelSize, element_bytes: int) -> int:
        """As a layer of an encoder, and an equal part of what members keep whose layers are not alike."""
        kept = 8 * size.hidden + 2 * size.intermediate + 4 - (-size.kept // size.layers)
        return element_bytes * kept + 4 * size.heads

    def outer_memory(self, size: ModelSize, element_bytes: int) -> int:
        return 2 * element_bytes * size.hidden

    def width(self, config: Any) -> int:
        settings, family = self._first(config)
        return family.width(settings)

    def padding(self, config: Any) -> float | None:
        settings, family = self._first(config)
        return family.padding(settings)

    def sample_rows(self, config: Any, rows: int, generator: np.random.Generator) -> NDArray[np.float32]:
        settings, family = self._first(config)
        return family.sample_rows(settings, rows, generator)

    def _first(self, config: Any) -> tuple[Any, ArrayFamily]:
        (settings, family), *_ = self.parts_of(config)
        return settings, family

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


FAMILY = EnsembleFamily()
