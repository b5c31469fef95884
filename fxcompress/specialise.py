"""Bind inputs to constants: what depends on them alone is computed once, branches they decide are taken, dead nodes go.

The result is a variant: a program that shares every untouched weight with the one it came from and lacks the bound inputs. Skipped work is
absent from its graph. Purity is ours to judge: in a functional graph every op is pure, while torch's own dead-code elimination keeps
attention, dropout and asserts alive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxcompress.dynamic import at_sizes
from fxcompress.errors import InputError, VerifierError, nearest
from fxcompress.functional import drop_dead
from fxcompress.interpret import constant_value, evaluate, run
from fxcompress.measure import relative_error
from fxcompress.program import Program, Value
from fxcompress.signature import INPUT, Bound
from fxcompress.verify import verify

LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4}
aten = torch.ops.aten


@torch.no_grad()
def specialise(program: Program, bindings: Mapping[str, Tensor]) -> Program:
    """The program with the named inputs bound. A dynamic axis of a bound input takes a value of size 1, which broadcasts.

    Compared with the program on its example inputs and at another size of every dynamic axis, the bound values in place. Raises InputError
    for unknown names and values that don't fit, VerifierError if the numbers differ.
    """
    _check_bindings(program, bindings)
    variant = program.copy()
    places = {str(n.target): n for n in variant.placeholders()}
    bound = {places[name]: value for name, value in bindings.items()}
    for node in bound:
        node.meta["bound"] = True
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
    """One walk: evaluate what only bound inputs and constants decide, whatever the dynamic sizes are, and give its readers the value."""
    known: dict[fx.Node, tuple[Any, Any]] = {n: (v, _resized(v, n)) for n, v in bound.items()}  # with every dynamic size 1, and 2
    fixed: set[fx.Node] = {n for n in program.graph.nodes if n.op == "get_attr"}  # what no input decides
    for node in [n for n in program.graph.nodes if n.op == "call_function"]:
        sources = node.all_input_nodes
        if all(n in fixed for n in sources):
            fixed.add(node)
        elif any(n in known for n in sources) and all(n in known or n in fixed or _is_size(n) for n in sources):
            constant = {n: constant_value(n, program.constants) for n in sources if n in fixed}
            one, two = (_attempt(node, {n: _value_at(n, i, known, constant) for n in sources}, program) for i in (0, 1))
            if _stands_for(one, node) and _is_same(one, two):
                known[node] = (one, two)
        elif taken := _taken(node, known):
            node.replace_all_uses_with(taken)
    for node, (value, _) in known.items():
        for reader in [u for u in node.users if u not in known]:
            _give(program, node, value, reader)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _resized(value: Tensor, node: fx.Node) -> Tensor:
    return value.expand([_size_at(want, 2) if _is_dynamic(want) else int(want) for want in node.meta["val"].shape])


def _is_dynamic(size: Any) -> bool:
    """Whether the size is open: a symbol that export found to have one value only is none."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _size_at(size: torch.SymInt, value: int) -> int:
    """The size where every symbol has this value."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, value)))


def _value_at(node: fx.Node, which: int, known: Mapping[fx.Node, tuple[Any, Any]], constant: Mapping[fx.Node, Any]) -> Any:
    if node in known:
        return known[node][which]
    return constant[node] if node in constant else _size_at(node.meta["val"], which + 1)


def _attempt(node: fx.Node, values: Mapping[fx.Node, Any], program: Program) -> Any:
    """The node's value; None where it can't be computed at these sizes."""
    try:
        return evaluate(node, values, program.constants)
    except (RuntimeError, IndexError, ArithmeticError):
        return None


def _is_same(one: Any, two: Any) -> bool:
    """Whether the value at size 1 is the one at size 2, once broadcast: then it depends on no dynamic size."""
    a, b = pytree.tree_leaves(one), pytree.tree_leaves(two)
    return len(a) == len(b) and all(_is_broadcast(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def _is_broadcast(x: Tensor, y: Tensor) -> bool:
    fits = x.dim() == y.dim() and all(m in (1, n) for m, n in zip(x.shape, y.shape, strict=True))
    return fits and relative_error(x.expand_as(y), y) <= LIMIT.get(x.dtype, 5e-2)


def _stands_for(value: Any, node: fx.Node) -> bool:
    """Whether the value is the node's own, with size 1 wherever the node has a dynamic size, so that it broadcasts to it."""
    wanted = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value is not None and not any(_is_size(n) for n in node.all_input_nodes)
    if not isinstance(wanted, Tensor) or value.dim() != wanted.dim():
        return False
    return all(have == (1 if _is_dynamic(want) else int(want)) for have, want in zip(value.shape, wanted.shape, strict=True))


def _taken(node: fx.Node, known: Mapping[fx.Node, tuple[Any, Any]]) -> fx.Node | None:
    """The branch of where(c, a, b) that a known uniform condition takes, if it has the shape and dtype of the result."""
    if node.target is not aten.where.self or node.args[0] not in known:
        return None
    condition = known[node.args[0]][0]  # type: ignore[index]
    if not (condition.all() or not condition.any()):
        return None
    branch = node.args[1] if condition.all() else node.args[2]
    same = isinstance(branch, fx.Node) and _form(branch) == _form(node)
    return branch if same else None  # type: ignore[return-value]


def _form(node: fx.Node) -> tuple[Any, str] | None:
    value = node.meta.get("val")
    return (value.dtype, str(tuple(value.shape))) if isinstance(value, Tensor) else None


def _give(program: Program, node: fx.Node, value: Any, reader: fx.Node) -> None:
    if not isinstance(value, Tensor):
        reader.args = fx.node.map_arg(reader.args, lambda n: value if n is node else n)
        reader.kwargs = fx.node.map_arg(reader.kwargs, lambda n: value if n is node else n)
        return
    constant = _constant(program, node, value)
    reader.replace_input_with(node, constant if _broadcasts(node, value, reader) else _expanded(program, node, constant, reader))


def _constant(program: Program, node: fx.Node, value: Tensor) -> fx.Node:
    name = f"bound.{node.name}"
    if name in program.constants:
        made: fx.Node = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == name)
        return made
    program.constants[name] = value
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        constant: fx.Node = program.graph.create_node("get_attr", name, name=f"bound_{node.name}")
    constant.meta = {"module": node.meta.get("module", ("",)), "val": value}
    return constant


def _broadcasts(node: fx.Node, value: Tensor, reader: fx.Node) -> bool:
    """Whether the value serves as it is: it has the full size, or the reader is pointwise and another operand brings that size."""
    if tuple(value.shape) == tuple(node.meta["val"].shape):
        return True
    others = [n for n in reader.all_input_nodes if n is not node]
    return torch.Tag.pointwise in getattr(reader.target, "tags", ()) and any(
        (_form(n) or ("", ""))[1] == (_form(reader) or ("", "-"))[1] for n in others
    )


def _expanded(program: Program, node: fx.Node, constant: fx.Node, reader: fx.Node) -> fx.Node:
    with program.graph.inserting_before(reader):
        sizes = [_size_node(program, s) if _is_dynamic(s) else int(s) for s in node.meta["val"].shape]
        new: fx.Node = program.graph.call_function(aten.expand.default, (constant, sizes))
    new.meta = dict(node.meta)
    return new


def _size_node(program: Program, size: torch.SymInt) -> fx.Node:
    """The size read from a free input that has this symbol on an axis."""
    free = [n for n in program.placeholders() if not n.meta.get("bound")]
    places = [(n, axis) for n in free for axis, s in enumerate(n.meta["val"].shape) if str(s) == str(size)]
    if not places:
        raise InputError("the binding can't be made", why=f"no other input has the dynamic size {size}", do="bind at another place")
    new: fx.Node = program.graph.call_function(aten.sym_size.int, places[0])
    new.meta = {"val": size, "module": ("",)}
    return new


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
    other = {s: min(max(low, 3), high) for s, (low, high) in program.symbols.items()}
    for example in (program.example, at_sizes(program.example, [v.shape for v in program.inputs], other)):
        _compare_on(example, program, variant, bindings)


def _compare_on(example: Sequence[Tensor], program: Program, variant: Program, bindings: Mapping[str, Tensor]) -> None:
    full = [bindings[v.name].expand_as(t) if v.name in bindings else t for v, t in zip(program.inputs, example, strict=True)]
    free = [t for v, t in zip(program.inputs, example, strict=True) if v.name not in bindings]
    for value, a, b in zip(program.outputs, run(program, full), run(variant, free), strict=True):
        limit = LIMIT.get(a.dtype, 5e-2)
        if not (error := relative_error(a, b)) <= limit:
            raise VerifierError(
                f"binding {', '.join(bindings)} changes output {value.name}", why=f"relative error {error:.1e}, limit {limit:.0e}"
            )
