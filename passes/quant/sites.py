"""Where a program multiplies: the sites a quantiser of activations is for, found by what each op contracts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxcompress.dataflow import WEIGHT_ARGUMENTS, decided_by_inputs, is_move, is_transposed, pads_with_zeros
from fxcompress.program import Program
from fxcompress.target import SiteFamily

aten = torch.ops.aten
CLAMPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
PARTS = (aten.slice.Tensor, aten.select.int)  # their operand holds more numbers, and may have another range
POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
SUMMED = (aten.addmm.default, aten.baddbmm.default)  # the first argument is added, the next two are multiplied


@dataclass(frozen=True)
class MatmulSite:
    """One op that contracts. family: "linear", "conv" and "transposed" (convolutions) multiply an activation by a constant, "product" two
    activations.

    activations: the operands that an input decides, by argument position.
    """

    node: fx.Node
    family: SiteFamily
    activations: dict[int, fx.Node]


def matmul_sites(program: Program) -> Iterator[MatmulSite]:
    """Every linear, convolution and matrix product that multiplies at least one activation, in order."""
    decided = decided_by_inputs(program)
    for node in program.graph.nodes:
        entry = WEIGHT_ARGUMENTS.get(node.target) if node.op == "call_function" else None
        if entry is None or entry[0] == "embedding":
            continue
        family: SiteFamily = "transposed" if entry[0] == "conv" and is_transposed(node) else entry[0]
        positions = (1, 2) if node.target in SUMMED else (0, 1)
        found = {i: node.args[i] for i in positions if node.args[i] in decided}
        if found:
            yield MatmulSite(node, "product" if len(found) == 2 else family, found)


def summed_axis(site: MatmulSite) -> int:
    """The axis of a layer's input that it sums over: a convolution's channels, else the last one, or the last but one of a right factor."""
    if site.family in ("conv", "transposed"):
        return 1
    is_right = next(iter(site.activations)) == (2 if site.node.target in SUMMED else 1) and site.node.target is not aten.linear.default
    return -2 if is_right else -1


def source_of(value: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The value before the ops that only move its numbers to this one reader, and the first of these, which reads it.

    A convolution takes the zeros around its windows in by itself, so the value is that before them.
    """
    if WEIGHT_ARGUMENTS.get(reader.target, ("",))[0] == "conv" and _pads_windows(value) and len(value.users) == 1:
        value, reader = value.all_input_nodes[0], value
    while is_move(value) and value.target not in PARTS and len(value.users) == 1:
        value, reader = value.all_input_nodes[0], value
    return value, reader


def _pads_windows(value: fx.Node) -> bool:
    return pads_with_zeros(value) and len(value.args[1]) <= 2 * (value.meta["val"].dim() - 2)  # type: ignore[arg-type]


def result_of(node: fx.Node) -> fx.Node:
    """Where the result of a site is read: behind the relu or clamp that is its only reader, else the node itself."""
    reader = next(iter(node.users)) if len(node.users) == 1 else node
    return reader if reader.target in CLAMPS else node
