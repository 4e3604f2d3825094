"""What is cached of a teacher, and that it comes back for the right rows."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distill_world import SEED, World, capture, finish, replica
from hypothesis import given, settings
from hypothesis import strategies as st

from overproof.artifacts import Artifact
from overproof.config import Dense, Sampled, Scheme, TopK
from overproof.data.manifest import Manifest, Shard, Split
from overproof.data.order import Order, uniforms
from overproof.data.parquet_reader import Shards
from overproof.data.parquet_writer import open_writer, to_table
from overproof.distill.cache_checks import check_rows
from overproof.distill.row_cache import plan_cached_files
from overproof.distill.target_cache import TargetCache, TargetIndex
from overproof.distill.target_codec import pack, unpack
from overproof.distill.target_encoder import DRAW_KEY, encode_targets
from overproof.errors import InputError
from overproof.models.hf_directory import load_model, to_tensors

SCHEMES: dict[str, Scheme] = {"topk": TopK(k=4), "sampled": Sampled(k=4, draws=20), "dense": Dense()}
TEMPERATURES = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def caches(text_world: World) -> dict[str, Artifact]:
    """Targets of the first 40 rows of the order of 96, by each scheme."""
    return {name: capture(text_world, 40, scheme=scheme.model_dump()) for name, scheme in SCHEMES.items()}


@pytest.fixture(scope="module")
def cached(caches: dict[str, Artifact]) -> Path:
    return caches["topk"].local()


@settings(max_examples=50)
@given(
    st.integers(0, 99),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 300),
    st.integers(1, 400),
)
def test_the_cover_is_every_row_group_the_first_rows_touch(
    seed: int, groups_of_shards: list[int], rows_per_group: int, rows: int, file_bytes: int
) -> None:
    shards = tuple(
        Shard(path=str(i), sha256="", size_bytes=0, rows=groups * rows_per_group, predictions=0)
        for i, groups in enumerate(groups_of_shards)
    )
    total = sum(shard.rows for shard in shards)
    manifest = Manifest(
        task="image_classification",
        columns=(),
        splits={"train": Split(shards=shards, rows=total, predictions=0, documents=0)},
        rows_per_group=rows_per_group,
        positions=1,
        outputs=10,
    )
    order = Order(manifest.groups, rows_per_group, seed)
    files = plan_cached_files(manifest, order, rows, 10, file_bytes)
    assert len({file.path for file in files}) == len(files)
    assert all(len(file.groups) == 1 or len(file.groups) * rows_per_group * 10 <= file_bytes for file in files)
    covered = [group for file in files for group in file.groups]
    assert covered == sorted(set((order.rows_at(0, min(rows, total)) // rows_per_group).tolist()))
    starts = np.cumsum([0, *groups_of_shards])
    for file in files:
        shard = int(file.path.removesuffix(".parquet").partition("-")[0])
        assert all(starts[shard] <= group < starts[shard + 1] for group in file.groups)
    assert [group for file in plan_cached_files(manifest, order, None, 10) for group in file.groups] == list(
        range(manifest.groups)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_targets_come_back_for_the_rows_asked_for(text_world: World, caches: dict[str, Artifact], scheme: str) -> None:
    layout = TargetIndex.read(caches[scheme].local()).identity.layout
    everything = [name for name in layout.schema.names if name != "sample_id"]
    targets, shards = TargetCache(caches[scheme].local(), everything), Shards(text_world.root, "train")
    order = Order(12, 8, SEED)
    ids = np.concatenate([order.rows_at(0, 40)[::-1], order.rows_at(3, 9)])  # any order, some twice
    found, rows = targets.take(ids), shards.take(ids)
    np.testing.assert_array_equal(found.pop("tokens"), rows["tokens"])
    assert found.pop("mask").all()
    model = load_model(text_world.artifacts["train"].local() / "model")
    with torch.inference_mode():
        prediction = text_world.predict(model, to_tensors(rows))
        uniform = torch.from_numpy(uniforms(SEED, DRAW_KEY, ids, 16)) if scheme == "sampled" else None
        kept = encode_targets(prediction.logits_BPV, prediction.targets_BP, SCHEMES[scheme], TEMPERATURES, uniform)
    expected = {name: value.numpy() for name, value in kept.items()}
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in expected.items()}
    assert found["logprobs"].shape == (46, 16, layout.slots)
    assert {value.dtype.str for value in found.values() if value.dtype.kind == "f"} == {"<f4"}
    for name, values in found.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-3)
        else:
            assert (values == expected[name]).mean() > 0.99  # ties may swap
    assert set(TargetCache(caches[scheme].local()).take(ids)) == set(layout.loss_columns)


def test_files_are_plain_and_their_row_groups_full(caches: dict[str, Artifact]) -> None:
    for artifact in caches.values():
        index = TargetIndex.read(artifact.local())
        assert not list(artifact.local().glob("*.part"))
        for file in index.files:
            parquet = pq.ParquetFile(artifact.local() / file.path)
            assert parquet.schema_arrow.equals(index.identity.layout.schema, check_metadata=True)
            assert parquet.num_row_groups == len(file.groups)
            assert {parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)} == {8}


def test_the_bytes_of_a_row_are_those_of_the_file(caches: dict[str, Artifact]) -> None:
    for artifact in caches.values():
        index = TargetIndex.read(artifact.local())
        file = index.files[0]
        metadata = pq.ParquetFile(artifact.local() / file.path).metadata
        content = sum(metadata.row_group(i).total_byte_size for i in range(len(file.groups)))
        rows, columns = 8 * len(file.groups), metadata.num_columns
        assert 0 < content - rows * index.identity.layout.row_bytes <= 32 * columns * len(file.groups)  # page headers


def test_what_was_drawn_depends_on_no_batch_and_no_other_row() -> None:
    whole = uniforms(7, DRAW_KEY, np.arange(100), 16)
    np.testing.assert_array_equal(whole[[90, 3]], uniforms(7, DRAW_KEY, np.array([90, 3]), 16))
    np.testing.assert_array_equal(whole[:, :4], uniforms(7, DRAW_KEY, np.arange(100), 4))
    assert 0 <= whole.min() < 1e-3 < 1 - 1e-3 < whole.max() < 1
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(uniforms(8, DRAW_KEY, np.arange(100), 16), whole).any()


def test_a_capture_done_again_gives_the_same_bits(text_world: World, caches: dict[str, Artifact]) -> None:
    again = capture(text_world, 40, scheme=SCHEMES["sampled"].model_dump())
    assert again.record.files == caches["sampled"].record.files


def test_rows_the_cache_lacks_are_refused(cached: Path) -> None:
    targets = TargetCache(cached)
    beyond = Order(12, 8, SEED).rows_at(40, 41)
    with pytest.raises(InputError, match=r"1 of 1 row groups .* covers 40 rows; raise cache\.rows"):
        targets.take(beyond)


def test_targets_travel_without_what_they_opened(cached: Path) -> None:
    targets = TargetCache(cached)
    ids = Order(12, 8, SEED).rows_at(0, 40)
    everything = targets.take(ids)
    again = pickle.loads(pickle.dumps(targets))
    assert not again._open
    np.testing.assert_array_equal(again.take(ids[7:9])["indices"], everything["indices"][7:9])


def test_a_cache_that_is_not_what_its_index_says_is_refused(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cache\.json: No such file"):
        TargetCache(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(cached, broken)
    index = TargetIndex.read(cached)
    first = max(index.files, key=lambda file: len(file.groups))
    row = np.array([first.groups[0] * 8])
    table = pq.read_table(broken / first.path)
    pq.write_table(table.append_column("more", pa.array(range(len(table)))), broken / first.path)
    with pytest.raises(InputError, match=r"columns are .*more.*expected .*run `cache` again"):
        TargetCache(broken).take(row)
    rewrite(cached / first.path, broken / first.path, lambda columns: columns | {"sample_id": columns["sample_id"] + 8})
    with pytest.raises(InputError, match=r"does not hold the rows that cache\.json says"):
        TargetCache(broken).take(row)
    rewrite(cached / first.path, broken / first.path, lambda columns: {n: v[8:] for n, v in columns.items()})
    with pytest.raises(InputError, match=rf"{len(first.groups) - 1} row groups, cache\.json lists"):
        TargetCache(broken).take(row)
    (broken / TargetIndex.FILE).write_text(index.model_dump_json().replace('"k":4', '"k":"many"'))
    with pytest.raises(InputError, match=r"cache\.json: identity\.scheme\.topk\.k: "):
        TargetCache(broken)


def rewrite(source: Path, target: Path, change: Any) -> None:
    """A cache file with other values, as the stage would have written it."""
    table = pq.read_table(source)
    columns: dict[str, Any] = {}
    for field in table.schema:
        values = table.column(field.name).combine_chunks()
        if pa.types.is_fixed_size_binary(field.type):
            kind = np.dtype(field.metadata[b"dtype"].decode())
            columns[field.name] = np.frombuffer(b"".join(values.to_pylist()), kind).reshape(len(table), -1)
        else:
            columns[field.name] = values.to_numpy()
    with open_writer(target, table.schema, 8) as writer:
        writer.write_table(to_table(change(columns), table.schema), row_group_size=8)


@pytest.mark.parametrize(
    ("field", "other", "words"),
    [
        ("teacher_sha256", "c" * 64, r"another teacher .*expected sha256 cccccccccccc"),
        ("tokenizer_sha256", "c" * 64, r"another tokenizer.*expected sha256 cccccccccccc"),
        ("manifest_sha256", "c" * 64, r"another prepared data"),
        ("positions", 32, r"another packing \(positions in a row\): 16, expected 32"),
        ("rows_per_group", 16, r"another packing \(rows in a row group\): 8, expected 16"),
        ("outputs", 321, r"another number of outputs: 320, expected 321"),
        ("scheme", Dense(), r"another scheme: .*'topk', 'k': 4.*, expected .*'dense'"),
        ("scheme", TopK(k=5), r"another scheme: .*'k': 4.*, expected .*'k': 5"),
        ("temperatures", (1.0,), r"another temperatures"),
        ("precision", "bf16", r"another precision: fp32, expected bf16"),
        ("seed", 4, r"another seed: 3, expected 4"),
    ],
)
def test_a_cache_for_something_else_is_refused(cached: Path, field: str, other: Any, words: str) -> None:
    index = TargetIndex.read(cached)
    index.check(index.identity)
    with pytest.raises(InputError, match=words):
        index.check(index.identity.model_copy(update={field: other}))


def test_targets_of_a_teacher_that_computes_in_bf16(text_world: World, caches: dict[str, Artifact]) -> None:
    """Half of the digits are gone, and the logits themselves are not rounded: they have more than bf16 holds."""
    worker, index = replica(text_world, 40, scheme=Dense().model_dump(), precision="bf16")
    assert index.identity.precision == "bf16"
    ids = Order(12, 8, SEED).rows_at(0, 8)
    found, whole = (TargetCache(a.local()).take(ids)["logprobs"] for a in (finish(worker), caches["dense"]))
    assert 0 < np.abs(found - whole).max() < 0.1
    with torch.inference_mode():
        model = text_world.predict(worker.model, to_tensors(Shards(text_world.root, "train").take(ids)))
    assert model.logits_BPV.dtype == torch.float32
    assert not torch.equal(model.logits_BPV, model.logits_BPV.bfloat16().float())


def test_a_gpu_that_torch_does_not_find_is_a_fault(text_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    worker, _ = replica(text_world, 40, gpus_per_actor=0.5)
    [report] = worker({"file": np.arange(1)})
    assert "0.5 GPUs are reserved here, and torch" in report["fault"][0]


def test_a_temperature_that_was_not_kept_is_refused(cached: Path) -> None:
    index = TargetIndex.read(cached)
    index.require_temperature(2.0)
    with pytest.raises(InputError, match=r"temperature 3: .*add it to cache\.temperatures"):
        index.require_temperature(3.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_permuted_vocabulary_and_other_tokens_are_caught(
    text_world: World, caches: dict[str, Artifact], tmp_path: Path, scheme: str
) -> None:
    whole, ids = caches[scheme].local(), Order(12, 8, SEED).rows_at(0, 40)
    check_rows(whole, text_world.root, ids)
    layout = TargetIndex.read(whole).identity.layout
    to = np.random.default_rng(0).permutation(layout.outputs)

    def permute(columns: dict[str, Any]) -> dict[str, Any]:
        if scheme != "dense":
            indices = unpack(columns["indices"], layout.positions * layout.slots, layout.bits)
            return columns | {"indices": pack(to[indices], layout.bits)}
        shaped = columns["logprobs"].reshape(len(columns["sample_id"]), layout.positions, -1)[..., to]
        return columns | {"logprobs": shaped.reshape(len(shaped), -1)}

    def shift(columns: dict[str, Any]) -> dict[str, Any]:
        return columns | {"tokens": np.roll(columns["tokens"], 1, 0)}

    for name, change, words in (("permuted", permute, "permuted vocabulary"), ("shifted", shift, "from other tokens")):
        shutil.copytree(whole, tmp_path / name)
        for file in TargetIndex.read(whole).files:
            rewrite(whole / file.path, tmp_path / name / file.path, change)
        with pytest.raises(InputError, match=words):
            check_rows(tmp_path / name, text_world.root, ids)
