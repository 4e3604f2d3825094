"""The teacher's cached targets: their key, their index, and rows of them by id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from overproof.artifacts import Artifact
from overproof.config import Recipe, Scheme
from overproof.config.base import Precision
from overproof.data.row_files import Source
from overproof.distill.row_cache import CacheIndex, CacheKey, RowCache, cache_key_fields
from overproof.distill.target_codec import TargetLayout
from overproof.errors import InputError
from overproof.registry import TASKS


class TargetKey(CacheKey):
    """All that cached targets follow from."""

    LABELS: ClassVar[dict[str, str]] = CacheKey.LABELS | {
        "scheme": "scheme",
        "temperatures": "temperatures",
        "precision": "precision",
        "text_sha256": "text of the teacher (null: the data's own)",
    }
    scheme: Annotated[Scheme, Field(discriminator="kind")]
    temperatures: tuple[float, ...]  # ascending; 1.0 is among them
    precision: Precision = "fp32"
    text_sha256: str | None = None  # of the text that the teacher wrote in place of the rows

    @property
    def layout(self) -> TargetLayout:
        column = TASKS[self.task].label_column
        return TargetLayout(self.scheme, column, self.positions, self.outputs, len(self.temperatures))

    @property
    def schema(self) -> pa.Schema:
        return self.layout.schema

    def decode(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        return self.layout.decode(name, values)


def target_key(
    recipe: Recipe, prepared: Artifact, trained: Artifact, teacher_text: Artifact | None = None
) -> TargetKey:
    """The key of a recipe's cache with this data and this teacher; of the teacher's text, where there is one."""
    return TargetKey(
        **cache_key_fields(recipe.seed, prepared, trained),
        scheme=recipe.cache.scheme,
        temperatures=tuple(sorted({1.0, *recipe.cache.temperatures})),
        precision=recipe.cache.precision,
        text_sha256=teacher_text.content_sha256 if teacher_text else None,
    )


class TargetIndex(CacheIndex[TargetKey]):
    """The content of ``cache.json``."""

    FILE = "cache.json"
    STAGE = "cache"
    DESCRIPTION = "the teacher's cache"
    format: Literal[2] = 2

    def require_temperature(self, temperature: float) -> None:
        """Refuse a temperature whose logsumexp was not kept.

        Raises:
            InputError: naming those there are.
        """
        if temperature not in self.identity.temperatures:
            raise InputError(
                f"temperature {temperature:g}: the teacher's cache holds {list(self.identity.temperatures)}; "
                "add it to cache.temperatures"
            )


class TargetCache(RowCache[TargetKey]):
    """The cached targets of train rows."""

    index: TargetIndex

    def __init__(self, source: Source, columns: Sequence[str] | None = None) -> None:
        """Open a cache directory; columns default to those a student learns from.

        Raises:
            InputError: there is no index.
        """
        index = TargetIndex.read(source)
        self.layout = index.identity.layout
        super().__init__(source, index, self.layout.loss_columns if columns is None else columns)
