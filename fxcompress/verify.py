"""The table of legal graphs: checked after capture, after `quant.finalize` and before lowering."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxcompress.errors import VerifierError
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.packing import unpack
from fxcompress.program import Program

SIZE_OPS = ("_operator", "math", "torch.fx.experimental.symbolic_shapes", "torch", "torch.utils._sympy.functions")


def verify(program: Program) -> None:
    """VerifierError naming the first node that breaks a rule of the table."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        for rule, sentence in RULES:
            if not rule(program, node):
                raise VerifierError(f"{node.name} ({node.op} {node.target}) is not legal in a program", why=sentence)
        if missing := [a.name for a in node.all_input_nodes if a not in seen]:
            raise VerifierError(f"{node.name} reads {missing[0]} before it is computed", why="nodes are in topological order")
        seen.add(node)


def _known_kind(program: Program, node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr", "call_function", "output")


def _no_mutation(program: Program, node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op != "call_function" or schema is None or not schema.is_mutable


def _known_function(program: Program, node: fx.Node) -> bool:
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
        return True
    return getattr(node.target, "__module__", "") in SIZE_OPS


def _constant_exists(program: Program, node: fx.Node) -> bool:
    return node.op != "get_attr" or str(node.target) in program.constants


def _flat_output(program: Program, node: fx.Node) -> bool:
    if node.op != "output":
        return True
    results = node.args[0]
    return isinstance(results, tuple) and all(isinstance(r, fx.Node) for r in results) and len(results) == len(program.outputs)


def _declared_input(program: Program, node: fx.Node) -> bool:
    return node.op != "placeholder" or any(node.target == v.name for v in program.inputs)


def _positive_scale(program: Program, node: fx.Node) -> bool:
    """A grid may be shifted, not turned over: kernels take the scale's sign for granted."""
    scale = node.args[1] if node.target in (torch.ops.fxc.quantize.default, torch.ops.fxc.dequantize.default) else None
    return not isinstance(scale, fx.Node) or scale.op != "get_attr" or bool((program.constants[str(scale.target)] > 0).all())


def _one_grid(program: Program, node: fx.Node) -> bool:
    """Codes mean something on the grid they were made for."""
    codes = node.args[0] if node.target is torch.ops.fxc.dequantize.default else None
    return not isinstance(codes, fx.Node) or codes.target is not torch.ops.fxc.quantize.default or codes.args[1:] == node.args[1:]


RULES: tuple[tuple[Callable[[Program, fx.Node], bool], str], ...] = (
    (_known_kind, "nodes are inputs, constants, functions and one output"),
    (_no_mutation, "no op may write its arguments"),
    (_known_function, "functions are torch ops, getitem and size arithmetic"),
    (_constant_exists, "a constant node names an entry of constants"),
    (_flat_output, "the output is the flat tuple of the declared outputs"),
    (_positive_scale, "the scale of a quantiser is positive"),
    (_one_grid, "what quantises and what dequantises its codes have one grid"),
    (_declared_input, "every placeholder is a declared input"),
)


def audit(program: Program) -> None:
    """VerifierError unless weight codes are packed, in range and evaluated alike twice, and no constant is left to quantise."""
    for node in program.graph.nodes:
        if node.target is torch.ops.fxc.quantize.default and all(a.op == "get_attr" for a in node.all_input_nodes):
            raise VerifierError(f"{node.name} quantises a constant at run time", why="quant.finalize stores its codes", do="- quant.finalize")
        if node.target is torch.ops.fxc.unpack.default and node.args[0].op == "get_attr":
            _audit_codes(node, program.constants[str(node.args[0].target)], str(node.args[1]), int(node.args[2]))


def _audit_codes(node: fx.Node, packed: Tensor, name: str, size: int) -> None:
    format = format_of(name)
    codes, again = unpack(packed, format, size), unpack(packed, format, size)
    if not torch.equal(codes.view(torch.uint8), again.view(torch.uint8)):
        raise VerifierError(f"{node.name} gives other codes the second time")
    if format.kind != "float" and codes.numel() and not format.qmin <= int(codes.min()) <= int(codes.max()) <= format.qmax:
        raise VerifierError(f"{node.name} holds codes outside {format.qmin}..{format.qmax}")
