"""Products of one input as a single product: queries, keys and values of a layer are one matrix, whose result is split.

In standard operators, so that ONNX's own evaluator still says what a file means; in int8 activations are then rounded
and scaled once in place of three times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class _Product:
    """A matrix and a bias, and the two nodes that they are in."""

    matmul: NodeProto
    add: NodeProto
    weights: TensorProto  # (inputs, outputs)
    bias: TensorProto  # (outputs,)


def fuse_products(model: onnx.ModelProto) -> None:
    """Have one product where several take the same input, each followed by a bias."""
    graph = model.graph
    found, starts, gone = _products(graph), dict[str, list[NodeProto]](), set[str]()
    for input, products in found.items():
        if len(products) < 2:
            continue
        starts[products[0].matmul.output[0]] = _fused(graph, input, products)
        gone |= {node.output[0] for each in products for node in (each.matmul, each.add)}
    kept = list[NodeProto]()
    for node in graph.node:
        made = starts.get(node.output[0], [])
        kept += made or ([] if node.output[0] in gone and node.op_type in ("MatMul", "Add") else [node])
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    tensors = [each for each in graph.initializer if each.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _products(graph: onnx.GraphProto) -> Mapping[str, Sequence[_Product]]:
    """By their input. Weights that more than one node reads stay."""
    tensors, readers = {each.name: each for each in graph.initializer}, defaultdict[str, list[NodeProto]](list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    found = defaultdict[str, list[_Product]](list)
    for node in graph.node:
        weights = tensors.get(node.input[1]) if node.op_type == "MatMul" else None
        if weights is None or len(weights.dims) != 2 or len(readers[node.output[0]]) != 1:
            continue
        [add] = readers[node.output[0]]
        [bias] = [tensors.get(name) for name in add.input if name != node.output[0]] if add.op_type == "Add" else [None]
        if bias is None or list(bias.dims) != [weights.dims[1]]:
            continue
        if len(readers[weights.name]) == 1:
            found[node.input[0]].append(_Product(node, add, weights, bias))
    return found


def _fused(graph: onnx.GraphProto, input: str, products: Sequence[_Product]) -> list[NodeProto]:
    """The nodes in place of these; their tensors are added to the graph."""
    weights, biases = (
        [numpy_helper.to_array(getattr(each, name)) for each in products] for name in ("weights", "bias")
    )
    name = "+".join(each.weights.name for each in products)
    matrix, bias, sizes, product, total = (f"{name}.{part}" for part in ("weight", "bias", "sizes", "product", "sum"))
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.concatenate(weights, 1), matrix),
            numpy_helper.from_array(np.concatenate(biases), bias),
            numpy_helper.from_array(np.array([len(each) for each in biases]), sizes),
        ]
    )
    outputs = [each.add.output[0] for each in products]
    return [
        helper.make_node("MatMul", [input, matrix], [product], name=product),
        helper.make_node("Add", [product, bias], [total], name=total),
        helper.make_node("Split", [total, sizes], outputs, name=f"{name}.split", axis=-1),
    ]
