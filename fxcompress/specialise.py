"""Bind inputs to constants: what depends on them alone is computed once, branches they decide are taken, dead nodes go.

The result is a variant: a program that shares every untouched weight with the one it came from and lacks the bound inputs. Skipped work is
absent from its graph. Purity is ours to judge: in a functional graph every op is pure, while torch's own dead-code elimination keeps
attention, dropout and asserts alive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.errors import InputError, VerifierError, nearest
from fxcompress.functional import drop_dead
from fxcompress.interpret import evaluate, run
from fxcompress.measure import relative_error
from fxcompress.program import Program, Value
from fxcompress.signature import INPUT, Bound
from fxcompress.verify import verify

LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4}
aten = torch.ops.aten


@torch.no_grad()
def specialise(program: Program, bindings: Mapping[str, Tensor]) -> Program:
    """The program with the named inputs bound. A dynamic axis of a bound input takes a value of size 1, which broadcasts.

    Compared with the program on its example inputs, the bound values in place. Raises InputError for unknown names and values that don't
    fit, VerifierError if the numbers differ.
    """
    _check_bindings(program, bindings)
    variant = program.copy()
    places = {str(n.target): n for n in variant.placeholders()}
    bound = {places[name]: value for name, value in bindings.items()}
    _move_sizes(variant, bound)
    _fold(variant, bound)
    drop_dead(variant.graph)
    for node in bound:
        variant.graph.erase_node(node)
    variant = _without(variant, bindings)
    verify(variant)
    _compare(program, variant, bindings)
    return variant


def _check_bindings(program: Program, bindings: Mapping[str, Tensor]) -> None:
    values = {v.name: v for v in program.inputs}
    for name, tensor in bindings.items():
        if name not in values:
            raise InputError(f"no input {name!r} to bind", why=nearest(name, values))
        wanted = values[name]
        fits = len(wanted.shape) == tensor.dim() and all(
            h == (w if isinstance(w, int) else 1) for w, h in zip(wanted.shape, tensor.shape, strict=True)
        )
        if tensor.dtype != wanted.dtype or not fits:
            shape = [w if isinstance(w, int) else 1 for w in wanted.shape]
            raise InputError(
                f"input {name!r} can't be bound to this value", why=f"it takes {wanted.dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}"
            )
    if len(bindings) == len(values):
        raise InputError("all inputs are bound", why="a program needs one input at least", do="leave one free")


def _move_sizes(program: Program, bound: Mapping[fx.Node, Tensor]) -> None:
    """A size read from a bound input is read from a free one that has the same symbol."""
    free = [n for n in program.placeholders() if n not in bound]
    for node in bound:
        for reader in [u for u in node.users if u.target is aten.sym_size.int]:
            symbol = str(node.meta["val"].shape[reader.args[1]])
            found = [(n, axis) for n in free for axis, size in enumerate(n.meta["val"].shape) if str(size) == symbol]
            if found:
                reader.args = found[0]


def _fold(program: Program, bound: Mapping[fx.Node, Tensor]) -> None:
    """One walk: evaluate what only bound inputs and constants decide, and give its readers the value."""
    known: dict[fx.Node, Any] = dict(bound)
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes
        if any(n in known for n in sources) and all(n in known or n.op == "get_attr" for n in sources):
            values = {n: known[n] if n in known else program.constants[str(n.target)] for n in sources}
            known[node] = evaluate(node, values, program.constants)
        elif taken := _taken(node, known):
            node.replace_all_uses_with(taken)
    for node, value in known.items():
        readers = [u for u in node.users if u not in known]
        if readers:
            _give(program, node, value, readers)


def _taken(node: fx.Node, known: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The branch of where(c, a, b) that a known uniform condition takes, if it has the shape and dtype of the result."""
    if node.target is not aten.where.self or node.args[0] not in known:
        return None
    condition = known[node.args[0]]  # type: ignore[index]
    if not (condition.all() or not condition.any()):
        return None
    branch = node.args[1] if condition.all() else node.args[2]
    same = isinstance(branch, fx.Node) and _form(branch) == _form(node)
    return branch if same else None  # type: ignore[return-value]


def _form(node: fx.Node) -> tuple[Any, str] | None:
    value = node.meta.get("val")
    return (value.dtype, str(tuple(value.shape))) if isinstance(value, Tensor) else None


def _give(program: Program, node: fx.Node, value: Any, readers: list[fx.Node]) -> None:
    if isinstance(value, Tensor):
        name = f"bound.{node.name}"
        program.constants[name] = value
        with program.graph.inserting_before(next(iter(program.graph.nodes))):
            constant = program.graph.create_node("get_attr", name, name=f"bound_{node.name}")
        constant.meta = {"module": node.meta.get("module", ("",)), "val": value}
        for reader in readers:
            reader.replace_input_with(node, constant)
        return
    for reader in readers:
        reader.args = fx.node.map_arg(reader.args, lambda n: value if n is node else n)
        reader.kwargs = fx.node.map_arg(reader.kwargs, lambda n: value if n is node else n)


def _without(program: Program, bindings: Mapping[str, Tensor]) -> Program:
    names = iter(program.signature.input_names)
    leaves = tuple(_bound_leaf(leaf, next(names), bindings) if leaf is INPUT else leaf for leaf in program.signature.leaves)
    kept = [i for i, v in enumerate(program.inputs) if v.name not in bindings]
    inputs: tuple[Value, ...] = tuple(program.inputs[i] for i in kept)
    signature = dataclasses.replace(program.signature, leaves=leaves, input_names=tuple(v.name for v in inputs))
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    constants = {k: v for k, v in program.constants.items() if k in used}
    symbols = {s: r for s, r in program.symbols.items() if any(s in str(d) for v in inputs for d in v.shape)}
    example = tuple(program.example[i] for i in kept)
    return dataclasses.replace(program, inputs=inputs, signature=signature, constants=constants, symbols=symbols, example=example)


def _bound_leaf(leaf: Any, name: str, bindings: Mapping[str, Tensor]) -> Any:
    return Bound(bindings[name]) if name in bindings else leaf


def _compare(program: Program, variant: Program, bindings: Mapping[str, Tensor]) -> None:
    full = [bindings[v.name].expand_as(t) if v.name in bindings else t for v, t in zip(program.inputs, program.example, strict=True)]
    for value, a, b in zip(program.outputs, run(program, full), run(variant, variant.example), strict=True):
        limit = LIMIT.get(a.dtype, 5e-2)
        if not (error := relative_error(a, b)) <= limit:
            raise VerifierError(
                f"binding {', '.join(bindings)} changes output {value.name}", why=f"relative error {error:.1e}, limit {limit:.0e}"
            )
