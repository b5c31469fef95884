"""The integer program: weight-side quantisers are evaluated once and stored as packed codes of the true width.

    dequantize(quantize(W)) -> dequantize(unpack(packed))

Exact: the codes are the same integers, bit for bit. The float weight is no longer read and goes, so from here on a file's size is what its
bytes say. `verify` audits the result: codes in range, no quantiser of a constant left, two evaluations bit-identical.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.packing import pack
from fxcompress.rewrite import Context, Match, Rewrite


class Finalize(Rewrite):
    """Fold every quantiser of a constant into packed codes."""

    name = "quant.finalize"
    contract = Exact(limit=0.0)
    targets = (torch.ops.fxc.quantize.default,)
    needs = frozenset({"quantised"})
    gives = frozenset({"finalised"})

    def match(self, node: fx.Node, on: Context) -> Match | None:
        """A quantiser whose value, scale and zero point are constants; one of an activation stays in the graph."""
        operands = [on.constant(a) for a in node.all_input_nodes]
        if any(t is None for t in operands):
            return None
        return Match(node, codes=_codes(node, on))

    def apply(self, match: Any, edit: Edit) -> None:
        """Store the packed codes; the unpacked ones take the quantiser's place."""
        node, name = match.node, str(match.node.args[0].target)
        format = format_of(node.args[3])
        with edit.site(node, f"{match.codes.numel()} codes of {format.bits} bits"):
            if format.bits > 8:
                edit.replace(node, edit.constant(f"{name}.codes", match.codes, like=node))
                return
            packed = edit.constant(f"{name}.packed", pack(match.codes, format), like=node)
            size = match.codes.shape[-1]
            edit.replace(node, edit.insert(torch.ops.fxc.unpack.default, packed, format.name, size, like=node, val=node.meta["val"]))


def _codes(node: fx.Node, on: Context) -> torch.Tensor:
    args = [on.constant(a) if isinstance(a, fx.Node) else a for a in node.args]
    codes: torch.Tensor = torch.ops.fxc.quantize.default(*args)
    return codes
