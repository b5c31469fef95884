"""A number that multiplies a product of codes goes into the scale of its first operand.

    (s_a s_b A B) c  ->  (c s_a) s_b A B

An attention divides its scores by the root of the head size: over all queries and keys, where the scale is one number.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from fxcompress.backends.onnx.build import Builder
from fxcompress.backends.onnx.views import tensor_of

SCALE, BIAS = 2, 6  # places among the inputs


def take_up_scales(model: ir.Model) -> None:
    """Rewrite every product without bias that only a multiplication by a positive number reads, in place. It keeps its name, and gives the
    value that the multiplication gave."""
    build = Builder(model)
    for node in [n for n in model.graph if n.op_type == "MatMulIntegerToFloat"]:
        scale, product = node.inputs[SCALE], node.outputs[0]
        readers = [use.node for use in product.uses()]
        times = readers[0] if len(readers) == 1 and not product.is_graph_output() else None
        number, held = _other_factor(times, product), tensor_of(scale)
        has_bias = any(v is not None for v in node.inputs[BIAS:])
        if scale is None or times is None or number is None or held is None or held.numel() != 1 or has_bias:
            continue
        scaled = (held.double() * number).float()
        node.replace_input_with(SCALE, build.constant(f"{scale.name}.times", scaled))
        result = times.outputs[0]
        name, product.type, product.shape = result.name, result.type, result.shape
        result.replace_all_uses_with(product, replace_graph_outputs=True)
        model.graph.remove(times, safe=True)
        product.name = name
    build.finish()


def _other_factor(node: ir.Node | None, factor: ir.Value) -> float | None:
    """The positive number that a node multiplies a value by."""
    others = [v for v in node.inputs if v is not factor] if node is not None and node.op_type == "Mul" else []
    held = tensor_of(others[0]) if len(others) == 1 else None
    number = float(held) if held is not None and not held.dim() else 0.0
    return number if 0 < number < math.inf else None
