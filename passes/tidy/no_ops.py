"""Ops that give back what they were given.

    op(x) -> x

Dropout outside training; casts and copies to what the value already is; views, expands and slices that change no size; permutations in the
order that is there; x * 1, x / 1, x ** 1, x + 0, x - 0. Legal where values, dtype and sizes stay, at every size of a dynamic axis (sizes are
compared as expressions), and where nothing downstream asks for the memory layout that a copy made. Exact, bit for bit, but that -0.0 + 0 is
+0.0 and now stays -0.0. Costs nothing. A tensor of ones as long as a channel axis is left alone: other passes fold scales into it.
Source: the definitions of the ops in the torch documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.passes.tidy.forms import reader_of_layout, same_form, same_layout
from fxcompress.rewrite import Context, Match, Reject, Rewrite

aten = torch.ops.aten
Found = fx.Node | Reject | None  # what the op gives back, why it doesn't, or that it was never meant to


def _arguments(node: fx.Node) -> Any:
    return node.args


def _dropout(node: fx.Node, on: Context) -> Found:
    x, p, training = _arguments(node)
    return Reject("{} drops at random in every call, with p = {}", node, p) if training and p else x


def _copy_or_view(node: fx.Node, on: Context) -> Found:
    x = _arguments(node)[0]
    return x if isinstance(x, fx.Node) and same_form(x.meta.get("val"), node.meta.get("val")) else None


def _cat(node: fx.Node, on: Context) -> Found:
    parts = _arguments(node)[0]
    return parts[0] if len(parts) == 1 else None


def _permute(node: fx.Node, on: Context) -> Found:
    x, order = _arguments(node)
    rank = len(order)
    return x if [a % rank for a in order] == list(range(rank)) else None


def _transpose(node: fx.Node, on: Context) -> Found:
    x, a, b = _arguments(node)
    rank = node.meta["val"].dim()
    return x if rank and a % rank == b % rank else None


def _pad(node: fx.Node, on: Context) -> Found:
    x, widths, *_ = _arguments(node)
    return x if all(isinstance(w, int) and w == 0 for w in widths) else None


def _neutral(node: fx.Node, on: Context) -> Found:
    neutral, commutes = NEUTRAL[node.target]
    a, b = _arguments(node)[:2]
    x = a if _is(b, neutral, on) else b if commutes and not node.kwargs and _is(a, neutral, on) else None
    if not isinstance(x, fx.Node):
        return None
    before, after = x.meta["val"], node.meta["val"]
    if before.dtype != after.dtype:
        return Reject("{} turns {} into {}", node, before.dtype, after.dtype)
    return x if same_form(before, after) else Reject("{} broadcasts {} to {}", node, x, list(after.shape))


def _is(operand: Any, number: int, on: Context) -> bool:
    """Whether an operand is this number: a literal or a constant of one element."""
    tensor = on.constant(operand)
    if tensor is not None:
        return tensor.numel() == 1 and bool(tensor == number)
    return isinstance(operand, int | float) and operand == number


NEUTRAL: Mapping[Any, tuple[int, bool]] = {
    aten.mul.Tensor: (1, True),
    aten.mul.Scalar: (1, False),
    aten.div.Tensor: (1, False),
    aten.div.Scalar: (1, False),
    aten.pow.Tensor_Scalar: (1, False),
    aten.add.Tensor: (0, True),
    aten.add.Scalar: (0, False),
    aten.sub.Tensor: (0, False),
    aten.sub.Scalar: (0, False),
}

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
_COPIES = (
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default),
    *(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default),
)
_VIEWS = (  # row-major order stays, so equal sizes are enough
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default),
    *(aten.expand.default, aten.expand_as.default, aten.flatten.using_ints, aten.unflatten.int, aten.slice.Tensor, aten.repeat.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)

RULES: Mapping[Any, Callable[[fx.Node, Context], Found]] = {
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys((*_COPIES, *_VIEWS), _copy_or_view),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _pad),
    **dict.fromkeys(NEUTRAL, _neutral),
    aten.cat.default: _cat,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
}


class NoOps(Rewrite):
    """Give the readers of an op that changes nothing what it was given."""

    name = "tidy.no_ops"
    contract = Exact(limit=0.0)
    targets = tuple(RULES)

    def match(self, node: fx.Node, on: Context) -> Match | Reject | None:
        """An op that changes neither values nor form, unless an output or a memory layout hangs on it."""
        source = RULES[node.target](node, on)
        if not isinstance(source, fx.Node):
            return source
        outputs = on.program.results()
        if node in outputs and (source in outputs or source.op in ("placeholder", "get_attr")):
            return Reject("{} is an output of its own: {} is an input, a constant or another output", node, source)
        if not same_layout(node.meta.get("val"), source.meta.get("val")) and (reader := reader_of_layout(node)):
            return Reject("{} lays {} out anew in memory, and {} may depend on that", node, source, reader)
        return Match(node, source=source)

    def apply(self, match: Any, edit: Edit) -> None:
        """Hand the source on."""
        with edit.site(match.node, f"{match.node.target} changes nothing"):
            edit.replace(match.node, match.source)
