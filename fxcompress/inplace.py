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


class NotFunctional(Exception):  # noqa: N818 - caught by capture, never seen by a user
    """An in-place op that has no functional form here, or a wrapper whose body can't be inlined as it stands."""


def functionalise(graph: fx.Graph) -> None:
    """Replace every in-place op. NotFunctional if it writes an input or a constant, or memory that is read later in another way than by slices,
    and for ops without a functional form."""
    for node in [n for n in graph.nodes if _mutates(n)]:
        find = _alias_groups(graph)
        target: fx.Node = node.args[0]
        shared = [m for m in graph.nodes if m is not node and find(m) is find(target)]
        if any(m.op in ("placeholder", "get_attr") for m in shared):
            raise NotFunctional(f"{node.name}: {node.target} writes an input or a constant")
        late = {m for m in shared if m < node and any(u > node for u in m.users)}
        _Write(node, late).run()


class _Write:
    """One in-place op. new: node -> what it is after the write, as far as that was needed."""

    def __init__(self, node: fx.Node, late: set[fx.Node]) -> None:
        self.node, self.late, self.graph = node, late, node.graph
        self.last, self.new = node, dict[fx.Node, fx.Node]()

    def run(self) -> None:
        target: fx.Node = self.node.args[0]  # type: ignore[assignment]
        after = {m: [u for u in m.users if u > self.node] for m in (*self.late, target)}
        self.new[target] = self._written(target)
        if self.late - {target}:
            part = target
            while part.target in SLICES:
                whole: fx.Node = part.args[0]  # type: ignore[assignment]
                self.new[whole] = self._insert(SLICES[part.target], whole, self.new[part], *part.args[1:], **part.kwargs)
                part = whole
        for member, readers in after.items():
            value = self._after(member)
            for reader in readers:
                reader.replace_input_with(member, value)
        for reader in list(self.node.users):  # the op gives what it wrote to
            if self.new[target] is not self.node and reader is not self.new[target]:
                reader.replace_input_with(self.node, self.new[target])

    def _written(self, target: fx.Node) -> fx.Node:
        """The target's new value, of its dtype and shape: the op itself, made functional; the value that is copied."""
        node, before = self.node, target.meta["val"]
        if node.target is aten.copy_.default:
            source = node.args[1]
            value = source if isinstance(source, fx.Node) else None
        else:
            form = _functional_form(node)
            made = fake_value(form, node.args, dict(node.kwargs)) if form is not None else None
            value = node if isinstance(made, Tensor) else None
            if value is not None:
                node.target, node.meta = form, {**node.meta, "val": made}  # type: ignore[assignment]
        if value is None or not isinstance(before, Tensor):
            raise NotFunctional(f"{node.name}: {node.target} has no functional form")
        if value.meta["val"].dtype != before.dtype:
            value = self._insert(aten.to.dtype, value, before.dtype)
        sizes, wanted = value.meta["val"].shape, before.shape
        if len(sizes) > len(wanted):
            raise NotFunctional(f"{node.name} would make {target.name} another shape")
        return value if len(sizes) == len(wanted) and all(map(_same, sizes, wanted)) else self._insert(aten.expand_as.default, value, target)

    def _after(self, member: fx.Node) -> fx.Node:
        """What a node that shares the memory is after the write."""
        if member not in self.new:
            if member.target not in SLICES:
                raise NotFunctional(f"{self.node.name}: {self.node.target} writes memory that {member.name} reads")
            source = self._after(member.args[0])  # type: ignore[arg-type]
            self.new[member] = self._insert(member.target, source, *member.args[1:], **member.kwargs)  # type: ignore[arg-type]
        return self.new[member]

    def _insert(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {**self.node.meta, "val": fake_value(target, args, kwargs)}
        self.last = made
        return made


def _same(a: Any, b: Any) -> bool:
    return str(a) == str(b)  # a symbolic size that is compared otherwise becomes a guard


def _functional_form(node: fx.Node) -> Callable[..., Any] | None:
    packet, overload = str(node.target._schema.name).split("::")[1], node.target._overloadname  # type: ignore[union-attr]
    form: Callable[..., Any] | None = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    return form if packet.endswith("_") else None


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _alias_groups(graph: fx.Graph) -> Callable[[Any], Any]:
    """A find function: nodes whose values may share memory have one representative."""
    parent: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        while parent.setdefault(x, x) is not x:
            x = parent[x]
        return x

    for node in graph.nodes:
        for source in _aliased(node):
            parent[find(node)] = find(source)
    return find


def _aliased(node: fx.Node) -> Iterator[fx.Node]:
    if node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem and size arithmetic
        yield from (a for a in node.args if isinstance(a, fx.Node) and not (node.target is operator.getitem and _makes_several(a)))
        return
    if schema.name == "aten::to" and _dtype(node) != _dtype(node.args[0]):
        return  # a cast that casts
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None:
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node))


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _makes_several(node: fx.Node) -> bool:
    """Whether an op returns several tensors of their own, as topk does, and not parts of one, as chunk does."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and len(schema.returns) > 1 and all(r.alias_info is None for r in schema.returns)
