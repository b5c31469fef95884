"""The table of legal graphs: checked after capture, after `quant.finalize` and before lowering."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from fxcompress.errors import VerifierError
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


RULES: tuple[tuple[Callable[[Program, fx.Node], bool], str], ...] = (
    (_known_kind, "nodes are inputs, constants, functions and one output"),
    (_no_mutation, "no op may write its arguments"),
    (_known_function, "functions are torch ops, getitem and size arithmetic"),
    (_constant_exists, "a constant node names an entry of constants"),
    (_flat_output, "the output is the flat tuple of the declared outputs"),
    (_declared_input, "every placeholder is a declared input"),
)
