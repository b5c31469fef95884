"""Axes that are merged, moved and parted again are never merged: what differs along one of them stays told apart.

    reshape to [L, B H, d], transpose to [B H, L, d], reshape to [B, H, L, d]    =    reshape to [L, B, H, d], permute to [B, H, L, d]

Done at capture where the merged size is dynamic: which positions of it are which head's can't be said by numbers then, and no fold could pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.edit import op_node
from fxcompress.transport.facts import Groups, Shape, grouped, sizes

aten = torch.ops.aten
MOVES = (aten.permute.default, aten.transpose.int)


def keep_apart(graph: fx.Graph) -> None:
    """Rewrite every such chain, in place."""
    for node in list(graph.nodes):
        order, source = _moved(node.args[0] if node.target is aten.reshape.default else None)
        if source is None or source.target is not aten.reshape.default or not isinstance(order, list):
            continue
        before, after = sizes(node.args[0].meta["val"]), sizes(node.meta["val"])
        groups = grouped(before, after)
        if _is_parting(groups, before, len(after)):
            _rewrite(graph, node, source.args[0], order, {mine[0]: theirs for mine, theirs in groups})


def _moved(node: Any) -> tuple[list[int] | None, fx.Node | None]:
    """(per axis that of what was moved, what was moved) behind permutations; (None, None) if there is none."""
    order: list[int] | None = None
    while isinstance(node, fx.Node) and node.target in MOVES:
        rank = node.meta["val"].dim()
        own = list(range(rank))
        if node.target is aten.permute.default:
            own = [a % rank for a in node.args[1]]  # type: ignore[union-attr]
        else:
            a, b = (int(d) % rank for d in node.args[1:])  # type: ignore[arg-type]
            own[a], own[b] = b, a
        order = own if order is None else [own[a] for a in order]
        node = node.args[0]
    return order, node if isinstance(node, fx.Node) else None


def _is_parting(groups: Groups, before: Shape, rank: int) -> bool:
    """Whether single axes are parted, one of them of a dynamic size, and nothing else happens."""
    is_split = all(len(mine) == 1 for mine, _ in groups) and len(groups) == len(before)
    is_whole = sum(len(theirs) for _, theirs in groups) == rank
    return is_split and is_whole and any(len(theirs) > 1 and not isinstance(before[mine[0]], int) for mine, theirs in groups)


def _rewrite(graph: fx.Graph, node: fx.Node, source: Any, order: list[int], parts: dict[int, list[int]]) -> None:
    """order: per axis of the moved value that of the merged one; parts: per axis of the moved value those of the result."""
    written: Any = node.args[1]
    laid = [axis for merged in range(len(order)) for axis in parts[order.index(merged)]]
    with graph.inserting_before(node):
        apart = op_node(graph, node, aten.reshape.default, source, [written[a] for a in laid])
        moved = op_node(graph, node, aten.permute.default, apart, [laid.index(a) for a in range(len(laid))])
    node.replace_all_uses_with(moved)
    graph.erase_node(node)
