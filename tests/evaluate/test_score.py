"""Scores are what the engine says of every token, and near a plain reading of the file, document by document."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overproof.artifacts import Artifact
from overproof.config import Evaluate
from overproof.data.manifest import Manifest
from overproof.data.parquet_reader import Shards
from overproof.engines.base import PlaceScores
from overproof.errors import InputError
from overproof.evaluate import stage
from overproof.export.gguf_file import read_gguf
from overproof.files import file_sha256
from overproof.models import hf_directory
from overproof.registry import FORMATS, TASKS
from overproof.tasks import text_evaluation
from overproof.tasks.base import FEWEST_UNITS, UNITS_TOGETHER, FileScores, ScoringTime, agreements, spread_units

SETTINGS = Evaluate(threads=1)


def score_text(file: Path, root: Path, most: int | None) -> FileScores:
    task, told = TASKS["language_modeling"], list[int]()
    units = task.units(root, most)
    scores = task.score(file, root, units, SETTINGS, "llama.cpp", FORMATS["gguf"], told.append)
    assert told == sorted(told)
    assert told[-1] == len(units) - 1
    return scores


def plain_reading(model: torch.nn.Module, root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats and predictions of each document, and all first choices, one row of the test split after the other."""
    shards = Shards(root, "test", ("document", "tokens", "length"))
    columns = shards.take(np.arange(shards.rows))
    nats, counts, choices = np.zeros(12), np.zeros(12, int), []
    for document, tokens, length in zip(columns["document"], columns["tokens"], columns["length"], strict=True):
        ids = torch.from_numpy(tokens[: length + 1].astype(np.int64))
        with torch.inference_mode():
            logprobs_PV = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        nats[document] -= float(logprobs_PV.gather(1, ids[1:, None]).sum())
        counts[document] += length
        choices.append(logprobs_PV.argmax(-1).numpy())
    return nats, counts, np.concatenate(choices)


@pytest.mark.parametrize(("name", "nats_off", "same"), [("student", 2e-4, 0.999), ("student-q4_0", 2e-3, 0.98)])
def test_text_scores_are_the_engines_sums_over_documents(
    text: dict[str, Artifact], name: str, nats_off: float, same: float
) -> None:
    """The engine rounds activations beside the weights: to half precision, or to eight bits beside q4_0."""
    file, root = text["compress"].local() / f"{name}.gguf", text["prepare"].local()
    found = score_text(file, root, None)
    nats, counts, choices = plain_reading(read_gguf(file), root)
    np.testing.assert_allclose(found.total, nats, rtol=nats_off)
    np.testing.assert_array_equal(found.predictions, counts)
    assert (found.choices_N == choices).mean() > same
    assert found.sha256 == file_sha256(file)
    assert found.size.sum() > 30_000


def test_what_an_engine_does_not_tell_torch_does(text: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM computes with the dequantised weights: of its files they are what is judged."""
    file, root = text["compress"].local() / "student-q4_0.gguf", text["prepare"].local()
    monkeypatch.setitem(text_evaluation.BATCH_LOGITS, "cpu", 5 * 64 * 512)  # batches that cross documents
    units = TASKS["language_modeling"].units(root, None)
    scorer = text_evaluation.open_scorer(file, root, "vllm", FORMATS["gguf"], threads=1)
    found = text_evaluation.score_text(file_sha256(file), root, units, scorer, lambda _: None, ScoringTime(None))
    nats, counts, choices = plain_reading(read_gguf(file), root)
    np.testing.assert_allclose(found.total, nats, rtol=1e-5)
    np.testing.assert_array_equal(found.predictions, counts)
    assert (found.choices_N == choices).mean() > 0.999  # batches may break near ties the other way


def test_however_documents_are_split_over_tasks_torch_scores_them_alike(
    text: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: a batch holds rows of several documents, and those of the same in every split."""
    for module in (text_evaluation, stage):
        monkeypatch.setattr(module, "UNITS_TOGETHER", 4)
    monkeypatch.setitem(text_evaluation.BATCH_LOGITS, "cpu", 5 * 64 * 512)
    file, root = text["compress"].local() / "student.gguf", text["prepare"].local()
    units = TASKS["language_modeling"].units(root, 11)
    whole, *others = (
        functools.reduce(
            FileScores.joined,
            (
                TASKS["language_modeling"].score(file, root, part, SETTINGS, "vllm", FORMATS["gguf"], lambda _: None)
                for part in stage.split_units(units, count)
            ),
        )
        for count in (1, 2, 3)
    )
    for other in others:
        for name in ("units", "total", "size", "predictions", "choices_N"):
            np.testing.assert_array_equal(getattr(other, name), getattr(whole, name))
    half = TASKS["language_modeling"].score(
        file, root, units, SETTINGS.model_copy(update={"precision": "bf16"}), "vllm", FORMATS["gguf"], lambda _: None
    )
    assert (half.total != whole.total).all()
    np.testing.assert_allclose(half.total, whole.total, rtol=0.01)


@given(
    units=st.integers(1, 300), sizes=st.lists(st.integers(1, 100), min_size=1, max_size=9), at_once=st.integers(1, 9)
)
def test_parts_are_whole_runs_and_none_takes_more_than_its_share(units: int, sizes: list[int], at_once: int) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    for name, count in stage.task_counts(named, at_once, units).items():
        parts = stage.split_units(np.arange(units), count)
        assert len(parts) == count
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(units))
        assert all(part[0] % UNITS_TOGETHER == 0 for part in parts)
        runs = -(-units // UNITS_TOGETHER)
        assert count == runs or named[name] / count <= sum(sizes) / at_once


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_rows_longer_than_the_files_context_are_refused_as_the_scorer_is_opened(
    text: dict[str, Artifact], engine: str, tmp_path: Path
) -> None:
    """Past it an engine computes something, and it is not the model."""
    file = text["compress"].local() / "student.gguf"
    manifest = Manifest.read(text["prepare"].local())
    for positions, fits in ((2048, True), (2049, False)):
        (tmp_path / "manifest.json").write_text(manifest.model_copy(update={"positions": positions}).model_dump_json())
        if fits:
            text_evaluation.open_scorer(file, tmp_path, engine, FORMATS["gguf"], threads=1).close()
            continue
        with pytest.raises(
            InputError, match=r"student\.gguf: rows of 2049 tokens, .* is of 2048: .*data.sequence_length"
        ):
            text_evaluation.open_scorer(file, tmp_path, engine, FORMATS["gguf"], threads=1)


def test_some_documents_are_the_same_as_among_all(text: dict[str, Artifact]) -> None:
    file, root = text["compress"].local() / "student.gguf", text["prepare"].local()
    every, some = score_text(file, root, None), score_text(file, root, 3)
    np.testing.assert_array_equal(some.units, [0, 6, 11])
    np.testing.assert_array_equal(some.total, every.total[some.units])
    np.testing.assert_array_equal(some.size, every.size[some.units])
    assert len(some.choices_N) == some.predictions.sum()


@pytest.mark.parametrize("kind", ["text", "digits"])
def test_a_file_whose_time_is_over_ends_with_the_unit_it_is_at(kind: str, request: pytest.FixtureRequest) -> None:
    done: dict[str, Artifact] = request.getfixturevalue(kind)
    task, engine, format = {
        "text": ("language_modeling", "llama.cpp", "gguf"), "digits": ("image_classification", "onnxruntime", "onnx"),
    }[kind]  # fmt: skip
    root, file = done["prepare"].local(), done["compress"].local() / f"student{FORMATS[format].suffix}"
    units = TASKS[task].units(root, 12)
    whole, some = (
        TASKS[task].score(file, root, units, settings, engine, FORMATS[format], lambda _: None)
        for settings in (SETTINGS, SETTINGS.model_copy(update={"score_s": 1e-9}))
    )
    assert len(whole.units) == 12
    expected = whole.first(FEWEST_UNITS)
    for name in ("units", "total", "size", "predictions", "choices_N"):
        np.testing.assert_array_equal(getattr(some, name), getattr(expected, name))
    assert some.columns.keys() == whole.columns.keys()


def test_no_row_is_read_past_the_document_at_which_the_time_is_over(text: dict[str, Artifact]) -> None:
    file, root = text["compress"].local() / "student.gguf", text["prepare"].local()
    rows, read = text_evaluation.TestDocuments.of(root), list[int]()
    scorer = text_evaluation.open_scorer(file, root, "llama.cpp", FORMATS["gguf"], threads=1)

    class Counting:
        def score(self, given: Iterable[np.ndarray]) -> Iterator[PlaceScores]:
            for number, scores in enumerate(scorer.score(given)):
                read.append(number)
                yield scores

        def close(self) -> None:
            scorer.close()

    limit = ScoringTime(1e-9)
    found = text_evaluation.score_text(file_sha256(file), root, rows.documents, Counting(), lambda _: None, limit)
    assert len(found.units) == FEWEST_UNITS
    assert len(read) == (rows.places < FEWEST_UNITS).sum() < len(rows.places)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_scorer_that_leaves_out_a_row_or_gives_one_more_is_no_scorer(text: dict[str, Artifact], off: int) -> None:
    """The last document's figures would be of a part of it."""
    root = text["prepare"].local()
    rows = text_evaluation.TestDocuments.of(root)

    class Uneven:
        def score(self, given: Iterable[np.ndarray]) -> Iterator[PlaceScores]:
            lengths = [len(tokens_S) - 1 for tokens_S in given]
            for length in (lengths + lengths[-1:])[: len(lengths) + off]:
                yield PlaceScores(np.ones(length), np.zeros(length, np.int32), np.ones(length))

        def close(self) -> None:
            pass

    file = text["compress"].local() / "student.gguf"
    with pytest.raises(ValueError, match="shorter than argument 1" if off < 0 else "longer than argument 1"):
        text_evaluation.score_text(file_sha256(file), root, rows.documents, Uneven(), lambda _: None, ScoringTime(None))


def test_image_scores_are_torchs(digits: dict[str, Artifact]) -> None:
    root = digits["prepare"].local()
    file = digits["compress"].local() / "student.onnx"
    task = TASKS["image_classification"]
    units, told = task.units(root, None), list[int]()
    found = task.score(file, root, units, SETTINGS, "onnxruntime", FORMATS["onnx"], told.append)
    assert told == list(range(len(units)))  # before each: how many are done
    shards = Shards(root, "test")
    batch = hf_directory.to_tensors(shards.take(np.arange(shards.rows)))
    with torch.inference_mode():
        model = hf_directory.load_model(digits["sweep"].local() / "students/student")
        prediction = TASKS["image_classification"].predict(model, batch)
    right_B = prediction.logits_BPV[:, 0].argmax(-1) == batch["label"]
    assert found.total.mean() == pytest.approx(float(right_B.double().mean()), abs=0.004)
    assert found.total.mean() > 0.3  # of ten classes


def test_agreement_is_counted_unit_by_unit() -> None:
    def scores(*choices: int) -> FileScores:
        ones = np.ones(2)
        return FileScores("", np.arange(2), ones, ones.astype(int), np.array([2, 3]), np.array(choices, np.int32))

    assert agreements(scores(1, 2, 3, 4, 5), scores(1, 0, 3, 4, 0)).tolist() == [1, 2]


def test_chosen_units_are_spread() -> None:
    assert spread_units(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert spread_units(np.arange(3), 9).tolist() == [0, 1, 2]
