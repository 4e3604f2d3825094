"""llama.cpp's logits at every place are the model's, and its C interface is called only as it is known to be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xllamacpp
from test_gguf import VOCABULARY, make, write

from overproof.engines import llamacpp_logits, llamacpp_memory, llamacpp_scorer
from overproof.engines.base import EngineSettings, PlaceScores, Sampling
from overproof.engines.llamacpp import ENGINE
from overproof.engines.llamacpp_logits import ContextParams, LlamaCppLogits, ModelParams, check_layout
from overproof.engines.llamacpp_scorer import LlamaCppScorer, place_scores
from overproof.errors import InputError
from overproof.export.gguf_file import read_gguf
from overproof.export.gguf_types import MIXES
from overproof.models import hf_directory

LENGTHS = (100, 37, 64, 1)
# The models' weights are random and large, which magnifies rounding. Measured: largest difference, and mean.
ROUNDING_NATS = {"f16": (0.05, 0.005), "q8_0": (1.0, 0.1), "q4_0": (1.0, 0.1)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def files(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {format: write(source, folder, format) for format in ("f16", "q8_0", "q4_0")}


def rows() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, VOCABULARY, length + 1).astype(np.uint16) for length in LENGTHS]


def engine_logprobs(file: Path, **settings: Any) -> np.ndarray:
    engine = LlamaCppLogits(file, max(LENGTHS), **settings)
    logits_NV = np.concatenate([part.copy() for row in rows() for part in engine.batches(row[:-1])])
    engine.close()
    return torch.from_numpy(logits_NV).double().log_softmax(-1).numpy()


def torch_logprobs(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        logits = [model(input_ids=torch.from_numpy(row[None, :-1].astype(np.int64))).logits[0] for row in rows()]
    return torch.cat(logits).double().log_softmax(-1).numpy()


def scores(file: Path, of: list[np.ndarray], threads: int = 1) -> list[PlaceScores]:
    scorer = LlamaCppScorer(file, max(LENGTHS), threads)
    found = list(scorer.score(of))
    scorer.close()
    return found


def test_every_place_is_the_models_own(
    source: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights in 32 bits but for the last digits; in 16, llama.cpp rounds activations to half precision, too."""
    monkeypatch.setitem(MIXES, "f16", MIXES["f32"])
    expected = torch_logprobs(hf_directory.load_model(source))
    found = engine_logprobs(write(source, tmp_path, "f16"), kv_cache="f32")
    assert found.shape == (sum(LENGTHS), VOCABULARY)
    assert np.abs(found - expected).max() < 2e-4
    half = np.abs(engine_logprobs(files["f16"], kv_cache="f32") - expected)
    most, mean = ROUNDING_NATS["f16"]
    assert (half.max() < most, half.mean() < mean) == (True, True)


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_integer_kernels_are_near_the_dequantised_weights_and_not_the_same(files: dict[str, Path], format: str) -> None:
    difference = np.abs(engine_logprobs(files[format]) - torch_logprobs(read_gguf(files[format])))
    most, mean = ROUNDING_NATS[format]
    assert 0.01 < difference.mean() < mean
    assert difference.max() < most


def test_scores_are_the_log_softmax_of_the_logits(files: dict[str, Path]) -> None:
    logprobs = engine_logprobs(files["q8_0"])
    found = PlaceScores.joined(scores(files["q8_0"], rows()))
    targets = np.concatenate([row[1:] for row in rows()]).astype(np.int64)
    every = np.arange(len(targets))
    np.testing.assert_array_equal(found.choices_P, logprobs.argmax(1))
    np.testing.assert_allclose(found.nats_P, -logprobs[every, targets], atol=1e-5)
    np.testing.assert_allclose(found.choice_nats_P, -logprobs.max(1), atol=1e-5)


def test_places_are_worked_on_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    logits_PV = (30 * generator.normal(size=(11, 50))).astype(np.float32)
    targets_P = generator.integers(0, 50, 11)
    expected = place_scores(logits_PV, targets_P)
    monkeypatch.setattr(llamacpp_scorer, "CHUNK_LOGITS", 4 * 50)
    found = place_scores(logits_PV, targets_P)
    for name in ("nats_P", "choices_P", "choice_nats_P"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    logprobs_PV = torch.from_numpy(logits_PV).double().log_softmax(-1).numpy()
    np.testing.assert_allclose(found.nats_P, -logprobs_PV[np.arange(11), targets_P], rtol=1e-6, atol=1e-6)


def test_a_row_is_read_by_itself(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No other row, nor the number of threads, moves its figures; batches of it move them by rounding alone."""
    alone, reversed_ = scores(files["q4_0"], rows()), scores(files["q4_0"], rows()[::-1], threads=2)
    for one, other in zip(alone, reversed_[::-1], strict=True):
        np.testing.assert_array_equal(one.nats_P, other.nats_P)
    whole = scores(files["f16"], rows())
    monkeypatch.setattr(llamacpp_memory, "FEWEST_TOKENS", 16)
    monkeypatch.setattr(llamacpp_memory, "MOST_LOGITS", 16 * VOCABULARY)
    engine = LlamaCppLogits(files["f16"], max(LENGTHS))
    assert [len(part) for part in engine.batches(rows()[1][:-1])] == [16, 16, 5]
    engine.close()
    for one, other in zip(whole, scores(files["f16"], rows()), strict=True):
        np.testing.assert_allclose(one.nats_P, other.nats_P, atol=ROUNDING_NATS["f16"][0])


@pytest.mark.parametrize("format", ["f16", "q8_0", "q4_0"])
def test_it_is_what_the_server_says_of_what_it_generates(files: dict[str, Path], format: str) -> None:
    engine, prompt = ENGINE.load(files[format], EngineSettings()), [0, 40, 41, 42]
    given = engine.complete(prompt, Sampling(40, logprobs=0))
    engine.close()
    assert given.token_logprobs is not None
    (found,) = scores(files[format], [np.array(prompt + given.tokens)])
    said = np.array([token.logprob for token in given.token_logprobs])
    assert np.abs(found.nats_P[len(prompt) - 1 :] + said).max() < ROUNDING_NATS[format][0] / 2


def test_what_cannot_be_read_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing; expected a GGUF file"):
        LlamaCppLogits(tmp_path / "none.gguf", 8)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files["f16"].read_bytes()[:9000])
    with pytest.raises(InputError, match=r"cut\.gguf: llama\.cpp cannot load it; expected a whole GGUF file"):
        LlamaCppLogits(cut, 8)
    with pytest.raises(
        InputError, match=r"f16\.gguf: rows of 129 tokens, and its context \(context_length\) is of 128"
    ):
        LlamaCppLogits(files["f16"], 129)
    engine = LlamaCppLogits(files["f16"], 8)
    for wrong, message in (
        ([VOCABULARY], r"llama\.cpp gave -1 for 1 tokens"),
        ([1] * 9, "9 tokens in a row; .* for 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            list(engine.batches(np.array(wrong)))
    assert len(next(engine.batches(np.array([1, 2])))) == 2  # and reads on
    engine.close()


def test_the_logits_at_some_places_are_those_of_the_whole_row(files: dict[str, Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(llamacpp_memory, "FEWEST_TOKENS", 16)
    monkeypatch.setattr(llamacpp_memory, "MOST_LOGITS", 16 * VOCABULARY)
    engine, row = LlamaCppLogits(files["f16"], 64), rows()[2][:-1]
    whole = np.concatenate([part.copy() for part in engine.batches(row)])
    places = np.array([0, 3, 15, 16, 17, 48, 63])  # of one batch many, one or none
    np.testing.assert_array_equal(engine.logits_at(row, places), whole[places])
    engine.close()


def fake_library(**changes: Any) -> SimpleNamespace:
    """The real functions, with other defaults."""

    def changed(params: Any) -> Any:
        for name, value in changes.items():
            if hasattr(params, name):
                setattr(params, name, value)
        return params

    real = llamacpp_logits.library()
    functions = {name: SimpleNamespace() for name in llamacpp_logits.FUNCTIONS}
    model, context = real.llama_model_default_params(), real.llama_context_default_params()

    class Defaults(SimpleNamespace):
        def __call__(self) -> Any:
            return self.value

    functions["llama_model_default_params"] = Defaults(value=changed(model))
    functions["llama_context_default_params"] = Defaults(value=changed(context))
    return SimpleNamespace(**functions)


def test_another_release_or_layout_is_refused() -> None:
    release = llamacpp_logits.RELEASE
    assert xllamacpp.__version__ == release
    check_layout(fake_library(), release)
    again = rf"pip install xllamacpp=={release}"
    with pytest.raises(InputError, match=rf"xllamacpp: found release 2027\.1\.1; .*{again}"):
        check_layout(fake_library(), "2027.1.1")
    for changes, found in (
        ({"n_gpu_layers": 7}, "n_gpu_layers 7 where the default is -1"),
        ({"type_k": 3}, "type_k 3 where the default is 1"),
        ({"ctx_other": 16}, "ctx_other 16 where the default is None"),
    ):
        with pytest.raises(InputError, match=rf"found {found}; .*{again}"):
            check_layout(fake_library(**changes), release)
    lacking = fake_library()
    del lacking.llama_decode
    with pytest.raises(InputError, match=rf"found no function llama_decode; .*{again}"):
        check_layout(lacking, release)
    assert {name for name, _ in ModelParams._fields_} & {name for name, _ in ContextParams._fields_} == set()
