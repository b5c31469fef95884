"""Regions: the module tree laid over the nodes, every node in exactly one leaf of it.

A node belongs to the innermost module it was traced in. Nodes that were traced in none (constants, sizes) belong where their readers are: to
the deepest module path that all of them share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from fxcompress.program import Program

Path = tuple[str, ...]


@dataclass
class Region:
    """A module path with its class name, the nodes traced directly in it, the regions inside, and its boundary.

    inputs: nodes outside it that it reads; outputs: its nodes (those of inner regions too) read outside. Order is that of the graph.
    """

    path: str
    kind: str
    nodes: list[fx.Node] = field(default_factory=list)
    children: list[Region] = field(default_factory=list)
    inputs: tuple[fx.Node, ...] = ()
    outputs: tuple[fx.Node, ...] = ()

    def walk(self) -> Iterator[Region]:
        """This region and all inside it, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def all_nodes(self) -> list[fx.Node]:
        """The nodes of this region and of all inside it."""
        return [n for region in self.walk() for n in region.nodes]


def regions(program: Program) -> Region:
    """The root region of the program; it covers every node but the output."""
    root = Region("", program.classes.get("", ""))
    by_path: dict[Path, Region] = {(): root}
    placed: dict[fx.Node, Path] = {}
    for node in reversed(list(program.graph.nodes)):
        if node.op != "output":
            placed[node] = _own_path(node) if _is_traced(node) else _shared_path(node, placed)
    for node in program.graph.nodes:
        if node.op != "output":
            _region_at(placed[node], by_path, program).nodes.append(node)
    _find_boundaries(root)
    return root


def _own_path(node: fx.Node) -> Path:
    """The chain of module paths, outermost first, without the root."""
    return tuple(p for p in node.meta.get("module", ()) if p)


def _is_traced(node: fx.Node) -> bool:
    """Whether the module path says where the node was traced: constants have none, and export reads sizes at the root."""
    is_size = isinstance(node.meta.get("val"), torch.SymInt)
    return bool(_own_path(node)) or (node.op == "call_function" and "module" in node.meta and not is_size)


def _shared_path(node: fx.Node, placed: dict[fx.Node, Path]) -> Path:
    """The deepest chain all readers share; the root for inputs and for what the output alone reads."""
    paths = [placed[u] for u in node.users if u in placed]
    if node.op == "placeholder" or not paths:
        return ()
    shared = paths[0]
    for path in paths[1:]:
        length = next((i for i, (a, b) in enumerate(zip(shared, path, strict=False)) if a != b), min(len(shared), len(path)))
        shared = shared[:length]
    return shared


def _region_at(path: Path, by_path: dict[Path, Region], program: Program) -> Region:
    if path not in by_path:
        by_path[path] = Region(path[-1], program.classes.get(path[-1], ""))
        _region_at(path[:-1], by_path, program).children.append(by_path[path])
    return by_path[path]


def _find_boundaries(root: Region) -> None:
    """Fill inputs and outputs of every region by one pass over the edges: an edge crosses the regions that hold only one of its ends."""
    chains: dict[fx.Node, list[Region]] = {}
    _chains(root, [], chains)
    inputs: dict[int, dict[fx.Node, None]] = {}
    outputs: dict[int, dict[fx.Node, None]] = {}
    for node, chain in chains.items():
        for reader in node.users:
            other = {id(r) for r in chains.get(reader, ())}
            for region in chain:
                if id(region) not in other:
                    outputs.setdefault(id(region), {})[node] = None
            own = {id(r) for r in chain}
            for region in chains.get(reader, ()):
                if id(region) not in own:
                    inputs.setdefault(id(region), {})[node] = None
    for region in root.walk():
        region.inputs, region.outputs = tuple(inputs.get(id(region), ())), tuple(outputs.get(id(region), ()))


def _chains(region: Region, above: list[Region], chains: dict[fx.Node, list[Region]]) -> None:
    chain = [*above, region]
    chains.update(dict.fromkeys(region.nodes, chain))
    for child in region.children:
        _chains(child, chain, chains)
