"""Files of what a teacher computed for train rows: their key, their index, and a reader that maps them.

Two kinds build on it: `target_cache` (its distribution at each position), `teacher_text` (rows that it wrote).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from overproof.artifacts import Artifact, local_folder
from overproof.data.columns import row_bytes
from overproof.data.manifest import MANIFEST, Manifest
from overproof.data.order import Order
from overproof.data.parquet_reader import Columns
from overproof.data.row_files import RowFile, Source, describe_source, open_rows
from overproof.engines.served_teacher import ServedTeacher
from overproof.errors import InputError
from overproof.files import read_json
from overproof.models.pretrained import weights_sha256

FILE_BYTES = 1 << 30  # of a file, about: an actor writes one at a time, and one that is lost loses no more
TEACHER = "model"  # the Hugging Face directory within the artifact of `train`


def teacher_folder(trained: Artifact) -> Path:
    """The teacher's Hugging Face directory on this machine."""
    return trained.local(f"{TEACHER}/") / TEACHER


class CacheKey(BaseModel):
    """All that the content follows from; each kind of cache adds its own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    LABELS: ClassVar[dict[str, str]] = {  # the most telling first
        "teacher_sha256": "teacher (its weights)",
        "tokenizer_sha256": "tokenizer",
        "task": "task",
        "outputs": "number of outputs",
        "positions": "packing (positions in a row)",
        "rows_per_group": "packing (rows in a row group)",
        "manifest_sha256": "prepared data (manifest.json)",
        "seed": "seed",
    }
    teacher_sha256: str  # of its weights; of one that is served, see ``ServedTeacher``
    tokenizer_sha256: str | None
    task: str
    outputs: int
    positions: int
    rows_per_group: int
    manifest_sha256: str
    seed: int

    @property
    def schema(self) -> pa.Schema:
        """The columns of a file, each flat and of one width; none may be null."""
        raise NotImplementedError

    def decode(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """A column of a file in the shape it is read in."""
        del name
        return values


def teacher_sha256(trained: Artifact) -> str:
    """Of a teacher's weights; of one that is served, of what is known of it."""
    files = trained.record.files
    if ServedTeacher.FILE in files:
        return ServedTeacher.read(trained.local(ServedTeacher.FILE)).sha256
    return weights_sha256(files, TEACHER)


def cache_key_fields(seed: int, prepared: Artifact, trained: Artifact) -> dict[str, Any]:
    """The fields of ``CacheKey``, of this data and this teacher."""
    manifest = Manifest.read(prepared)
    return {
        "teacher_sha256": teacher_sha256(trained),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "task": manifest.task,
        "outputs": manifest.outputs,
        "positions": manifest.positions,
        "rows_per_group": manifest.rows_per_group,
        "manifest_sha256": prepared.record.files[MANIFEST].sha256,
        "seed": seed,
    }


class CachedFile(BaseModel):
    """One Parquet file, and the train row groups it holds in their order."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    groups: tuple[int, ...]


def plan_cached_files(
    manifest: Manifest, order: Order, rows: int | None, row_bytes: int, file_bytes: int = FILE_BYTES
) -> tuple[CachedFile, ...]:
    """The row groups that the first ``rows`` rows of the order touch, in files of ``file_bytes`` at most, of one train
    shard each; one without any has no file.
    """
    most = max(1, file_bytes // (row_bytes * order.rows_per_group))
    wanted = order.rows_at(0, order.rows if rows is None else min(rows, order.rows))
    groups = np.unique(wanted // order.rows_per_group)
    files, first = [], 0
    for number, shard in enumerate(manifest.splits["train"].shards):
        last = first + shard.rows // order.rows_per_group
        in_shard = groups[(first <= groups) & (groups < last)]
        for part in range(0, len(in_shard), most):
            named = f"{number:05d}" + (f"-{part // most:03d}" if len(in_shard) > most else "")
            files.append(CachedFile(path=f"{named}.parquet", groups=tuple(in_shard[part : part + most].tolist())))
        first = last
    return tuple(files)


KeyT = TypeVar("KeyT", bound=CacheKey)


class CacheIndex(BaseModel, Generic[KeyT]):
    """The index beside the files: their key, and which rows they hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    FILE: ClassVar[str]  # name of the index
    STAGE: ClassVar[str]  # which writes it, and the section of the recipe that it reads
    DESCRIPTION: ClassVar[str]  # in messages
    identity: KeyT
    rows: int
    files: tuple[CachedFile, ...]

    @classmethod
    def of(cls, identity: KeyT, manifest: Manifest, rows: int | None) -> Self:
        """Of the first ``rows`` rows in training order."""
        files = plan_cached_files(manifest, manifest.order(identity.seed), rows, row_bytes(identity.schema))
        covered = sum(len(file.groups) for file in files) * manifest.rows_per_group
        return cls(identity=identity, rows=covered, files=files)

    @classmethod
    def read(cls, source: Source) -> Self:
        """Read it from beside the files.

        Raises:
            InputError: it is missing or not of this format.
        """
        return read_json(cls, local_folder(source, cls.FILE) / cls.FILE)

    def check(self, expected: KeyT) -> None:
        """Refuse files made by another teacher, of other data or with other settings.

        Raises:
            InputError: the first difference, most telling first.
        """
        for field, label in self.identity.LABELS.items():
            found, wanted = _format_value(getattr(self.identity, field)), _format_value(getattr(expected, field))
            if found != wanted:
                raise InputError(
                    f"{self.FILE}: made with another {label}: {found}, expected {wanted}; "
                    f"run `{self.STAGE}` again for this teacher and this data"
                )


def _format_value(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:12]}…"
    return str(value.model_dump()) if isinstance(value, BaseModel) else str(value)


class RowCache(Generic[KeyT]):
    """Cached rows by ``sample_id``. Picklable: open files are not pickled with it."""

    def __init__(self, source: Source, index: CacheIndex[KeyT], columns: Sequence[str]) -> None:
        self.source, self.index, self.columns = source, index, tuple(columns)
        self.where = describe_source(source)
        files = index.files
        groups = np.array([group for file in files for group in file.groups], np.int64)
        self._groups, by_group = np.sort(groups), np.argsort(groups, kind="stable")
        self._file_of_group = np.repeat(np.arange(len(files)), [len(file.groups) for file in files])[by_group]
        self._index_in_file = np.concatenate([np.arange(len(file.groups)) for file in files])[by_group]
        self._open: dict[int, RowFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def require(self, sample_ids: NDArray[np.int64]) -> None:
        """Refuse rows that the cache does not hold.

        Raises:
            InputError: naming the first.
        """
        index, groups = self.index, np.unique(np.asarray(sample_ids) // self.index.identity.rows_per_group)
        missing = groups[~np.isin(groups, self._groups)]
        if len(missing):
            raise InputError(
                f"{self.where}: {len(missing)} of {len(groups)} row groups needed are not in {index.DESCRIPTION} "
                f"(the first is {missing[0]}), which covers {index.rows} rows; raise {index.STAGE}.rows, "
                "or set it to null to cover every row"
            )

    def take(self, sample_ids: NDArray[np.int64]) -> Columns:
        """The columns in the order given, shaped as ``CacheKey.decode`` has it.

        Raises:
            InputError: a row is not covered, or a file is not what the index says.
        """
        ids, identity = np.asarray(sample_ids, np.int64), self.index.identity
        self.require(ids)
        group, row = np.divmod(ids, identity.rows_per_group)
        at = np.searchsorted(self._groups, group)
        file, row = self._file_of_group[at], row + self._index_in_file[at] * identity.rows_per_group
        columns: Columns = {}
        for number in np.unique(file):
            in_file = np.flatnonzero(file == number)
            opened = self._open_file(int(number))
            if not np.array_equal(opened.take("sample_id", row[in_file]), ids[in_file]):
                raise self._invalid_file(int(number), f"does not hold the rows that {self.index.FILE} says;")
            for name in self.columns:
                values = opened.take(name, row[in_file])
                columns.setdefault(name, np.empty((len(ids), *values.shape[1:]), values.dtype))[in_file] = values
        return {name: identity.decode(name, values) for name, values in columns.items()}

    def _open_file(self, number: int) -> RowFile:
        if number not in self._open:
            listed, identity = self.index.files[number], self.index.identity

            def check(file: pq.ParquetFile) -> None:
                if not file.schema_arrow.equals(identity.schema, check_metadata=True):
                    found, wanted = (
                        ", ".join(f"{f.name} {f.type}" for f in names) for names in (file.schema_arrow, identity.schema)
                    )
                    raise self._invalid_file(number, f"columns are {found}; expected {wanted}:")
                if file.num_row_groups != len(listed.groups):
                    raise self._invalid_file(
                        number, f"{file.num_row_groups} row groups, {self.index.FILE} lists {len(listed.groups)}:"
                    )

            columns = ("sample_id", *self.columns)
            self._open[number] = open_rows(self.source, listed.path, columns, identity.rows_per_group, check)
        return self._open[number]

    def _invalid_file(self, number: int, fault: str) -> InputError:
        return InputError(f"{self.where}/{self.index.files[number].path}: {fault} run `{self.index.STAGE}` again")
