"""Models as ONNX files, and quantised ones.

Every file takes ``inputs`` (B, D) float32 and gives ``logprobs`` (B, V) float32, for any B.
"""

from __future__ import annotations

import logging
import math
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
from onnx.reference.op_run import OpRun
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.models.base import ArrayFamily
from overproof.models.hf_directory import load_model
from overproof.models.sizes import family_of

OPSET = 20
# Of the patch convolution there is little to gain: it is small, and ONNX Runtime has no fast int8 kernel for it.
QUANTIZED = ["MatMul", "Gemm", "Gather"]
SMALL_TABLE = 4096  # numbers: of smaller tables of embeddings, such as those of categories, there is little to gain
LOUD = ("torch.onnx", "onnxscript", "onnx_ir", "root")


class FlatClassifier(nn.Module):
    """A model from flat rows (B, D) to log-probabilities (B, V)."""

    def __init__(self, model: PreTrainedModel, family: ArrayFamily) -> None:
        super().__init__()
        self.model, self.family = model, family
        self.width = family.width(model.config)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.family.flat_logprobs(self.model, inputs)


def flat_classifier(directory: Path) -> FlatClassifier:
    """The model of a Hugging Face directory, fp32, in evaluation mode."""
    model = load_model(directory)
    _, family = family_of({"architectures": model.config.architectures}, directory)
    assert isinstance(family, ArrayFamily)
    return FlatClassifier(model, family).eval()


def export_onnx(model: Path, path: Path) -> None:
    """Write a Hugging Face directory as one fp32 ONNX file; ``path`` appears when complete.

    The exporter that captures graphs takes 2 to 4 s; the tracing one takes 0.2 s and leaves dead weights in the file.
    """
    classifier = flat_classifier(model)
    # The fused kernel's graph guards against masks that a classifier lacks.
    classifier.model.set_attn_implementation("eager")
    with _quiet():
        program = torch.onnx.export(
            classifier,
            (torch.zeros(2, classifier.width),),
            input_names=["inputs"],
            output_names=["logprobs"],
            dynamic_shapes={"inputs": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _write(program.model_proto, path)


def quantize_onnx(source: Path, path: Path) -> None:
    """Write an fp32 file again with int8 weights, one scale for each output channel, or for a table of embeddings.

    Activations are quantised while running, one scale for a whole batch: a row's answer depends a little
    on the rows it is asked about with. Weights keep seven bits, since AVX2's int8 products overflow on eight.
    """
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        quantized = Path(scratch) / "int8.onnx"
        quantize_dynamic(
            source,
            quantized,
            op_types_to_quantize=QUANTIZED,
            nodes_to_exclude=_lookups_in_small_tables(onnx.load(source).graph),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        _write(onnx.load(quantized), path)


def _lookups_in_small_tables(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes."""
    sizes = {table.name: math.prod(table.dims) for table in graph.initializer}
    gathers = (node for node in graph.node if node.op_type == "Gather")
    return [node.name for node in gathers if sizes.get(node.input[0], 0) < SMALL_TABLE]


class Reference:
    """ONNX's own executable specification, in numpy: slow, and independent of ONNX Runtime's kernels and rewrites.

    It runs a file's bytes operator by operator, integers included, so it says what the file means. That the
    file means the trained model is for ``export/stage.py`` to check, once, against torch.
    """

    def __init__(self, path: Path) -> None:
        self._evaluator = ReferenceEvaluator(onnx.load(path), new_ops=[GatherElements])

    def __call__(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities (B, V)."""
        logprobs_BV: NDArray[np.float32] = self._evaluator.run(["logprobs"], {"inputs": inputs_BD.astype(np.float32)})[
            0
        ]
        return logprobs_BV


class GatherElements(OpRun):  # type: ignore[misc]  # untyped
    """The operator by its specification; onnx 1.23 has it for axes from 0 and fewer than 64 entries alone."""

    op_domain = ""

    def _run(self, data: NDArray[np.float32], indices: NDArray[np.int64], axis: int = 0) -> tuple[NDArray[np.float32]]:
        return (np.take_along_axis(data, indices, axis),)


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
