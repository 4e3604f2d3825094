"""Exports that are wrong on purpose are refused, each time; honest ones pass, whatever the seed of the resamples.

What is wrong beside the file itself, its tokenizer, its report or its test split, is in ``test_defective_reports``.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Ggml
from onnx import TensorProto as Onnx
from onnx import numpy_helper
from transformers import PreTrainedModel

from overproof.artifacts import Artifact
from overproof.config import Evaluate, Gate
from overproof.data.manifest import TOKENIZER
from overproof.data.parquet_reader import Shards
from overproof.distill.pruning import keep_layers
from overproof.engines.llamacpp_logits import LlamaCppLogits
from overproof.engines.onnx_runtime import OnnxRuntime
from overproof.errors import InputError
from overproof.evaluate.gate import judge
from overproof.evaluate.metrics import Bootstrap, MeasuredFile, PerExampleSums, Report, quality_metrics
from overproof.export.base import WeighedFormat
from overproof.export.ggml_blocks import dequantise, quantise
from overproof.export.gguf_file import export_gguf
from overproof.export.gguf_weights import require_same_weights
from overproof.export.onnx_int8 import quantize_onnx, quantize_onnx_static
from overproof.export.stage import require_same_model
from overproof.models.hf_directory import load_model, save_model
from overproof.registry import FORMATS, TASKS
from overproof.tasks.base import FileScores, agreements

GATE = Gate.model_validate(
    {"rules": [{"kind": "regression", "against": "student", "at_most": 0.02},
               {"kind": "keep", "against": "teacher", "at_least": 0.95}]}
)  # fmt: skip
SEEDS, LEAST_HONEST = 100, 95
Weights = np.ndarray


# --- conversions that mean another model ----------------------------------------------------------


def permuted_heads(model: PreTrainedModel) -> PreTrainedModel:
    weight = model.model.layers[1].self_attn.q_proj.weight.data
    width = weight.shape[0] // model.config.num_attention_heads
    weight.copy_(weight.roll(width, 0))
    return model


def transposed_matrix(model: PreTrainedModel) -> PreTrainedModel:
    weight = model.model.layers[0].self_attn.o_proj.weight.data
    weight.copy_(weight.T.clone())
    return model


def missing_layer(model: PreTrainedModel) -> PreTrainedModel:
    return keep_layers(model, [0])


def swapped_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    weight = model.model.embed_tokens.weight.data
    weight[40:60] = weight[60:80].clone()
    return model


def wrong_rope_base(model: PreTrainedModel) -> PreTrainedModel:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}
    return model


def wrong_scale(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    return model


CONVERSIONS = (permuted_heads, transposed_matrix, missing_layer, swapped_embeddings, wrong_rope_base, wrong_scale)


@pytest.mark.parametrize("defect", CONVERSIONS, ids=lambda defect: defect.__name__)
def test_a_file_that_means_another_model_is_not_written_off_as_rounding(
    text: dict[str, Artifact], tmp_path: Path, defect: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    source = text["train"].local() / "model"
    tokenizer, changed = text["prepare"].local() / TOKENIZER, defect(copy.deepcopy(load_model(source)))
    save_model(changed, changed.config, tmp_path / "changed", tokenizer)
    export_gguf(tmp_path / "changed", tokenizer, tmp_path / "changed.gguf", "f16", "changed")
    require_same_model(FORMATS["gguf"], tmp_path / "changed", tmp_path / "changed.gguf")
    with pytest.raises(RuntimeError, match="the export is wrong"):
        require_same_model(FORMATS["gguf"], source, tmp_path / "changed.gguf")


# --- quantised GGUF files -------------------------------------------------------------------------


def saturated(weights: Weights) -> Weights:
    """As by a scale that the largest numbers do not fit."""
    most = np.abs(weights).max(1, keepdims=True) / 4
    return weights.clip(-most, most)


def scaled(weights: Weights) -> Weights:
    return weights * np.float32(1.6)


def rows_permuted(weights: Weights) -> Weights:
    return np.roll(weights, len(weights) // 3, 0)


def transposed(weights: Weights) -> Weights:
    return np.ascontiguousarray(weights.T) if weights.shape[0] == weights.shape[1] else weights[::-1]


def emptied(weights: Weights) -> Weights:
    return np.zeros_like(weights)


@pytest.fixture(scope="module")
def judged(text: dict[str, Artifact]) -> Callable[..., bool]:
    """Whether a quantised file of the student passes, with a seed of the resamples."""
    task, root, folder = TASKS["language_modeling"], text["prepare"].local(), text["compress"].local()
    units, scores = task.units(root, 12), dict[Path, FileScores]()

    def score(file: Path) -> FileScores:
        if file not in scores:
            scores[file] = task.score(file, root, units, Evaluate(), "llama.cpp", FORMATS["gguf"], lambda _: None)
        return scores[file]

    def passes(file: Path, seed: int = 0) -> bool:
        # The student stands for its own teacher: what was lost is what rounding and the defect cost.
        of = {"teacher": folder / "student.gguf", "student": folder / "student.gguf", "student-x": file}
        sums = {
            name: PerExampleSums(
                s.total, s.size.astype(float), agreements(s, score(of["teacher"])).astype(float),
                s.predictions.astype(float),
            )
            for name, s in ((name, score(path)) for name, path in of.items())
        }  # fmt: skip
        metrics, comparisons = quality_metrics(task.quality, sums, Bootstrap(200, 0.95, seed))
        measured = tuple(
            MeasuredFile(
                name=name, student=None if name == "teacher" else "student", format="x", size_bytes=1, sha256="0" * 64,
                candidate=name == "student-x", metrics=metrics[name],
            )
            for name in of
        )  # fmt: skip
        report = Report(
            task="language_modeling", quality=task.quality.name, engine="llama.cpp", computes_with="", confidence=0.95,
            measured=measured, comparisons=comparisons,
        )  # fmt: skip
        return judge(GATE, report).passed

    return passes


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.0.attn_output.weight", "blk.0.ffn_down.weight"])
@pytest.mark.parametrize(
    "defect", [saturated, scaled, rows_permuted, transposed, emptied], ids=lambda defect: defect.__name__
)
def test_a_quantised_file_with_one_wrong_tensor_is_not_written(
    text: dict[str, Artifact], judged: Callable[..., bool], tmp_path: Path, tensor: str,
    defect: Callable[[Weights], Weights],
) -> None:  # fmt: skip
    file = shutil.copyfile(text["compress"].local() / "student-q8_0.gguf", tmp_path / "wrong.gguf")
    reader = gguf.GGUFReader(file, "r+")
    found = next(each for each in reader.tensors if each.name == tensor)
    assert found.tensor_type is Ggml.Q8_0
    found.data[:] = quantise(defect(dequantise(np.array(found.data), Ggml.Q8_0)), Ggml.Q8_0)
    reader.data.flush()
    with pytest.raises(
        RuntimeError, match=f"tensor {tensor} is .* rounding to Q8_0 explains 0.05: the export is wrong"
    ):
        require_same_weights(file, text["compress"].local() / "student.gguf")
    if defect is emptied:  # what shows in quality the gate refuses, too
        assert not any(judged(file, seed) for seed in range(20))


@pytest.mark.parametrize("variant", ["q8_0", "q4_0"])
def test_honest_gguf_files_pass(text: dict[str, Artifact], judged: Callable[..., bool], variant: str) -> None:
    file = text["compress"].local() / f"student-{variant}.gguf"
    require_same_weights(file, text["compress"].local() / "student.gguf")
    passed = sum(judged(file, seed) for seed in range(SEEDS))
    print(f"{variant}: {passed} of {SEEDS} passed")
    assert passed >= LEAST_HONEST


def test_a_file_that_is_cut_anywhere_is_not_loaded(text: dict[str, Artifact], tmp_path: Path) -> None:
    whole = (text["compress"].local() / "student-q8_0.gguf").read_bytes()
    places = np.random.default_rng(0).integers(1, len(whole), 24).tolist()
    for size in (1, 4, 24, *places, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.gguf: llama\.cpp cannot load it"):
            LlamaCppLogits(tmp_path / "cut.gguf", 16)


# --- quantised ONNX files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8_files(digits: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The teacher of the digits, by variant."""
    folder, whole = tmp_path_factory.mktemp("int8"), digits["compress"].local() / "teacher.onnx"
    pixels = Shards(digits["prepare"].local(), "train").take(np.arange(8))["pixels"].reshape(8, 1, -1)
    files = {"fp32": whole} | {variant: folder / f"{variant}.onnx" for variant in ("int8", "int8-static")}
    quantize_onnx(whole, files["int8"])
    quantize_onnx_static(whole, files["int8-static"], iter(pixels), full_range=False)
    return files


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.name == name)


def change(model: onnx.ModelProto, name: str, to: Callable[[Weights], Weights]) -> None:
    """Of a tensor, keeping its type."""
    found = tensor(model, name)
    values = numpy_helper.to_array(found)
    found.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(to(values), values.dtype), name))


def matrices(model: onnx.ModelProto) -> list[str]:
    """Names of the codes, the square matrices first."""
    found = [i for i in model.graph.initializer if i.name.endswith("_quantized") and len(i.dims) == 2]
    return [i.name for i in sorted(found, key=lambda i: len({*i.dims}))]


def scale_of(codes: str) -> str:
    return codes.removesuffix("_quantized") + "_scale"


def saturated_codes(model: onnx.ModelProto) -> None:
    codes = matrices(model)[0]
    change(model, codes, lambda values: (2 * values.astype(int)).clip(-64, 63))
    change(model, scale_of(codes), lambda values: values / 2)


def a_scale_too_large(model: onnx.ModelProto) -> None:
    change(model, scale_of(matrices(model)[0]), lambda values: values * np.float32(1.1))


def one_channel_too_large(model: onnx.ModelProto) -> None:
    change(model, scale_of(matrices(model)[0]), lambda values: np.append(values[:-1], 1.1 * values[-1]))


def a_scale_too_coarse(model: onnx.ModelProto) -> None:
    """Each number is the nearest that its scale has, and that is 0, 1 or -1 of it."""
    codes = matrices(model)[0]
    change(model, codes, lambda values: np.round(values / 64))
    change(model, scale_of(codes), lambda values: values * 64)


def scales_permuted(model: onnx.ModelProto) -> None:
    change(model, scale_of(matrices(model)[0]), lambda values: np.roll(values, 1))


def codes_permuted(model: onnx.ModelProto) -> None:
    change(model, matrices(model)[0], lambda values: np.roll(values, len(values) // 4, 0))


def codes_transposed(model: onnx.ModelProto) -> None:
    change(model, matrices(model)[0], lambda values: values.T)


def swapped_layers(model: onnx.ModelProto) -> None:
    one, other = matrices(model)[:2]  # of two layers: equal shapes
    mine, others = (numpy_helper.to_array(tensor(model, name)) for name in (one, other))
    change(model, one, lambda _: others)
    change(model, other, lambda _: mine)


def missing_codes(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(tensor(model, matrices(model)[0]))


def another_bias(model: onnx.ModelProto) -> None:
    name = next(i.name for i in model.graph.initializer if i.data_type == Onnx.FLOAT and i.name.endswith("bias"))
    change(model, name, lambda values: values + np.float32(1e-3))


ONNX_DEFECTS = (
    saturated_codes, a_scale_too_large, one_channel_too_large, a_scale_too_coarse, scales_permuted, codes_permuted,
    codes_transposed, swapped_layers, missing_codes, another_bias,
)  # fmt: skip


@pytest.mark.parametrize("variant", ["int8", "int8-static"])
@pytest.mark.parametrize("defect", ONNX_DEFECTS, ids=lambda defect: defect.__name__)
def test_an_int8_file_with_other_weights_is_not_written(
    int8_files: dict[str, Path], tmp_path: Path, variant: str, defect: Callable[[onnx.ModelProto], None]
) -> None:
    written = FORMATS["onnx"]
    assert isinstance(written, WeighedFormat)
    written.require_same_weights(int8_files[variant], int8_files["fp32"])
    model = onnx.load(int8_files[variant])
    defect(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(RuntimeError, match=r"wrong\.onnx: .* of teacher\.onnx.*: the export is wrong"):
        written.require_same_weights(tmp_path / "wrong.onnx", int8_files["fp32"])


def test_an_onnx_file_that_is_cut_anywhere_is_not_loaded(int8_files: dict[str, Path], tmp_path: Path) -> None:
    whole = int8_files["int8"].read_bytes()
    places = np.random.default_rng(0).integers(1, len(whole), 8).tolist()
    for size in (0, 1, 24, *places, len(whole) - 1):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.onnx"):
            OnnxRuntime(tmp_path / "cut.onnx")
