"""ONNX files with int8 weights, one scale for each output channel, or for a table of embeddings.

Convolutions are int8 throughout in files with static scales alone. In others their kernels are stored in int8 and
computed with in fp32: for convolutions whose activations are quantised while running ONNX Runtime has one scale for a
whole kernel, which batch norm has made uneven, and takes several times as long as in fp32.

Weights keep seven bits unless asked otherwise, since int8 products overflow on AVX2's instructions; those of AVX-512
VNNI, AVX-VNNI and ARM take eight.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from overproof.engines.onnx_runtime import without_padding
from overproof.export.onnx_file import quiet, read_metadata, write_onnx

QUANTIZED = ["MatMul", "Gemm", "Gather"]
CONVOLUTION = "Conv"
IMAGE_KERNEL_DIMS = 4  # outputs, inputs, height, width
SHAPED = {"Reshape", "Transpose"}  # operators that move an image's pixels and change none
SMALL_TABLE = 4096  # numbers: of smaller tables of embeddings, such as those of categories, there is little to gain
TRANSPOSED = "_Transposed"  # what ONNX Runtime calls the weights of a layer that it writes as another operator
LARGEST_CODE = 127
LEAST_CODES = 32  # that the largest number of a scale has: 63 where weights keep seven bits
NOTHING = 1e-30  # numbers for which there is no scale
STEPS = 0.51  # of a number's scale, that rounding to the nearest takes at most, and a little of float32


def quantize_onnx(source: Path, path: Path, full_range: bool = False) -> None:
    """Write an fp32 file again. Activations are quantised while running, one scale for a whole batch: a row's answer
    depends a little on the rows it is asked about with. Those of convolutions stay as they are.
    """
    _quantise(onnx.load(source), path, full_range, partial(quantize_dynamic, source), QUANTIZED)


def quantize_onnx_static(source: Path, path: Path, rows: Iterator[NDArray[np.float32]], full_range: bool) -> None:
    """Write an fp32 file again. The scale of each activation is that of the least and the largest number which it has
    on rows, each (1, D): an answer depends on its row alone.
    """
    model = onnx.load(source)
    quantise = partial(
        quantize_static,
        source,
        calibration_data_reader=_Rows(rows, read_metadata(model)),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"MatMulConstBOnly": True},
    )
    _quantise(model, path, full_range, quantise, [*QUANTIZED, CONVOLUTION])


def _quantise(
    model: onnx.ModelProto, path: Path, full_range: bool, quantise: Callable[..., None], operators: list[str]
) -> None:
    """Write what ``quantise`` makes of a model's file, with the model's metadata."""
    with tempfile.TemporaryDirectory() as scratch, quiet():
        quantized = Path(scratch) / "int8.onnx"
        quantise(
            model_output=quantized,
            op_types_to_quantize=operators,
            nodes_to_exclude=[*_lookups_in_small_tables(model.graph), *_small_convolutions(model.graph)],
            per_channel=True,
            reduce_range=not full_range,
            weight_type=QuantType.QInt8,
        )
        made = onnx.load(quantized)
        if CONVOLUTION not in operators:
            _store_kernels_in_int8(made.graph)
        write_onnx(made, path, read_metadata(model))


class _Rows(CalibrationDataReader):  # type: ignore[misc]  # untyped
    def __init__(self, rows: Iterator[NDArray[np.float32]], metadata: Mapping[str, str]) -> None:
        self._rows, self._metadata = rows, metadata

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        row_1D = next(self._rows, None)
        return None if row_1D is None else {"inputs": without_padding(row_1D, self._metadata)}


def _lookups_in_small_tables(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes."""
    sizes = {table.name: math.prod(table.dims) for table in graph.initializer}
    gathers = (node for node in graph.node if node.op_type == "Gather")
    return [node.name for node in gathers if sizes.get(node.input[0], 0) < SMALL_TABLE]


def _small_convolutions(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that are given images, such as a patch convolution or a stem, and of those over rows of
    tokens: there is one in a model, and little to gain.
    """
    pixels = {value.name for value in graph.input}
    for node in graph.node:  # in the order in which they are computed
        if node.op_type in SHAPED and node.input[0] in pixels:
            pixels |= set(node.output)
    images = {table.name for table in graph.initializer if len(table.dims) == IMAGE_KERNEL_DIMS}
    convolutions = [node for node in graph.node if node.op_type == CONVOLUTION]
    return [node.name for node in convolutions if node.input[0] in pixels or node.input[1] not in images]


def _store_kernels_in_int8(graph: onnx.GraphProto) -> None:
    """Have the graph's convolutions read kernels of integers, with a scale for each output channel. They keep eight
    bits: no integers are multiplied.
    """
    left_out, tables = set(_small_convolutions(graph)), {table.name: table for table in graph.initializer}
    nodes = (node for node in graph.node if node.op_type == CONVOLUTION and node.name not in left_out)
    reads = list[onnx.NodeProto]()
    for name in dict.fromkeys(node.input[1] for node in nodes):  # two may share one
        kernel = numpy_helper.to_array(tables[name])
        steps = np.abs(kernel).max((1, 2, 3)) / np.float32(LARGEST_CODE)
        steps[steps == 0] = 1.0  # of a channel that gives nothing
        codes = np.round(kernel / steps[:, None, None, None]).astype(np.int8)
        graph.initializer.remove(tables[name])
        zeros = np.zeros(len(kernel), np.int8)
        parts = {f"{name}_quantized": codes, f"{name}_scale": steps, f"{name}_zero_point": zeros}
        graph.initializer.extend([numpy_helper.from_array(values, part) for part, values in parts.items()])
        reads.append(onnx.helper.make_node("DequantizeLinear", [*parts], [name], axis=0))
    for read in reversed(reads):
        graph.node.insert(0, read)


def require_same_numbers(file: Path, unquantised: Path) -> None:
    """Look whether an int8 file holds the weights of the fp32 one that it was made from, as far as rounding moves them.

    Raises:
        RuntimeError: one is missing, or is another.
    """
    found, expected = (
        {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        for path in (file, unquantised)
    )
    for name, values in expected.items():
        if values.dtype != np.float32 or values.size < 2:
            continue
        if name in found:
            same = np.array_equal(found[name], values)
        elif f"{name}_quantized" in found:
            same = _is_rounded(found, name, values)
        elif f"{name}{TRANSPOSED}_quantized" in found:
            same = _is_rounded(found, f"{name}{TRANSPOSED}", values.T)
        else:
            raise RuntimeError(f"{file}: {name} of {unquantised.name} is missing: the export is wrong")
        if not same:
            raise RuntimeError(
                f"{file}: {name} is not that of {unquantised.name}, by more than rounding explains: the export is wrong"
            )


def _is_rounded(found: Mapping[str, NDArray[Any]], name: str, values: NDArray[np.float32]) -> bool:
    codes = found[f"{name}_quantized"].astype(np.float64)  # a bias has 32 bits
    of = name if f"{name}_scale" in found else f"{name}_quantized"  # a bias is called otherwise
    scale, zero = (found.get(f"{of}_{part}", np.zeros(1)).astype(np.float64) for part in ("scale", "zero_point"))
    if codes.shape != values.shape:
        return False
    axes = [axis for axis in range(codes.ndim) if codes.shape[axis] == scale.size]  # of a square matrix there are two
    shapes = [tuple(scale.size if each == axis else 1 for each in range(codes.ndim)) for axis in axes]
    for shape in shapes if scale.size > 1 else [()]:
        steps, zeros = scale.reshape(shape), zero.reshape(shape)
        near = np.all(np.abs((codes - zeros) * steps - values) <= STEPS * np.abs(steps))
        if near and (found[f"{name}_quantized"].dtype != np.int8 or _is_fine(steps, values)):
            return True
    return False


def _is_fine(steps: NDArray[np.float64], values: NDArray[np.float32]) -> bool:
    """Whether the largest number of each scale has a large code: by a coarse one rounding explains anything."""
    others = tuple(axis for axis in range(values.ndim) if steps.ndim == 0 or steps.shape[axis] == 1)
    largest = np.abs(values).max(others, keepdims=steps.ndim > 0)
    return bool(np.all((LEAST_CODES * np.abs(steps) <= largest) | (largest < NOTHING)))
