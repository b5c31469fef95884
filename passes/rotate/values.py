"""Where values are weighed: attention, whole or spelled out in any way, and whatever else multiplies two activations before a layer.

A product is linear in either factor, so the channels that one of them hands on to a layer may turn there, whatever makes the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fxcompress.passes.norms import CASTS
from fxcompress.transport import Kind, Seed, Transport
from fxcompress.transport.facts import Facts
from fxcompress.transport.relations import relate
from fxcompress.transport.relations.contractions import Port, Product, products_of
from fxcompress.transport.solver import Solver

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.einsum.default)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
ATTENTION = aten.scaled_dot_product_attention.default


def weighings(engine: Transport) -> Iterator[tuple[fx.Node, list[Seed]]]:
    """Every op that weighs values, with the values: the channels of one factor, or of the other. Of attention and of a product with a softmax
    it is known which; else it is what reaches a layer."""
    facts = engine.facts
    for node in facts.program.graph.nodes:
        if node.target is ATTENTION:
            found = _seeds(facts, node.args[2], range(_rank(facts, node.args[2]) - 2), [-1])
        elif node.target in PRODUCTS:
            found = [s for product in _varying(facts, node) for s in _of_product(facts, product)]
        else:
            continue
        if found:
            yield node, found


def _of_product(facts: Facts, product: Product) -> Iterator[Seed]:
    """The second factor's channels, then the first's."""
    result = products_of(facts, product.node)[-1].out.letters
    for port, other in ((product.b, product.a), (product.a, product.b)):
        free = product.free(port) & set(result)
        if isinstance(port.node, fx.Node) and free:
            batch = [port.letters.index(x) for x in product.roles["batch"]]
            handed = [result.index(x) for x in free]
            if (port is product.b and _is_softmax(other.node)) or _reaches_layer(facts, product.node, handed):
                yield from _seeds(facts, port.node, batch, [port.letters.index(x) for x in free])


def _seeds(facts: Facts, value: Any, batch: Iterable[int], channels: Iterable[int]) -> list[Seed]:
    """The channels of a value, apart for each head, as far as sizes are known; none if it has one channel."""
    shape = facts.shape(value) or ()
    known = [[a % len(shape) for a in axes if isinstance(shape[a], int) and shape[a] > 1] for axes in (batch, channels)]
    return [Seed(value, tuple(sorted(known[0] + known[1])))] if known[1] else []


def _reaches_layer(facts: Facts, node: fx.Node, axes: list[int]) -> bool:
    """Whether some layer sums over these axes of a result before it is multiplied by another activation: what moves along them goes there."""
    found = Solver(facts, Kind.PERMUTE, is_open=True)
    for seed in _seeds(facts, node, (), axes):
        found.seed(seed)
    ahead = set(node.users)
    for at in found.pending():
        if at in ahead and at.target is not ATTENTION and not _varying(facts, at):
            relate(found, at)
            ahead.update(at.users)
    return any(_is_summed(found, at) for at in ahead if not _varying(facts, at))


def _is_summed(labels: Solver, node: fx.Node) -> bool:
    """Whether the op is a layer that sums over labelled channels of its input."""
    return any(_varies(labels, port, product.roles["summed"]) for product in products_of(labels.facts, node) for port in (product.a, product.b))


def _varies(labels: Solver, port: Port, letters: frozenset[str]) -> bool:
    return any(n > 1 and letter in letters for label in port.read(labels) for letter, n in zip(port.letters, label.index.shape, strict=True))


def _varying(facts: Facts, node: fx.Node) -> list[Product]:
    """The products of the op whose factors both vary with the inputs, or whose first is a softmax."""
    products = products_of(facts, node)
    return [p for p in products if not facts.is_constant(p.b.node) and (not facts.is_constant(p.a.node) or _is_softmax(p.a.node))]


def _is_softmax(weights: Any) -> bool:
    while isinstance(weights, fx.Node) and weights.target in (*CASTS, aten.dropout.default):
        weights = weights.args[0]
    return isinstance(weights, fx.Node) and weights.target in SOFTMAX


def _rank(facts: Facts, value: Any) -> int:
    return len(facts.shape(value) or ())
