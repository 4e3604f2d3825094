"""Classifiers as ONNX, for ONNX Runtime.

Every file takes ``pixels`` (B, 64) float32 and gives ``logprobs`` (B, classes) float32, for any B.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from overproof.models import hf_directory

PIXELS = hf_directory.IMAGE_EDGE**2
OPSET = 20
# Of the patch convolution there is little to gain: it is small, and ONNX Runtime has no fast int8 kernel for it.
QUANTIZED = ["MatMul", "Gemm"]
LOUD = ("torch.onnx", "onnxscript", "onnx_ir", "root")


class _Classifier(nn.Module):
    """A vision transformer from flat pixels to log-probabilities."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        images_BCHW = pixels.reshape(-1, 1, hf_directory.IMAGE_EDGE, hf_directory.IMAGE_EDGE)
        logits_BV: Tensor = self.model(pixel_values=images_BCHW).logits
        return logits_BV.log_softmax(-1)


def export_onnx(model: Path, path: Path) -> None:
    """Write a Hugging Face vision transformer as one fp32 ONNX file; ``path`` appears when complete.

    The exporter that captures graphs takes 2 to 4 s; the tracing one takes 0.2 s and leaves dead weights in the file.
    """
    loaded = hf_directory.load_model(model)
    loaded.set_attn_implementation("eager")  # the fused kernel's graph guards against masks that a classifier lacks
    classifier = _Classifier(loaded).eval()
    with _quiet():
        program = torch.onnx.export(
            classifier,
            (torch.zeros(2, PIXELS),),
            input_names=["pixels"],
            output_names=["logprobs"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _write(program.model_proto, path)


def quantize_onnx(source: Path, path: Path) -> None:
    """Write an fp32 file again with int8 weights, one scale for each output channel.

    Activations are quantised while running, one scale for a whole batch: an image's answer depends a little
    on the images it is asked about with. Weights keep seven bits, since AVX2's int8 products overflow on eight.
    """
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        quantized = Path(scratch) / "int8.onnx"
        quantize_dynamic(
            source,
            quantized,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        _write(onnx.load(quantized), path)


class Reference:
    """ONNX's own executable specification, in numpy: slow, and independent of ONNX Runtime's kernels and rewrites.

    It runs a file's bytes operator by operator, integers included, so it says what the file means. That the
    file means the trained model is for ``export.py`` to check, once, against torch.
    """

    def __init__(self, path: Path) -> None:
        self._evaluator = ReferenceEvaluator(onnx.load(path))

    def __call__(self, pixels_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities (B, classes)."""
        logprobs_BV: NDArray[np.float32] = self._evaluator.run(["logprobs"], {"pixels": pixels_BD})[0]
        return logprobs_BV


def _write(proto: onnx.ModelProto, path: Path) -> None:
    """Save in one file, without the exporter's notes: they hold this machine's paths and outweigh a small model."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    proto.graph.doc_string = ""
    onnx.checker.check_model(proto, full_check=True)
    part = path.with_name(f"{path.name}.part")
    onnx.save(proto, part)
    part.replace(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what exporters log about every model; their errors still rise."""
    before = {name: logging.getLogger(name).level for name in LOUD}
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
