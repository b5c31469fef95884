"""Attention whose keys and values were repeated for groups of queries, as attention that knows of groups.

    sdpa(q, reshape(expand(unsqueeze(k))), reshape(expand(unsqueeze(v))))  ->  sdpa(q, k, v, enable_gqa)

A cache of keys and values is then read as it is, not copied once per query head at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.dataflow import is_move

aten = torch.ops.aten


def before_groups(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Keys and values [.., H, S, E] that this attention's own [.., H r, S, E] repeat, head h from head h // r; None where they don't."""
    if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa") or len(node.args) > 7:
        return None
    key, value = _repeated(node.args[1]), _repeated(node.args[2])
    if key is None or value is None or key.meta["val"].shape[-3] != value.meta["val"].shape[-3]:
        return None
    return key, value


def _repeated(value: Any) -> fx.Node | None:
    wide = _past_slices(value.args[0]) if value.target in (aten.reshape.default, aten.view.default) else None
    narrow = _past_slices(wide.args[0]) if wide is not None and wide.target is aten.expand.default else None
    if wide is None or narrow is None or narrow.target is not aten.unsqueeze.default:
        return None
    source: fx.Node = _past_slices(narrow.all_input_nodes[0])
    *batch, heads, length, width = source.meta["val"].shape
    shapes = [tuple(n.meta["val"].shape) for n in (narrow, wide, value)]
    groups = shapes[1][-3] if len(shapes[1]) == len(batch) + 4 else None
    if not isinstance(heads, int) or not isinstance(groups, int):
        return None
    told = [(*batch, heads, n, length, width) for n in (1, groups)] + [(*batch, heads * groups, length, width)]
    return source if all(_equal(a, b) for a, b in zip(shapes, told, strict=True)) else None


def _past_slices(value: Any) -> Any:
    """The value before slices that take everything, and other moves that leave its shape."""
    while is_move(value) and _equal(value.meta["val"].shape, value.all_input_nodes[0].meta["val"].shape) and _keeps_order(value):
        value = value.all_input_nodes[0]
    return value


def _keeps_order(move: fx.Node) -> bool:
    packet = getattr(move.target, "overloadpacket", None)
    return packet in (aten.slice, aten.clone, aten.contiguous, aten.to, aten._to_copy, aten.expand, aten.reshape, aten.view)


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are the same, symbols by name: asking whether they are equal could put a condition on the program's sizes."""
    return [str(n) for n in a] == [str(n) for n in b]
