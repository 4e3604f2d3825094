"""Models as ONNX files; those of int8 are made from them in ``onnx_int8``.

Every file takes ``inputs`` (B, D) float32 and gives ``logprobs`` (B, V) float32, for any B; one of a model whose rows
may be shorter for any D up to its width, with metadata that says so (``engines/onnx_runtime``).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn
from transformers import PreTrainedModel

from overproof.engines.onnx_runtime import PADDING, WIDTH, without_padding
from overproof.export.onnx_fusion import fuse_products
from overproof.models.base import ArrayFamily
from overproof.models.hf_directory import load_model
from overproof.models.sizes import family_of

OPSET = 20
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
    padding, shapes, metadata = (
        classifier.family.padding(classifier.model.config),
        {0: torch.export.Dim("batch")},
        dict[str, str](),
    )
    if padding is not None:
        shapes[1] = torch.export.Dim("columns", min=1, max=classifier.width)
        metadata = {WIDTH: str(classifier.width), PADDING: f"{padding:g}"}
    with quiet():
        program = torch.onnx.export(
            classifier,
            (torch.zeros(2, classifier.width),),
            input_names=["inputs"],
            output_names=["logprobs"],
            dynamic_shapes={"inputs": shapes},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    fuse_products(proto)
    write_onnx(proto, path, metadata)


class Reference:
    """ONNX's own executable specification, in numpy: slow, and independent of ONNX Runtime's kernels and rewrites.

    It runs a file's bytes operator by operator, integers included, so it says what the file means. That the
    file means the trained model is for ``export/stage.py`` to check, once, against torch.
    """

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._evaluator, self._metadata = ReferenceEvaluator(model, new_ops=[GatherElements]), read_metadata(model)

    def __call__(self, inputs_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities (B, V)."""
        rows_BD = without_padding(inputs_BD.astype(np.float32), self._metadata)
        logprobs_BV: NDArray[np.float32] = self._evaluator.run(["logprobs"], {"inputs": rows_BD})[0]
        return logprobs_BV


class GatherElements(OpRun):  # type: ignore[misc]  # untyped
    """The operator by its specification; onnx 1.23 has it for axes from 0 and fewer than 64 entries alone."""

    op_domain = ""

    def _run(self, data: NDArray[np.float32], indices: NDArray[np.int64], axis: int = 0) -> tuple[NDArray[np.float32]]:
        return (np.take_along_axis(data, indices, axis),)


def read_metadata(proto: onnx.ModelProto) -> dict[str, str]:
    return {each.key: each.value for each in proto.metadata_props}


def write_onnx(proto: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Save in one file, with this metadata alone and without the exporter's notes: they hold this machine's paths and
    outweigh a small model.
    """
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(metadata))
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    proto.graph.doc_string = ""
    onnx.checker.check_model(proto, full_check=True)
    part = path.with_name(f"{path.name}.part")
    onnx.save(proto, part)
    part.replace(path)


@contextmanager
def quiet() -> Iterator[None]:
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
