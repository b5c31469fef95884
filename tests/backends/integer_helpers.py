"""Programs with quantised activations, built by hand: the pairs that `quant.insert` and `quant.finalize` leave behind."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.numerics.affine import quantize
from fxcompress.numerics.blocks import Block
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.packing import pack
from fxcompress.numerics.ranges import minmax_range
from fxcompress.program import Program

aten, fxc = torch.ops.aten, torch.ops.fxc
CONTRACTIONS = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding), (0, 1)),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input), (0, 1)),
}
CLAMPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
Choose = Callable[[fx.Node], bool]


def integer(
    program: Program, format: str = "uint8", *, token: bool = False, outputs: Choose = lambda n: "conv" in str(n.target), weights: str = "int8"
) -> Program:
    """A copy with a pair on every operand of every contraction, and on the results `outputs` picks. Ranges are those of the example."""
    result = program.copy()
    values: dict[fx.Node, Tensor] = {}
    run(result, result.example, values.__setitem__)
    edit = Edit(result)
    for site in [n for n in result.graph.nodes if n.target in CONTRACTIONS]:
        for operand in [site.args[p] for p in CONTRACTIONS[site.target]]:
            if _leaf(operand) is not None:
                quantised_weight(edit, site, operand, weights)
            elif operand.target is not fxc.dequantize.default:
                quantised_value(edit, operand, [site], values[operand], format, token)
        if outputs(site):
            after = next(iter(site.users)) if next(iter(site.users)).target in CLAMPS else site
            quantised_value(edit, after, list(after.users), values[after], format, False)
            quantised_bias(edit, site)
    edit.commit()
    return result


def quantised_value(edit: Edit, value: fx.Node, readers: Sequence[fx.Node], seen: Tensor, format: str, token: bool) -> None:
    """A pair between a value and these readers; static, or one scale a token computed in the graph."""
    kind, rank = format_of(format), seen.dim()
    with edit.site(value, "activation"):
        at: dict[str, Any] = {"like": value, "before": min(readers)}
        if token:
            top = edit.insert(aten.amax.default, edit.insert(aten.abs.default, value, **at), [-1], True, **at)
            grid = (edit.insert(aten.clamp_min.default, edit.insert(aten.div.Tensor, top, kind.qmax, **at), 1e-30, **at), None)
            block: Block = (*[1] * (rank - 1), -1)
        else:
            block = (-1,) * rank
            scale, zero = minmax_range(seen, kind, kind.signed, block)
            name = f"{value.name}.scale"
            grid = (edit.constant(name, scale, **at), None if zero is None else edit.constant(f"{value.name}.zero_point", zero, **at))
        codes = edit.insert(fxc.quantize.default, value, *grid, format, list(block), **at)
        pair = edit.insert(fxc.dequantize.default, codes, *grid, format, list(block), **at)
        for reader in readers:
            edit._rewire(reader, value, pair)


def quantised_weight(edit: Edit, site: fx.Node, operand: fx.Node, format: str) -> None:
    """Packed codes with a scale for each output channel in the place of a dense constant."""
    leaf = _leaf(operand)
    assert leaf is not None
    if leaf.target is fxc.dequantize.default:
        return
    kind, tensor = format_of(format), edit.program.constants[str(leaf.target)]
    columns = operator.xor(site.target in (aten.linear.default,) or "conv" in str(site.target), operand is not leaf)
    axis = 1 if "transpose" in str(site.target) else 0 if columns else tensor.dim() - 1
    block = tuple(1 if a == axis else -1 for a in range(tensor.dim()))
    scale, _ = minmax_range(tensor, kind, True, block)
    with edit.site(leaf, "weight"):
        at: dict[str, Any] = {"like": leaf, "before": leaf.next}
        name = str(leaf.target)
        packed = edit.constant(f"{name}.packed", pack(quantize(tensor, scale, None, kind, block), kind), **at)
        factor = edit.constant(f"{name}.scale", scale, **at)
        codes = edit.insert(fxc.unpack.default, packed, format, tensor.shape[-1], **at)
        edit.replace(leaf, edit.insert(fxc.dequantize.default, codes, factor, None, format, list(block), **at))


def quantised_bias(edit: Edit, site: fx.Node) -> None:
    """int32 codes at the product of the scales of input and weight."""
    bias = site.args[2] if len(site.args) > 2 else None
    if not isinstance(bias, fx.Node):
        return
    constants, (x, weight) = edit.program.constants, site.args[:2]
    scale = (constants[str(x.args[1].target)].reshape(()) * constants[str(weight.args[1].target)].reshape(-1)).contiguous()
    codes = quantize(constants[str(bias.target)], scale, None, format_of("int32"), (1,))
    with edit.site(site, "bias"):
        at: dict[str, Any] = {"like": bias, "before": site}
        name = str(bias.target)
        nodes = edit.constant(f"{name}.codes", codes, **at), edit.constant(f"{name}.scale", scale, **at)
        edit._rewire(site, bias, edit.insert(fxc.dequantize.default, *nodes, None, "int32", [1], **at))


def _leaf(operand: fx.Node) -> fx.Node | None:
    while operand.target in (aten.t.default, aten.transpose.int, aten.permute.default):
        operand = operand.args[0]
    is_constant = operand.op == "get_attr" or (operand.target is fxc.dequantize.default and operand.args[0].target is fxc.unpack.default)
    return operand if is_constant else None
