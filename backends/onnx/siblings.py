"""N-bit products of one input as one product: queries, keys and values of an attention, gate and up of a gated layer.

    MatMulNBits(x, W₁), MatMulNBits(x, W₂)  ->  Split(MatMulNBits(x, [W₁; W₂]))

A token that is decoded spends much of such a product on starting it and on rounding x again. Measured on SmolLM2's 4-bit products, M = 1, one
AVX-512 VNNI thread: 7.4 to 6.7 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch

from fxcompress.backends.onnx.views import integer

AND = "+"  # between the names of products that run as one


def merge_siblings(model: ir.Model) -> None:
    """Merge them in place. Rows are put together when the file is written, so nothing is copied here. Tied weights stay alone."""
    for nodes in list(_families(model.graph)):
        sizes = [integer(n, "N") for n in nodes]
        inputs = [nodes[0].inputs[0], *(_together(model.graph, nodes, i) for i in range(1, len(nodes[0].inputs)))]
        kept = {name: value for name, value in nodes[0].attributes.items() if name != "N"}
        name = AND.join(str(n.name) for n in nodes)
        product = ir.Node(nodes[0].domain, nodes[0].op_type, inputs, [*kept.values(), ir.AttrInt64("N", sum(sizes))], name=name)
        lengths = ir.node("Constant", [], {"value_ints": sizes})
        cut = ir.node("Split", [product.outputs[0], lengths.outputs[0]], {"axis": -1}, num_outputs=len(nodes))
        cut.name = f"{nodes[0].name}.split"
        for new in (product, cut):
            new.metadata_props.update(nodes[0].metadata_props)
        old = [n.outputs[0] for n in nodes]
        own = [v for n in nodes for v in n.inputs[1:] if v is not None]
        ir.convenience.replace_nodes_and_values(model.graph, nodes[0], nodes, [product, lengths, cut], old, cut.outputs)
        for value in own:
            del model.graph.initializers[str(value.name)]


def _families(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Products that differ in nothing but their weights and how many rows these have."""
    families: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMulNBits" and all(_is_own(v) for v in node.inputs[1:]):
            form = [integer(node, name) for name in ("K", "bits", "block_size", "accuracy_level")]
            families.setdefault((node.inputs[0], len(node.inputs), *form), []).append(node)
    return (nodes for nodes in families.values() if len(nodes) > 1)


def _is_own(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and len(value.uses()) == 1


def _together(graph: ir.Graph, nodes: Sequence[ir.Node], position: int) -> ir.Value:
    """One operand of all of them, row under row."""
    values = [v for n in nodes if (v := n.inputs[position]) is not None]
    parts: list[Any] = [v.const_value for v in values]
    rows, *rest = zip(*(p.shape.numpy() for p in parts), strict=True)
    shape = ir.Shape([sum(rows), *(size[0] for size in rest)])
    dtype, name = parts[0].dtype, AND.join(str(v.name) for v in values)

    def read() -> ir.TensorProtocol:
        return ir.tensor_adapters.TorchTensor(torch.cat([p.raw for p in parts]), name=name)

    tensor = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    joined = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(joined)
    return joined
