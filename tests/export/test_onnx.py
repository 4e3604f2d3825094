"""ONNX files give the answers of the model they were made from, for any number of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers import ViTConfig, ViTForImageClassification

from overproof.export import stage
from overproof.export.onnx_file import Reference, export_onnx
from overproof.export.onnx_fusion import fuse_products
from overproof.export.onnx_int8 import quantize_onnx, quantize_onnx_static
from overproof.models import hf_directory
from overproof.registry import FORMATS, TASKS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        initializer_range=0.2,
        architectures=["ViTForImageClassification"],
    )
    hf_directory.save_model(ViTForImageClassification(config), config, folder / "model")
    export_onnx(folder / "model", folder / "fp32.onnx")
    quantize_onnx(folder / "fp32.onnx", folder / "int8.onnx")
    return {"model": folder / "model", "fp32": folder / "fp32.onnx", "int8": folder / "int8.onnx"}


def run(file: Path, pixels_BD: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logprobs_BV: np.ndarray = session.run(["logprobs"], {"inputs": pixels_BD})[0]
    return logprobs_BV


@pytest.mark.parametrize("count", [1, 3, 17])
def test_fp32_is_torch(files: dict[str, Path], count: int) -> None:
    pixels_BD = np.random.default_rng(count).random((count, 64), np.float32)
    batch = {"pixels": torch.from_numpy(pixels_BD).view(-1, 1, 8, 8), "label": torch.zeros(count, dtype=torch.int64)}
    with torch.inference_mode():
        expected = (
            TASKS["image_classification"]
            .predict(hf_directory.load_model(files["model"]), batch)
            .logits_BPV[:, 0]
            .log_softmax(-1)
            .numpy()
        )
    np.testing.assert_allclose(run(files["fp32"], pixels_BD), expected, atol=1e-5)
    np.testing.assert_allclose(Reference(files["fp32"])(pixels_BD), expected, atol=1e-5)


def test_int8_is_close_and_smaller(files: dict[str, Path]) -> None:
    pixels_BD = np.random.default_rng(0).random((40, 64), np.float32)
    exact, rounded = run(files["fp32"], pixels_BD), run(files["int8"], pixels_BD)
    assert 0 < np.abs(exact - rounded).mean() < 0.1
    assert (exact.argmax(1) == rounded.argmax(1)).mean() > 0.85
    assert files["int8"].stat().st_size < 0.6 * files["fp32"].stat().st_size
    one = np.concatenate([run(files["int8"], image[None]) for image in pixels_BD])
    np.testing.assert_allclose(one, np.concatenate([Reference(files["int8"])(i[None]) for i in pixels_BD]), atol=1e-4)


def test_weights_are_int8_per_channel_with_seven_bits(files: dict[str, Path]) -> None:
    values = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(files["int8"]).graph.initializer}
    weights = {name: v for name, v in values.items() if v.dtype == np.int8 and v.ndim == 2}
    assert len(weights) == 2 * 4 + 1  # two of attention and two of the layer's network, and the classifier
    for name, weight in weights.items():
        assert np.abs(weight.astype(int)).max() <= 64, name
        scale = values[name.removesuffix("_quantized") + "_scale"]
        assert scale.shape == (weight.shape[1],)


def graph_of(shared: bool) -> onnx.ModelProto:
    """Two products with biases of one input, of one matrix where it is ``shared``, and a third without a bias."""
    rng, helper, width = np.random.default_rng(0), onnx.helper, 3 if shared else 5
    sizes = {"a": (6, 3), "b": (6, width), "a_bias": (3,), "b_bias": (width,), "c": (6, 2)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("Add", ["a_bias", "xa"], ["one"]),
        helper.make_node("MatMul", ["x", "a" if shared else "b"], ["xb"]),
        helper.make_node("Add", ["xb", "b_bias"], ["two"]),
        helper.make_node("MatMul", ["x", "c"], ["three"]),
    ]
    columns = {"x": 6, "one": 3, "two": width, "three": 2}
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", of]) for name, of in columns.items()]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in values.items() if not shared or name != "b"]
    return helper.make_model(
        helper.make_graph(nodes, "made", ends[:1], ends[1:], tensors), opset_imports=[helper.make_opsetid("", 20)]
    )


def test_products_of_one_input_are_one(files: dict[str, Path]) -> None:
    inputs = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    plain, fused, shared = graph_of(False), graph_of(False), graph_of(True)
    fuse_products(fused)
    onnx.checker.check_model(fused)
    expected, found = (ReferenceEvaluator(model).run(None, {"x": inputs}) for model in (plain, fused))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6)
    assert [node.op_type for node in fused.graph.node] == ["MatMul", "Add", "Split", "MatMul"]
    assert len(fused.graph.initializer) == 4
    before = shared.SerializeToString()
    fuse_products(shared)
    assert shared.SerializeToString() == before  # what two nodes read stays
    whole = onnx.load(files["fp32"]).graph
    weights = {each.name for each in whole.initializer}
    assert len([node for node in whole.node if node.op_type == "MatMul" and node.input[1] in weights]) == 2 * 4


def test_one_file_without_this_machines_paths(files: dict[str, Path]) -> None:
    assert {f.name for f in files["fp32"].parent.iterdir()} == {"model", "fp32.onnx", "int8.onnx"}
    for name in ("fp32", "int8"):
        content = files[name].read_bytes()
        for trace in (b".py", b"site-packages", str(files["model"].parent).encode()):
            assert trace not in content, (name, trace)


def test_check_after_the_export_can_fail(files: dict[str, Path], tmp_path: Path) -> None:
    stage.require_same_model(FORMATS["onnx"], files["model"], files["fp32"])
    proto = onnx.load(files["fp32"])
    weight = next(i for i in proto.graph.initializer if len(i.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    with pytest.raises(RuntimeError, match="the export is wrong"):
        stage.require_same_model(FORMATS["onnx"], files["model"], tmp_path / "broken.onnx")


def test_exporting_says_nothing(files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    quantize_onnx(files["fp32"], tmp_path / "again.onnx")
    assert capfd.readouterr() == ("", "")


def images(count: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(5)
    return (generator.random((1, 64), np.float32) for _ in range(count))


def test_static_int8_is_close_and_its_answers_depend_on_their_row_alone(files: dict[str, Path], tmp_path: Path) -> None:
    static = tmp_path / "static.onnx"
    quantize_onnx_static(files["fp32"], static, images(32), full_range=False)
    rows_BD = np.concatenate(list(images(40)))
    exact, found = run(files["fp32"], rows_BD), run(static, rows_BD)
    assert 0 < np.abs(exact - found).mean() < 0.1
    assert (exact.argmax(1) == found.argmax(1)).mean() > 0.85
    np.testing.assert_allclose(found[7:8], run(static, rows_BD[7:8]), atol=1e-6)
    assert not np.allclose(run(files["int8"], rows_BD)[7:8], run(files["int8"], rows_BD[7:8]), atol=1e-6)
    np.testing.assert_allclose(found[:3], Reference(static)(rows_BD[:3]), atol=0.05)
    saturated = tmp_path / "saturated.onnx"  # what is calibrated on rows that are not like those to come
    quantize_onnx_static(files["fp32"], saturated, (row * 0.01 for row in images(32)), full_range=False)
    assert np.abs(exact - run(saturated, rows_BD)).mean() > 2 * np.abs(exact - found).mean()


def test_the_full_range_has_eight_bits_and_errs_less(files: dict[str, Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole.onnx"
    quantize_onnx(files["fp32"], whole, full_range=True)
    codes = [i for i in onnx.load(whole).graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 2]
    assert codes
    assert max(np.abs(onnx.numpy_helper.to_array(code).astype(int)).max() for code in codes) == 127
    rows_BD = np.concatenate(list(images(40)))
    exact = Reference(files["fp32"])(rows_BD)
    errors = [np.abs(Reference(path)(rows_BD) - exact).mean() for path in (whole, files["int8"])]
    assert errors[0] < errors[1]
