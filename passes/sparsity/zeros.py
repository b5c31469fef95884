"""Where weights hold channels of zeros: of every product with a constant, whatever spells it, and of batch norms by their gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.interpret import constant_value
from fxcompress.transport import Seed
from fxcompress.transport.facts import Facts
from fxcompress.transport.relations.contractions import Port, products_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Zeroed:
    """node: the layer. value: what it reads, or its result; axes: where that has its channels. zeros: those whose weights are 0."""

    node: fx.Node
    value: fx.Node
    axes: tuple[int, ...]
    zeros: Tensor

    @property
    def seed(self) -> Seed:
        """A change of these channels."""
        return Seed(self.value, self.axes)


def zeroed(facts: Facts, node: fx.Node) -> Iterator[Zeroed]:
    """The layer's inputs, and its results, of which some channels meet zeros: those of all experts (heads, groups), then those of each."""
    found = (*_of_products(facts, node), *_of_norms(facts, node))
    return (z for z in found if z.zeros.any() and [facts.shape(z.value)[a] for a in z.axes] == [*z.zeros.shape])  # type: ignore[index]


def _of_products(facts: Facts, node: fx.Node) -> Iterator[Zeroed]:
    for product in products_of(facts, node):
        for weight, other in ((product.b, product.a), (product.a, product.b)):
            if (flags := _flags(facts, weight)) is None or facts.is_constant(other.node):
                continue
            sides = ((other, product.roles["summed"]), (product.out, product.free(weight)))
            for port, letters in ((port, letters) for port, letters in sides if isinstance(port.node, fx.Node)):
                together = [{letter} for letter in sorted(letters)]
                if port.split is None:
                    together += [t for t in ({*letters, *product.roles["batch"]},) if letters and len(t) > 1]
                for every in (sorted(t, key=port.letters.index) for t in together):
                    yield Zeroed(node, port.node, tuple(_axis(port, x) for x in every), _along(flags, weight, every))


def _flags(facts: Facts, port: Port) -> Tensor | None:
    """Where a weight is 0, with an axis per letter; of rows that are picked of a table, where all rows are. None for what is no weight."""
    node, constants = port.node, facts.program.constants
    if facts.is_constant(node):
        flags: Tensor = constant_value(node, constants) == 0
    elif isinstance(node, fx.Node) and (count := _picked(node)) and facts.is_constant(table := node.args[0]):
        flags = (constant_value(table, constants) == 0).flatten(0, count - 1).all(0)  # type: ignore[arg-type]
        flags = flags[(None,) * (len(port.letters) - flags.dim())]
    else:
        return None
    if port.split is None:
        return flags
    axis, groups = port.split
    return flags.reshape(*flags.shape[:axis], groups, -1, *flags.shape[axis + 1 :])


def _picked(node: fx.Node) -> int:
    """Along how many leading axes of a table the node picks rows; 0 for any other op."""
    if node.target is aten.index.Tensor:
        return 0 if None in node.args[1] else len(node.args[1])  # type: ignore[arg-type, operator]
    return int(node.target is aten.embedding.default or (node.target is aten.index_select.default and node.args[1] == 0))


def _along(flags: Tensor, port: Port, letters: Sequence[str]) -> Tensor:
    """Per channel, along these axes, whether all its weights are 0; channels in groups are counted through."""
    rest = [a for a, x in enumerate(port.letters) if x not in (*letters, "group")]
    zeros = flags.all(rest) if rest else flags
    kept = [x for x in port.letters if x in letters]
    return zeros.flatten() if port.split else zeros.permute([kept.index(x) for x in letters])


def _axis(port: Port, letter: str) -> int:
    return port.split[0] if port.split else port.letters.index(letter)


def _of_norms(facts: Facts, node: fx.Node) -> Iterator[Zeroed]:
    given: Any = facts.arguments(node) if node.target is aten.batch_norm.default else {}
    if facts.is_constant(given.get("weight")):
        yield Zeroed(node, node, (1,), constant_value(given["weight"], facts.program.constants) == 0)
