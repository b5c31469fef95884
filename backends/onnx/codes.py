"""Codes of activations as operands of integer ops: found behind what is dequantised, stored in the type that the kernel is fast with, moved.

A code's value never changes. int8 codes are stored plus 128, as uint8, with their zero point, and a quantiser that stands on the right of a
product gets a copy that stores them less 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from fxcompress.backends.onnx.build import Builder
from fxcompress.backends.onnx.exported import FX_INDEX
from fxcompress.backends.onnx.views import rank, tensor_of

UINT8, INT8 = ir.DataType.UINT8, ir.DataType.INT8
SHIFT = 128
SIGNED = ".s8"  # ends the name of a quantiser's codes that are stored less 128
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Gather", "Identity")


class NoKernelError(Exception):
    """Why a product of codes has no integer kernel."""


@dataclass(frozen=True)
class Base:
    """Where a dequantised value comes from. rows: what the dequantised codes are multiplied by. path: the ops that move it since then."""

    linear: ir.Node
    rows: ir.Value | None
    path: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Codes:
    """Codes as an operand; scale and zero point are scalars, or a weight's vectors [N]. rows: [.., 1], another factor for each vector."""

    value: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    rows: ir.Value | None = None


class Store:
    """Makes operands out of dequantised values. One code in one type is stored once."""

    def __init__(self, build: Builder) -> None:
        self.build, self.graph = build, build.graph
        self.made: dict[tuple[ir.Value, ir.Value | None], ir.Value] = {}

    def operand(self, value: ir.Value | None, wanted: ir.DataType) -> Codes:
        """The codes of a dequantised value as an operand, of the wanted type if their quantiser can give it."""
        base = base_of(value)
        if base is None:
            raise NoKernelError("one of its operands isn't quantised")
        stored, scale, zero = (*base.linear.inputs, None)[:3]
        if stored is None or scale is None or stored.dtype not in (UINT8, INT8):
            raise NoKernelError(f"there is no integer kernel for codes of {stored.dtype if stored is not None else None}")
        if rank(scale) != 0:
            raise NoKernelError("an activation with a scale for each index of an axis has no integer kernel")
        if base.rows is not None and (base.path or base.rows.shape is None or base.rows.shape[-1] != 1):
            raise NoKernelError("an activation with more than one scale a token has no integer kernel")
        zero = zero if zero is not None else self._zero(stored.dtype)
        if wanted == INT8 and stored.dtype == UINT8 and (signed := self._signed(stored)) is not None:
            stored, zero = signed, self._shifted(zero, -SHIFT)
        for step in base.path:
            stored = self._moved(step, stored)
        return Codes(stored, scale, zero, base.rows)

    def _zero(self, dtype: ir.DataType) -> ir.Value:
        return self.build.constant(f"zero_{dtype.name.lower()}", torch.tensor(0, dtype=ir.tensor_adapters.to_torch_dtype(dtype)))

    def make_unsigned(self, quantiser: ir.Node) -> None:
        """int8 codes are stored plus 128, as uint8, and everything that reads them knows it."""
        quantiser.replace_input_with(2, self._shifted(quantiser.inputs[2], SHIFT))
        _retype(quantiser.outputs[0], UINT8)
        for node in _chain(quantiser.outputs[0]):
            if node.op_type == "Clip":
                for i in (1, 2):
                    node.replace_input_with(i, self._shifted(node.inputs[i], SHIFT))
                _retype(node.outputs[0], UINT8)
            else:
                zero = node.inputs[2] if len(node.inputs) > 2 else None
                _set_input(node, 2, self._shifted(zero or self._zero(INT8), SHIFT))

    def _signed(self, codes: ir.Value) -> ir.Value | None:
        """The same codes less 128, by a quantiser of their own; None where no quantiser makes them."""
        node = codes.producer()
        if (codes, None) in self.made:
            return self.made[codes, None]
        if node is None or node.op_type not in ("QuantizeLinear", "Clip"):
            return None
        if node.op_type == "Clip":
            inner = self._signed(node.inputs[0])  # type: ignore[arg-type]
            inputs = [inner, *(self._shifted(v, -SHIFT) for v in node.inputs[1:])]
        else:
            inner, inputs = codes, [*node.inputs[:2], self._shifted(node.inputs[2], -SHIFT)]
        return None if inner is None else self._after(node, inputs, f"{codes.name}{SIGNED}", INT8, (codes, None))

    def _moved(self, step: ir.Node, codes: ir.Value) -> ir.Value:
        """What the op makes of the codes."""
        key = step.outputs[0], codes
        return self.made[key] if key in self.made else self._after(step, [codes, *step.inputs[1:]], f"{step.name}.codes", codes.dtype, key)

    def _after(
        self, node: ir.Node, inputs: list[ir.Value | None], name: str, dtype: ir.DataType | None, key: tuple[ir.Value, ir.Value | None]
    ) -> ir.Value:
        """The output of a copy of the node with these inputs."""
        new = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), name=name)
        new.outputs[0].name, new.outputs[0].shape = name, node.outputs[0].shape
        _retype(new.outputs[0], dtype)
        self.graph.insert_after(node, new)
        self.made[key] = new.outputs[0]
        return new.outputs[0]

    def _shifted(self, value: ir.Value | None, by: int) -> ir.Value:
        """A zero point or bound of codes that are stored plus `by`, as uint8 or int8."""
        assert value is not None
        dtype = torch.uint8 if by > 0 else torch.int8
        number = tensor_of(value)
        if number is not None:
            return self.build.constant(f"{value.name}.{'u8' if by > 0 else 's8'}", (number.to(torch.int16) + by).to(dtype))
        if (value, None) not in self.made:
            self.made[value, None] = self._computed_shift(value, by)
        return self.made[value, None]

    def _computed_shift(self, value: ir.Value, by: int) -> ir.Value:
        wide = ir.node("Cast", [value], {"to": ir.DataType.INT32})
        moved = ir.node("Add", [wide.outputs[0], self.build.constant(f"shift_{by}", torch.tensor(by, dtype=torch.int32))])
        narrow = ir.node("Cast", moved.outputs, {"to": UINT8 if by > 0 else INT8})
        producer = value.producer()
        assert producer is not None
        self.graph.insert_after(producer, [wide, moved, narrow])
        return narrow.outputs[0]


def base_of(value: ir.Value | None) -> Base | None:
    """Where a value comes from that is dequantised codes, moved at most; None for others."""
    node, path = (value.producer() if value is not None else None), list[ir.Node]()
    while node is not None and node.op_type in MOVES:
        path.insert(0, node)
        node = _producer(node)
    if node is None or node.op_type == "DequantizeLinear":
        return Base(node, None, tuple(path)) if node else None
    inner = _producer(node) if node.op_type == "Mul" else None
    if inner is None or inner.op_type != "DequantizeLinear" or inner.metadata_props.get(FX_INDEX) != node.metadata_props.get(FX_INDEX):
        return None
    return Base(inner, node.inputs[1], tuple(path))


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None


def _chain(codes: ir.Value) -> list[ir.Node]:
    """The nodes that read codes, through clips of them."""
    found: list[ir.Node] = []
    for node, _ in codes.uses():
        found += [node, *(_chain(node.outputs[0]) if node.op_type == "Clip" else [])]
    return found


def ends_dequantised(codes: ir.Value) -> bool:
    """Whether all that reads the codes, through clips, dequantises them."""
    readers = _chain(codes)
    values = [codes, *(n.outputs[0] for n in readers if n.op_type == "Clip")]
    return all(n.op_type in ("Clip", "DequantizeLinear") for n in readers) and not any(v.is_graph_output() for v in values)


def _retype(value: ir.Value, dtype: ir.DataType | None) -> None:
    if dtype is not None:
        value.type = ir.TensorType(dtype)


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
