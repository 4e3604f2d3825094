"""Writing shards and reading their rows back by id."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_shards import GROUP, ROWS, VOCABULARY, T, write_tiny_text

from overproof.data import parquet_reader
from overproof.data.manifest import MANIFEST, Column, Manifest, shard_schema
from overproof.data.order import Order
from overproof.data.parquet_reader import Shards, table_to_numpy
from overproof.data.parquet_writer import parquet_bytes, to_table
from overproof.data.row_files import open_shard
from overproof.data.token_parts import text_columns
from overproof.errors import InputError
from overproof.files import file_sha256


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_text(tmp_path)


def test_a_shard_is_what_its_entry_says(root: Path) -> None:
    manifest = Manifest.read(root)
    assert (manifest.groups, manifest.positions, manifest.outputs) == (16, T, VOCABULARY)
    for shard in manifest.splits["train"].shards:
        path = root / shard.path
        assert shard.sha256 == file_sha256(path)
        assert shard.size_bytes == path.stat().st_size
        assert shard.predictions == shard.rows * T
        found = pq.ParquetFile(path)
        sizes = {found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)}
        assert sizes == {GROUP}
        assert found.schema_arrow.equals(manifest.schema)


def test_rows_come_in_the_order_asked_for(root: Path) -> None:
    shards = Shards(root, "train", ("sample_id", "tokens", "length"))
    ids = np.random.default_rng(0).permutation(sum(ROWS)).repeat(2)
    taken = shards.take(ids)
    assert np.array_equal(taken["sample_id"], ids)
    assert np.array_equal(taken["tokens"], ids[:, None] * 100 + np.arange(T + 1))
    assert taken["tokens"].dtype == np.uint16
    assert shards.rows == sum(ROWS)
    assert list(Shards(root, "validation").take(np.array([5, 0]))) == ["tokens", "length"]


def test_mapped_values_are_those_that_parquet_gives(root: Path) -> None:
    """In every row group, the last of which is shorter, of tokens, numbers and pixels alike."""
    for split, shard in ((split, shard) for split, of in Manifest.read(root).splits.items() for shard in of.shards):
        table = table_to_numpy(pq.read_table(root / shard.path))
        shards = Shards(root, split, list(table))
        found = shards.take(table["sample_id"])
        for name, values in table.items():
            assert found[name].dtype == values.dtype
            assert np.array_equal(found[name], values)


@pytest.mark.parametrize(
    "how",
    [
        {"compression": "zstd"},
        {"use_dictionary": ["length"]},
        {"max_rows_per_page": 2},
        {"column_encoding": {"length": "DELTA_BINARY_PACKED"}},
    ],
    ids=str,
)
def test_values_that_do_not_lie_plain_are_refused(root: Path, how: dict[str, Any]) -> None:
    path = root / "train/00000.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pq.read_table(path), path, row_group_size=GROUP, **(plain | how))
    with pytest.raises(InputError, match=r"is not plain values of one page in a row group: prepare again"):
        Shards(root, "train").take(np.array([0]))


@pytest.mark.parametrize("ahead_bytes", [1, 500, 1 << 20])
def test_planned_steps_are_the_rows_of_each_step(root: Path, ahead_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each of two ranks, from inside the first epoch into the third."""
    monkeypatch.setattr(parquet_reader, "READ_AHEAD_BYTES", ahead_bytes)
    shards, order = Shards(root, "train", ("sample_id", "tokens")), Order(16, GROUP, 3)
    for rank in range(2):
        steps = list(shards.steps(order, 12, 3, 14, rank, 2))
        planned = [order.step_rows(step, 12, rank, 2).tolist() for step in range(3, 14)]
        assert [columns["sample_id"].tolist() for columns in steps] == planned
        assert all(np.array_equal(c["tokens"][:, 1], c["sample_id"] * 100 + 1) for c in steps)


def test_taken_rows_are_the_callers_own(root: Path) -> None:
    shards = Shards(root, "train")
    shards.take(np.arange(4))["tokens"][:] = 9999
    assert shards.take(np.arange(4))["tokens"].max() < 9999


def test_what_is_opened_stays_behind(root: Path) -> None:
    shards = Shards(root, "train")
    shards.take(np.arange(8))
    copy = pickle.loads(pickle.dumps(shards))
    assert not copy._open
    assert np.array_equal(copy.take(np.arange(3))["tokens"], shards.take(np.arange(3))["tokens"])


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, 2), (65_537, 4)])
def test_tokens_take_two_bytes_where_they_can(vocab_size: int, width: int) -> None:
    """Every token of the vocabulary comes back, from inside a table too; one beyond it is refused, never cut off."""
    ids_RS = np.array([[0, 1], [vocab_size - 1, 2], [3, vocab_size - 2]], np.int32)
    columns = {"sample_id": np.arange(3), "document": np.arange(3), "tokens": ids_RS, "length": np.arange(3)}
    table = to_table(columns, shard_schema(text_columns(1, vocab_size)))
    assert table.schema.field("tokens").type == pa.binary(2 * width)
    for part in (slice(0, 3), slice(1, 3)):
        found = table_to_numpy(table.slice(part.start, part.stop - part.start))["tokens"]
        assert found.dtype.itemsize == width
        assert np.array_equal(found, ids_RS[part])
    if width == 2:
        with pytest.raises(ValueError, match="from 0 to 65536 in a row; expected numbers of type uint16"):
            to_table(columns | {"tokens": ids_RS + (ids_RS == 65_535)}, shard_schema(text_columns(1, vocab_size)))


def test_bytes_that_do_not_say_what_they_hold_are_refused(root: Path) -> None:
    path = root / "train/00000.parquet"
    table = pq.read_table(path)
    field = table.schema.field("tokens")
    replace(path, table.cast(table.schema.set(2, field.remove_metadata())))
    with pytest.raises(InputError, match=r"tokens fixed_size_binary\[18\], .*; expected .*\[18\] of <u2, length"):
        Shards(root, "train").take(np.array([0]))


def test_the_same_rows_give_the_same_bytes() -> None:
    columns = {"sample_id": np.arange(9), "pixels": np.ones((9, 1, 8, 8), np.float32), "label": np.arange(9)}
    fields = shard_schema((Column(name="pixels", dtype="<f4", shape=(1, 8, 8)), Column(name="label", dtype="<i4")))
    tables = [to_table(columns, fields) for _ in range(2)]
    assert parquet_bytes(tables[0], 4) == parquet_bytes(tables[1], 4)


@pytest.mark.parametrize("ids", [[64], [-1], [3, 99]])
def test_rows_that_do_not_exist_are_refused(root: Path, ids: list[int]) -> None:
    with pytest.raises(InputError, match="expected 0 to 63"):
        Shards(root, "train").take(np.array(ids))


def test_unknown_names_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'test'; expected one of train, validation"):
        Shards(root, "test")
    with pytest.raises(InputError, match="no column 'pixels'; expected some of sample_id, document"):
        Shards(root, "train", ("pixels",))
    with pytest.raises(InputError, match=r"manifest\.json: No such file"):
        Manifest.read(tmp_path / "none")
    (tmp_path / MANIFEST).write_text('{"format": 1}')
    with pytest.raises(InputError, match="format: Input should be 6; expected what this version writes"):
        Manifest.read(tmp_path)


class Secret(pa.ExtensionType):
    """An object column of a type that some other program registered."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "somebody.secret")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


def replace(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=GROUP, compression="none", use_dictionary=False, write_statistics=False)


@pytest.mark.parametrize("nested", [False, True])
def test_object_columns_are_refused(root: Path, nested: bool) -> None:
    path = root / "train/00000.parquet"
    objects = pa.ExtensionArray.from_storage(Secret(), pa.array([b"\x80"] * ROWS[0], pa.large_binary()))
    column = pa.StructArray.from_arrays([objects], ["inner"]) if nested else objects
    replace(path, pq.read_table(path).append_column("extra", column))
    with pytest.raises(InputError, match="column 'extra' holds objects"):
        Shards(root, "train").take(np.array([0]))


def test_an_unregistered_object_type_is_refused(root: Path) -> None:
    path = root / "train/00000.parquet"
    field = pa.field("extra", pa.large_binary(), metadata={"ARROW:extension:name": "somebody.unregistered"})
    table = pq.read_table(path).append_column(field, pa.array([b"\x80"] * ROWS[0], pa.large_binary()))
    replace(path, table)
    with pytest.raises(InputError, match=r"holds objects \(somebody.unregistered\)"):
        Shards(root, "train").take(np.array([0]))


def test_a_shard_that_changed_is_refused(root: Path) -> None:
    path = root / "train/00000.parquet"
    whole = pq.read_table(path)
    replace(path, whole.drop_columns(["length"]))
    with pytest.raises(InputError, match=r"columns are sample_id int64, .*; expected .* length int32"):
        Shards(root, "train").take(np.array([0]))
    replace(path, whole.slice(0, 8))
    with pytest.raises(InputError, match="8 rows, the manifest says 40"):
        Shards(root, "train").take(np.array([0]))
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="expected a Parquet shard"):
        open_shard(path)
    path.unlink()
    with pytest.raises(InputError, match="expected a Parquet shard"):
        Shards(root, "train").take(np.array([0]))
