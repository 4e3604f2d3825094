"""The teacher's cached targets: what they belong to, and rows of them by id, straight from the mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from overproof.artifact import Artifact
from overproof.data.manifest import MANIFEST, Manifest
from overproof.data.read import Columns, Mapped, open_shard
from overproof.distill.columns import Layout
from overproof.errors import InputError
from overproof.files import read_json
from overproof.recipe import Recipe, Scheme

INDEX = "cache.json"
TEACHER = "model/model.safetensors"  # within the artifact of `train`


class Identity(BaseModel):
    """All that a cache's targets follow from; which rows it covers beside."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    teacher_sha256: str  # of model.safetensors
    tokenizer_sha256: str | None
    kind: Literal["text", "digits"]
    outputs: int
    positions: int
    rows_per_group: int
    manifest_sha256: str
    scheme: Annotated[Scheme, Field(discriminator="kind")]
    temperatures: tuple[float, ...]  # ascending; 1.0 is among them
    seed: int

    @property
    def layout(self) -> Layout:
        return Layout(self.scheme, self.kind == "text", self.positions, self.outputs, len(self.temperatures))


def identity(recipe: Recipe, prepared: Artifact, trained: Artifact) -> Identity:
    """Of the cache that a recipe asks for, with this data and this teacher."""
    manifest = Manifest.read(prepared.local())
    return Identity(
        teacher_sha256=trained.record.files[TEACHER].sha256,
        tokenizer_sha256=manifest.tokenizer_sha256,
        kind=manifest.kind,
        outputs=manifest.outputs,
        positions=manifest.positions,
        rows_per_group=manifest.rows_per_group,
        manifest_sha256=prepared.record.files[MANIFEST].sha256,
        scheme=recipe.cache.scheme,
        temperatures=tuple(sorted({1.0, *recipe.cache.temperatures})),
        seed=recipe.seed,
    )


NAMES = {
    "teacher_sha256": "teacher (model.safetensors)",
    "tokenizer_sha256": "tokenizer",
    "kind": "kind of data",
    "outputs": "number of outputs",
    "positions": "packing (positions in a row)",
    "rows_per_group": "packing (rows in a row group)",
    "manifest_sha256": "prepared data (manifest.json)",
    "scheme": "scheme",
    "temperatures": "temperatures",
    "seed": "seed",
}


class CacheFile(BaseModel):
    """One Parquet file and the train row groups it holds, in the order of its row groups."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    groups: tuple[int, ...]


class CacheIndex(BaseModel):
    """The content of ``cache.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[2] = 2
    identity: Identity
    rows: int
    files: tuple[CacheFile, ...]

    @classmethod
    def read(cls, root: Path) -> CacheIndex:
        """Read ``root/cache.json``.

        Raises:
            InputError: it is missing or not of this format.
        """
        return read_json(cls, Path(root) / INDEX)

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

    def check(self, expected: Identity) -> None:
        """Refuse a cache of another teacher, tokenizer, data, packing or scheme.

        Raises:
            InputError: the first difference, most telling first.
        """
        for field, what in NAMES.items():
            found, wanted = _words(getattr(self.identity, field)), _words(getattr(expected, field))
            if found != wanted:
                raise InputError(
                    f"{INDEX}: made with another {what}: {found}, expected {wanted}; "
                    "run `cache` again for this teacher and this data"
                )


def _words(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:12]}…"
    return str(value.model_dump()) if isinstance(value, BaseModel) else str(value)


class Targets:
    """The cached targets of train rows by ``sample_id``. Picklable: what it opened stays behind."""

    def __init__(self, root: Path, columns: Sequence[str] | None = None) -> None:
        """Open a cache directory; columns default to those a student learns from.

        Raises:
            InputError: there is no index.
        """
        self.root = Path(root)
        self.index = CacheIndex.read(self.root)
        self.layout = self.index.identity.layout
        self.columns = tuple(columns) if columns is not None else self.layout.loss_columns
        groups = np.array([group for file in self.index.files for group in file.groups], np.int64)
        self._groups, by_group = np.sort(groups), np.argsort(groups, kind="stable")
        self._file = np.repeat(np.arange(len(self.index.files)), [len(file.groups) for file in self.index.files])[
            by_group
        ]
        self._place = np.concatenate([np.arange(len(file.groups)) for file in self.index.files])[by_group]
        self._mapped: dict[int, Mapped] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    def require(self, sample_ids: NDArray[np.int64]) -> None:
        """Refuse rows that are not covered.

        Raises:
            InputError: naming the first.
        """
        groups = np.unique(np.asarray(sample_ids) // self.index.identity.rows_per_group)
        missing = groups[~np.isin(groups, self._groups)]
        if len(missing):
            raise InputError(
                f"{self.root}: {len(missing)} of {len(groups)} row groups asked for are not in the teacher's cache "
                f"(the first is {missing[0]}), which covers {self.index.rows} rows; raise cache.rows, "
                "or set it to null to cover every row"
            )

    def take(self, sample_ids: NDArray[np.int64]) -> Columns:
        """Targets in the order given, shaped as ``Layout.decode`` has it.

        Raises:
            InputError: a row is not covered, or a file is not what the index says.
        """
        ids = np.asarray(sample_ids, np.int64)
        self.require(ids)
        group, row = np.divmod(ids, self.index.identity.rows_per_group)
        at = np.searchsorted(self._groups, group)
        file, row = self._file[at], row + self._place[at] * self.index.identity.rows_per_group
        taken: Columns = {}
        for number in np.unique(file):
            here = np.flatnonzero(file == number)
            mapped = self._map(int(number))
            if not np.array_equal(mapped.take("sample_id", row[here]), ids[here]):
                path = self.root / self.index.files[number].path
                raise InputError(f"{path}: does not hold the rows that {INDEX} says; run `cache` again")
            for name in self.columns:
                values = mapped.take(name, row[here])
                taken.setdefault(name, np.empty((len(ids), *values.shape[1:]), values.dtype))[here] = values
        return {name: self.layout.decode(name, values) for name, values in taken.items()}

    def _map(self, number: int) -> Mapped:
        if number not in self._mapped:
            listed, expected = self.index.files[number], self.layout.schema
            path = self.root / listed.path
            file = open_shard(path)
            if not file.schema_arrow.equals(expected, check_metadata=True):
                found, wanted = (
                    ", ".join(f"{f.name} {f.type}" for f in names) for names in (file.schema_arrow, expected)
                )
                raise InputError(f"{path}: columns are {found}; expected {wanted}: run `cache` again")
            if file.num_row_groups != len(listed.groups):
                raise InputError(
                    f"{path}: {file.num_row_groups} row groups, {INDEX} lists {len(listed.groups)}: run `cache` again"
                )
            rows_per_group = self.index.identity.rows_per_group
            self._mapped[number] = Mapped.of(path, file, ("sample_id", *self.columns), rows_per_group)
        return self._mapped[number]
