"""Rotary position embedding as ONNX Runtime's own kernel, one node where the model has six.

    x c + cat(-x₂, x₁) s,  x = (x₁, x₂) halved along the last axis  ->  RotaryEmbedding(x, rows, c₁, s₁)

The kernel reads half a row of a table per position. Here the table is the cosines and sines of this call, row by row, so any way of making them
will do; but both halves of a row have to be the same angles, which is read off the graph: functions of cat(a, a).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fxcompress.backends.onnx.build import CONTRIB
from fxcompress.backends.onnx.views import tensor_of

_UNARY = ("Cos", "Sin", "Cast")


def fuse_rotary(model: ir.Model) -> None:
    """Rewrite every rotary embedding of the model, in place."""
    tables: dict[tuple[ir.Value, ir.Value, str], list[ir.Value]] = {}
    for node in list(model.graph):
        found = next(_rotations(node), None)
        if found is None:
            continue
        key = found.cos, found.sin, str(_shape(found.x)[0])
        if key not in tables:
            tables[key] = _table(model.graph, node, found)
        new = ir.node("RotaryEmbedding", [found.x, *tables[key]], domain=CONTRIB, name=node.name)
        new.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)
    if tables:
        RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class _Rotation:
    """x [B, H, L, E] turned by angles whose cosines and sines are [B or 1, 1, L, E]."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value


def _rotations(node: ir.Node) -> Iterator[_Rotation]:
    for straight, turned in _orders(node, "Add"):
        for x, cos in _orders(_made_by(straight), "Mul"):
            for other, sin in _orders(_made_by(turned), "Mul"):
                if _is_turn(other, x) and _fit(x, cos, sin) and _is_doubled(cos) and _is_doubled(sin):
                    yield _Rotation(x, cos, sin)


def _orders(node: ir.Node | None, op: str) -> list[tuple[ir.Value, ir.Value]]:
    if node is None or node.op_type != op or node.domain:
        return []
    a, b = node.inputs
    assert a is not None and b is not None
    return [(a, b), (b, a)]


def _is_turn(value: ir.Value, x: ir.Value) -> bool:
    """Whether the value is cat(-x₂, x₁) along the last axis."""
    cat = _made_by(value)
    if cat is None or cat.op_type != "Concat" or len(cat.inputs) != 2 or cat.attributes["axis"].as_int() not in (-1, 3):
        return False
    minus = _made_by(cat.inputs[0])
    width = _shape(x)[-1] if _shape(x) else None
    if minus is None or minus.op_type != "Neg" or not isinstance(width, int) or width % 2:
        return False
    return _is_cut(minus.inputs[0], x, width // 2, width) and _is_cut(cat.inputs[1], x, 0, width // 2)


def _is_cut(value: ir.Value | None, x: ir.Value, start: int, stop: int) -> bool:
    """Whether the value is x[.., start:stop]."""
    node = _made_by(value)
    if node is None or node.op_type != "Slice" or node.inputs[0] is not x:
        return False
    given = [tensor_of(v) for v in node.inputs[1:]]
    if len(given) != 4 or any(t is None or t.numel() != 1 for t in given):
        return False
    first, last, axis, step = (int(t) for t in given if t is not None)
    return first == start and min(last, _shape(x)[-1]) == stop and axis in (-1, 3) and step == 1


def _fit(x: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
    batch, _, length, width = _shape(x) if len(_shape(x)) == 4 else (0,) * 4
    return x.dtype == ir.DataType.FLOAT and all(_shape(t) in ([batch, 1, length, width], [1, 1, length, width]) for t in (cos, sin))


def _is_doubled(value: ir.Value | None) -> bool:
    """Whether both halves of the last axis are the same: numbers computed one by one from cat(a, a)."""
    node = _made_by(value)
    if node is None:
        return False
    if node.op_type == "Concat":
        return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and node.attributes["axis"].as_int() in (-1, len(_shape(value)) - 1)
    if node.op_type == "Mul":
        numbers = [tensor_of(v) for v in node.inputs]
        return any(t is not None and t.numel() == 1 and _is_doubled(v) for t, v in zip(numbers, reversed(node.inputs), strict=True))
    if node.op_type in ("Unsqueeze", "Slice"):
        axis = tensor_of(node.inputs[-1] if node.op_type == "Unsqueeze" else node.inputs[3])
        return axis is not None and axis.numel() == 1 and 0 <= int(axis) < len(_shape(value)) - 1 and _is_doubled(node.inputs[0])
    return node.op_type in _UNARY and _is_doubled(node.inputs[0])


def _table(graph: ir.Graph, before: ir.Node, found: _Rotation) -> list[ir.Value]:
    """rows [B, L] of the table, cosines and sines [B L, E / 2]; a batch of one serves every row of x."""
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes))
        return nodes[-1].outputs[0]

    def ints(*numbers: int) -> ir.Value:
        return add("Constant", value_ints=list(numbers))

    half = _shape(found.x)[-1] // 2
    cos, sin = (add("Reshape", add("Slice", t, ints(0), ints(half), ints(3)), ints(-1, half)) for t in (found.cos, found.sin))
    count, length = add("Shape", cos, start=0, end=1), add("Shape", found.x, start=2, end=3)
    all_rows = add("Range", add("Constant", value_int=0), add("Squeeze", count), add("Constant", value_int=1))
    rows = add("Reshape", all_rows, add("Concat", ints(-1), length, axis=0))
    if _shape(found.cos)[0] != _shape(found.x)[0]:
        rows = add("Expand", rows, add("Concat", add("Shape", found.x, start=0, end=1), length, axis=0))
    graph.insert_before(before, nodes)
    return [rows, cos, sin]


def _made_by(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _shape(value: ir.Value | None) -> list[Any]:
    """Sizes, symbols by name; none where the rank is unknown."""
    if value is None or value.shape is None:
        return []
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]
