"""Text that the teacher wrote from the beginnings of train rows: its key, its index, and rows of it by id.

Students that train on it learn the teacher's distribution over whole sequences (arXiv 1606.07947).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import pyarrow as pa

from overproof.artifacts import Artifact
from overproof.config import Generate, Recipe
from overproof.config.base import Precision
from overproof.data.manifest import shard_schema
from overproof.data.row_files import Source
from overproof.data.token_parts import text_columns
from overproof.distill.row_cache import CacheIndex, CacheKey, RowCache, cache_key_fields

GENERATION_KEY = (1 << 63) + 1  # of the random numbers: no epoch of an order has it, nor have the cache's draws


class TextKey(CacheKey):
    """All that the text follows from."""

    LABELS: ClassVar[dict[str, str]] = CacheKey.LABELS | {
        "prompt_tokens": "prompt (tokens of a row)",
        "temperature": "temperature",
        "precision": "precision",
    }
    prompt_tokens: int
    temperature: float  # 0: the likeliest token
    precision: Precision = "fp32"

    @property
    def tokens(self) -> int:
        """Tokens written in a row."""
        return self.positions + 1 - self.prompt_tokens

    @property
    def schema(self) -> pa.Schema:
        """``sample_id`` int64, and the row's P + 1 ``tokens``, those of the prompt among them, as a shard has them."""
        return text_cache_schema(self.positions, self.outputs)


def text_cache_schema(positions: int, outputs: int) -> pa.Schema:
    """The columns of a file."""
    return shard_schema(tuple(column for column in text_columns(positions, outputs) if column.name == "tokens"))


def text_key(recipe: Recipe, prepared: Artifact, trained: Artifact) -> TextKey:
    """The key of a recipe's text with this data and this teacher."""
    settings = generate_settings(recipe)
    return TextKey(
        **cache_key_fields(recipe.seed, prepared, trained),
        prompt_tokens=settings.prompt_tokens,
        temperature=settings.temperature,
        precision=settings.precision,
    )


def generate_settings(recipe: Recipe) -> Generate:
    """The recipe's section `generate`, which there is where the stage runs."""
    assert recipe.generate is not None
    return recipe.generate


class TextIndex(CacheIndex[TextKey]):
    """The content of ``text.json``."""

    FILE = "text.json"
    STAGE = "generate"
    DESCRIPTION = "the teacher's text"
    format: Literal[1] = 1


class TeacherText(RowCache[TextKey]):
    """The tokens of train rows as the teacher wrote them: {"tokens": (B, P + 1)}."""

    def __init__(self, source: Source) -> None:
        """Open the directory.

        Raises:
            InputError: there is no index.
        """
        super().__init__(source, TextIndex.read(source), ("tokens",))
