"""Operations of two programs at the same sizes: those of the first one's example, since each was measured at its own.

Inputs of one name show which size of the one is which of the other. Where a size is fixed on one side, the other takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fxcompress.cost import at_sizes
from fxcompress.history import Graph, History

_SHAPE = re.compile(r"(\w+)\[(.*)\]")


def at_one_size(first: History, second: History) -> tuple[Graph, Graph, str]:
    """The last graph of each with its operations at sizes that both have, and which those are, or why they can't be compared."""
    sizes = _common(first, second)
    told = next(_unlike(first, second, sizes), "")
    if not told:
        told = at(sizes[0]) or "at the sizes of both"
    try:
        old, new = (_resized(h.graphs[-1], s) for h, s in zip((first, second), sizes, strict=True))
    except ValueError as error:
        return first.graphs[-1], second.graphs[-1], f"each at the sizes of its own example: {error}"
    return old, new, told


def at(sizes: Mapping[str, int]) -> str:
    """Dynamic sizes in words, "at batch=2, past=8"; "" where there are none."""
    return f"at {', '.join(f'{name}={size}' for name, size in sizes.items())}" if sizes else ""


def _common(first: History, second: History) -> tuple[dict[str, int], dict[str, int]]:
    """Both programs' dynamic sizes, those of the second as in the first."""
    old, new = dict(first.sizes), dict(second.sizes)
    pairs = [(a, b) for shapes in _shared(first, second) for a, b in zip(*shapes, strict=False)]
    for a, b in pairs:
        if a in old and b.isdecimal():
            old[a] = int(b)
    for a, b in pairs:
        if b in new and (a in old or a.isdecimal()):
            new[b] = old[a] if a in old else int(a)
    return old, new


def _unlike(first: History, second: History, sizes: tuple[Mapping[str, int], Mapping[str, int]]) -> Iterator[str]:
    """A sentence for every input that isn't of one size."""
    for old, new in _shared(first, second):
        one, other = ([str(known.get(d, d)) for d in dims] for dims, known in zip((old, new), sizes, strict=True))
        if unknown := [d for d in (*one, *other) if d.isidentifier()]:
            yield f"each at the sizes of its own example: nothing says what {unknown[0]} was"
        elif one != other:
            yield f"each at the sizes of its own example: an input is [{', '.join(one)}] and [{', '.join(other)}]"


def _shared(first: History, second: History) -> Iterator[tuple[list[str], list[str]]]:
    """The sizes of the inputs that both have by name."""
    for name, node in first.graphs[0].nodes.items():
        other = second.graphs[0].nodes.get(name)
        if node.op == "input" and other is not None and other.op == "input":
            yield _dims(node.shape), _dims(other.shape)


def _dims(shape: str) -> list[str]:
    found = _SHAPE.fullmatch(shape)
    return found[2].split(", ") if found and found[2] else []


def _resized(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    nodes = {name: replace(n, flops=at_sizes(n.formula, sizes)) if n.formula else n for name, n in graph.nodes.items()}
    return Graph(nodes, graph.kinds, graph.parents)
