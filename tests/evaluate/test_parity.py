"""The parity probe agrees with a sound engine, and catches what is broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from overproof.artifacts import Artifact
from overproof.config import Evaluate
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.export import gguf_file, stage
from overproof.export.onnx_file import Reference
from overproof.models import gguf_layout
from overproof.registry import FORMATS, TASKS
from overproof.tasks import text_evaluation
from overproof.tasks.base import Metric
from overproof.tasks.text_evaluation import text_parity_nats
from overproof.tasks.torch_scorer import TorchScorer

SETTINGS = Evaluate(threads=1, decode_tokens=16, timed_requests=20, probe_prompts=4, probe_tokens=16)
# llama.cpp rounds keys, values and activations to half precision beside f16 weights, activations to 8 bits beside
# quantised ones. What is broken is off by more, in these barely trained models too.
ROUNDING_NATS = {"f16": 0.01, "q8_0": 0.15, "q4_0": 0.15}


def measure_text(file: Path, root: Path) -> dict[str, Metric]:
    return TASKS["language_modeling"].probe(file, root, SETTINGS, "llama.cpp", FORMATS["gguf"], lambda _: None)


@pytest.mark.parametrize("name", ["student", "student-q8_0", "student-q4_0"])
def test_engine_gives_the_references_logprobs(text: dict[str, Artifact], name: str) -> None:
    found = measure_text(text["compress"].local() / f"{name}.gguf", text["prepare"].local())
    assert found["parity_nats"].value < ROUNDING_NATS[name.removeprefix("student-") if "-" in name else "f16"]
    assert found["parity_nats"].n == 4 * 16
    assert (found["split_otherwise"].value, found["split_otherwise"].n) == (0, 12)
    assert found["decode_tokens_per_s"].value > 100
    assert found["latency_p95_s"].n == 20
    assert found["latency_p50_s"].value <= found["latency_p95_s"].value
    assert found["time_to_first_token_s"].value < found["latency_p50_s"].value
    assert 0 < found["time_to_first_token_s"].value < 5
    assert 20 < found["resident_before_load_mb"].value < found["resident_mb"].value < 400


def test_rotary_rows_in_the_wrong_order_are_caught(
    text: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a mistake that the reader shares: the file is read by the engine, in its own way."""
    monkeypatch.setattr(gguf_layout, "interleave_rotary", lambda weights, _: weights)
    source, file = text["train"].local() / "model", tmp_path / "broken.gguf"
    gguf_file.export_gguf(source, source / "tokenizer.json", file, "f16", "broken")
    with pytest.raises(RuntimeError, match="the export is wrong"):
        stage.require_same_model(FORMATS["gguf"], source, file)
    monkeypatch.setattr(gguf_layout, "split_rotary", lambda weights, _: weights)
    with pytest.raises(RuntimeError, match="the export is wrong"):
        stage.require_same_model(FORMATS["gguf"], source, file)


def test_answers_of_another_file_are_caught(text: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers is held against what was judged."""
    other, root = text["compress"].local() / "control.gguf", text["prepare"].local()
    right = text_evaluation.open_scorer
    monkeypatch.setattr(text_evaluation, "open_scorer", lambda _, *rest: right(other, *rest))
    assert measure_text(text["compress"].local() / "student.gguf", root)["parity_nats"].value > 0.3


def fixed(logits_SV: torch.Tensor) -> TorchScorer:
    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=logits_SV[None, : input_ids.shape[1]])

    return TorchScorer(Fixed(), batch_rows=1)


def test_another_choice_costs_half_its_gap() -> None:
    logits_SV = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.002]])
    logprobs_SV = logits_SV.log_softmax(-1)
    same = [float(logprobs_SV[1, 0]), float(logprobs_SV[2, 1])]
    assert text_parity_nats(fixed(logits_SV), [0, 0], [0, 1], same) == pytest.approx(0, abs=1e-6)
    near_tie = [float(logprobs_SV[1, 0]), float(logprobs_SV[2, 0])]
    assert text_parity_nats(fixed(logits_SV), [0, 0], [0, 0], near_tie) == pytest.approx(0.001, abs=1e-5)
    wrong_choice = [float(logprobs_SV[1, 1]), float(logprobs_SV[2, 1])]
    assert text_parity_nats(fixed(logits_SV), [0, 0], [1, 1], wrong_choice) == pytest.approx(1.0, abs=1e-5)
    wrong_figure = [same[0] - 0.3, same[1]]
    assert text_parity_nats(fixed(logits_SV), [0, 0], [0, 1], wrong_figure) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize("name", ["student", "student-int8"])
def test_onnx_runtime_gives_the_references_logprobs(digits: dict[str, Artifact], name: str) -> None:
    file, root = digits["compress"].local() / f"{name}.onnx", digits["prepare"].local()
    found = TASKS["image_classification"].probe(file, root, SETTINGS, "onnxruntime", FORMATS["onnx"], lambda _: None)
    assert 0 < found["parity_nats"].value < 1e-4
    assert found["images_per_s"].value > 50


def test_other_bytes_are_other_answers(digits: dict[str, Artifact], tmp_path: Path) -> None:
    """The reference reads the file: one matrix scaled, and it no longer agrees with an engine on the old one."""
    file = digits["compress"].local() / "student-int8.onnx"
    proto = onnx.load(file)
    scale = next(i for i in proto.graph.initializer if i.name.endswith("_scale") and numpy_helper.to_array(i).size > 1)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    pixels_BD = np.random.default_rng(0).random((1, 64), np.float32)
    engine = OnnxRuntime(file)
    assert np.abs(engine.logprobs(pixels_BD) - Reference(file)(pixels_BD)).max() < 1e-4
    assert np.abs(engine.logprobs(pixels_BD) - Reference(tmp_path / "broken.onnx")(pixels_BD)).max() > 1e-2
