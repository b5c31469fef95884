"""Who is compared with whom when an open edit is checked: each new value, what it is computed from, and the old value it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from fxcompress.dataflow import ancestors
from fxcompress.edit import Edit, Site, Step

CONE = 64  # nodes between operands and an old value that is computed anew


@dataclass(frozen=True)
class Pair:
    """One comparison: the new node's value, computed from `frontier`, against the old node's. role "constant": the tensor stored now against
    the old one under its record; "end": an input's or output's old value under its record against itself."""

    site: Site
    old: fx.Node
    new: fx.Node
    frontier: dict[fx.Node, fx.Node]
    role: Literal["value", "constant", "end"] = "value"

    @property
    def is_alone(self) -> bool:
        """Whether the new value is computed from the old one and nothing else."""
        return set(self.frontier.values()) == {self.old}

    @property
    def needed(self) -> set[fx.Node]:
        """The old nodes whose values the comparison takes."""
        return {self.old, *self.frontier.values()}


class Pairs:
    """The old and the new graph of an open edit, side by side. steps: the old nodes as they were; carried: nodes that only carry changes."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.steps = {s.node: s for s in edit.before}
        self.position = {s.node: i for i, s in enumerate(edit.before)}
        self.touched = {n for site in edit.sites for n in site.touched}
        self.carried = _first_sites(edit, self.touched)
        self._origin = self._origins()

    def __iter__(self) -> Iterator[Pair]:
        """Every comparison there is to make."""
        gone = {old for site in self.edit.sites for old in site.replaced if not old.users}
        for site in self.edit.sites:
            touched = (n for n in site.touched if n not in self.edit.loose and n not in gone)
            for old, new in [*site.replaced.items(), *((n, n) for n in touched)]:
                if old in self.steps or old in self._origin:
                    yield Pair(site, self._root(old), new, self._frontier(new))
        for node, site in self.carried.items():
            yield Pair(site, node, node, self._frontier(node))
        for old, new in self._ends():
            if changed := [n for n in (new, old) if n in self.edit.changes or n in self.edit.loose]:
                yield Pair(self._site_of(changed[0]), old, changed[0], {}, "end")
        for leaf in (n for n in self.edit.changes if n.op == "get_attr" and n in self.steps):
            yield Pair(next(s for s in self.edit.sites if str(leaf.target) in s.constants), leaf, leaf, {}, "constant")

    def is_old(self, node: fx.Node) -> bool:
        """Whether the node computes what it did, from what it did."""
        return node in self.steps and node not in self.touched and node not in self.carried

    def before(self, wanted: Iterable[fx.Node]) -> list[Step]:
        """The old nodes that these depend on, in order."""
        needed = ancestors(wanted, lambda n: self.steps[n].inputs)
        return [s for s in self.edit.before if s.node in needed]

    def cone(self, pair: Pair) -> list[Step] | None:
        """The steps from the new value's operands to the old value, in order; None if there is another way to it, or it is long."""
        roots, found, stack = set(pair.frontier.values()), dict[fx.Node, None](), [pair.old]
        if pair.old in roots:
            return None
        while stack:
            node = stack.pop()
            if node.op == "placeholder" or len(found) > CONE:
                return None
            found[node] = None
            stack += [n for n in self.steps[node].inputs if n not in roots and n not in found]
        return [self.steps[n] for n in sorted(found, key=self.position.__getitem__)]

    def _ends(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Inputs and outputs: the old value, and the node that stands for it now."""
        inputs = [n for n in self.steps if n.op == "placeholder"]
        yield from zip(inputs, inputs, strict=True)
        yield from zip(self.edit.before[-1].args[0], self.edit.program.results(), strict=True)

    def _site_of(self, carrier: fx.Node) -> Site:
        """The site that recorded a change of this value."""
        return next(s for s in self.edit.sites if not {carrier, *carrier.users}.isdisjoint(s.carried))

    def _origins(self) -> dict[fx.Node, fx.Node]:
        """New node -> the old node whose value it stands for. What replaces a helper node of another site stands for none."""
        origin: dict[fx.Node, fx.Node] = {}
        for old, new in ((old, new) for site in self.edit.sites for old, new in site.replaced.items()):
            if new not in self.steps and (old in self.steps or old in origin):
                origin[new] = old
        return origin

    def _root(self, node: fx.Node) -> fx.Node:
        """The old value a node stands for: itself, or what it replaced, through earlier sites of this edit."""
        while node not in self.steps:
            node = self._origin[node]
        return node

    def _frontier(self, new: fx.Node) -> dict[fx.Node, fx.Node]:
        """The nodes whose OLD values the new node is computed from, each with the old node it stands for. Constants are read anew."""
        if self.is_old(new):
            return {new: new}
        found: dict[fx.Node, fx.Node] = {}
        seen: set[fx.Node] = set()
        stack = list(new.all_input_nodes)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._origin or (node in self.steps and node.op != "get_attr" and node not in self.edit.loose):
                found[node] = self._root(node)
            else:
                stack.extend(node.all_input_nodes)
        return found


def _first_sites(edit: Edit, touched: set[fx.Node]) -> dict[fx.Node, Site]:
    """Nodes that only carry changes, each with the first site that says so."""
    found: dict[fx.Node, Site] = {}
    old_nodes = {step.node for step in edit.before}
    gone = {old for site in edit.sites for old in site.replaced}
    for site in edit.sites:
        for node in site.carried:
            if node in old_nodes and node not in touched and node not in gone and node not in edit.loose:
                found.setdefault(node, site)
    return found
