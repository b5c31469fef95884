"""In-place ops of a flat graph as functional ones. What writes to a slice makes the whole with the slice put back, and every later reader of
the same memory reads it from there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.edit import fake_value

aten = torch.ops.aten
SLICES: Mapping[Any, Callable[..., Any]] = {  # op that shows a part of a value -> the op that puts a part back
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}

DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
RETURNING = (  # ops that may give what they were given, and don't say so
    *DROPOUTS,
    *("type_as", "einsum", "meshgrid", "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d"),
)


class NotFunctional(Exception):  # noqa: N818 - caught by capture, never seen by a user
    """An in-place op that has no functional form here, or a wrapper whose body can't be inlined as it stands."""


def functionalise(graph: fx.Graph) -> None:
    """Replace every in-place op. NotFunctional if it writes an input or a constant, or memory that is read later in another way than by slices,
    and for ops without a functional form."""
    groups: Mapping[fx.Node, list[fx.Node]] = {}
    for node in [n for n in graph.nodes if _mutates(n)]:
        groups = groups or _alias_groups(graph)
        target = node.args[0]
        if isinstance(target, fx.Node) and (idle := [m for m in groups[target] if _is_idle(m)]):
            for dropout in idle:
                dropout.replace_all_uses_with(dropout.args[0])  # type: ignore[arg-type]
            groups, target = _alias_groups(graph), node.args[0]
        if not isinstance(target, fx.Node) or torch.Tag.inplace_view in node.target.tags:
            raise NotFunctional(f"{node.name}: {node.target} writes several values, or changes a shape")
        shared = [m for m in groups[target] if m is not node]
        if any(m.op in ("placeholder", "get_attr") for m in shared):
            raise NotFunctional(f"{node.name}: {node.target} writes an input or a constant")
        late = {m for m in shared if m < node and any(u > node for u in m.users)}
        if _Write(node, target, late).run():
            groups = {}


class _Write:
    """One in-place op. new: node -> what it is after the write, as far as that was needed."""

    def __init__(self, node: fx.Node, target: fx.Node, late: set[fx.Node]) -> None:
        self.node, self.target, self.late = node, target, late
        self.last, self.new = node, dict[fx.Node, fx.Node]()

    def run(self) -> bool:
        """Whether nodes were added."""
        after = {m: [u for u in m.users if u > self.node] for m in (*self.late, self.target, self.node)}
        part, value = self.target, self._written()
        while self.late - {self.target} and part.target in SLICES:
            whole: fx.Node = part.args[0]  # type: ignore[assignment]
            part, value = whole, self._insert(SLICES[part.target], whole, value, *part.args[1:], **part.kwargs)
        self.new[part] = value  # all else is read from there, so that a later write to a part is one to the whole
        self.new[self.node] = self._after(self.target)
        for member, readers in after.items():
            value = self._after(member)
            for reader in readers:
                if value is not member:
                    reader.replace_input_with(member, value)
        return self.last is not self.node

    def _written(self) -> fx.Node:
        """The target's new value, of its dtype and shape and with memory of its own: the op itself, made functional, or a copy."""
        node, before = self.node, self.target.meta.get("val")
        if not isinstance(before, Tensor):
            raise NotFunctional(f"{node.name} writes what is no tensor")
        if node.target is aten.copy_.default and isinstance(node.args[1], fx.Node):
            value = self._cast(node.args[1], before.dtype)
            return self._insert(
                aten.clone.default, value if _are_same(value, before) else self._insert(aten.expand_as.default, value, self.target)
            )
        form = _functional_form(node)
        made = fake_value(form, node.args, dict(node.kwargs)) if form is not None else None
        if not isinstance(made, Tensor):
            raise NotFunctional(f"{node.name}: {node.target} has no functional form")
        node.target, node.meta = form, {**node.meta, "val": made}  # type: ignore[assignment]
        if not _are_same(node, before):
            raise NotFunctional(f"{node.name} would make {self.target.name} another shape")
        return self._cast(node, before.dtype)

    def _cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return value if _dtype(value) == dtype else self._insert(aten.to.dtype, value, dtype)

    def _after(self, member: fx.Node) -> fx.Node:
        """What a node that shares the memory is after the write."""
        if member not in self.new:
            if member.target not in SLICES:
                raise NotFunctional(f"{self.node.name}: {self.node.target} writes memory that {member.name} reads")
            source = self._after(member.args[0])  # type: ignore[arg-type]
            self.new[member] = self._insert(member.target, source, *member.args[1:], **member.kwargs)  # type: ignore[arg-type]
        return self.new[member]

    def _insert(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.node.graph.inserting_after(self.last):
            made = self.node.graph.call_function(target, args, kwargs)
        made.meta = {**self.node.meta, "val": fake_value(target, args, kwargs)}
        self.last = made
        return made


def _are_same(value: fx.Node, wanted: Tensor) -> bool:
    """Whether the shapes are. A symbolic size that is compared otherwise than by name becomes a guard."""
    return list(map(str, value.meta["val"].shape)) == list(map(str, wanted.shape))


def _functional_form(node: fx.Node) -> Callable[..., Any] | None:
    packet, overload = str(node.target._schema.name).split("::")[1], node.target._overloadname  # type: ignore[union-attr]
    form: Callable[..., Any] | None = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    return form if packet.endswith("_") else None


def _is_idle(node: fx.Node) -> bool:
    """Whether it is a dropout that gives its input itself."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name.removeprefix("aten::") in DROPOUTS and len(node.args) > 2 and node.args[2] is False


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _alias_groups(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Per node those whose values may share its memory, itself among them, in order."""
    parent: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        while parent.setdefault(x, x) is not x:
            x = parent[x]
        return x

    for node in graph.nodes:
        for source in _aliased(node):
            parent[find(node)] = find(source)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        members.setdefault(find(node), []).append(node)
    return {node: members[find(node)] for node in graph.nodes}


def _aliased(node: fx.Node) -> Iterator[fx.Node]:
    if node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem and size arithmetic
        yield from (a for a in node.args if isinstance(a, fx.Node) and not (node.target is operator.getitem and _makes_several(a)))
        return
    if schema.name == "aten::to" and _dtype(node) != _dtype(node.args[0]):
        return  # a cast that casts
    if schema.name.removeprefix("aten::") in RETURNING:
        yield from node.all_input_nodes
        return
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None:
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node))


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _makes_several(node: fx.Node) -> bool:
    """Whether an op returns several tensors of their own, as topk does, and not parts of one, as chunk does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and len(schema.returns) > 1 and all(r.alias_info is None for r in schema.returns)
