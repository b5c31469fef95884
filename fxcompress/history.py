"""History: the graphs of a run, as captured and after every pass, as plain data. Diffs and viewers are built on it.

Weights are not in it, only statistics of each. In the file every text stands once and every version of a node stands once; a graph is what it
drops and adds to the one before. A node keeps its name through all passes, so two graphs of a run are compared by name.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.cost import CONTRACTIONS, Costs, example_sizes, symbol_names
from fxcompress.program import Program
from fxcompress.regions import regions

VERSION = 1
FIXED = 7  # fields of a node that are always written: its texts
DEFAULTS: tuple[Any, ...] = (0, 0, (), 0)  # of the others
GREATEST = 10**24  # of a count in a file
DEQUANTIZE = "fxc.dequantize.default"
SOURCE = "source"  # meta of a node that was restored without its stack trace: the line that it came from
_HERE = f"{Path(__file__).parent}{os.sep}"
_FRAME = re.compile(r'File "([^"]*)", line (\d+), in \S+\n\s*(.*)')


@dataclass(frozen=True, slots=True)
class Node:
    """A node as text and numbers.

    op: "input", "constant", "output", or the op's name. inputs: the nodes it reads, in the order of its arguments. attributes: its arguments
    with % where those stand; of a constant its name in the model. region: the module path it belongs to. shape: dtype and sizes. source:
    file, line and code of the model that it came from. flops, stored: operations at the sizes of the example, bytes of a constant. statistics:
    least, greatest, mean, standard deviation and checksum of a constant. revision: how often a constant's content was changed. formula: the
    operations in the dynamic sizes; "" where they depend on none.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: str
    region: str
    shape: str
    source: str = ""
    flops: int = 0
    stored: int = 0
    statistics: tuple[float | None, ...] = ()
    revision: int = 0
    formula: str = ""


_FIELDS = attrgetter(*[f.name for f in fields(Node)][:-1])  # as they stand in a file: all but the formula


@dataclass(frozen=True)
class Graph:
    """Nodes by name, in order, and the class of every region (module path)."""

    nodes: Mapping[str, Node]
    kinds: Mapping[str, str]
    parents: Mapping[str, str]

    @property
    def flops(self) -> int:
        """Operations of one call at the sizes of the example."""
        return sum(n.flops for n in self.nodes.values())

    @property
    def stored(self) -> int:
        """Bytes of all constants."""
        return sum(n.stored for n in self.nodes.values())


def quantised_share(graph: Graph) -> float:
    """Of all multiply-accumulates at the sizes of the example, those of ops that read a dequantised value, through what only moves it."""
    work = [n for n in graph.nodes.values() if n.op in CONTRACTIONS]
    quantised = (n for n in work if any(_is_dequantised(i, graph) for i in n.inputs))
    return sum(n.flops for n in quantised) / (sum(n.flops for n in work) or 1)


def _is_dequantised(name: str, graph: Graph) -> bool:
    node = graph.nodes[name]
    while node.op != DEQUANTIZE and node.inputs and not node.flops:
        node = graph.nodes[node.inputs[0]]
    return node.op == DEQUANTIZE


@dataclass
class History:
    """graphs[0] is the captured one, graphs[i] the one after the i-th pass.

    recast: values that carry a change since a pass, such as a scale that a weight makes good. sqnr: how far the values of the last graph are
    from those of the captured one on the probe, in dB; None: equal. sizes: what each dynamic size is in the example.
    """

    graphs: list[Graph] = field(default_factory=list)
    recast: set[str] = field(default_factory=set)
    sqnr: dict[str, float | None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def record(self, program: Program, changed: Collection[str] = (), recast: Collection[str] = ()) -> None:
        """Append the program as it is. changed: names of the constants whose content was changed since the last record."""
        self.graphs.append(graph_of(program, self.graphs[-1] if self.graphs else None, changed))
        self.recast.update(recast)
        self.sizes = {str(name): size for name, size in example_sizes(program).items()}

    def resume(self, program: Program) -> None:
        """Tell the nodes of a restored program where they came from, so that what is made of them says so too."""
        for node in program.graph.nodes:
            node.meta[SOURCE] = self.graphs[-1].nodes[node.name].source

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**_written(self.graphs), "recast": sorted(self.recast), "sqnr": self.sqnr, "sizes": self.sizes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> History:
        """The inverse. ValueError, LookupError, TypeError or AttributeError for what isn't of that form, or says what can't be."""
        history = cls(list(_read(data)), set(data["recast"]), dict(data["sqnr"]), dict(data.get("sizes", {})))
        _check(history)
        return history


def graph_of(program: Program, last: Graph | None = None, changed: Collection[str] = ()) -> Graph:
    """The program's graph as plain data; what is as in the last one is taken from there."""
    costs, places, kinds, parents = Costs(program), dict[fx.Node, str](), dict[str, str](), dict[str, str]()
    for region in regions(program).walk():
        kinds[region.path] = region.kind
        for child in region.children:
            parents.setdefault(child.path, region.path)
        places.update((node, region.path) for node in region.nodes)
    sizes: dict[Any, str] = {symbol: str(name) for symbol, name in symbol_names(program).items()}
    nodes = {}
    for node in program.graph.nodes:
        made = _node(node, places.get(node, ""), sizes)
        old = last.nodes.get(node.name) if last else None
        fresh = node.op == "get_attr" and str(node.target) in changed
        same = old is not None and not fresh and _definition(old) == _definition(made)
        revision = 0 if old is None else old.revision + fresh
        nodes[node.name] = old if old is not None and same else _measured(made, node, program, costs, revision)
    return Graph(nodes, kinds, parents)


def _definition(node: Node) -> tuple[Any, ...]:
    return node.op, node.inputs, node.attributes, node.region, node.shape


def _node(node: fx.Node, region: str, sizes: dict[Any, str]) -> Node:
    inputs: list[str] = []
    op = {"placeholder": "input", "get_attr": "constant", "output": "output"}.get(node.op) or _op_name(node.target)
    given = [*(_text(a, inputs) for a in node.args), *(f"{k}={_text(v, inputs)}" for k, v in node.kwargs.items())]
    attributes = ", ".join(given) if node.op in ("call_function", "output") else str(node.target)
    return Node(node.name, op, tuple(inputs), attributes, region, _shape(node.meta.get("val"), sizes), _source(node))


def _measured(made: Node, node: fx.Node, program: Program, costs: Costs, revision: int) -> Node:
    cost = costs.of(node)
    statistics = _statistics(program.constants[str(node.target)]) if node.op == "get_attr" else ()
    flops, formula = costs.bound(cost.flops), str(cost.flops) if getattr(cost.flops, "free_symbols", ()) else ""
    return replace(made, flops=flops, stored=int(cost.weights), statistics=statistics, revision=revision, formula=formula)


def _op_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else str(getattr(target, "__name__", target))


def _text(value: Any, inputs: list[str]) -> str:
    if isinstance(value, fx.Node):
        inputs.append(value.name)
        return "%"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_text(v, inputs) for v in value)}]"
    return str(value).removeprefix("torch.") if not isinstance(value, str) else repr(value)


def _shape(value: Any, sizes: dict[Any, str]) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(_size(s, sizes) for s in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(_shape(v, sizes) for v in value)})"
    return "" if value is None else type(value).__name__.removeprefix("Sym").lower()


def _size(size: Any, sizes: dict[Any, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    expression = size.node.expr
    if expression not in sizes:
        sizes[expression] = str(expression.subs({s: sizes.get(s, s) for s in expression.free_symbols}))
    return sizes[expression]


def _source(node: fx.Node) -> str:
    """The innermost frame that isn't torch's own, without the folders above the last one; of a model made of torch's layers alone theirs. The
    frames of whoever called the model are not its code."""
    if SOURCE in node.meta:
        return str(node.meta[SOURCE])
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith(_HERE)]
    own = [f for f in frames if "/torch/" not in f[0].replace("\\", "/")] or frames
    if not own:
        return ""
    path, line, code = own[-1]
    place = "/".join(path.replace("\\", "/").split("/")[-2:])
    return f"{place}:{line}  {code.strip()}"


@torch.no_grad()
def _statistics(tensor: Tensor) -> tuple[float | None, ...]:
    if not tensor.numel() or tensor.is_complex():
        return ()
    wide = tensor if tensor.is_floating_point() and tensor.itemsize > 2 else tensor.float()
    low, high = (float(v) for v in torch.aminmax(wide))
    std, mean = (float(v) for v in torch.std_mean(wide, correction=0))
    moments = (float(f"{v:.5g}") if math.isfinite(v) else None for v in (low, high, mean, std))
    return (*moments, zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data))


def _written(graphs: Sequence[Graph]) -> dict[str, Any]:
    versions: dict[Node, int] = {}
    known: dict[int, int] = {}  # the same by identity: most nodes are those of the graph before, and a hash of all their texts takes its time
    formulas: dict[str, list[int]] = {}
    steps, last = [], list[int]()
    for graph in graphs:
        known.update((id(n), versions.setdefault(n, len(versions))) for n in graph.nodes.values() if id(n) not in known)
        order = [known[id(n)] for n in graph.nodes.values()]
        steps.append(_step(last, order))
        last = order
    texts = _numbered(versions, graphs)
    for node, number in versions.items():
        if node.formula:
            formulas.setdefault(node.formula, []).append(number)
    kinds = [[[_interned(texts, v) for v in (path, kind, g.parents.get(path, ""))] for path, kind in g.kinds.items()] for g in graphs]
    shared = [k if i == 0 or k != kinds[i - 1] else None for i, k in enumerate(kinds)]
    rows = _rows(versions, texts)
    return {"version": VERSION, "nodes": rows, "steps": steps, "regions": shared, "texts": list(texts), "formulas": formulas}


def _numbered(versions: Iterable[Node], graphs: Iterable[Graph]) -> dict[str, int]:
    """The number of every text: small ones, which are short, for those that stand often."""
    values = [v for node in versions for v in _FIELDS(node)]
    counts = Counter(v for value in values for v in (value if isinstance(value, tuple) else [value]) if isinstance(v, str))
    counts.update(text for g in graphs for path, kind in g.kinds.items() for text in (path, kind, g.parents.get(path, "")))
    return {text: number for number, (text, _) in enumerate(counts.most_common())}


def _rows(versions: Iterable[Node], texts: dict[str, int]) -> list[Any]:
    """A node's fields without the last ones that are as by default; of a later version only what differs, by place, and "of" which."""
    rows: list[Any] = []
    known: dict[str, tuple[int, list[Any]]] = {}
    for number, node in enumerate(versions):
        row = [_interned(texts, v) for v in _FIELDS(node)]
        if node.name in known:
            of, old = known[node.name]
            rows.append({"of": of, **{str(i): v for i, (v, w) in enumerate(zip(row, old, strict=True)) if v != w}})
        else:
            rows.append(row[: max(i for i, v in enumerate(row) if i < FIXED or v) + 1])
        known[node.name] = number, row
    return rows


def _interned(texts: dict[str, int], value: Any) -> Any:
    if isinstance(value, str):
        return texts.setdefault(value, len(texts))
    if isinstance(value, tuple):
        return [_interned(texts, v) if isinstance(v, str) else v for v in value]
    return value


def _step(old: Sequence[int], new: Sequence[int]) -> dict[str, list[Any]]:
    """drop: positions in the old order, each less the one before it. put: positions in the new order and versions, in turn, the same way."""
    gone, kept = set(old) - set(new), set(old)
    drop, put, position = [], [], 0
    for place, version in enumerate(new):
        while position < len(old) and old[position] in gone:
            drop.append(position)
            position += 1
        if position < len(old) and old[position] == version:
            position += 1
        else:
            put.append([place, version])
            if version in kept:
                gone.add(version)
    drop.extend(range(position, len(old)))
    gaps = [[a - b for a, b in zip(column, [0, *column], strict=False)] for column in (drop, *map(list, zip(*put, strict=True)))]
    return {"drop": gaps[0], "put": [gap for pair in zip(*gaps[1:], strict=True) for gap in pair]}


def applied(old: Sequence[int], step: Mapping[str, Any]) -> list[int]:
    """The order of versions after a step. ValueError for a step that doesn't fit."""
    dropped = set(accumulate(step["drop"]))
    kept = iter([v for i, v in enumerate(old) if i not in dropped])
    put = dict(zip(accumulate(step["put"][::2]), accumulate(step["put"][1::2]), strict=True))
    order = [put[place] if place in put else next(kept, None) for place in range(len(old) - len(dropped) + len(put))]
    made = [v for v in order if v is not None]
    if len(made) < len(order) or next(kept, None) is not None:
        raise ValueError("a step doesn't fit the graph before it")
    return made


def _read(data: Mapping[str, Any]) -> Iterator[Graph]:
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']}, this one reads {VERSION}")
    texts: list[str] = data["texts"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is none")
    nodes = _nodes_from(data["nodes"], texts, data.get("formulas", {}))
    order: list[int] = []
    kinds: Iterable[Any] = ()
    for step, rows in zip(data["steps"], data["regions"], strict=True):
        order = applied(order, step)
        kinds = kinds if rows is None else [[texts[i] for i in row] for row in rows]
        parents = {path: parent for path, _, parent in kinds if path}
        if order and min(order) < 0:
            raise ValueError("a graph names a node that isn't there")
        graph = Graph({nodes[i].name: nodes[i] for i in order}, {path: kind for path, kind, _ in kinds}, parents)
        if len(graph.nodes) < len(order):
            raise ValueError("two nodes of a graph have one name")
        yield graph


def _nodes_from(rows: Iterable[Any], texts: Sequence[str], formulas: Mapping[str, Sequence[int]]) -> list[Node]:
    of = {number: formula for formula, numbers in formulas.items() for number in numbers}
    full: list[list[Any]] = []
    for row in rows:
        if isinstance(row, dict):
            full.append([row.get(str(i), v) for i, v in enumerate(full[row["of"]])])
        else:
            full.append([*row, *DEFAULTS[len(row) - FIXED :]])
    return [_node_from(row, texts, of.get(number, "")) for number, row in enumerate(full)]


def _node_from(row: Sequence[Any], texts: Sequence[str], formula: str) -> Node:
    name, op, inputs, attributes, region, shape, source, flops, stored, statistics, revision = row
    told = (texts[i] for i in inputs), texts[attributes], texts[region], texts[shape], texts[source]
    return Node(texts[name], texts[op], tuple(told[0]), *told[1:], flops, stored, tuple(statistics), revision, formula)


def _check(history: History) -> None:
    """ValueError for a history that no run can have."""
    if not history.graphs:
        raise ValueError("it holds no graph")
    if not all(isinstance(name, str) for name in history.recast):
        raise ValueError("a value that carries a change has no name")
    for name, figure in history.sqnr.items():
        if figure is not None and not _is_figure(figure):
            raise ValueError(f"the SQNR at {name} is {figure!r}")
    for name, size in history.sizes.items():
        if type(size) is not int or not 0 <= size <= GREATEST:
            raise ValueError(f"the size {name} is {size!r}")
    checked: set[int] = set()
    for graph in history.graphs:
        _check_modules(graph)
        _check_order(graph, checked)


def _check_modules(graph: Graph) -> None:
    if "" not in graph.kinds:
        raise ValueError("a graph has no root module")
    for path in graph.kinds:
        above, seen = path, set[str]()
        while above:
            if above in seen or above not in graph.kinds:
                raise ValueError(f"the module {path!r} is in none")
            seen.add(above)
            above = graph.parents.get(above, "")


def _check_order(graph: Graph, checked: set[int]) -> None:
    seen: set[str] = set()
    for node in graph.nodes.values():
        if missing := set(node.inputs) - seen:
            raise ValueError(f"{node.name} reads {min(missing)!r}, which no node before it computes")
        if node.region and node.region not in graph.kinds:
            raise ValueError(f"{node.name} is in the module {node.region!r}, which isn't there")
        if id(node) not in checked:
            _check_figures(node)
            checked.add(id(node))
        seen.add(node.name)


def _check_figures(node: Node) -> None:
    counts = node.flops, node.stored, node.revision
    if not all(type(v) is int and 0 <= v <= GREATEST for v in counts) or not isinstance(node.formula, str):
        raise ValueError(f"{node.name} has the figures {counts}")
    if len(node.statistics) not in (0, 5) or not all(v is None or _is_figure(v) for v in node.statistics):
        raise ValueError(f"{node.name} has the statistics {node.statistics}")
    if node.statistics and type(node.statistics[4]) is not int:
        raise ValueError(f"{node.name} has the checksum {node.statistics[4]!r}")


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
