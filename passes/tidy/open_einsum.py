"""An einsum of two operands is opened into a matrix product and what brings its operands there.

    letters of both operands that the result has    batches
    letters of both that it hasn't                  summed
    letters of one                                  rows, columns

    A -> [batches, rows, summed],  B -> [batches, summed, columns],  matmul, and the result's letters in their order

For passes that quantise products; run it only before one. Several letters of a kind become one axis, but rows without batches, which matmul
takes as they are. Declined: letters that stand twice in a term or are summed in one operand alone, and axes that would have to be parted again
into more than one dynamic size. Exact but for rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from fxcompress.contract import Exact
from fxcompress.dataflow import spelled
from fxcompress.edit import Edit
from fxcompress.passes.tidy.forms import reader_of_layout, same_size
from fxcompress.rewrite import Context, Match, Reject, Rewrite

aten = torch.ops.aten


class OpenEinsum(Rewrite):
    """Replace einsum by matmul."""

    name = "tidy.open_einsum"
    contract = Exact()
    targets = (aten.einsum.default,)
    gives = frozenset({"opened"})

    def match(self, node: fx.Node, on: Context) -> Match | Reject:
        """Two operands whose letters are batches, rows, columns or summed."""
        operands: Any = node.args[1]
        if len(operands) != 2:
            return Reject("{} has {} operands, not two", node, len(operands))
        (left, right), result = spelled(str(node.args[0]), [x.meta["val"].dim() for x in operands])
        if any(len(set(term)) < len(term) for term in (left, right, result)):
            return Reject("{} takes a diagonal", node)
        if alone := sorted((set(left) ^ set(right)) - set(result)):
            return Reject("{} sums {} over one operand alone", node, alone[0])
        shapes = [x.meta["val"].shape for x in operands]
        sizes = {letter: n for term, shape in zip((left, right), shapes, strict=True) for letter, n in zip(term, shape, strict=True)}
        summed = [x for x in left if x in right and x not in result]
        if apart := [x for x in summed if not same_size(shapes[0][left.index(x)], shapes[1][right.index(x)])]:
            return Reject("{} repeats {} along one operand", node, apart[0])
        if reader := reader_of_layout(node):
            return Reject("{} lays its result out otherwise in memory, and {} may depend on that", node, reader)
        batches = [x for x in result if x in left and x in right]
        rows, columns = ([x for x in result if x in term and x not in batches] for term in (left, right))
        parted = [columns, *([rows] if batches else [])]
        if any(sum(not isinstance(sizes[x], int) for x in letters) > 1 for letters in parted if len(letters) > 1):
            return Reject("{} has several dynamic sizes in one operand", node)
        return Match(node, terms=(left, right), result=result, kinds=(batches, rows, columns, summed), sizes=sizes)

    def apply(self, match: Any, edit: Edit) -> None:
        """Its readers read the product."""
        with edit.site(match.node, "opened"):
            edit.replace(match.node, _opened(match, partial(edit.insert, like=match.node)))


def _opened(match: Any, op: Any) -> fx.Node:
    """The product and what stands around it; its last node."""
    batches, rows, columns, summed = match.kinds
    left, right = match.node.args[1]
    lead = len(batches)
    a = _joined(_ordered(left, match.terms[0], [*batches, *rows, *summed], op), lead + len(rows), len(summed), op)
    if batches:
        a = _joined(a, lead, len(rows), op)
    b = _joined(_ordered(right, match.terms[1], [*batches, *summed, *columns], op), lead + len(summed), len(columns), op)
    b = _joined(b, lead, len(summed), op)
    product = op(aten.matmul.default, a, b)
    product = _parted(product, -1, [match.sizes[x] for x in columns], op)
    if batches:
        product = _parted(product, lead, [match.sizes[x] for x in rows], op)
    return _ordered(product, "".join([*batches, *rows, *columns]), match.result, op)


def _ordered(x: fx.Node, letters: Any, wanted: Any, op: Any) -> fx.Node:
    """The axes in another order."""
    order = [list(letters).index(letter) for letter in wanted]
    return x if order == sorted(order) else op(aten.permute.default, x, order)


def _joined(x: fx.Node, axis: int, count: int, op: Any) -> Any:
    """`count` axes from this one on as one; a new one of size 1 for none."""
    if count == 0:
        return op(aten.unsqueeze.default, x, axis)
    return x if count == 1 else op(aten.flatten.using_ints, x, axis, axis + count - 1)


def _parted(x: fx.Node, axis: int, sizes: list[Any], op: Any) -> Any:
    """The inverse, to these sizes."""
    if not sizes:
        return op(aten.squeeze.dim, x, axis)
    numbers = [n if isinstance(n, int) else -1 for n in sizes]
    return x if len(sizes) == 1 else op(aten.unflatten.int, x, axis, numbers)
