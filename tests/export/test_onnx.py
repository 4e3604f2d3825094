"""ONNX files give the answers of the model they were made from, for any number of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from overproof.export import stage
from overproof.export.onnx_file import Reference, export_onnx, quantize_onnx
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
    assert len(weights) == 2 * 6 + 1  # four of attention and two of the layer's network, and the classifier
    for name, weight in weights.items():
        assert np.abs(weight.astype(int)).max() <= 64, name
        scale = values[name.removesuffix("_quantized") + "_scale"]
        assert scale.shape == (weight.shape[1],)


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
