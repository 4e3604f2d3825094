"""What is left of a convolutional model whose stages keep fewer channels, told from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from overproof.config.models import OfTeacher, Pruned, no_equal_layers
from overproof.models.base import ConvolutionalFamily, ModelFamily

if TYPE_CHECKING:
    from overproof.models.base import DataShape
    from overproof.models.sizes import ModelSize


def narrowed_config(config: Mapping[str, Any], student: OfTeacher, family: ConvolutionalFamily) -> dict[str, Any]:
    """The content of a config.json for what is left of its model.

    Raises:
        InputError: it has not as much, or something else than channels of stages is asked for.
    """
    teacher = f"a {(config.get('architectures') or ['?'])[0]}"
    if not isinstance(student, Pruned):
        raise no_equal_layers(student, teacher)
    return family.narrowed(config, student.stages(teacher))


def narrowed_size(config: Mapping[str, Any], student: Pruned, family: ModelFamily, shape: DataShape) -> ModelSize:
    """How large it is, fitted to the data.

    Raises:
        InputError: as ``narrowed_config``.
    """
    assert isinstance(family, ConvolutionalFamily)
    narrowed = narrowed_config(config, student, family)
    return family.directory_size(narrowed, family.tensors(narrowed), shape)
