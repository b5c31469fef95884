"""What a step did to each node: added, removed, changed or moved; and which numbered blocks it did the same to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fxcompress.diff.matching import attributes
from fxcompress.history import Graph, Node

State = Literal["added", "removed", "changed", "moved"]
_NUMBERED = re.compile(r"(.*\.|)([0-9]+)", re.DOTALL)  # "layers.3", not "conv2"


def states(before: Graph, after: Graph, replaced: Mapping[str, str]) -> dict[str, State]:
    """The state of every node that isn't as it was; nodes in the order of the graph after, the removed ones where they stood.

    replaced: per value the one its readers read instead, so that a reader of the new one has not changed.
    """
    found = {name: state for name, node in merged(before, after).items() if (state := _state(node, before, after, replaced))}
    return found


def merged(before: Graph, after: Graph) -> dict[str, Node]:
    """The nodes of both graphs, those of the second where both have one; a removed node stands before what it stood before."""
    waiting: dict[str, Node] = {}
    gone: dict[str, dict[str, Node]] = {}
    for name, node in before.nodes.items():
        if name not in after.nodes:
            waiting[name] = node
        elif waiting:
            gone[name], waiting = waiting, {}
    if not gone:
        return {**after.nodes, **waiting}
    ordered: dict[str, Node] = {}
    for name, node in after.nodes.items():
        if name in gone:
            ordered.update(gone[name])
        ordered[name] = node
    return {**ordered, **waiting}


def _state(node: Node, before: Graph, after: Graph, replaced: Mapping[str, str]) -> State | None:
    old, new = before.nodes.get(node.name), after.nodes.get(node.name)
    if old is None or new is None:
        return "added" if old is None else "removed"
    if old is new:
        return None
    told_same = old.attributes == new.attributes or attributes(old) == attributes(new)
    if not told_same or (old.op, old.shape, old.revision, old.statistics) != (new.op, new.shape, new.revision, new.statistics):
        return "changed"
    if old.region != new.region and old.op != "constant":  # a constant stands where its readers are
        return "moved"
    reads_same = len(old.inputs) == len(new.inputs) and all(_stands(a, b, replaced) for a, b in zip(old.inputs, new.inputs, strict=True))
    return None if reads_same else "changed"


def _stands(old: str, new: str, replaced: Mapping[str, str]) -> bool:
    seen: set[str] = set()
    while old != new and old in replaced and old not in seen:
        seen.add(old)
        old = replaced[old]
    return old == new


def rewired(before: Graph, after: Graph, found: Mapping[str, State]) -> list[str]:
    """Nodes that are as they were and read another value, which stands for the one they read."""
    both = ((before.nodes[name], node) for name, node in after.nodes.items() if name in before.nodes and name not in found)
    return [new.name for old, new in both if old.inputs != new.inputs]


def alike(before: Graph, after: Graph, found: Mapping[str, State], changes_only: bool) -> dict[str, str]:
    """Numbered module -> the first of its siblings that is the same, states included: "layers.3" -> "layers.0".

    The same: ops, arguments, shapes, states and what reads what; what constants and nodes are called doesn't count, nor where a value comes
    from, unless it is read in another's place. changes_only: the same in what changed, and in what reads another value. Modules inside a folded
    one aren't listed.
    """
    parents = {**before.parents, **after.parents}
    blocks: dict[str, _Block] = {}
    around: dict[str, list[_Block]] = {}
    others = {*rewired(before, after, found)} if changes_only else set()
    nodes = merged(before, after)
    for node in nodes.values():
        if changes_only and node.name not in found and node.name not in others:
            continue
        old = before.nodes.get(node.name) if found.get(node.name) == "changed" or node.name in others else None
        if node.region not in around:
            numbered = [path for path in _chain(node.region, parents) if _NUMBERED.fullmatch(path)]
            around[node.region] = [blocks.setdefault(path, _Block(path)) for path in numbered]
        for block in around[node.region]:
            block.add(node, old, found.get(node.name), nodes)
    first: dict[object, str] = {}
    folded: dict[str, str] = {}
    for path in sorted(blocks, key=_order):
        key = (parents.get(path, ""), path.rstrip("0123456789"), blocks[path].structure())
        if first.setdefault(key, path) != path:
            folded[path] = first[key]
    return {path: to for path, to in folded.items() if not any(above in folded for above in _chain(parents.get(path, ""), parents))}


@dataclass
class _Block:
    """The nodes of a module without their names: an input is the number of a node inside, or of a value from outside."""

    path: str
    lines: list[object] = field(default_factory=list)
    constants: list[tuple[str, str, str]] = field(default_factory=list)
    inside: dict[str, object] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)

    def add(self, node: Node, old: Node | None, state: State | None, nodes: Mapping[str, Node]) -> None:
        """The next node; old: what it was, where it has changed. nodes: all of both graphs."""
        place = node.region.removeprefix(self.path)
        if node.op == "constant":
            self.constants.append((state or "", node.shape, place))
            self.inside[node.name] = self.constants[-1]
            return
        was = old and (old.op, old.attributes, old.shape, self._read(old), self._exchanged(old, node, nodes))
        self.lines.append((state, node.op, node.attributes, node.shape, place, self._read(node), was))
        self.inside[node.name] = len(self.lines)

    def _read(self, node: Node) -> tuple[object, ...]:
        return tuple(self.inside[i] if i in self.inside else -1 - self.outside.setdefault(i, len(self.outside)) for i in node.inputs)

    def _exchanged(self, old: Node, new: Node, nodes: Mapping[str, Node]) -> tuple[tuple[str | int, str | int], ...]:
        """Where the values from outside were that are read no more, and those in their place, as far as that isn't one module."""
        pairs = ((nodes[a].region, nodes[b].region) for a, b in zip(old.inputs, new.inputs, strict=False) if not {a, b} & self.inside.keys())
        return tuple((self._whence(a), self._whence(b)) for a, b in pairs if a != b)

    def _whence(self, region: str) -> str | int:
        """A module outside: of a sibling how many places on it is."""
        stem = self.path.rstrip("0123456789")
        sibling = re.match(rf"{re.escape(stem)}([0-9]+)(\.|$)", region)
        return int(sibling[1]) - int(self.path[len(stem) :]) if sibling else region

    def structure(self) -> object:
        """Equal for blocks that are the same."""
        return tuple(self.lines), tuple(sorted(self.constants))


def _chain(path: str, parents: Mapping[str, str]) -> Iterator[str]:
    """The module and those around it, without the root."""
    while path:
        yield path
        path = parents.get(path, "")


def _order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
