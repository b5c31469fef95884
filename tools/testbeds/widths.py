"""Which share of a program's multiplications runs at which width, read from the graph."""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.cost import Costs, macs
from fxcompress.dataflow import before_moves, is_constant
from fxcompress.numerics.formats import format_of
from fxcompress.passes.quant.sites import SUMMED
from fxcompress.program import Program


def macs_by_width(program: Program) -> dict[str, float]:
    """Shares of all multiply-accumulates on the example inputs: "W4A8" for a weight of 4 by an activation of 8 bits, "A8A8" for a product of
    two activations, "L4A8" where the first are codes of logs, which multiply as the numbers they mean, "float" where an operand isn't
    quantised. The widest first.
    """
    shapes = Costs(program, formulas=False).shapes
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        work = macs(node, shapes)
        if work:
            width = _width(node)
            found[width] = found.get(width, 0) + work
    total = sum(found.values())
    return {width: found[width] / total for width in sorted(found, key=found.__getitem__, reverse=True)}


def _width(node: fx.Node) -> str:
    first = 1 if node.target in SUMMED else 0
    pair = sorted((a for a in node.args[first : first + 2] if isinstance(a, fx.Node)), key=is_constant, reverse=True)
    widths = [_named(before_moves(operand), is_constant(operand)) for operand in pair]
    return "float" if "" in widths or len(widths) != 2 else "".join(widths)


def _named(value: fx.Node, is_weight: bool) -> str:
    """Kind and bits of an operand's codes; "" of numbers."""
    if value.target is not torch.ops.fxc.dequantize.default:
        return ""
    format = format_of(str(value.args[3]))
    return f"{'L' if format.kind == 'log' else 'W' if is_weight else 'A'}{format.bits}"
