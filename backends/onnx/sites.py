"""The quantised sites of a program, which a report counts: readers of quantised constants, products of dequantised activations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx

from fxcompress.backends.onnx.outline import DEQUANTIZE, QUANTIZE, Outline, arguments, outline
from fxcompress.dataflow import before_moves, weight_uses
from fxcompress.numerics.formats import format_of
from fxcompress.program import Program


def quantised_sites(program: Program, work: Mapping[fx.Node, int]) -> list[fx.Node]:
    """Readers of quantised constants, and ops that multiply dequantised activations. work: multiply-accumulates of each node."""
    outlined = outline(program)
    sites = readers_of_codes(outlined) | {n for n in outlined.nodes if work[n] and reads_codes(n)}
    return [n for n in outlined.nodes if n in sites]


def readers_of_codes(outlined: Outline) -> set[fx.Node]:
    """What reads a quantised constant, through its views."""
    places = {place: outlined.leaves[index] for place, index in outlined.places.items()}
    return {n for place, leaf in places.items() if leaf.quantised is not None for n in readers(place, leaf.shape)}


def readers(place: fx.Node, shape: tuple[int, ...]) -> list[fx.Node]:
    """What reads a constant of this shape, through its views."""
    uses, others = weight_uses(place, torch.empty(shape, device="meta"))
    return [*(u.node for u in uses), *others]


def reads_codes(node: fx.Node) -> bool:
    """Whether an operand is a dequantised activation."""
    return any(_is_dequantised(a) for a in node.all_input_nodes)


def in_logs(node: fx.Node) -> str | None:
    """Why no integer kernel runs an op that reads codes of a log format; None for others."""
    values = (before_moves(a) for a in node.all_input_nodes)
    name = next((n for v in values if v.target is DEQUANTIZE and format_of(n := str(arguments(v)["format"])).kind == "log"), None)
    return name and f"codes of {name} are multiplied as the numbers they mean"


def share(part: Iterable[fx.Node], whole: Collection[fx.Node], work: Mapping[fx.Node, int]) -> float | None:
    """Of the multiply-accumulates of the whole, those of the part; None where there are none."""
    total = sum(work[n] for n in whole)
    return sum(work[n] for n in part) / total if total else None


def _is_dequantised(value: fx.Node) -> bool:
    """Whether a value is codes, dequantised and moved at most; constants are not asked about."""
    value = before_moves(value)
    return value.target is DEQUANTIZE and arguments(value)["codes"].target is QUANTIZE
