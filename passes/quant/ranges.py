"""The grid of a static activation quantiser is chosen again, from the values that reach it now.

    s, z  <-  argmin over [lo, hi] of the method's loss on the histogram of x

Ranges chosen on the float model are a little off once everything before is quantised; and one place may ask for another method than the rest
(`where`). The method is that of quant.insert: minmax, mse, entropy or percentile:99.99. Lossy by nature: clipping is the point. Costs nothing.
Source: Nagel et al., A White Paper on Neural Network Quantization (arXiv 2106.08295), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import field_validator
from torch import Tensor, fx

from fxcompress.calibrate.observers import Distribution
from fxcompress.contract import Lossy
from fxcompress.edit import Edit
from fxcompress.numerics.formats import format_of
from fxcompress.passes.quant.grids import check_method, grid_of
from fxcompress.rewrite import Context, Options, Reject, Transform


class RangesOptions(Options):
    """method: minmax, mse, entropy or percentile:99.99."""

    method: str = "mse"

    @field_validator("method")
    @classmethod
    def _is_method(cls, value: str) -> str:
        return check_method(value)


class Ranges(Transform):
    """Choose the grid of every static activation quantiser again."""

    name = "quant.ranges"
    contract = Lossy()
    Options = RangesOptions
    needs = frozenset({"quantised"})
    excludes = frozenset({"finalised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site a quantiser."""
        pairs = [n for n in on.program.graph.nodes if _is_static(n, on)]
        pairs = [n for n in pairs if on.admits(n) or any(on.admits(u) for d in n.users for u in d.users)]
        answers = on.observe((n.args[0], Distribution()) for n in pairs)
        declined: dict[str, Reject] = {}
        for node in pairs:
            value, scale, zero, format, _ = node.args
            grid = grid_of(value, answers[value, Distribution()], format_of(format), self.options.method, self.name)
            if isinstance(grid, Reject):
                declined[node.name] = grid
                continue
            with edit.site(node, f"{float(grid.lo):.4g} to {float(grid.hi):.4g}") as site:
                site.places = [node, *(u for d in node.users for u in d.users)]
                _store(scale, grid.scale, edit)
                if zero is not None and grid.zero_point is not None:
                    _store(zero, grid.zero_point, edit)
        return declined


def _store(constant: fx.Node, chosen: Tensor, edit: Edit) -> None:
    new = chosen.reshape(constant.meta["val"].shape)
    edit.carry(constant, lambda _: new)  # to be checked against what is stored: the contract puts no limit to what readers make of it
    edit.fold(constant, new)


def _is_static(node: fx.Node, on: Context) -> bool:
    """Whether a node quantises an activation with one constant scale of its own; the scale of a log format is no range."""
    if node.target is not torch.ops.fxc.quantize.default or node.args[0].op == "get_attr":  # type: ignore[union-attr]
        return False
    if format_of(str(node.args[3])).kind == "log":
        return False
    scale = on.constant(node.args[1])
    shared = [u for u in node.args[1].users if u.target is node.target and u is not node]  # type: ignore[union-attr]
    return scale is not None and scale.numel() == 1 and not shared
