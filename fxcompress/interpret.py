"""Run a Program in torch, node by node: the specification every backend is compared with.

Values are freed at their last use, so memory stays near that of the eager model. Quantised programs run through the reference kernels of
the `fxc::` ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.ops.quantizer import PLAIN
from fxcompress.program import Program

Visit = Callable[[fx.Node, Any], Any]


@torch.no_grad()
def run(program: Program, inputs: Sequence[Tensor], visit: Visit | None = None) -> list[Any]:
    """The program's outputs on its flat inputs. visit(node, value) sees every value as it is made; a value it returns replaces it."""
    return walk(program.graph.nodes, program.constants, inputs, program.results(), visit)


@torch.no_grad()
def walk(
    nodes: Iterable[fx.Node],
    constants: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    results: Sequence[fx.Node],
    visit: Visit | None = None,
    known: Mapping[fx.Node, Any] | None = None,
) -> list[Any]:
    """Evaluate nodes in order, keep `results`; everything else lives until its last reader ran. known: values of nodes that are left out."""
    ordered = list(nodes)
    last = last_uses(ordered)
    kept = set(results)
    values = iter(inputs)
    env: dict[fx.Node, Any] = dict(known or {})
    for node in ordered:
        if node.op == "output":
            continue
        env[node] = next(values) if node.op == "placeholder" else evaluate(node, env, constants)
        if visit is not None:
            seen = visit(node, env[node])
            env[node] = env[node] if seen is None else seen
        for dead in last.get(node, ()):
            if dead not in kept:
                del env[dead]
    return [env[n] for n in results]


def evaluate(node: fx.Node, env: Mapping[fx.Node, Any], constants: Mapping[str, Tensor]) -> Any:
    """The value of one constant or op node, its arguments taken from env."""
    if node.op == "get_attr":
        return constants[str(node.target)]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
    target = node.target if torch.is_grad_enabled() else PLAIN.get(node.target, node.target)  # a dispatcher costs more than small tensors
    return target(*args, **kwargs)  # type: ignore[operator]


def constant_value(node: fx.Node, constants: Mapping[str, Tensor]) -> Any:
    """The value of a node that no input decides."""
    return evaluate(node, {n: constant_value(n, constants) for n in node.all_input_nodes}, constants)


def last_uses(
    ordered: Sequence[fx.Node], inputs: Callable[[fx.Node], Iterable[fx.Node]] = lambda n: n.all_input_nodes
) -> dict[fx.Node, list[fx.Node]]:
    """Per node the values whose last reader it is; a value nobody reads dies where it is made. inputs: what a node reads."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(ordered):
        for used in (node, *inputs(node)):
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    return last
