"""Attention as one op is opened into the products and the softmax inside.

    attention(Q, K, V) -> softmax(Q K^T c + M) V,    c = 1 / sqrt(head size) or as given

For passes that need the softmax or the scores; run it only before one. A boolean mask puts -inf where it is False, a float mask is added, a
causal one keeps column j <= row i, both counted from 0 whatever the two lengths are. A row with nothing but -inf gives 0, as in torch, so
probabilities are set to 0 once more under a mask. Heads shared by several queries are repeated. Legal without dropout. Exact but for rounding.
Costs memory: the scores, heads x queries x keys, which fused kernels never store.
Source: the reference implementation in the documentation of torch.nn.functional.scaled_dot_product_attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.passes.tidy.forms import reader_of_layout
from fxcompress.passes.tidy.schema import arguments
from fxcompress.rewrite import Context, Match, Reject, Rewrite

aten = torch.ops.aten


class OpenAttention(Rewrite):
    """Replace scaled_dot_product_attention by its definition."""

    name = "tidy.open_attention"
    contract = Exact()
    targets = (aten.scaled_dot_product_attention.default,)
    gives = frozenset({"opened"})

    def match(self, node: fx.Node, on: Context) -> Match | Reject:
        """Any call without dropout whose scale and head counts are numbers."""
        given = arguments(node)
        query, mask = given["query"].meta["val"], given["attn_mask"]
        if given["dropout_p"]:
            return Reject("{} drops at random in every call, with p = {}", node, given["dropout_p"])
        if given["scale"] is None and not isinstance(query.shape[-1], int):
            return Reject("{} scales by a head size that is dynamic", node)
        if mask is not None and given["is_causal"]:
            return Reject("{} is causal and has the mask {}, which its definition excludes", node, mask)
        if mask is not None and mask.meta["val"].dtype not in (torch.bool, query.dtype):
            return Reject("{} adds a mask of {} to scores of {}", node, mask.meta["val"].dtype, query.dtype)
        if reader := reader_of_layout(node):
            return Reject("{} lays its result out otherwise in memory, and {} may depend on that", node, reader)
        repeats = [_repeats(query, given[k].meta["val"]) if given["enable_gqa"] else 1 for k in ("key", "value")]
        if None in repeats:
            return Reject("{} shares a number of heads that is dynamic", node)
        return Match(node, given=given, scale=scale_of(given), repeats=repeats)

    def apply(self, match: Any, edit: Edit) -> None:
        """Its readers read the result of the definition."""
        with edit.site(match.node, "opened"):
            edit.replace(match.node, inserted(match, edit))


def inserted(match: Any, edit: Edit, held: Callable[[fx.Node], fx.Node] = lambda probabilities: probabilities) -> fx.Node:
    """The products, the mask and the softmax of a match, inserted at the open site; the last product. held: what it reads in place of the
    probabilities."""
    given, op = match.given, partial(edit.insert, like=match.node)
    key, value = (_repeated(given[k], n, op) for k, n in zip(("key", "value"), match.repeats, strict=True))
    scores = op(aten.matmul.default, given["query"], op(aten.transpose.int, key, -2, -1))
    if match.scale != 1:
        scores = op(aten.mul.Tensor, scores, match.scale)
    return op(aten.matmul.default, held(_softmax(scores, given, op)), value)


def scale_of(given: dict[str, Any]) -> float:
    """c: as given, or 1 / sqrt(head size)."""
    return float(given["scale"]) if given["scale"] is not None else 1 / math.sqrt(given["query"].meta["val"].shape[-1])


def causal_mask(query: fx.Node, key: fx.Node, op: Any) -> fx.Node:
    """[queries, keys], True where key j <= query i."""
    sizes = [_size(query, op), _size(key, op)]
    ones = op(aten.ones.default, sizes, dtype=torch.bool, device=query.meta["val"].device)
    mask: fx.Node = op(aten.tril.default, ones)
    return mask


def _softmax(scores: fx.Node, given: dict[str, Any], op: Any) -> fx.Node:
    """Masked scores to probabilities."""
    mask = causal_mask(given["query"], given["key"], op) if given["is_causal"] else given["attn_mask"]
    if mask is None:
        return op(aten.softmax.int, scores, -1)  # type: ignore[no-any-return]
    if mask.meta["val"].dtype == torch.bool:
        scores, kept = op(aten.where.ScalarOther, mask, scores, -math.inf), mask
    else:
        scores, kept = op(aten.add.Tensor, scores, mask), op(aten.gt.Scalar, mask, -math.inf)
    probabilities = op(aten.softmax.int, scores, -1)
    return probabilities if given["is_causal"] else op(aten.where.ScalarOther, kept, probabilities, 0.0)  # type: ignore[no-any-return]


def _size(node: fx.Node, op: Any) -> Any:
    """The length of the axis before the last: a number, or a node where it is dynamic."""
    value = node.meta["val"]
    size, axis = value.shape[-2], value.dim() - 2
    return size if isinstance(size, int) else op(aten.sym_size.int, node, axis, val=size)


def _repeats(query: Any, value: Any) -> int | None:
    """How many query heads share one head of the value; None if that is no number."""
    heads, shared = query.shape[-3], value.shape[-3]
    return heads // shared if isinstance(heads, int) and isinstance(shared, int) else None


def _repeated(node: fx.Node, times: int, op: Any) -> fx.Node:
    return node if times == 1 else op(aten.repeat_interleave.self_int, node, times, node.meta["val"].dim() - 3)
