"""ONNX files of convolutional models: batch norm as in evaluation, and convolutions in int8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from overproof.data.manifest import Manifest
from overproof.export import stage
from overproof.export.onnx_file import Reference, export_onnx
from overproof.export.onnx_int8 import quantize_onnx, quantize_onnx_static, require_same_numbers
from overproof.models.hf_directory import build_model, load_model, save_model
from overproof.models.resnet import FAMILY, ResNet
from overproof.registry import FORMATS

SECTIONS = {
    "basic": ResNet(embedding_size=8, hidden_sizes=(32, 64), depths=(1, 2)),
    "bottleneck": ResNet(embedding_size=16, hidden_sizes=(64, 192), depths=(1, 1), layer_type="bottleneck"),
}
DETAILS = {"channels": 3, "height": 16, "width": 12, "classes": ["a", "b", "c", "d"]}
WIDTH = 3 * 16 * 12


@pytest.fixture(scope="module", params=SECTIONS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    manifest = Manifest(
        task="image_classification", columns=(), splits={}, rows_per_group=4, positions=1, outputs=4, details=DETAILS
    )
    model = build_model(SECTIONS[request.param], manifest, 0)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data = torch.empty_like(weight).uniform_(-0.2, 1.0, generator=generator)
    for _ in range(20):  # running statistics, by which alone the file computes
        model(torch.rand(16, 3, 16, 12, generator=generator))
    save_model(model, model.config, folder / "model")
    found = {name: folder / f"{name}.onnx" for name in ("fp32", "int8", "static")} | {"model": folder / "model"}
    export_onnx(found["model"], found["fp32"])
    quantize_onnx(found["fp32"], found["int8"])
    quantize_onnx_static(found["fp32"], found["static"], rows(32), full_range=False)
    return found


def rows(count: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(5)
    return (generator.random((1, WIDTH), np.float32) for _ in range(count))


def run(file: Path, rows_BD: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logprobs_BV: np.ndarray = session.run(["logprobs"], {"inputs": rows_BD})[0]
    return logprobs_BV


@pytest.mark.parametrize("count", [1, 5])
def test_fp32_is_torch_in_evaluation(files: dict[str, Path], count: int) -> None:
    rows_BD = np.random.default_rng(count).random((count, WIDTH), np.float32)
    with torch.inference_mode():
        expected = FAMILY.flat_logprobs(load_model(files["model"]), torch.from_numpy(rows_BD)).numpy()
    np.testing.assert_allclose(run(files["fp32"], rows_BD), expected, atol=1e-5)
    np.testing.assert_allclose(Reference(files["fp32"])(rows_BD), expected, atol=1e-5)
    stage.require_same_model(FORMATS["onnx"], files["model"], files["fp32"])


@pytest.mark.parametrize("variant", ["int8", "static"])
def test_int8_has_the_convolutions_but_the_stems_and_is_close(files: dict[str, Path], variant: str) -> None:
    found = {each.name: numpy_helper.to_array(each) for each in onnx.load(files[variant]).graph.initializer}
    kernels = {name: values for name, values in found.items() if values.ndim == 4}
    (whole,) = [name for name, values in kernels.items() if values.dtype == np.float32]
    assert "embedder" in whole
    assert all(values.dtype == np.int8 for name, values in kernels.items() if name != whole)
    for name, values in kernels.items():
        if name != whole:
            assert np.abs(values.astype(int)).max() == (127 if variant == "int8" else 64)  # seven bits where multiplied
            assert found[f"{name.removesuffix('_quantized')}_scale"].shape == (len(values),)  # of each channel
    rows_BD = np.concatenate(list(rows(40)))
    exact, rounded = run(files["fp32"], rows_BD), run(files[variant], rows_BD)
    assert 0 < np.abs(exact - rounded).mean() < 0.1
    assert (exact.argmax(1) == rounded.argmax(1)).mean() > 0.85
    one = np.concatenate([run(files[variant], row[None]) for row in rows_BD[:4]])
    meant = np.concatenate([Reference(files[variant])(row[None]) for row in rows_BD[:4]])
    np.testing.assert_allclose(one, meant, atol=0.05 if variant == "static" else 1e-4)
    assert files[variant].stat().st_size < 0.75 * files["fp32"].stat().st_size


@pytest.mark.parametrize("variant", ["int8", "static"])
def test_a_file_with_another_kernel_is_refused(files: dict[str, Path], variant: str, tmp_path: Path) -> None:
    require_same_numbers(files[variant], files["fp32"])
    proto = onnx.load(files[variant])
    kernel = next(i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 4)
    codes = numpy_helper.to_array(kernel).copy()
    codes[0] = -codes[0]
    kernel.CopyFrom(numpy_helper.from_array(codes, kernel.name))
    onnx.save(proto, tmp_path / "spoiled.onnx")
    with pytest.raises(RuntimeError, match="by more than rounding explains: the export is wrong"):
        require_same_numbers(tmp_path / "spoiled.onnx", files["fp32"])
