"""Cost of a program before anything runs: arithmetic and bytes of every node, as numbers or as formulas in the dynamic sizes.

Multiply-accumulates are one line an op. Sizes may be integers or sympy expressions in the names the program gives its dynamic axes; a formula
is bound to numbers with `subs`. Whatever contracts nothing costs one operation for each element of its largest operand or result, and what only
moves, gathers or fills costs none: roofline figures, not a clock.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from math import ceil, floor, prod
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

import fxcompress.ops  # noqa: F401 - registers the fxc:: ops named below
from fxcompress.dataflow import is_move, spelled
from fxcompress.numerics.formats import format_of
from fxcompress.program import Program

Shape = Sequence[Any]
_ATEN = torch.ops.aten
_MOVES = "cat stack split chunk split_with_sizes slice select index index_select gather embedding arange full zeros ones pad"
_FREE = frozenset([*_MOVES.split(), "quantize", "dequantize", "unpack"])  # a kernel that computes in codes has these inside


class Cost(NamedTuple):
    """flops: two for each multiply-accumulate. weights: bytes stored in constants. traffic: bytes read and written, results and constants."""

    flops: Any
    weights: Any
    traffic: Any


class Costs:
    """The costs of one program's nodes, as formulas or at the sizes of the example inputs. A node without a fake value (of a stored program)
    costs 0."""

    def __init__(self, program: Program, formulas: bool = True) -> None:
        self.program = program
        self.example = example_sizes(program)
        self._names, self._formulas = symbol_names(program), formulas
        self._sizes: dict[Any, Any] = {}
        self.shapes = {n: self.shape(n) for n in program.graph.nodes}

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Sizes of the node's value; () for a number or nothing."""
        return tuple(self._size(s) for s in getattr(node.meta.get("val"), "shape", ()))

    def of(self, node: fx.Node) -> Cost:
        """The cost of one node."""
        if node.op == "get_attr":
            tensor = self.program.constants[str(node.target)]
            return Cost(0, tensor.numel() * tensor.element_size(), 0)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or is_move(node):
            return Cost(0, 0, 0)
        contracted = macs(node, self.shapes)
        packet = str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]
        tensors = [n for n in (node, *node.all_input_nodes) if isinstance(n.meta.get("val"), Tensor)]
        elementwise = 0 if packet in _FREE and not _takes_logs(node) else max((prod(self.shapes[n]) for n in tensors), key=self.bound)
        traffic = sum(prod(self.shapes[n]) * n.meta["val"].element_size() for n in tensors)
        return Cost(2 * contracted if contracted != 0 else elementwise, 0, traffic)

    def total(self, nodes: Iterable[fx.Node]) -> Cost:
        """The sum over nodes, each formula once with its count."""
        counted = [Counter(column) for column in zip(*(self.of(n) for n in nodes), strict=True)] or [Counter[Any]()] * 3
        return Cost(*(sympy.expand(sympy.Add(*(v * k for v, k in c.items()))) for c in counted))

    def bound(self, value: Any) -> int:
        """A formula at the sizes of the example inputs. A size that only the data decides, as how many entries a mask keeps, counts as 1."""
        if not isinstance(value, sympy.Expr):
            return int(value)
        known = value.subs(self.example)
        return int(known.subs(dict.fromkeys(known.free_symbols, 1)))

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._sizes:
            named = expression.xreplace(self._names)
            self._sizes[expression] = named if self._formulas and not named.is_number else self.bound(named)
        return self._sizes[expression]


def _takes_logs(node: fx.Node) -> bool:
    """Whether a quantiser or its inverse has a log format, which no product reads as it is."""
    return node.target in (torch.ops.fxc.quantize.default, torch.ops.fxc.dequantize.default) and format_of(str(node.args[3])).kind == "log"


def at_sizes(formula: str, sizes: Mapping[str, int]) -> int:
    """A formula that was written as text, at these sizes. It may come from a file, so it is read as arithmetic and never run.

    A size that is not among them counts as 1, as one that only the data decides. ValueError for what isn't arithmetic of whole numbers.
    """
    try:
        return int(_arithmetic(ast.parse(formula, mode="eval").body, sizes))
    except (SyntaxError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{formula[:80]!r} can't be computed: {type(error).__name__}") from None


_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: Fraction(a) / b,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}
_CALLED: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("floor", "FloorToInt"), floor),
    **dict.fromkeys(("ceiling", "CeilToInt"), ceil),
    **dict.fromkeys(("FloorDiv", "CleanDiv"), operator.floordiv),
    **dict.fromkeys(("Mod", "PythonMod"), operator.mod),
    "Max": max,
    "Min": min,
    "Abs": abs,
}
_POWERS, _GREATEST = range(17), 1 << 256  # a file may ask for numbers that no memory holds


def _arithmetic(node: ast.AST, sizes: Mapping[str, int]) -> Any:
    value = _value(node, sizes)
    if abs(value) > _GREATEST:
        raise OverflowError
    return value


def _value(node: ast.AST, sizes: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return sizes.get(node.id, 1)
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_arithmetic(node.operand, sizes))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _CALLED[node.func.id](*(_arithmetic(a, sizes) for a in node.args))
    if not isinstance(node, ast.BinOp):
        raise TypeError(ast.dump(node))
    left, right = _arithmetic(node.left, sizes), _arithmetic(node.right, sizes)
    if isinstance(node.op, ast.Pow):
        return left ** _POWERS[right]
    return _OPERATORS[type(node.op)](left, right)


def symbol_names(program: Program) -> dict[sympy.Symbol, sympy.Symbol]:
    """Torch's symbol of a dynamic size -> the program's own name for it."""
    found = {}
    for node, value in zip(program.placeholders(), program.inputs, strict=True):
        for size, name in zip(getattr(node.meta.get("val"), "shape", ()), value.shape, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found[size.node.expr] = sympy.Symbol(str(name))
    return found


def example_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """What each dynamic size is in the example inputs."""
    pairs = [
        (str(name), int(size))
        for value, tensor in zip(program.inputs, program.example, strict=False)
        for name, size in zip(value.shape, tensor.shape, strict=False)
    ]
    return {sympy.Symbol(name): size for name, size in pairs if name in program.symbols}


def macs(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> Any:
    """Multiply-accumulates of the node; 0 for ops that don't contract."""
    rule = _RULES.get(str(node.target))
    if rule is None:
        return 0
    listed = node.args[1] if rule is _sums else node.args
    given = [shapes.get(a, ()) if isinstance(a, fx.Node) else () for a in listed]  # type: ignore[union-attr]
    return rule(given, shapes.get(node, ()), node)


def _contracts(operand: int) -> Callable[[Sequence[Shape], Shape, Any], Any]:
    """Every output element sums over the last axis of that operand."""
    return lambda given, out, node: prod(out) * given[operand][-1]


def _convolves(given: Sequence[Shape], out: Shape, node: fx.Node) -> Any:
    turned = "transpose" in str(node.target) or (node.target is _ATEN.convolution.default and bool(node.args[6]))
    return prod(given[0] if turned else out) * prod(given[1][1:])


def _sums(given: Sequence[Shape], out: Shape, node: fx.Node) -> Any:
    """Operands are multiplied one after the other: each time all letters of the two, of which those that nobody wants any more are summed."""
    terms, result = spelled(str(node.args[0]), [len(shape) for shape in given])
    sizes = {letter: size for term, shape in zip(terms, given, strict=True) for letter, size in zip(term, shape, strict=True)}
    left, work = set(terms[0]), 0
    for number, term in enumerate(terms[1:], 1):
        work += prod(sizes[letter] for letter in sorted(left.union(term)))
        left = left.union(term) & set(result).union(*terms[number + 1 :])
    return work


def _attends(given: Sequence[Shape], out: Shape, node: fx.Node) -> Any:
    query, key, value = given[:3]
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurs(given: Sequence[Shape], out: Shape, node: fx.Node) -> Any:
    """Every weight matrix multiplies every step of every sequence. given[0]: the sequence [.., .., features]."""
    weights: Any = next(a for a in node.args if isinstance(a, list | tuple) and len(a) > 2)
    return prod(given[0][:-1]) * sum(int(w.meta["val"].numel()) for w in weights if w.meta["val"].dim() == 2)


_RULES: Mapping[str, Callable[[Sequence[Shape], Shape, Any], Any]] = {
    **{f"aten.{op}.default": _contracts(0) for op in ("linear", "mm", "bmm", "matmul")},
    **{f"aten.{op}.default": _contracts(1) for op in ("addmm", "baddbmm")},
    **{f"aten.conv{n}d.{overload}": _convolves for n in (1, 2, 3) for overload in ("default", "padding")},
    **dict.fromkeys(("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"), _convolves),
    "aten.convolution.default": _convolves,
    **dict.fromkeys(("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input"), _recurs),
    "aten.scaled_dot_product_attention.default": _attends,
    "aten.einsum.default": _sums,
}

CONTRACTIONS = frozenset(_RULES)  # names of the ops that multiply and accumulate
