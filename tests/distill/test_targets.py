"""What is cached of a teacher, and that it comes back for the right rows."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill_world import SEED, World, capture
from hypothesis import given, settings
from hypothesis import strategies as st

from overproof.data.manifest import Manifest, Shard, Split
from overproof.data.plan import Order
from overproof.data.read import Shards
from overproof.distill.losses import top_k
from overproof.distill.targets import GROUPS_KEPT, INDEX, CacheIndex, Targets, position_bytes, schema
from overproof.distill.teacher import cover
from overproof.errors import InputError
from overproof.models import forward, load, to_tensors


@pytest.fixture(scope="module")
def cached(text_world: World) -> Path:
    """Targets of the first 40 rows of the order of 96."""
    return capture(text_world, 40).local()


@pytest.mark.parametrize("k", [1, 5, 40])
def test_top_k_keeps_what_defines_the_teacher(k: int) -> None:
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 8
    temperatures = [0.5, 1.0, 3.0]
    found = top_k(logits, k, temperatures)
    logprobs = torch.log_softmax(logits.double(), -1)
    top, indices = logprobs.topk(k, -1)
    rest = logprobs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    assert torch.equal(found["indices"], indices.reshape(2, -1))
    torch.testing.assert_close(found["logprobs"].double(), top.reshape(2, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["tail"].double(), rest, rtol=1e-5, atol=1e-5)
    assert torch.isinf(found["tail"]).all() == (k == 40)
    expected = torch.stack([torch.logsumexp(logits.double() / t, -1) for t in temperatures], -1)
    torch.testing.assert_close(found["logsumexp"].double(), expected.reshape(2, -1), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 99), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 300))
def test_the_cover_is_every_row_group_the_first_rows_touch(
    seed: int, groups_of_shards: list[int], rows_per_group: int, rows: int
) -> None:
    shards = tuple(
        Shard(path=str(i), sha256="", size_bytes=0, rows=groups * rows_per_group, tokens=0)
        for i, groups in enumerate(groups_of_shards)
    )
    total = sum(shard.rows for shard in shards)
    manifest = Manifest(
        kind="digits",
        splits={"train": Split(shards=shards, rows=total, tokens=0, documents=0)},
        rows_per_group=rows_per_group,
        sequence_length=None,
        vocab_size=None,
        classes=10,
        tokenizer_sha256=None,
        dropped={},
    )
    order = Order(manifest.groups, rows_per_group, seed)
    files = cover(manifest, order, rows)
    covered = [group for file in files for group in file.groups]
    assert covered == sorted(set((order.rows_at(0, min(rows, total)) // rows_per_group).tolist()))
    starts = np.cumsum([0, *groups_of_shards])
    for file in files:
        shard = int(file.path.removesuffix(".parquet"))
        assert all(starts[shard] <= group < starts[shard + 1] for group in file.groups)
    assert [group for file in cover(manifest, order, None) for group in file.groups] == list(range(manifest.groups))


def test_targets_come_back_for_the_rows_asked_for(text_world: World, cached: Path) -> None:
    targets, shards = Targets(cached), Shards(text_world.root, "train")
    order = Order(12, 8, SEED)
    ids = np.concatenate([order.rows_at(0, 40)[::-1], order.rows_at(3, 9)])  # any order, some twice
    found = targets.take(ids)
    model = load(text_world.artifacts["train"].local() / "model")
    with torch.inference_mode():
        logits = forward(model, to_tensors(shards.take(ids))).logits_BPV
    expected = {name: value.numpy() for name, value in top_k(logits, 4, [0.5, 1.0, 2.0]).items()}
    shapes = {"indices": (46, 16, 4), "logprobs": (46, 16, 4), "tail": (46, 16), "logsumexp": (46, 16, 3)}
    assert {name: value.shape for name, value in found.items()} == shapes
    assert {name: value.dtype.str for name, value in found.items()} == {
        "indices": "<i8", "logprobs": "<f4", "tail": "<f4", "logsumexp": "<f4"
    }  # fmt: skip
    assert (found["indices"].reshape(46, -1) == expected["indices"]).mean() > 0.99  # ties may swap
    np.testing.assert_allclose(found["logprobs"].reshape(46, -1), expected["logprobs"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["tail"], expected["tail"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["logsumexp"].reshape(46, -1), expected["logsumexp"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [1 << 16, 1 << 17])
def test_bytes_of_a_position_are_those_of_the_columns(outputs: int) -> None:
    types = [field.type for field in schema(16, 4, 3, outputs) if field.name != "sample_id"]
    assert position_bytes(4, 3, outputs) * 16 == sum(t.list_size * t.value_type.bit_width // 8 for t in types)


def test_files_are_plain_and_their_row_groups_full(cached: Path) -> None:
    index = CacheIndex.read(cached)
    assert not list(cached.glob("*.part"))
    for file in index.files:
        parquet = pq.ParquetFile(cached / file.path)
        assert parquet.schema_arrow.names == ["sample_id", "indices", "logprobs", "tail", "logsumexp"]
        assert parquet.schema_arrow.field("indices").type == pa.list_(pa.uint16(), 16 * 4)
        assert parquet.num_row_groups == len(file.groups)
        assert {parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)} == {8}


def test_rows_the_cache_lacks_are_refused(cached: Path) -> None:
    targets = Targets(cached)
    beyond = Order(12, 8, SEED).rows_at(40, 41)
    with pytest.raises(InputError, match=r"1 of 1 row groups .* covers 40 rows; raise cache\.rows"):
        targets.take(beyond)


def test_targets_travel_and_keep_few_row_groups(text_world: World) -> None:
    targets = Targets(capture(text_world, None).local())
    everything = targets.take(np.arange(96))
    assert len(targets._groups) == GROUPS_KEPT
    again = pickle.loads(pickle.dumps(targets))
    assert not again._groups
    np.testing.assert_array_equal(again.take(np.arange(90, 96))["indices"], everything["indices"][90:])


def test_a_cache_that_is_not_what_its_index_says_is_refused(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cache\.json: No such file"):
        Targets(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(cached, broken)
    index = CacheIndex.read(cached)
    first, second = index.files[0], index.files[1]
    table = pq.read_table(broken / first.path)
    pq.write_table(table.append_column("more", pa.array(range(len(table)))), broken / first.path)
    with pytest.raises(InputError, match=r"columns are .*more.*expected .*run `cache` again"):
        Targets(broken).take(np.array([first.groups[0] * 8]))
    shutil.copy(cached / first.path, broken / second.path)
    with pytest.raises(InputError, match=r"does not hold rows"):
        Targets(broken).take(np.array([second.groups[0] * 8]))
    (broken / INDEX).write_text(index.model_dump_json().replace('"k":4', '"k":"many"'))
    with pytest.raises(InputError, match=r"cache\.json: k: "):
        Targets(broken)


def test_a_cache_for_something_else_is_refused(cached: Path) -> None:
    index = CacheIndex.read(cached)
    index.check("a" * 64, "b" * 64)
    with pytest.raises(InputError, match=r"another teacher .*expected cccccccccccc"):
        index.check("c" * 64, "b" * 64)
    with pytest.raises(InputError, match=r"another prepared data"):
        index.check("a" * 64, "c" * 64)
    assert index.column(2.0) == 2
    with pytest.raises(InputError, match=r"temperature 3: .*add it to cache\.temperatures"):
        index.column(3.0)
