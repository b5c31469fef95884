"""Q/DQ graph -> direct integer ops: products whose operands are dequantised codes read the codes.

    MatMul(DQ(a), W), Gemm        ->  MatMulIntegerToFloat(a, W_q, s_a, s_W, bias)              W_q int8, one scale a column
    MatMul(DQ(a) * rows, W)       ->  MatMulIntegerToFloat(a, W_q, 1, s_W) * rows               rows: one scale a token
    MatMul(DQ(a), DQ(b))          ->  MatMulIntegerToFloat(a, b, s_a, s_b)
    Q(clamp(Conv(DQ(x), W)))      ->  QLinearConv(x, W_q, int32 bias), clamped:     code(clamp(y, l, h)) = clamp(code(y), code(l), code(h))

A code's value never changes. Signed codes are stored plus 128 with their zero point, since the fast kernels take unsigned codes on the left
(measured, one thread, AVX-512 VNNI: [64, 576] x [576, 1536] 3.2 x float32 against 0.3 x, a 3 x 3 convolution 3.4 x against 0.14 x) and signed
ones on the right (2.4 x against 1.5 x): a quantiser read from both sides is duplicated. Transposes and reshapes between DQ and product move to
the codes. Everything else stays a Q/DQ graph, which ONNX Runtime fuses as it can.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as cleanup
import torch
from torch import Tensor

from fxcompress.backends.onnx.blocks import Matrix, matrix_of
from fxcompress.backends.onnx.build import CONTRIB, Builder
from fxcompress.backends.onnx.codes import INT8, SHIFT, UINT8, Codes, NoKernelError, Store, base_of, ends_dequantised
from fxcompress.backends.onnx.exported import FX_INDEX, leaf_name
from fxcompress.backends.onnx.outline import Leaf, Outline, arguments
from fxcompress.backends.onnx.views import Read, factor, integer, rank, read_of, tensor_of
from fxcompress.numerics.affine import quantize
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.packing import unpack

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")
BIAS_RTOL = 1e-6  # the bias' scale is the rounded product of the other two


class Legaliser:
    """Puts integer ops in the place of products in a skeleton whose leaves are not bound yet. reasons: per product (name of its fx node) that
    reads codes and stays as it is."""

    def __init__(self, build: Builder, outlined: Outline, constants: Mapping[str, Tensor]) -> None:
        self.build, self.graph, self.outline, self.constants = build, build.graph, outlined, constants
        self.leaves: Mapping[str | None, Leaf] = {leaf_name(i): leaf for i, leaf in enumerate(outlined.leaves)}
        self.reasons: dict[str, str] = {}
        self.store = Store(build)

    def run(self) -> None:
        """All products, in order."""
        for node in list(self.graph):
            if node.op_type == "CastLike":
                self._settle(node)
        for node in list(self.graph):
            if node.op_type == "QuantizeLinear" and node.outputs[0].dtype == INT8 and ends_dequantised(node.outputs[0]):
                self.store.make_unsigned(node)
        for node in list(self.graph):
            base = base_of(node.inputs[0]) if node.op_type == "Shape" else None
            if base and not base.path:
                node.replace_input_with(0, base.linear.inputs[0])
        for node in list(self.graph):
            if node.op_type in PRODUCTS and any(base_of(v) for v in node.inputs[:2]):
                self._legalise(node)
        cleanup.RemoveUnusedNodesPass()(self.build.model)

    def _settle(self, node: ir.Node) -> None:
        """A bound of a clamp is no reader of what it clamps."""
        number, dtype = tensor_of(node.inputs[0]), getattr(node.inputs[1], "dtype", None)
        if number is not None and dtype is not None:
            typed = number.to(ir.tensor_adapters.to_torch_dtype(dtype))
            node.outputs[0].replace_all_uses_with(self.build.constant(f"{node.name}.bound", typed))
            self.graph.remove(node, safe=True)

    def _legalise(self, node: ir.Node) -> None:
        try:
            if node.op_type in ("MatMul", "Gemm"):
                self._product(node)
            elif node.op_type == "Conv":
                self._convolution(node)
            else:
                raise NoKernelError(f"ONNX Runtime has no integer kernel for {node.op_type}")
        except NoKernelError as reason:
            self.reasons[self._name(node)] = str(reason)
            self._write_out(node)

    def _write_out(self, node: ir.Node) -> None:
        """ONNX Runtime 1.32 quantises float weights by itself, one scale a tensor, where it finds DequantizeLinear before one of these ops: so
        the activation is dequantised by (code - zero_point) * scale written out."""
        base = base_of(node.inputs[0])
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or base is None or base.path or base.rows is not None:
            return
        codes, scale, zero = (*base.linear.inputs, None)[:3]
        if rank(scale) != 0:
            return
        steps = [ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})]
        if zero is not None:
            steps.append(ir.node("Cast", [zero], {"to": ir.DataType.FLOAT}))
            steps.append(ir.node("Sub", [steps[0].outputs[0], steps[1].outputs[0]]))
        steps.append(ir.node("Mul", [steps[-1].outputs[0], scale]))
        self.graph.insert_before(node, steps)
        node.replace_input_with(0, steps[-1].outputs[0])

    def _name(self, node: ir.Node) -> str:
        index = node.metadata_props.get(FX_INDEX)
        return self.outline.nodes[int(index)].name if index else str(node.name)

    def _product(self, node: ir.Node) -> None:
        if node.op_type == "Gemm" and (integer(node, "transA") or any(factor(node, f) != 1 for f in ("alpha", "beta"))):
            raise NoKernelError("Gemm with a transposed input or a factor has no integer kernel")
        left, right = self._left(node), self._right(node)
        bias, old = self._addend(node)
        is_inside = bias is not None and left.rows is None and bias.shape == right.value.shape[-1:]  # type: ignore[index]
        inputs = [left.value, right.value, left.scale, right.scale, left.zero_point, right.zero_point, *([bias] if is_inside else [])]
        nodes = [ir.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)]
        for op, value in (("Mul", left.rows), ("Add", None if is_inside else bias)):
            if value is not None:
                nodes.append(ir.node(op, [nodes[-1].outputs[0], value]))
        self._replace(old, nodes)

    def _left(self, node: ir.Node) -> Codes:
        if read_of(node.inputs[0], self.leaves):
            raise NoKernelError("the weight is the left operand")
        codes, value = self.store.operand(node.inputs[0], UINT8), node.inputs[0]
        if value is None or value.shape is None or len(value.shape) < 2:
            raise NoKernelError("a product with a vector has no integer kernel")
        return codes

    def _right(self, node: ir.Node) -> Codes:
        if read := read_of(node.inputs[1], self.leaves):
            return self._columns(node, read)
        codes = self.store.operand(node.inputs[1], INT8)
        if codes.rows is not None:
            raise NoKernelError("its right operand has a scale for each token")
        if integer(node, "transB"):
            raise NoKernelError("Gemm with a transposed activation has no integer kernel")
        return codes

    def _columns(self, node: ir.Node, read: Read) -> Codes:
        """A weight as int8 codes [K, N], scale and zero point [N], or scalar for all columns."""
        if read.leaf.quantised is None:
            raise NoKernelError("its weight isn't quantised")
        if len(read.axes) != 2:
            raise NoKernelError(f"a weight of {len(read.axes)} axes has no integer kernel")
        axes = read.axes if integer(node, "transB") else read.axes[::-1]
        matrix = matrix_of(read.leaf, self.constants, (axes[0], axes[1]), dict(read.picked))
        if isinstance(matrix, str):
            raise NoKernelError(matrix)
        suffix = "".join(f".{index}" for _, index in read.picked) + ".columns"
        codes, scale, zero = _int8_columns(matrix)
        name, scale_name = read.leaf.name, read.leaf.quantised.scale
        named = ((name, codes), (scale_name, scale), (f"{name}.zero_point", zero))
        return Codes(*(self.build.constant(f"{n}{suffix}", t) for n, t in named))

    def _addend(self, node: ir.Node) -> tuple[ir.Value | None, list[ir.Node]]:
        """What the op adds to the product, and the nodes it consists of: torch.onnx writes linear of three axes as MatMul and Add."""
        if node.op_type == "Gemm":
            return (self._dense(node.inputs[2]) if len(node.inputs) > 2 else None), [node]
        uses = list(node.outputs[0].uses())
        after = uses[0].node if len(uses) == 1 else None
        index = node.metadata_props.get(FX_INDEX)
        if after is None or after.op_type != "Add" or index is None or after.metadata_props.get(FX_INDEX) != index:
            return None, [node]
        return self._dense(after.inputs[1 - uses[0].idx]), [node, after]

    def _dense(self, value: ir.Value | None) -> ir.Value | None:
        leaf = self.leaves.get(value.name) if value is not None else None
        return value if leaf is None or leaf.quantised is not None else self.build.constant(leaf.name, self.constants[leaf.name])

    def _convolution(self, node: ir.Node) -> None:
        leaf = self.leaves.get(node.inputs[1].name)  # type: ignore[union-attr]
        if leaf is None or leaf.quantised is None:
            raise NoKernelError("its weight isn't quantised")
        x, (codes, scale) = self.store.operand(node.inputs[0], UINT8), _channels(leaf, self.constants)
        if x.rows is not None or x.value.dtype != UINT8:
            raise NoKernelError("its input isn't quantised to 8 bits with one scale")
        clamps, quantiser = _clamps_and_quantiser(node)
        grid = quantiser.inputs[1:3]
        bias = self._int32_bias(node, x, scale)
        named = (
            (f"{leaf.name}.codes", codes),
            (f"{leaf.quantised.scale}.channels", scale),
            (f"{leaf.name}.zero_points", torch.zeros_like(scale, dtype=torch.int8)),
        )
        weight = [self.build.constant(n, t) for n, t in named]
        inputs = [x.value, x.scale, x.zero_point, *weight, *grid, *([bias] if bias is not None else [])]
        nodes = [ir.Node("", "QLinearConv", inputs, list(node.attributes.values()))]
        if bounds := self._bounds(clamps, *grid):
            nodes.append(ir.node("Clip", [nodes[-1].outputs[0], *bounds]))
        self._replace(_between(node, quantiser), nodes)

    def _int32_bias(self, node: ir.Node, x: Codes, scale: Tensor) -> ir.Value | None:
        """The bias in units of s_x s_W; a bias of zeros is none."""
        index = node.metadata_props.get(FX_INDEX)
        if index is not None and arguments(self.outline.nodes[int(index)]).get("bias") is None:
            return None  # torch.onnx writes zeros
        leaf = self.leaves.get(node.inputs[2].name) if len(node.inputs) > 2 else None  # type: ignore[union-attr]
        if len(node.inputs) == 2 or (leaf is not None and leaf.quantised is None and not self.constants[leaf.name].any()):
            return None
        grid = leaf.quantised if leaf is not None else None
        if leaf is None or grid is None or grid.format.name != "int32" or grid.zero_point is not None:
            raise NoKernelError("its bias isn't int32 codes at the scale s_x s_W")
        s_x = tensor_of(x.scale)
        if s_x is None or not torch.allclose(self.constants[grid.scale].double(), s_x.double() * scale.double(), rtol=BIAS_RTOL, atol=0):
            raise NoKernelError("the scale of its bias isn't s_x s_W")
        return self.build.constant(leaf.name, self.constants[leaf.name])

    def _bounds(self, clamps: list[Tensor], scale: ir.Value | None, zero: ir.Value | None) -> list[ir.Value]:
        """The least and greatest code that relus and clamps leave; none if the quantiser leaves no others anyway."""
        if not clamps:
            return []
        s, z = tensor_of(scale), tensor_of(zero)
        if s is None or z is None:
            raise NoKernelError("a clamp before a quantiser whose grid is computed")
        codes = torch.tensor([0, 255], dtype=torch.uint8)
        for ends in clamps:
            least, greatest = quantize(ends, s.reshape(1), z.reshape(1), format_of("uint8"), (-1,))
            codes = codes.clamp(least, greatest)
        if codes.tolist() == [0, 255]:
            return []
        return [self.build.constant(f"code_{int(c)}", c.clone()) for c in codes]

    def _replace(self, old: list[ir.Node], new: list[ir.Node]) -> None:
        new[0].name = self._name(old[0])
        for node in new:
            node.metadata_props[FX_INDEX] = old[0].metadata_props.get(FX_INDEX, "")
        ir.convenience.replace_nodes_and_values(self.graph, old[-1], old, new, old[-1].outputs, new[-1].outputs)


def _int8_columns(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    if matrix.format.bits != 8:
        raise NoKernelError(f"{matrix.format} weights have no integer kernel")
    along, across = matrix.block[1], matrix.block[0]
    if along != -1 and along < matrix.columns:
        raise NoKernelError(f"a weight in groups of {along} has no integer kernel")
    codes = unpack(matrix.codes, matrix.format, matrix.columns) if matrix.is_packed else matrix.codes
    zero = torch.zeros_like(matrix.scale, dtype=torch.int8) if matrix.zero_point is None else matrix.zero_point
    if not matrix.format.signed:
        codes, zero = ((t.to(torch.int16) - SHIFT).to(torch.int8) for t in (codes, zero))
    scale, zero = (t.reshape(-1) for t in (matrix.scale, zero))
    if len(scale) not in (1, matrix.rows):
        scale, zero = (t.repeat_interleave(across)[: matrix.rows] for t in (scale, zero))
    if len(scale) == 1 != matrix.rows:
        scale, zero = scale.reshape(()), zero.reshape(())
    return codes.T.contiguous(), scale.contiguous(), zero.contiguous()


def _channels(leaf: Leaf, constants: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A convolution's int8 codes as they are, and its scales [M]."""
    grid = leaf.quantised
    assert grid is not None
    if grid.format.name != "int8" or leaf.dtype != torch.float32:
        raise NoKernelError(f"{grid.format} weights have no integer convolution")
    if any(b != -1 and b < size for b, size in zip(grid.block[1:], leaf.shape[1:], strict=True)) or grid.block[0] not in (-1, 1):
        raise NoKernelError("a weight in groups has no integer convolution")
    if grid.zero_point is not None and constants[grid.zero_point].any():
        raise NoKernelError("a weight with zero points has no integer convolution")
    codes = constants[leaf.name]
    codes = unpack(codes, grid.format, leaf.shape[-1]) if grid.packed else codes
    return codes, constants[grid.scale].reshape(-1).expand(leaf.shape[0]).contiguous()


def _clamps_and_quantiser(node: ir.Node) -> tuple[list[Tensor], ir.Node]:
    """[least, greatest] of each relu or clamp after a convolution, and the quantiser that alone reads the result."""
    clamps: list[Tensor] = []
    value = node.outputs[0]
    while not value.is_graph_output() and len(value.uses()) == 1:
        reader = next(iter(value.uses())).node
        value = reader.outputs[0]
        if reader.op_type == "QuantizeLinear":
            if value.dtype != UINT8 or rank(reader.inputs[1]) != 0:
                raise NoKernelError("its result isn't quantised to 8 bits with one scale")
            return clamps, reader
        ends = _ends(reader)
        if ends is None:
            break
        clamps.append(ends)
    raise NoKernelError("its result is read in float, and the integer kernel gives codes")


def _between(node: ir.Node, last: ir.Node) -> list[ir.Node]:
    return [node] if node is last else [node, *_between(next(iter(node.outputs[0].uses())).node, last)]


def _ends(node: ir.Node) -> Tensor | None:
    """[least, greatest] of a relu or a clamp between constants, float32."""
    if node.op_type == "Relu":
        return torch.tensor([0.0, torch.inf])
    if node.op_type != "Clip":
        return None
    ends = []
    for value, default in zip((*node.inputs[1:], None, None), (-torch.inf, torch.inf), strict=False):
        number = torch.tensor(default) if value is None else tensor_of(value)
        if number is None:
            return None
        ends.append(float(number))
    return torch.tensor(ends)
