"""Which node of one graph is which of another: by the names of a common run, else by module path and op, else by structure.

A level of the comparison pairs nodes that share a key, in order; what it leaves goes to the next, weaker one. Modules are paired first, so that
a renamed one is the same place under another name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from fxcompress.history import Graph, Node

PRIME = "′"  # behind a name of the second graph that the first has for something else
Key = Callable[[Node], Hashable]
T = TypeVar("T")


@dataclass(frozen=True)
class Aligned:
    """The second graph under the names of the first. nodes, regions: where a name of it is another than it had, what it was."""

    graph: Graph
    nodes: Mapping[str, str]
    regions: Mapping[str, str]


def aligned(first: Graph, second: Graph, captured: tuple[Graph, Graph] | None = None) -> Aligned:
    """The second graph with its matched nodes and modules named as in the first; others keep their names, with a prime where taken.

    captured: the graphs that the two were made from, in which no pass has yet taken away what tells modules apart; left out: themselves.
    """
    ends = captured or (first, second)
    regions = match_regions(*ends)
    known = match_nodes(ends[0].nodes, _moved(ends[1], _named(regions, ends[1].kinds, ends[0].kinds))) if captured else {}
    places = _named(regions, second.kinds, first.kinds)
    moved = _moved(second, places)
    names = _named(match_nodes(first.nodes, moved, known), second.nodes, first.nodes)
    nodes = {}
    for node in moved.values():
        nodes[names[node.name]] = replace(node, name=names[node.name], inputs=tuple(names[i] for i in node.inputs))
    kinds = {places[path]: kind for path, kind in second.kinds.items()}
    parents = {places[path]: places[parent] for path, parent in second.parents.items()}
    return Aligned(Graph(nodes, kinds, parents), _renamed(names), _renamed(places))


def match_regions(first: Graph, second: Graph) -> dict[str, str]:
    """Module path of the second graph -> that of the first, within its parent's counterpart: by name and class, else by class and content.

    Content is first what the weights hold, then the ops and what stands before and behind. A number as a name is a place in a list, so there
    the content goes first: a block put in front leaves the others what they were.
    """
    sides = _Modules(first), _Modules(second)
    found, queue = {"": ""}, [("", "")]
    while queue:
        old, new = queue.pop(0)
        olds, news = sides[0].inside(old), sides[1].inside(new)
        for rank in _RANKS:
            pairs = _zipped(olds, news, partial(rank, sides[0]), partial(rank, sides[1]))
            found.update((b, a) for a, b in pairs)
            queue.extend(pairs)
            taken = {a for a, _ in pairs}
            olds, news = [a for a in olds if a not in taken], [b for b in news if b not in found]
    return found


class _Modules:
    """The modules of one graph, with what tells them apart."""

    def __init__(self, graph: Graph) -> None:
        self.kinds, self.parents = graph.kinds, graph.parents
        self._places = {path: place for place, path in enumerate(dict.fromkeys(_in_order(graph)))}
        self.ops = _gathered(graph, {n.name: n.op for n in graph.nodes.values()})
        self.weights = _gathered(graph, {n.name: (n.shape, n.statistics) for n in graph.nodes.values() if n.statistics})
        self.before, self.behind = (
            _gathered(graph, {n.name: number for n, number in walk(graph.nodes) if n.op != "constant"}) for walk in (_upward, _downward)
        )
        self._children: dict[str, list[str]] = {}
        for path, parent in graph.parents.items():
            self._children.setdefault(parent, []).append(path)

    def inside(self, path: str) -> list[str]:
        """The modules directly in one, in the order in which they run: that of registration may be another."""
        return sorted(self._children.get(path, ()), key=lambda p: self._places.get(p, len(self._places)))

    def name(self, path: str) -> str:
        """Its own."""
        return path.removeprefix(f"{self.parents[path]}.")

    def is_numbered(self, path: str) -> bool:
        """Whether its name is its place in a list."""
        return path.rpartition(".")[2].isdecimal()


def _weighed(modules: _Modules, path: str) -> Hashable:
    """Class, ops and weights, where there are any."""
    return (modules.kinds[path], modules.ops[path], modules.weights[path]) if modules.weights[path] else object()


def _listed(rank: Callable[[_Modules, str], Hashable]) -> Callable[[_Modules, str], Hashable]:
    """For modules of a list alone."""
    return lambda modules, path: rank(modules, path) if modules.is_numbered(path) else object()


_RANKS: tuple[Callable[[_Modules, str], Hashable], ...] = (
    lambda m, path: (m.name(path), _weighed(m, path), m.before[path], m.behind[path]),
    lambda m, path: (_weighed(m, path), m.before[path], m.behind[path]),  # another's name, but place and weights are its own
    lambda m, path: (m.name(path), _weighed(m, path)),
    _listed(_weighed),
    _listed(lambda m, path: (m.kinds[path], m.ops[path], m.before[path], m.behind[path])),
    _listed(lambda m, path: (m.kinds[path], m.ops[path], m.behind[path])),
    _listed(lambda m, path: (m.kinds[path], m.ops[path], m.before[path])),
    lambda m, path: (m.name(path), m.kinds[path]),
    _weighed,
    lambda m, path: (m.kinds[path], m.ops[path], m.before[path], m.behind[path]),
    lambda m, path: (m.kinds[path], m.ops[path]),
    lambda m, path: m.name(path),
    lambda m, path: m.kinds[path],
)


def match_nodes(first: Mapping[str, Node], second: Mapping[str, Node], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name in the second graph -> name in the first. known: pairs that are given, as far as both graphs still have them."""
    found = {name: old for name, old in (known or {}).items() if old in first and name in second}
    ups = {**{id(n): h for n, h in _upward(first)}, **{id(n): h for n, h in _upward(second)}}
    downs = {**{id(n): h for n, h in _downward(first)}, **{id(n): h for n, h in _downward(second)}}
    alike: Key = lambda n: (n.op, attributes(n), n.shape)  # noqa: E731
    levels: list[Key] = [
        lambda n: (n.name, n.op) if n.op in ("input", "output") else id(n),
        lambda n: (n.region, alike(n)) if n.op == "constant" else id(n),
        lambda n: (n.region, alike(n), ups[id(n)], downs[id(n)]),
        lambda n: (n.region, alike(n), ups[id(n)]),
        lambda n: (n.region, alike(n), downs[id(n)]),
        lambda n: (n.region, alike(n)),
        lambda n: (n.region, n.op, n.shape) if n.op != "constant" else id(n),
        lambda n: (n.region, n.op, attributes(n)),
        lambda n: (n.region, n.op) if n.op != "constant" else id(n),
        lambda n: (n.region, n.op, n.shape, downs[id(n)]),  # a scale named after a value
        lambda n: (alike(n), ups[id(n)], downs[id(n)]),
        lambda n: (alike(n), ups[id(n)]),
        lambda n: (alike(n), downs[id(n)]),
    ]
    given = {*found.values()}
    olds, news = [n for n in first.values() if n.name not in given], [n for n in second.values() if n.name not in found]
    for key in levels:
        pairs = _zipped(olds, news, key, key)
        found.update((b.name, a.name) for a, b in pairs)
        taken = {a.name for a, _ in pairs}
        olds, news = [n for n in olds if n.name not in taken], [n for n in news if n.name not in found]
    return found


def _moved(graph: Graph, places: Mapping[str, str]) -> dict[str, Node]:
    return {n.name: _placed(n, places[n.region]) for n in graph.nodes.values()}


def _placed(node: Node, region: str) -> Node:
    own = attributes(node)
    is_inside = node.op == "constant" and own != node.attributes
    return replace(node, region=region, attributes=f"{region}.{own}" if is_inside else node.attributes)


def attributes(node: Node) -> str:
    """What the node is told, a constant's name relative to its module."""
    return node.attributes.removeprefix(f"{node.region}.") if node.op == "constant" else node.attributes


def _zipped(olds: Iterable[T], news: Iterable[T], of_old: Callable[[T], Hashable], of_new: Callable[[T], Hashable]) -> list[tuple[T, T]]:
    """Pairs of equal keys, those of one key in order."""
    waiting: dict[Hashable, list[T]] = {}
    for old in olds:
        waiting.setdefault(of_old(old), []).append(old)
    queues = {key: iter(items) for key, items in waiting.items()}
    pairs = ((next(queues.get(of_new(new), iter(())), None), new) for new in news)
    return [(old, new) for old, new in pairs if old is not None]


def _upward(nodes: Mapping[str, Node]) -> Iterable[tuple[Node, int]]:
    """Per node a number for everything it is computed from."""
    seen: dict[str, int] = {}
    for node in nodes.values():
        own = attributes(node) if node.op != "constant" else ""
        seen[node.name] = hash((node.op, own, node.shape, *(seen[i] for i in node.inputs)))
        yield node, seen[node.name]


def _downward(nodes: Mapping[str, Node]) -> Iterable[tuple[Node, int]]:
    """Per node a number for everything that is computed from it."""
    read: dict[str, list[int]] = {}
    for node in reversed(list(nodes.values())):
        own = hash((node.op, "" if node.op == "constant" else attributes(node), node.shape, *read.get(node.name, ())))
        for place, name in enumerate(node.inputs):
            read.setdefault(name, []).append(hash((own, place)))
        yield node, own


def _in_order(graph: Graph) -> Iterable[str]:
    """Module paths in the order of their first op; constants stand at the head of the graph and say nothing about that."""
    for node in graph.nodes.values():
        if node.op != "constant":
            yield from _around(node, graph)


def _around(node: Node, graph: Graph) -> Iterable[str]:
    """The modules a node is in, innermost first, without the root."""
    path = node.region
    while path:
        yield path
        path = graph.parents.get(path, "")


def _gathered(graph: Graph, facts: Mapping[str, Hashable]) -> dict[str, Hashable]:
    """Per module path what is known of the nodes in it and in all inside it, with how often."""
    found: dict[str, Counter[Hashable]] = {path: Counter() for path in graph.kinds}
    for name, fact in facts.items():
        for path in _around(graph.nodes[name], graph):
            found[path][fact] += 1
    return {path: frozenset(facts.items()) for path, facts in found.items()}


def _named(matched: Mapping[str, str], names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """A name of the first graph for what is matched; its own for the rest, with primes until it is free."""
    used, found = {*taken, *matched.values()}, dict(matched)
    for name in names:
        if name not in found:
            own = name
            while own in used:
                own += PRIME
            used.add(own)
            found[name] = own
    return found


def _renamed(names: Mapping[str, str]) -> dict[str, str]:
    return {now: was for was, now in names.items() if now != was}
