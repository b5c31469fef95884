"""Additions to an ONNX graph: constants as initializers, and nodes that come before all others."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

CONTRIB = "com.microsoft"


class Builder:
    """Collects what is to be added to a graph. One tensor under one name is one initializer."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.early: list[ir.Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.taken = {v.name for v in self.graph.inputs} | {v.name for node in self.graph for v in node.outputs}

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        """The initializer of that name, or of the next free name where another tensor or value has it."""
        while name in self.taken or (name in self.tensors and not _same(self.tensors[name], tensor)):
            name = f"{name}_"
        if name not in self.tensors:
            self.tensors[name] = tensor
            self.graph.register_initializer(_value(name, tensor))
        return self.graph.initializers[name]

    def ints(self, *numbers: int) -> ir.Value:
        """A small int64 vector."""
        return self.constant("ints_" + "_".join(map(str, numbers)), torch.tensor(numbers, dtype=torch.int64))

    def early_node(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a node over constants; ONNX Runtime folds these once, when the model is loaded."""
        node = ir.node(op, list(inputs), attributes)
        self.early.append(node)
        return node.outputs[0]

    def finish(self) -> None:
        """Put the early nodes before all others and declare the opset of contributed ops."""
        if self.early:
            self.graph.insert_before(self.graph[0], self.early)
        if any(node.domain == CONTRIB for node in self.graph):
            self.model.opset_imports[CONTRIB] = 1


def _value(name: str, tensor: Tensor) -> ir.Value:
    held = TorchTensor(tensor, name=name)
    return ir.Value(name=name, shape=held.shape, type=ir.TensorType(held.dtype), const_value=held)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b)))
