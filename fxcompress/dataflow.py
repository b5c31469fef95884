"""What reads what: the uses of a constant as a weight, found through views, whatever the model calls it."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import fxcompress.ops  # noqa: F401 - registers what `pair_of` looks for
from fxcompress.program import Program
from fxcompress.target import Family

aten = torch.ops.aten
Axes = tuple[int, ...]  # per axis of a view, the axis of the constant it runs along


@dataclass(frozen=True)
class WeightUse:
    """One reader that multiplies by the constant or gathers its rows. Axes are those of the constant.

    contraction: the axis summed over (linear, conv: input channels) or the row gathered (embedding: the vector's axis).
    channel: the axis that becomes the output's channels (embedding: the row number). window: axes of a convolution's kernel.
    """

    family: Family
    node: fx.Node
    channel: int
    contraction: int
    window: tuple[int, ...] = ()


def weight_uses(constant: fx.Node, tensor: Tensor) -> tuple[list[WeightUse], list[fx.Node]]:
    """(uses as a weight, other readers) of a constant, both through transposes, selects and casts of it."""
    uses: list[WeightUse] = []
    others: list[fx.Node] = []
    for reader, source, axes in _readers(constant, tuple(range(tensor.dim()))):
        if use := _use(reader, source, axes):
            uses.append(use)
        else:
            others.append(reader)
    return uses, others


def _readers(source: fx.Node, axes: Axes) -> Iterator[tuple[fx.Node, fx.Node, Axes]]:
    for reader in source.users:
        view = VIEWS.get(reader.target) if reader.op == "call_function" else None
        if view is not None and reader.args[0] is source:
            yield from _readers(reader, view(axes, *reader.args[1:]))
        else:
            yield reader, source, axes


def _use(reader: fx.Node, source: fx.Node, axes: Axes) -> WeightUse | None:
    entry = WEIGHT_ARGUMENTS.get(reader.target) if reader.op == "call_function" else None
    if entry is None or len(axes) < 2:
        return None
    family, positions = entry
    places = [i for i, a in enumerate(reader.args) if a is source]
    if len(places) != 1 or places[0] not in positions or source in reader.kwargs.values():
        return None
    channel, contraction = positions[places[0]]
    if family == "conv" and is_transposed(reader):
        channel, contraction = contraction, channel
    return WeightUse(family, reader, axes[channel], axes[contraction], axes[2:] if family == "conv" else ())


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution is a transposed one."""
    name = str(node.target)
    return "conv_transpose" in name or (node.target is aten.convolution.default and bool(node.args[6]))


def _swap(axes: Axes, a: int, b: int) -> Axes:
    order = list(axes)
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _drop(axes: Axes, dim: int, *_: Any) -> Axes:
    dim %= len(axes)
    return axes[:dim] + axes[dim + 1 :]


VIEWS: Mapping[Any, Callable[..., Axes]] = {
    aten.t.default: lambda axes: axes[::-1],
    aten.transpose.int: _swap,
    aten.permute.default: lambda axes, order: tuple(axes[i] for i in order),
    aten.select.int: _drop,
    aten.to.dtype: lambda axes, *_: axes,
    aten._to_copy.default: lambda axes, *_: axes,
    aten.contiguous.default: lambda axes, *_: axes,
    aten.clone.default: lambda axes, *_: axes,
}

_MOVING = "to _to_copy view reshape transpose permute t expand unsqueeze squeeze flatten unflatten contiguous clone select slice mT"
_MOVES = frozenset(getattr(torch.ops.aten, name) for name in _MOVING.split())

_LENDERS = {  # per op the place of the operand of which it takes only the form
    **dict.fromkeys((getattr(aten, f"{name}_like") for name in ("zeros", "ones", "full", "empty")), 0),
    **dict.fromkeys((getattr(aten, f"new_{name}") for name in ("zeros", "ones", "full", "empty")), 0),
    **dict.fromkeys((aten.view_as, aten.reshape_as, aten.expand_as, aten.type_as), 1),
    aten.sym_size: 0,
}

_UNOPENED = "einsum _trilinear tensordot lstm gru rnn_tanh rnn_relu mv dot addbmm cdist"
UNOPENED = frozenset(_UNOPENED.split())  # ops that multiply by a weight in a way this table doesn't tell


def is_move(node: fx.Node) -> bool:
    """Whether the op hands on the numbers of its first operand, in another place or shape."""
    if getattr(node.target, "overloadpacket", None) not in _MOVES:
        return False
    before, after = (getattr(n.meta["val"], "dtype", None) for n in (node.all_input_nodes[0], node))
    return before == after


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether the op puts zeros around its operand and cuts nothing off: quantised with one scale, before or after is the same."""
    if node.op != "call_function" or node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return False
    sizes, *rest = node.args[1:]
    is_constant = all(r in ("constant", None, 0) for r in (*rest, *node.kwargs.values()))
    return is_constant and all(isinstance(n, int) and n >= 0 for n in sizes)  # type: ignore[union-attr]


def is_read(node: fx.Node, operand: fx.Node) -> bool:
    """Whether the op reads the numbers of an operand, not its form alone."""
    place = _LENDERS.get(getattr(node.target, "overloadpacket", None))
    return place is None or any(a is operand for i, a in enumerate(node.args) if i != place) or operand in node.kwargs.values()


def is_zero(node: fx.Node) -> bool:
    """Whether the op makes zeros, whatever the inputs are."""
    return getattr(node.target, "overloadpacket", None) in (aten.zeros, aten.zeros_like, aten.new_zeros)


def ancestors(wanted: Iterable[fx.Node], inputs: Callable[[fx.Node], Iterable[fx.Node]] = lambda n: n.all_input_nodes) -> set[fx.Node]:
    """These nodes and everything their values depend on. inputs: what a node reads, or read once."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(inputs(node))
    return found


class Quantised(NamedTuple):
    """What a dequantised value stands for, and its grid."""

    value: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    format: str
    block: Sequence[int]


def pair_of(node: Any) -> Quantised | None:
    """The value and the grid of a node that dequantises what was quantised just before; None for anything else."""
    codes = node.args[0] if isinstance(node, fx.Node) and node.target is torch.ops.fxc.dequantize.default else None
    is_pair = isinstance(codes, fx.Node) and codes.target is torch.ops.fxc.quantize.default
    return Quantised(*codes.args) if is_pair else None  # type: ignore[union-attr]


def before_pair(node: fx.Node) -> fx.Node:
    """The value that a pair stands for, or the node itself."""
    pair = pair_of(node)
    return node if pair is None else pair.value


def decided_by_inputs(program: Program) -> set[fx.Node]:
    """The nodes whose values an input decides."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def before_moves(value: fx.Node) -> fx.Node:
    """The value before everything that only moves its numbers, or puts zeros around them."""
    while is_move(value) or pads_with_zeros(value):
        value = value.all_input_nodes[0]
    return value


def is_constant(node: fx.Node) -> bool:
    """Whether no input decides the node's value."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return False
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        stack.extend(new)
    return True


def contracts_unopened(node: fx.Node) -> bool:
    """Whether the op multiplies by its weights in a way that `weight_uses` can't tell."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.split("::")[1] in UNOPENED


def spelled(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms of an einsum equation and its result, with a letter for every axis that `...` stands for; a result that is left out is the
    letters that stand once. ranks: of the operands."""
    equation = equation.replace(" ", "")
    if "->" not in equation:
        once = "".join(sorted(x for x in set(equation) if x.isalpha() and equation.count(x) == 1))
        equation += f"->{'...' * ('...' in equation)}{once}"
    terms, _, result = equation.partition("->")
    free = "".join(x for x in string.ascii_letters if x not in equation)
    counts = [rank - len(term.replace(".", "")) for rank, term in zip(ranks, terms.split(","), strict=True)]
    parts = [term.replace("...", free[:count][::-1]) for term, count in zip(terms.split(","), counts, strict=True)]
    return parts, result.replace("...", free[: max(counts)][::-1])


_ROWS = (-2, -1)  # [.., N, K]: N channels, K summed over
_COLUMNS = (-1, -2)  # [.., K, N]

# per op: family, and per argument position (channel axis, contraction axis) of a weight standing there
WEIGHT_ARGUMENTS: Mapping[Any, tuple[Family, Mapping[int, tuple[int, int]]]] = {
    aten.linear.default: ("linear", {1: _ROWS}),
    aten.addmm.default: ("linear", {1: _ROWS, 2: _COLUMNS}),
    aten.mm.default: ("linear", {0: _ROWS, 1: _COLUMNS}),
    aten.matmul.default: ("linear", {0: _ROWS, 1: _COLUMNS}),
    aten.bmm.default: ("linear", {0: _ROWS, 1: _COLUMNS}),
    aten.baddbmm.default: ("linear", {1: _ROWS, 2: _COLUMNS}),
    aten.embedding.default: ("embedding", {0: (0, 1)}),
    **{
        op: ("conv", {1: (0, 1)})
        for op in (
            aten.conv1d.default,
            aten.conv2d.default,
            aten.conv3d.default,
            aten.conv1d.padding,
            aten.conv2d.padding,
            aten.conv3d.padding,
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
            aten.convolution.default,
        )
    },
}
