"""A diff as plain data for scripts: all that the text says, nothing folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from fxcompress.diff import Diff, Run, Step
from fxcompress.diff.recipes import differing
from fxcompress.diff.states import State
from fxcompress.diff.text import content, written
from fxcompress.history import Graph, Node
from fxcompress.report import PassReport


def summary(diff: Diff) -> dict[str, Any]:
    """runs: with their passes; unfinished: what of one that isn't through is done and to come. bytes, flops, nodes: [before, after].
    steps: per state the names of the nodes, and each as the text writes it.
    renamed: of nodes and modules, what they are called in the second. sizes: at which flops are counted, in words.
    recipes: options that differ, and passes that only one run has, whose option is ""."""
    return {
        "title": diff.title,
        "is_same": diff.is_same,
        "runs": [_run(run, label) for run, label in zip(diff.runs, diff.labels, strict=True)],
        **_sizes(diff.whole.before, diff.whole.after),
        "sizes": diff.sizes,
        "renamed": dict(diff.was),
        "recipes": [{"pass": d.label, "option": d.option, "first": d.first, "second": d.second} for d in differing(diff)],
        "steps": [_step(step, diff.was) for step in diff.steps],
    }


def _run(run: Run, label: str) -> dict[str, Any]:
    graphs = run.history.graphs
    passes = [_pass(p, a, b) for p, a, b in zip(run.passes, graphs[:-1], graphs[1:], strict=True)]
    return {"title": label, "unfinished": run.unfinished, "output_sqnr": run.sqnrs, "passes": passes}


def _pass(done: PassReport, before: Graph, after: Graph) -> dict[str, Any]:
    facts = done.model_dump(mode="json", include={"name", "contract", "unit", "fired", "legal", "declined", "notes", "output_sqnr"})
    worst = done.worst and done.worst.model_dump(mode="json", include={"site", "value", "figure", "limit", "verdict", "why"})
    return {**facts, "worst": worst, **_sizes(before, after)}


def _sizes(before: Graph, after: Graph) -> dict[str, list[int]]:
    sides = before, after
    return {"bytes": [g.stored for g in sides], "flops": [g.flops for g in sides], "nodes": [len(g.nodes) for g in sides]}


def _step(step: Step, was: Mapping[str, str]) -> dict[str, Any]:
    by_state = {state: [name for name, found in step.states.items() if found == state] for state in get_args(State)}
    named = {*step.states, *step.rewired}
    nodes = {name: dict(_node(node, step, was)) for name, node in step.nodes.items() if name in named}
    return {"name": step.name, **by_state, "rewired": step.rewired, "written": nodes, "alike": step.changed_alike}


def _node(node: Node, step: Step, was: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Module and line; was: the line before, or the content of a constant, and how far a pass moved it; there: its name in
    the second."""
    old = step.before.nodes.get(node.name)
    yield "module", node.region
    yield "line", written(node)
    if old is not None and node.name in step.after.nodes:
        if written(old) != written(node):
            yield "was", written(old)
        elif (old.statistics, old.revision) != (node.statistics, node.revision):
            yield from (("content_was", content(old)), ("content", content(node)))
            yield from (("moved", by) for by in [step.moved.get(node.name)] if by is not None)
        if old.region != node.region:
            yield "module_was", old.region
    if node.name in was:
        yield "there", was[node.name]
