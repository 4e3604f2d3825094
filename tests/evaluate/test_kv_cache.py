"""Keys and values in eight bits: what is measured with them is served with them, costs a little, and takes less."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np
import pytest

from overproof.artifacts import Artifact
from overproof.config import Evaluate, Serve, load_recipe
from overproof.data.manifest import Manifest
from overproof.engines import llamacpp_server
from overproof.engines.base import Sampling
from overproof.engines.llamacpp import LlamaCpp
from overproof.engines.llamacpp_scorer import LlamaCppScorer
from overproof.engines.probe import probe_text
from overproof.engines.probe_messages import TextRequest
from overproof.errors import InputError
from overproof.export.gguf_file import export_gguf
from overproof.models.hf_directory import build_model, save_model
from overproof.models.llama import Llama
from overproof.package.package import open_package
from overproof.registry import FORMATS, TASKS
from overproof.serve.replica import load_engine
from packing import RECIPES, make_package

TOKENS = np.arange(40, 100) % 256


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package("text", tmp_path_factory.mktemp("store"), "evaluate.kv_cache=q8_0")


def nats(file: Path, cache: str) -> np.ndarray:
    scorer = LlamaCppScorer(file, len(TOKENS), 1, cache)  # type: ignore[arg-type]
    (found,) = scorer.score([TOKENS])
    scorer.close()
    return found.nats_P


def test_scores_are_near_those_of_half_precision_and_not_the_same(text: dict[str, Artifact]) -> None:
    file = text["compress"].local() / "student.gguf"
    half, eight = nats(file, "f16"), nats(file, "q8_0")
    assert 0 < np.abs(half - eight).max() < 0.2
    assert half.mean() == pytest.approx(eight.mean(), abs=0.02)


def test_what_answers_is_what_was_judged(text: dict[str, Artifact]) -> None:
    """Parity holds with the cache on both sides: prompt, greedy text and its log-probabilities."""
    file, root = text["compress"].local() / "student.gguf", text["prepare"].local()
    settings = Evaluate(threads=1, decode_tokens=8, timed_requests=3, streams=2, kv_cache="q8_0")
    found = TASKS["language_modeling"].probe(file, root, settings, "llama.cpp", FORMATS["gguf"], lambda _: None)
    assert found["parity_nats"].value < 0.05


def test_a_package_is_served_as_it_was_measured(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, given = open_package(package), list[str]()
    assert opened.report.kv_cache == "q8_0"
    original = llamacpp_server.server_params

    def params(*arguments: object, **named: object) -> object:
        made = original(*arguments, **named)  # type: ignore[arg-type]
        given.append(made.cache_type_k.name)
        return made

    monkeypatch.setattr("overproof.engines.llamacpp.server_params", params)
    engine = load_engine(opened, Serve())
    assert isinstance(engine, LlamaCpp)
    assert engine.complete([0, 40, 41], Sampling(4)).tokens
    reading = engine.read_prompt([0, *range(40, 60)], Sampling(0, logprobs=0, echo=True), Event())
    assert reading.scores is not None
    engine.close()
    assert given == ["GGML_TYPE_Q8_0"]
    assert "keeps keys and values in q8_0" in (package / "README.md").read_text()


def test_it_takes_about_half(text: dict[str, Artifact], tmp_path: Path) -> None:
    """Of a context long enough to see it, in fresh processes."""
    prepared, context = text["prepare"].local(), 16384
    manifest = Manifest.read(prepared)
    shape = Llama(hidden_size=256, intermediate_size=32, layers=4, heads=4, kv_heads=4)
    tokenizer = manifest.tokenizer(prepared)
    assert tokenizer is not None
    model = build_model(shape, manifest, 0)
    model.config.max_position_embeddings = context
    save_model(model, model.config, tmp_path / "model", tokenizer)
    export_gguf(tmp_path / "model", tokenizer, tmp_path / "wide.gguf", "f16", "wide")
    told = {
        "engine": "llama.cpp", "file": str(tmp_path / "wide.gguf"), "threads": 1, "prompts": [[0, 40, 41]],
        "probe_tokens": 4, "texts": ["import os"], "timed_prompts": [[0, 40]], "timed_requests": 3, "probe_s": 60.0,
        "decode_tokens": 4,
    }  # fmt: skip
    half, eight = (
        probe_text(TextRequest.model_validate(told | {"kv_cache": cache}), lambda _: None).resident_mb
        for cache in ("f16", "q8_0")
    )
    saved = 2 * 4 * 256 * (2 - 34 / 32) * context  # bytes, of keys and values, in blocks of 32
    assert half - eight == pytest.approx(saved / 1e6, rel=0.3)


def test_other_engines_have_none() -> None:
    for name, engine in (("digits", "onnxruntime"), ("stdlib-lm", "vllm")):
        with pytest.raises(InputError, match=rf"evaluate\.kv_cache: found 'q8_0'; {engine} has"):
            load_recipe(RECIPES / f"{name}.yaml", (f"evaluate.engine={engine}", "evaluate.kv_cache=q8_0"))
