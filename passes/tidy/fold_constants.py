"""What is computed from constants alone is computed once, here.

    f(c1, c2, ...) -> c

A cone is everything a value is computed from; it is constant if no input and no dynamic size is in it (torch.arange, zeros, full with literal
sizes have neither). Each maximal one becomes a constant. Legal because ops are functions of their arguments: those that draw random
numbers (a dropout that is switched off doesn't) or leave memory as it was found are not. Weight-side quantisers (fxc::) stay, or the weight
would be float again. Exact, bit for bit. Costs file size where the result is larger than the constants it replaces, which are those read by
nothing else; past 1 MiB and four times their size the cone is declined, and the largest cones inside it are folded in its place. So is one
that only repeats numbers, as a batch of fixed size does with a table of positions: runtimes unfold those as they load. Source: constant
folding as in any compiler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.contract import Exact
from fxcompress.dataflow import is_move
from fxcompress.edit import Edit
from fxcompress.interpret import walk
from fxcompress.program import Program, module_path
from fxcompress.rewrite import Context, Reject, Transform

MUCH, TIMES = 2**20, 4  # bytes, and how often the constants that go
REPEATED = 2**14  # bytes that repeating numbers may add
REPEATS = frozenset((torch.ops.aten.expand, torch.ops.aten.expand_as, torch.ops.aten.repeat, torch.ops.aten.repeat_interleave))
UNDEFINED = ("empty", "new_empty", "empty_like", "empty_strided", "empty_permuted")


class FoldConstants(Transform):
    """Compute every maximal cone of constants."""

    name = "tidy.fold_constants"
    contract = Exact(limit=0.0)

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per cone, at its last node."""
        declined: dict[str, Reject] = {}
        roots = folded_roots(on.program, declined)
        roots = [r for r in roots if on.admits(r)]
        for root, value in zip(roots, evaluated(on.program, roots), strict=True):
            module = module_path(root)
            with edit.site(root, "computed from constants alone"):
                edit.replace(root, edit.constant(f"{module}.{root.name}" if module else root.name, value, like=root))
        return declined


def folded_roots(program: Program, declined: dict[str, Reject]) -> list[fx.Node]:
    """The last nodes of the cones to fold, in order; declined ones are added to `declined`. Readers are decided before what they read."""
    constant, stay, roots = constant_nodes(program), set[fx.Node](), []
    for node in reversed([n for n in constant if n.op == "call_function"]):
        if all(user in constant for user in node.users):
            continue
        if reason := _reason_to_stay(node, program, constant):
            if stay.isdisjoint(node.users):
                declined[node.name] = reason
            stay.add(node)
            del constant[node]
        else:
            roots.append(node)
    return roots[::-1]


def constant_nodes(program: Program) -> dict[fx.Node, None]:
    """Constants and every op computed from constants and literals alone, in order."""
    found: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and found.keys() >= set(node.all_input_nodes) and _is_function(node)):
            found[node] = None
    return found


def evaluated(program: Program, roots: list[fx.Node]) -> list[Tensor]:
    """The values of the roots, each in memory of its own."""
    needed = {n for root in roots for n in _cone(root)}
    values = walk([n for n in program.graph.nodes if n in needed], program.constants, (), roots)
    return [v.clone(memory_format=torch.contiguous_format) for v in values]


def _is_function(node: fx.Node) -> bool:
    """Whether equal arguments give equal values, and the op isn't one of a quantiser."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    packet = target._schema.name.split("::")[1]
    draws = torch.Tag.nondeterministic_seeded in target.tags and not (target is torch.ops.aten.dropout.default and node.args[2:] == (False,))
    return target.namespace != "fxc" and not draws and packet not in UNDEFINED


def _reason_to_stay(root: fx.Node, program: Program, constant: Mapping[fx.Node, None]) -> Reject | None:
    value = root.meta.get("val")
    if not isinstance(value, Tensor):
        return Reject("{} is a {}, not a tensor", root, type(value).__name__)
    if root in program.results():
        return Reject("{} is an output: the program would hand out the constant itself", root)
    made, gone = _bytes(value), sum(_bytes(program.constants[str(n.target)]) for n in _only_read_in(_cone(root)))
    if made > MUCH and made > TIMES * gone:
        return Reject("{} would store {:.1f} MiB in place of {:.1f} MiB", root, made / 2**20, gone / 2**20)
    if made - (once := _bytes(_without_repeats(root).meta["val"])) > REPEATED:
        return Reject("{} only repeats numbers: it would store {:.0f} KiB in place of {:.0f} KiB", root, made / 2**10, once / 2**10)
    return None


def _without_repeats(node: fx.Node) -> fx.Node:
    """What a node's numbers are moved and repeated from."""
    while getattr(node.target, "overloadpacket", None) in REPEATS or (node.all_input_nodes and is_move(node)):
        node = node.all_input_nodes[0]
    return node


def _cone(root: fx.Node) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack.extend(node.all_input_nodes)
    return found


def _only_read_in(cone: Mapping[fx.Node, None]) -> list[fx.Node]:
    """Constants of the cone that nothing outside it reads."""
    return [n for n in cone if n.op == "get_attr" and all(user in cone for user in n.users)]


def _bytes(value: Any) -> int:
    return int(value.numel()) * int(value.element_size())
