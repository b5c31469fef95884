"""What a node of a skeleton says: its attributes, the constants it reads, and which of them are only seen through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from fxcompress.backends.onnx.outline import Leaf


@dataclass(frozen=True)
class Read:
    """A leaf as a value. axes: of the leaf, one for each axis of the value. picked: (axis of the leaf, index) of those that are gone."""

    leaf: Leaf
    axes: tuple[int, ...]
    picked: tuple[tuple[int, int], ...] = ()


def view(node: ir.Node) -> tuple[int, ...] | int | None:
    """The order of a transpose, or the constant index picked on the first axis."""
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return tuple(node.attributes["perm"].as_ints())
    if node.op_type != "Gather" or integer(node, "axis") or node.inputs[1] is None:
        return None
    index = ir.convenience.get_const_tensor(node.inputs[1])
    return int(index.numpy()) if index is not None and not index.shape else None


def read_of(value: ir.Value | None, leaves: Mapping[str | None, Leaf]) -> Read | None:
    """The leaf that the value is a view of."""
    if value is None:
        return None
    if value.name in leaves:
        leaf = leaves[value.name]
        return Read(leaf, tuple(range(len(leaf.shape))))
    node = value.producer()
    seen, inner = (None, None) if node is None else (view(node), read_of(node.inputs[0], leaves) if node.inputs else None)
    if seen is None or inner is None:
        return None
    if isinstance(seen, int):
        return Read(inner.leaf, inner.axes[1:], (*inner.picked, (inner.axes[0], seen)))
    return Read(inner.leaf, tuple(inner.axes[i] for i in seen), inner.picked)


def integer(node: ir.Node, name: str) -> int:
    """An integer attribute, 0 where it is not given."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def factor(node: ir.Node, name: str) -> float:
    """A factor, 1 where it is not given."""
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else 1.0


def tensor_of(value: ir.Value | None) -> Tensor | None:
    """The numbers a value always has: an initializer's, a Constant's, or those cast or reshaped."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type in ("CastLike", "Cast"):
        return tensor_of(node.inputs[0])
    if node is not None and node.op_type == "Reshape":
        numbers, target = tensor_of(node.inputs[0]), tensor_of(node.inputs[1])
        return None if numbers is None or target is None or 0 in target else numbers.reshape(target.tolist())
    found = ir.convenience.get_const_tensor(value)
    return None if found is None else torch.from_numpy(found.numpy().copy())


def rank(value: ir.Value | None) -> int | None:
    """How many axes a value has, None if nothing says it. The shape of a reshaped value is that of its target."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    target = tensor_of(node.inputs[1]) if node is not None and node.op_type == "Reshape" else None
    number = tensor_of(value) if target is None else None
    return len(target) if target is not None else number.dim() if number is not None else None
