"""The cache stage on a real cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from distill_world import SEED, World, replica

from overproof.data.manifest import MANIFEST, TOKENIZER, Manifest
from overproof.data.order import Order
from overproof.distill.target_cache import TargetCache, TargetIndex
from overproof.distill.teacher_stages import cache_targets, check_scheme
from overproof.errors import InputError
from overproof.models.hf_directory import build_model, save_model
from overproof.models.llama import Llama
from overproof.stage_context import ProgressEvent, TaskProgress


@pytest.mark.usefixtures("ray_cluster")
def test_the_teacher_sees_each_row_group_of_the_order_once(
    digits_world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[ProgressEvent] = []
    context = digits_world.context(
        "cache", events.append, cache={"scheme": {"kind": "topk", "k": 10}, "rows": 500, "actors": 2}
    )
    metrics = cache_targets(context)
    folder = Path(context.draft.uri)
    manifest, index = Manifest.read(digits_world.root), TargetIndex.read(folder)
    order = Order(manifest.groups, manifest.rows_per_group, SEED)
    covered = sorted(set((order.rows_at(0, 500) // 8).tolist()))
    assert [group for file in index.files for group in file.groups] == covered
    assert index.identity.temperatures == (0.5, 1.0, 2.0)
    assert (
        index.identity.teacher_sha256 == digits_world.artifacts["train"].record.files["model/model.safetensors"].sha256
    )
    assert index.identity.manifest_sha256 == digits_world.artifacts["prepare"].record.files[MANIFEST].sha256
    assert sorted(p.name for p in folder.iterdir()) == [*(file.path for file in index.files), "cache.json"]
    assert metrics["rows"] == metrics["positions"] == len(covered) * 8 == index.rows
    assert metrics["actors"] == 2
    size = sum((folder / file.path).stat().st_size for file in index.files)
    assert metrics["bytes_per_position"] == pytest.approx(size / metrics["positions"])

    found = TargetCache(folder, ("logprobs", "tail")).take(order.rows_at(0, 500))
    mass = np.exp(found["logprobs"]).sum(-1)
    np.testing.assert_allclose(mass, 1, atol=2e-3)
    assert np.isneginf(found["tail"]).all()

    assert events[0] == TaskProgress("cache", 0, index.rows, "starting 2 teachers")
    done = [event.done for event in events if isinstance(event, TaskProgress)]
    assert done == sorted(done)
    assert done[-1] == index.rows
    assert len(set(done)) > index.rows / 24  # one word a forward pass, while the pool runs
    assert "ray.data" not in (printed := capfd.readouterr()).out + printed.err


def test_a_teacher_of_another_tokenizer_is_refused(text_world: World, tmp_path: Path) -> None:
    other = make_other_teacher(text_world, tmp_path, tokenizer='{"made": "elsewhere"}')
    with pytest.raises(InputError, match=r"model/tokenizer\.json: not a tokenizer\.json"):
        cache_targets(other.context("cache"))


def test_more_targets_than_outputs_are_refused(digits_world: World) -> None:
    with pytest.raises(InputError, match=r"cache\.scheme\.k: found 11; the data has 10 outputs"):
        cache_targets(digits_world.context("cache", cache={"scheme": {"kind": "topk", "k": 11}}))


def test_a_row_group_beyond_a_page_is_refused(text_world: World) -> None:
    whole = replica(text_world, None, scheme={"kind": "dense"})[1].identity
    check_scheme(whole)
    with pytest.raises(
        InputError, match=r"whole distribution of 8 rows of 2048 positions take 4\.98 GB; expected at most"
    ):
        check_scheme(whole.model_copy(update={"outputs": 151_936, "positions": 2048}))


def test_a_teacher_of_other_outputs_is_reported(text_world: World, tmp_path: Path) -> None:
    other = make_other_teacher(text_world, tmp_path, vocab_size=352)
    teacher, index = replica(other, None)
    faults = [str(report["fault"][0]) for report in teacher({"file": np.arange(len(index.files))})]
    assert faults == ["the teacher has 352 outputs; expected the data's 320"]
    assert not list(Path(teacher.job.draft.uri).glob("*.parquet"))


def make_other_teacher(world: World, folder: Path, tokenizer: str | None = None, vocab_size: int = 320) -> World:
    """The same data with a teacher that does not fit it."""
    config = Llama(hidden_size=32, intermediate_size=32, layers=1, heads=2, kv_heads=1)
    manifest = Manifest.read(world.root).model_copy(update={"outputs": vocab_size})
    file = world.root / TOKENIZER
    if tokenizer:
        file = folder / TOKENIZER
        file.write_text(tokenizer)
    draft = world.draft("train")
    model = build_model(config, manifest, 0)
    save_model(model, model.config, Path(draft.uri) / "model", file)
    return dataclasses.replace(world, artifacts=world.artifacts | {"train": draft.commit({}, 0)})
