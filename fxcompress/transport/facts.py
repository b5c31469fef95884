"""What the rules ask about a program again and again: shapes, arguments by name, how a reshape groups axes. Computed once per program."""

from __future__ import annotations

import operator
from math import gcd
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxcompress.edit import fake_value
from fxcompress.program import Program

aten = torch.ops.aten
KEEPING = (aten.expand.default, aten.expand_as.default, aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default)
Dim = Any  # an int, or a sympy expression where dynamic
Shape = tuple[Dim, ...]
Groups = list[tuple[list[int], list[int]]]  # per group: axes before, axes after, of equal product
SPLITS = (
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default),
    *(aten.unsafe_chunk.default, aten.tensor_split.sections, aten.tensor_split.indices),
)
FILLED: dict[Any, float | None] = {  # ops that make a value of one number; None where an argument gives it
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0.0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1.0),
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.new_full.default), None),
}


class Facts:
    """Lazily computed facts about one program as it stands."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.results = frozenset(program.results())
        self.ranks: dict[tuple[str, fx.Node], int] = {}  # filled by the policy
        self.ranges: dict[fx.Node, tuple[float, float]] = {}  # filled by `ranges`
        self._values: dict[fx.Node, Any] = {}
        self._shapes: dict[fx.Node, Shape] = {}
        self._arguments: dict[fx.Node, dict[str, Any]] = {}
        self._groups: dict[fx.Node, Groups] = {}
        self._anchor = next((n for n in program.graph.nodes if hasattr(n.meta.get("val"), "fake_mode")), None)

    def value(self, node: fx.Node) -> Any:
        """The node's fake value; None if there is none."""
        if node not in self._values:
            known = node.meta.get("val")
            self._values[node] = self._faked(node) if known is None and node.op == "call_function" else known
        return self._values[node]

    def shape(self, node: fx.Node) -> Shape | None:
        """Sizes: ints, expressions where dynamic; None if the value is no tensor."""
        if node not in self._shapes:
            value = self.value(node)
            if not isinstance(value, Tensor):
                return None
            self._shapes[node] = sizes(value)
        return self._shapes[node]

    def distinct(self, node: fx.Node) -> Shape | None:
        """The shape, with 1 along axes that an expand made: all positions there are one."""
        shape = self.shape(node)
        while shape is not None and node.op == "call_function" and node.target in KEEPING:
            source: Any = node.args[0]
            before = self.shape(source) or ()
            lead = len(shape) - len(before)
            shape = tuple(1 if a < lead or before[a - lead] == 1 else n for a, n in enumerate(shape))
            node = source
        return shape

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by the schema's names, defaults filled in."""
        if node not in self._arguments:
            self._arguments[node] = arguments(node)
        return self._arguments[node]

    def groups(self, node: fx.Node, source: fx.Node) -> Groups:
        """How a reshape of source groups axes."""
        if node not in self._groups:
            before, after = self.shape(source), self.shape(node)
            assert before is not None and after is not None
            self._groups[node] = grouped(before, after)
        return self._groups[node]

    def is_constant(self, node: Any) -> bool:
        """Whether a value is a constant or made from constants alone by views and casts."""
        while isinstance(node, fx.Node):
            if node.op == "get_attr":
                return True
            if node.op != "call_function" or len(node.all_input_nodes) != 1:
                return False
            node = node.all_input_nodes[0]
        return False

    def _faked(self, node: fx.Node) -> Any:
        for source in node.all_input_nodes:
            if source.meta.get("val") is None:
                source.meta["val"] = self.value(source)
        try:
            return fake_value(node.target, node.args, dict(node.kwargs), self._anchor)  # type: ignore[arg-type]
        except Exception:
            return None


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an op node by name: given by position, by keyword, or the schema's default."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)}
    given = {**{a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}, **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def filling(node: fx.Node) -> Any:
    """The number, or the node that computes it, that an op of FILLED writes everywhere."""
    number = FILLED[node.target]
    return arguments(node)["fill_value"] if number is None else number


def is_getitem(node: fx.Node) -> bool:
    """Whether the node takes a tensor out of a tuple."""
    return node.op == "call_function" and node.target is operator.getitem


def outputs(node: fx.Node) -> dict[int, fx.Node]:
    """The nodes that take tensors out of a tuple, by position."""
    return {int(u.args[1]): u for u in node.users if is_getitem(u)}  # type: ignore[arg-type]


def sizes(value: Tensor) -> Shape:
    """The sizes of a fake value: ints, expressions where dynamic."""
    return tuple(_dim(d) for d in value.shape)


def _dim(size: Any) -> Dim:
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_number else expr
    return int(size)


def grouped(before: Shape, after: Shape) -> Groups:
    """Split two shapes of one product into minimal groups of equal product; axes of size 1 belong to none."""
    left = [a for a, n in enumerate(before) if n != 1]
    right = [a for a, n in enumerate(after) if n != 1]
    groups: Groups = []
    while left or right:
        mine, theirs = left[:1], right[:1]
        del left[:1], right[:1]
        while (a := _product(before, mine)) != (b := _product(after, theirs)) and (left or right):
            side, own = (left, mine) if left and (not right or _divides(a, b)) else (right, theirs)
            own.append(side.pop(0))
        groups.append((mine, theirs))
    return groups


def runs(groups: Groups, before: Shape, after: Shape) -> list[tuple[list[int], list[int], int, int]]:
    """(axes before, axes after, outer, inner): neighbours of known sizes, with how many of their outermost and innermost positions both shapes
    count alike. All of a group of known sizes; around a dynamic size what the outer axes have in common, and what the inner ones have."""
    found = []
    for mine, theirs in groups:
        (lead, tail), (other_lead, other_tail) = _ends(before, mine), _ends(after, theirs)
        if len(tail) == len(mine) and len(other_tail) == len(theirs):
            found.append((mine, theirs, _product(before, mine), 1))
        else:
            found.append((lead, other_lead, gcd(_product(before, lead), _product(after, other_lead)), 1))
            found.append((tail, other_tail, 1, gcd(_product(before, tail), _product(after, other_tail))))
    return found


def _ends(shape: Shape, axes: list[int]) -> tuple[list[int], list[int]]:
    """The axes of known sizes before the first dynamic one, and after the last; where there is none, all come after it."""
    dynamic = [i for i, a in enumerate(axes) if not isinstance(shape[a], int)]
    return (axes[: dynamic[0]], axes[dynamic[-1] + 1 :]) if dynamic else ([], axes)


def _product(shape: Shape, axes: list[int]) -> Dim:
    total: Dim = 1
    for axis in axes:
        total = total * shape[axis]
    return sympy.expand(total) if isinstance(total, sympy.Expr) else total


def _divides(a: Dim, b: Dim) -> bool:
    """Whether a grows towards b: a is smaller, or divides it where sizes are dynamic."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return bool(sympy.fraction(sympy.cancel(sympy.sympify(b) / a))[1] == 1)
