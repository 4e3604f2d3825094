"""The teacher's cached targets: how they are laid out in Parquet and read back by row id.

Shapes: B rows, P predictions in a row, V outputs, K kept for each prediction, L temperatures.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from overproof.data.read import Columns, open_shard, read_group
from overproof.errors import InputError
from overproof.files import read_json

INDEX = "cache.json"
TEACHER = "model/model.safetensors"  # within the artifact of `train`
GROUPS_KEPT = 8
UINT16_OUTPUTS = 1 << 16


class CacheFile(BaseModel):
    """One Parquet file and the train row groups it holds, in the order of its row groups."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    groups: tuple[int, ...]


class CacheIndex(BaseModel):
    """The content of ``cache.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    k: int
    temperatures: tuple[float, ...]  # ascending; 1.0 is among them
    outputs: int
    positions: int
    rows: int
    rows_per_group: int
    files: tuple[CacheFile, ...]
    teacher_sha256: str  # of model.safetensors
    tokenizer_sha256: str | None
    manifest_sha256: str

    @classmethod
    def read(cls, root: Path) -> CacheIndex:
        """Read ``root/cache.json``.

        Raises:
            InputError: it is missing or not of this format.
        """
        return read_json(cls, Path(root) / INDEX)

    def column(self, temperature: float) -> int:
        """The column of a temperature among the logsumexp.

        Raises:
            InputError: the cache has no such temperature.
        """
        if temperature not in self.temperatures:
            raise InputError(
                f"temperature {temperature:g}: the teacher's cache holds {list(self.temperatures)}; "
                "add it to cache.temperatures"
            )
        return self.temperatures.index(temperature)

    def check(self, teacher_sha256: str, manifest_sha256: str) -> None:
        """Refuse a cache made by another teacher or from other data.

        Raises:
            InputError: naming which of the two differs.
        """
        pairs = {
            "teacher (model.safetensors)": (self.teacher_sha256, teacher_sha256),
            "prepared data (manifest.json)": (self.manifest_sha256, manifest_sha256),
        }
        for what, (found, expected) in pairs.items():
            if found != expected:
                raise InputError(
                    f"{INDEX}: made with another {what}: sha256 {found[:12]}…, expected {expected[:12]}…; "
                    "run `cache` again for this teacher and this data"
                )


def schema(positions: int, k: int, temperatures: int, outputs: int) -> pa.Schema:
    """The columns of a cache file; none may be null."""
    types = {
        "sample_id": pa.int64(),
        "indices": pa.list_(pa.uint16() if outputs <= UINT16_OUTPUTS else pa.uint32(), positions * k),
        "logprobs": pa.list_(pa.float16(), positions * k),
        "tail": pa.list_(pa.float32(), positions),
        "logsumexp": pa.list_(pa.float32(), positions * temperatures),
    }
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in types.items()])


def position_bytes(k: int, temperatures: int, outputs: int) -> int:
    """Bytes of one prediction's targets before they are compressed."""
    index = 2 if outputs <= UINT16_OUTPUTS else 4
    return k * (index + 2) + 4 + 4 * temperatures


class Targets:
    """The cached targets of train rows by ``sample_id``. Picklable: what it opened stays behind."""

    def __init__(self, root: Path) -> None:
        """Open a cache directory.

        Raises:
            InputError: there is no index.
        """
        self.root = Path(root)
        self.index = CacheIndex.read(self.root)
        self._places = {
            group: (file.path, place) for file in self.index.files for place, group in enumerate(file.groups)
        }
        self._files: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[int, Columns] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_groups": OrderedDict()}

    def require(self, sample_ids: NDArray[np.int64]) -> None:
        """Refuse rows that are not covered.

        Raises:
            InputError: naming the first.
        """
        groups = np.unique(np.asarray(sample_ids) // self.index.rows_per_group)
        missing = [int(group) for group in groups if int(group) not in self._places]
        if missing:
            raise InputError(
                f"{self.root}: {len(missing)} of {len(groups)} row groups asked for are not in the teacher's cache "
                f"(the first is {missing[0]}), which covers {self.index.rows} rows; raise cache.rows, "
                "or set it to null to cover every row"
            )

    def take(self, sample_ids: NDArray[np.int64]) -> Columns:
        """Targets in the order given: indices (B,P,K) int64, logprobs (B,P,K), tail (B,P), logsumexp (B,P,L) float32.

        Raises:
            InputError: a row is not covered, or a file is not what the index says.
        """
        ids = np.asarray(sample_ids, np.int64)
        self.require(ids)
        group, place = np.divmod(ids, self.index.rows_per_group)
        taken: Columns = {}
        for key in np.unique(group):
            here = np.flatnonzero(group == key)
            for name, values in self._group(int(key)).items():
                out = taken.setdefault(name, np.empty((len(ids), *values.shape[1:]), values.dtype))
                out[here] = values[place[here]]
        shape = (len(ids), self.index.positions)
        return {
            "indices": taken["indices"].astype(np.int64).reshape(*shape, self.index.k),
            "logprobs": taken["logprobs"].astype(np.float32).reshape(*shape, self.index.k),
            "tail": taken["tail"].reshape(shape),
            "logsumexp": taken["logsumexp"].reshape(*shape, len(self.index.temperatures)),
        }

    def _group(self, group: int) -> Columns:
        if group not in self._groups:
            path, place = self._places[group]
            columns = read_group(self._file(path), place, self._file(path).schema_arrow.names)
            first = group * self.index.rows_per_group
            if not np.array_equal(columns.pop("sample_id"), np.arange(first, first + self.index.rows_per_group)):
                raise InputError(
                    f"{self.root / path}: row group {place} does not hold rows {first}…; run `cache` again"
                )
            self._groups[group] = columns
            if len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]

    def _file(self, path: str) -> pq.ParquetFile:
        if path not in self._files:
            index = self.index
            file = open_shard(self.root / path)
            expected = schema(index.positions, index.k, len(index.temperatures), index.outputs)
            if not file.schema_arrow.equals(expected):
                found, wanted = (
                    ", ".join(f"{f.name} {f.type}" for f in names) for names in (file.schema_arrow, expected)
                )
                raise InputError(f"{self.root / path}: columns are {found}; expected {wanted}: run `cache` again")
            self._files[path] = file
        return self._files[path]
