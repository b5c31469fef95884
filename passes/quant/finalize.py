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
from fxcompress.dataflow import is_constant
from fxcompress.edit import Edit
from fxcompress.interpret import constant_value
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
    whole = "codes are stored for every quantised weight or the program can't run: leave the place out of the pass that quantised it"

    def match(self, node: fx.Node, on: Context) -> Match | None:
        """A quantiser of a constant; one of an activation stays in the graph."""
        if on.constant(node.args[0]) is None or not is_constant(node):
            return None
        return Match(node, codes=constant_value(node, on.program.constants))

    def apply(self, match: Any, edit: Edit) -> None:
        """Packed codes take the quantiser's place, codes wider than a byte as they are. A computed scale becomes a constant."""
        node, name = match.node, str(match.node.args[0].target)
        format, scale = format_of(node.args[3]), node.args[1]
        with edit.site(node, f"{match.codes.numel()} codes of {format.bits} bits"):
            if scale.op != "get_attr":
                known = constant_value(scale, edit.program.constants).contiguous()
                edit.replace(scale, edit.constant(f"{name}.scale", known, like=node, before=node))
            if format.bits > 8:
                edit.replace(node, edit.constant(f"{name}.codes", match.codes, like=node))
                return
            packed = edit.constant(f"{name}.packed", pack(match.codes, format), like=node)
            size = match.codes.shape[-1]
            edit.replace(node, edit.insert(torch.ops.fxc.unpack.default, packed, format.name, size, like=node, val=node.meta["val"]))
