"""Files in compressed-tensors of a model that was really trained: how near they are to it, and what vLLM computes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from finished import RECIPES
from overproof.artifacts import Artifact, Store
from overproof.config import Serve
from overproof.data.parquet_reader import Shards
from overproof.engines.base import EngineSettings, Sampling, TextEngine
from overproof.export.base import ExportContext
from overproof.export.compressed_tensors import FORMAT, CompressedTensors
from overproof.export.compressed_tensors_file import read_compressed, require_same_weights
from overproof.export.compressed_tensors_schemes import SCHEMES
from overproof.package.package import open_package
from overproof.registry import ENGINES, FORMATS
from overproof.serve.replica import load_engine
from overproof.tasks import text_evaluation

VLLM_PYTHON = "OVERPROOF_VLLM"
PROMPT, RUN_S = [0, 70, 71, 72], 3000
needs_vllm = pytest.mark.skipif(VLLM_PYTHON not in os.environ, reason=f"{VLLM_PYTHON} names no Python with vLLM")


@pytest.fixture(scope="module")
def exported(text: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A variant of a small teacher that was really trained, its tokenizer beside it."""
    folder, prepared = tmp_path_factory.mktemp("variants"), text["prepare"]
    model, tokenizer = text["train"].local() / "model", prepared.local() / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())

    def write(variant: str) -> Path:
        file = folder / f"{variant}.safetensors"
        if not file.exists():
            settings = CompressedTensors.model_validate({"calibration": {"rows": 64}})
            FORMAT.write(model, file, variant, ExportContext(settings, "teacher", model, tokenizer, prepared), file)
        return file

    return write


def distance(text: dict[str, Artifact], reference: Path, file: Path) -> float:
    """Mean KL divergence of a file's model from the reference's on test documents, which calibration has not seen."""
    rows = Shards(text["prepare"], "test").take(np.arange(48))["tokens"].astype(np.int64)
    whole, model, tokens_BS = read_compressed(reference), read_compressed(file), torch.from_numpy(rows)[:, :-1]
    with torch.inference_mode():
        expected, found = (each(input_ids=tokens_BS).logits.log_softmax(-1) for each in (whole, model))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_calibrated_files_are_as_large_and_nearer_to_the_model(
    exported: Callable[[str], Path], text: dict[str, Artifact]
) -> None:
    sizes = [exported(variant).stat().st_size for variant in ("int4", "int4-gptq")]
    assert abs(sizes[0] - sizes[1]) <= 8  # of the header
    require_same_weights(exported("int4-gptq"), exported("bf16"))
    far, near = (distance(text, exported("bf16"), exported(variant)) for variant in ("int4", "int4-gptq"))
    eight = max(distance(text, exported("bf16"), exported(variant)) for variant in ("int8", "fp8"))
    print(f"KL to bf16: int4 {far:.5f}, int4-gptq {near:.5f}, int8 and fp8 {eight:.5f} at most")
    assert near < 0.75 * far
    assert eight < far  # and they round activations, too


@pytest.mark.parametrize("variant", ["int8", "fp8"])
def test_their_scorer_rounds_activations_as_their_engine_does(
    exported: Callable[[str], Path], text: dict[str, Artifact], variant: str
) -> None:
    """What it gives is that of the rounded weights with inputs that are rounded by the formula, and not without."""
    root, file = text["prepare"].local(), exported(variant)
    scheme, tokens_S = SCHEMES[variant], Shards(root, "test").take(np.arange(1))["tokens"][0].astype(np.int64)
    scorer = text_evaluation.open_scorer(file, root, "vllm", FORMATS["compressed_tensors"], threads=1)
    [found] = scorer.score([tokens_S])
    scorer.close()
    model, layers = read_compressed(file), 0
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and type(part) is not torch.nn.Linear:
            part.__class__, layers = torch.nn.Linear, layers + 1
    assert layers == 7 * model.config.num_hidden_layers

    def nats() -> np.ndarray:
        with torch.inference_mode():
            logprobs_SV = model(input_ids=torch.from_numpy(tokens_S)[None, :-1]).logits[0].log_softmax(-1)
        return -logprobs_SV.gather(-1, torch.from_numpy(tokens_S)[1:, None])[:, 0].numpy()

    def rounded(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        scale_B1 = given[0].abs().amax(-1, keepdim=True) / scheme.most
        codes = given[0] / scale_B1
        return (codes.to(scheme.codes).float() if scheme.type == "float" else codes.round()) * scale_B1

    without = nats()
    for part in model.model.layers.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(rounded)
    np.testing.assert_allclose(found.nats_P, nats(), atol=1e-4)
    assert np.abs(found.nats_P - without).max() > 1e-3


@pytest.mark.trial
@needs_vllm
@pytest.mark.parametrize("variant", ["bf16", "int8", "fp8", "int4-gptq"])
def test_vllm_computes_with_the_files_own_bytes(exported: Callable[[str], Path], variant: str) -> None:
    """Its log-probabilities are those of what torch reads from the file, as far as half precision tells."""
    file = exported(variant)
    engine, reference = ENGINES["vllm"].load(file, EngineSettings(slots=2)), read_compressed(file)
    assert isinstance(engine, TextEngine)
    with closing(engine):
        for seed in range(3):
            done = engine.complete(PROMPT, Sampling(24, temperature=1.0, seed=seed, logprobs=1))
            assert done.token_logprobs is not None
            with torch.inference_mode():
                logits_SV = reference(input_ids=torch.tensor([[*PROMPT, *done.tokens]])).logits[0]
            places = range(len(PROMPT) - 1, len(PROMPT) + len(done.tokens) - 1)
            expected_SV = logits_SV[list(places)].log_softmax(-1)
            pairs = zip(done.token_logprobs, expected_SV, strict=True)
            differences = [abs(token.logprob - float(row_V[token.id])) for token, row_V in pairs]
            assert np.mean(differences) < 0.1
            assert max(differences) < 0.6


@pytest.mark.trial
@needs_vllm
def test_a_whole_run_ships_and_serves_what_vllm_computed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sets = (
        f"store={tmp_path}", "train.steps=60", "train.warmup_steps=5", "train.validate_every=30", "sweep.steps=30",
        "sweep.validate_every=30", "tune={}", "sweep.keep=1", "sweep.concurrent_trials=1", "cache.actors=1",
        "compress={kind: compressed_tensors, formats: [int8, int4-gptq], calibration: {rows: 32}}",
        "evaluate={max_documents: 8, timed_requests: 4, streams: 1}",
        "gate.rules=[{kind: regression, against: student, at_most: 0.03}, {kind: parity, at_most: 0.5}]",
    )  # fmt: skip
    command = [sys.executable, "-m", "overproof.cli.main", "run", str(RECIPES / "stdlib-lm.yaml")]
    command += [word for override in sets for word in ("--set", override)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    package = open_package(Store(str(tmp_path)).get("stdlib-lm/package").local())
    assert package.content.model_format in ("int8", "int4-gptq")
    assert package.content.model == "model.safetensors"
    assert "computes with the file's own bytes" in (package.path / "README.md").read_text()
    engine = load_engine(package, Serve())
    assert isinstance(engine, TextEngine)
    with closing(engine):
        assert len(engine.complete("import ", Sampling(8, temperature=0.0)).tokens) == 8
