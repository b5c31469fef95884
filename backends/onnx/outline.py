"""A program as a translator sees it: the ops that matter, in order, and its constants reduced to leaves.

A leaf is a dense constant, or a whole `fxc::dequantize(fxc::unpack(codes), scale, zero_point)` of constants. Recipes of one model mostly
differ in leaves alone, so two outlines of equal `fingerprint` share one translation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import fxcompress.ops  # noqa: F401 - registers the fxc:: ops named below
from fxcompress.numerics.blocks import Block
from fxcompress.numerics.formats import Format, format_of
from fxcompress.program import Program

QUANTIZE = torch.ops.fxc.quantize.default
DEQUANTIZE = torch.ops.fxc.dequantize.default
UNPACK = torch.ops.fxc.unpack.default

SAME_OP: Mapping[Any, Any] = {  # the first has no translation, or asks for strides that a leaf doesn't have
    torch.ops.aten.__and__.Tensor: torch.ops.aten.bitwise_and.Tensor,
    torch.ops.aten.__or__.Tensor: torch.ops.aten.bitwise_or.Tensor,
    torch.ops.aten.__xor__.Tensor: torch.ops.aten.bitwise_xor.Tensor,
    torch.ops.aten.min.other: torch.ops.aten.minimum.default,
    torch.ops.aten.max.other: torch.ops.aten.maximum.default,
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
}


@dataclass(frozen=True)
class Quantised:
    """What makes a leaf's codes numbers: constants' names, format and block as in `numerics.affine.dequantize`."""

    scale: str
    zero_point: str | None
    format: Format
    block: Block
    packed: bool


@dataclass(frozen=True)
class Leaf:
    """A constant of the graph. name: of the dense tensor or of the codes; shape and dtype: those of the tensor the graph computes with."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    quantised: Quantised | None = None


@dataclass(frozen=True)
class Outline:
    """inputs: all placeholders. nodes: the ops the results need, in order. places: leaf number of each node that stands for a leaf."""

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    leaves: tuple[Leaf, ...]
    places: Mapping[fx.Node, int]
    results: tuple[fx.Node, ...]


def outline(program: Program) -> Outline:
    """The program's outline. Dead nodes are left out; equal constants under one name are one leaf."""
    needed = _needed(program)
    nodes = tuple(n for n, leaf in needed.items() if leaf is None)
    numbers: dict[Leaf, int] = {}  # by first reader: passes may put the constants anywhere before it
    read = (a for n in (*nodes, program.output_node) for a in n.all_input_nodes)
    places = {a: numbers.setdefault(leaf, len(numbers)) for a in read if (leaf := needed.get(a)) is not None}
    return Outline(tuple(program.placeholders()), nodes, tuple(numbers), places, program.results())


def fingerprint(outlined: Outline) -> str:
    """sha256 of everything a translation depends on: ops, wiring, arguments, and shape and dtype of inputs and leaves; no name, no value."""
    names = {n: f"%{i}" for i, n in enumerate(outlined.nodes)}
    names |= {n: f"${i}" for i, n in enumerate(outlined.inputs)}
    names |= {n: f"#{i}" for n, i in outlined.places.items()}
    lines = [f"{n.target} {_type(n)}" for n in outlined.inputs]
    lines += [f"{leaf.shape} {leaf.dtype}" for leaf in outlined.leaves]
    lines += [f"{SAME_OP.get(n.target, n.target)} {fx.node.map_arg((n.args, n.kwargs), names.__getitem__)}" for n in outlined.nodes]
    lines += [names[n] for n in outlined.results]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names in its op's schema, defaults left out."""
    schema = node.target._schema  # type: ignore[union-attr]
    return dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)


def _needed(program: Program) -> dict[fx.Node, Leaf | None]:
    wanted, leaves = set(program.results()), dict[fx.Node, Leaf | None]()
    for node in reversed(program.graph.nodes):
        if node in wanted and node.op != "placeholder":
            leaves[node] = _leaf(node, program)
            wanted.update(() if leaves[node] else node.all_input_nodes)
    return dict(reversed(leaves.items()))


def _leaf(node: fx.Node, program: Program) -> Leaf | None:
    value = program.constant(node)
    if value is not None:
        return Leaf(str(node.target), tuple(value.shape), value.dtype)
    return _quantised_leaf(node, program) if node.target is DEQUANTIZE else None


def _quantised_leaf(node: fx.Node, program: Program) -> Leaf | None:
    given = arguments(node)
    codes, packed = given["codes"], False
    if codes.target is UNPACK:
        inner = arguments(codes)
        codes, packed = inner["packed"], True
    parts = [codes, given["scale"], *([given["zero_point"]] if given.get("zero_point") is not None else [])]
    if any(part.op != "get_attr" for part in parts) or format_of(given["format"]).kind == "log":
        return None
    stored, scale = program.constants[str(codes.target)], program.constants[str(parts[1].target)]
    shape = (*stored.shape[:-1], int(inner["size"])) if packed else tuple(stored.shape)
    zero_point = str(parts[2].target) if len(parts) == 3 else None
    block = tuple(int(b) for b in given["block"])
    quantised = Quantised(str(parts[1].target), zero_point, format_of(given["format"]), block, packed)
    return Leaf(str(codes.target), shape, scale.dtype, quantised)


def _type(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype} {tuple(value.shape)}"
