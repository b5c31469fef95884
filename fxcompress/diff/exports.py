"""A step for other viewers: networkx, Graphviz's dot, the JSON of model-explorer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fxcompress.diff import Diff, Step
from fxcompress.diff.states import State
from fxcompress.diff.text import SIGNS, printable
from fxcompress.history import Graph, Node

STYLES: Mapping[State, str] = {
    "added": 'color="#136c31", penwidth=2',
    "removed": 'color="#b3261e", style=dashed',
    "changed": 'color="#865700", peripheries=2',
    "moved": 'color="#6a3fb5", style=dotted',
}
FILLS: Mapping[State, str] = {"added": "#cdebd6", "removed": "#f8d3d0", "changed": "#f7e3b5", "moved": "#dfd3f5"}


def as_networkx(step: Step) -> Any:
    """A DiGraph of the nodes of both graphs; an edge says in which it is ("before", "after", "both")."""
    import networkx

    graph = networkx.DiGraph()
    for name, node in step.nodes.items():
        kept = {k: getattr(node, k) for k in ("op", "attributes", "region", "shape", "source", "flops", "stored")}
        graph.add_node(name, **kept, state=step.states.get(name, "same"))
    for (source, target), place in _edges(step).items():
        graph.add_edge(source, target, graph=place)
    return graph


def as_dot(step: Step) -> str:
    """A digraph with a cluster for each module."""
    inside: dict[str, list[str]] = {}
    for path, parent in step.parents.items():
        inside.setdefault(parent, []).append(path)
    members: dict[str, list[Node]] = {}
    for node in step.nodes.values():
        members.setdefault(node.region, []).append(node)
    edges = [
        f"  {_quoted(a)} -> {_quoted(b)}{'' if place == 'both' else f' [style={_DRAWN[place]}]'};" for (a, b), place in _edges(step).items()
    ]
    lines = ["digraph {", '  node [shape=box, fontname="monospace"];', *_cluster("", inside, members, step), *edges, "}"]
    return "\n".join(lines) + "\n"


def as_model_explorer(diff: Diff) -> str:
    """A graph collection with the graphs before and after."""
    step = diff.whole
    pairs = [("before", step.before), ("after", step.after)][step.before is step.after :]
    graphs = [{"id": name, "nodes": [_explored(node, graph, step) for node in graph.nodes.values()]} for name, graph in pairs]
    return json.dumps({"label": diff.title, "graphs": graphs}, indent=1) + "\n"


_DRAWN = {"before": "dashed", "after": "bold"}


def _edges(step: Step) -> dict[tuple[str, str], str]:
    before, after = ({(i, n.name): None for n in g.nodes.values() for i in n.inputs} for g in (step.before, step.after))
    return {e: "both" if e in before and e in after else "before" if e in before else "after" for e in (*before, *after)}


def _cluster(path: str, inside: Mapping[str, list[str]], members: Mapping[str, list[Node]], step: Step) -> Iterator[str]:
    if path:
        yield f"  subgraph {_quoted(f'cluster {path}')} {{ label={_quoted(path)};"
    for node in members.get(path, ()):
        state = step.states.get(node.name)
        sign, style = (f"{SIGNS[state]} ", f", {STYLES[state]}") if state else ("", "")
        yield f"  {_quoted(node.name)} [label={_quoted(f'{sign}{node.op}', node.name)}{style}];"
    for child in inside.get(path, ()):
        yield from _cluster(child, inside, members, step)
    if path:
        yield "  }"


def _quoted(*lines: str) -> str:
    escaped = (printable(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'


def _explored(node: Node, graph: Graph, step: Step) -> dict[str, Any]:
    chain, path = list[str](), node.region
    while path:
        parent = graph.parents.get(path, "")
        chain.insert(0, path.removeprefix(f"{parent}.").replace("/", "_"))
        path = parent
    state = step.states.get(node.name)
    shown = {"name": node.name, "value": node.shape, "arguments": node.attributes, "source": node.source, "state": state or "same"}
    edges = [{"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)} for i, name in enumerate(node.inputs)]
    return {
        "id": node.name,
        "label": node.op,
        "namespace": "/".join(chain),
        "incomingEdges": edges,
        "attrs": [{"key": k, "value": v} for k, v in shown.items() if v],
        **({"style": {"backgroundColor": FILLS[state]}} if state else {}),
    }
