"""Weights as integers or 8-bit floats, activations as they are.

    W -> dequantize(quantize(W)),  W_q = clip(round(W / s) + z),  W ≈ (W_q - z) s,  s and z per tensor, channel or group

A site is a constant that only multiplies (linear, matmul, convolution) or is gathered from (embedding), found from its readers through views
of it; a table tied to an output head is one site with two readers. Round to nearest; the range of each block is searched for the least
squared error. Costs the noise of the format: the contract asks for the SQNR of an ideal quantiser on the measured range, less 3 dB.
Source: A Survey of Low-bit Large Language Models (arXiv 2409.16694), basics and round-to-nearest.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, fx

from fxcompress.contract import LOSS, Bounded
from fxcompress.dataflow import WeightUse, contracts_unopened, weight_uses
from fxcompress.edit import Edit
from fxcompress.errors import RecipeError
from fxcompress.numerics.blocks import Block, block_of
from fxcompress.numerics.formats import Format, format_of
from fxcompress.numerics.ranges import minmax_range, mse_range, quantisation_error
from fxcompress.passes.quant.grids import insert_pair
from fxcompress.rewrite import Context, Match, Options, Reject, Rewrite


class WeightOnlyOptions(Options):
    """weights: "format/granularity", as in int4/group:32, int8/channel, float8_e4m3fn/tensor. embeddings: the same for constants that are
    gathered from, those tied to a head too; left out, they follow `weights`. symmetric: no zero points. range: how each block's range is found.
    storage: whether weights are quantised too where the target has no kernel for them and computes in float: only the file gets smaller.
    """

    weights: str = "int8/channel"
    embeddings: str | None = None
    symmetric: bool = Field(default=True, validate_default=True)
    range: Literal["minmax", "mse"] = "mse"
    storage: bool = False

    @field_validator("weights", "embeddings")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                format, granularity = parse(value)
            except RecipeError as error:
                raise ValueError(f"{error.what}; {error.why or error.do}") from None
            if format.bits > 8:
                raise ValueError(f"codes of {format} are wider than a byte and can't be packed")
            if format.kind == "log":
                raise ValueError(f"{format} holds nothing below 0: softmax.adaptive has it for probabilities")
            if granularity == "token":
                raise ValueError("a weight has no tokens; one of tensor, channel, group:64")
        return value

    @field_validator("symmetric")
    @classmethod
    def _is_held(cls, value: bool, info: ValidationInfo) -> bool:
        for text in filter(None, (info.data.get("weights"), info.data.get("embeddings"))):
            format = parse(text)[0]
            if value and not format.signed:
                raise ValueError(f"{format} holds nothing below 0 without zero points; say symmetric: false")
            if not value and format.kind == "float":
                raise ValueError(f"{format} has no zero points; say symmetric: true")
        return value


class WeightOnly(Rewrite):
    """Quantise every legal weight the recipe admits."""

    name = "quant.weight_only"
    contract = Bounded()
    Options = WeightOnlyOptions
    targets = ("get_attr",)
    gives = frozenset({"quantised"})
    excludes = frozenset({"finalised"})

    def match(self, node: fx.Node, on: Context) -> Match | Reject | None:
        """A float constant of two axes or more whose readers all use it as a weight along the same axes."""
        tensor = on.program.constants[str(node.target)]
        if not tensor.is_floating_point() or tensor.dim() < 2:
            return None
        uses, others = weight_uses(node, tensor)
        if not uses:
            reader = next((r for r in others if contracts_unopened(r)), None)
            return Reject("{} is multiplied inside {}, where its axes aren't known", node, reader) if reader is not None else None
        if others:
            return Reject("{} is also read by {}, not as a weight", node, others[0])
        if not tensor.any():
            return Reject("{} is all zeros", node)
        if len({(u.contraction, u.channel) for u in uses}) > 1:
            return Reject("{} is summed over different axes by {} and {}", node, uses[0].node, uses[-1].node)
        format, granularity = parse(self._asked(uses))
        block = block_for(granularity, tensor, uses[0])
        if reason := self._no_kernel(uses, format, block, tensor, on):
            return Reject("{}: {}", node, reason)
        return Match(uses[0].node, places=[u.node for u in uses], leaf=node, tensor=tensor, format=format, block=block)

    def _asked(self, uses: list[WeightUse]) -> str:
        gathered = any(u.family == "embedding" for u in uses)
        return str((gathered and self.options.embeddings) or self.options.weights)

    def _no_kernel(self, uses: list[WeightUse], format: Format, block: Block, tensor: Tensor, on: Context) -> str | None:
        if on.target.kernels is not None and tensor.dtype == torch.float64:
            return f"{on.target.name}'s n-bit kernels compute in float32, the weight is float64"
        if self.options.storage:
            return None
        size = block[uses[0].contraction]
        group = size if size > 1 else None
        refusals = (on.target.refusal(u.family, format, group, tensor.shape[u.contraction], self.options.symmetric) for u in uses)
        return next((r for r in refusals if r), None)

    def apply(self, match: Any, edit: Edit) -> None:
        """Insert the pair before the constant's first reader, so that its value lives no longer than it must; every reader reads the pair."""
        search = mse_range if self.options.range == "mse" else minmax_range
        scale, zero = search(match.tensor, match.format, self.options.symmetric, match.block)
        leaf, name = match.leaf, str(match.leaf.target)
        with edit.site(match.node, f"{match.format.name} in blocks of {list(match.block)}"):
            at = {"like": match.node, "before": min(leaf.users)}
            scale_node = edit.constant(f"{name}.scale", scale, **at)
            zero_node = None if zero is None else edit.constant(f"{name}.zero_point", zero, **at)
            pair = insert_pair(edit, leaf, scale_node, zero_node, match.format, match.block, **at)
            if self.options.range == "mse":
                pair.meta[LOSS] = quantisation_error(match.tensor, scale, zero, match.format, match.block)
            edit.replace(leaf, pair)


def parse(text: str) -> tuple[Format, str]:
    """("int4/group:32") -> format and granularity; the granularity left out means channel. RecipeError if either is unknown."""
    name, _, granularity = text.partition("/")
    block_of(granularity or "channel", (1, 1))
    return format_of(name), granularity or "channel"


def block_for(granularity: str, tensor: Tensor, use: WeightUse) -> Block:
    """The block of a weight: one scale for everything summed over, cut into groups along the contraction axis if the granularity says so.

    tensor: one scale in all. A convolution's kernel window always belongs to one block.
    """
    if granularity == "tensor":
        return (-1,) * tensor.dim()
    along = block_of(granularity, tensor.shape, group_axis=use.contraction)[use.contraction] if granularity.startswith("group") else -1
    return tuple(along if a == use.contraction else -1 if a in use.window else 1 for a in range(tensor.dim()))
