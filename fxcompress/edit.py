"""Edit: the only way a Program changes. Every change is journalled, and until `commit` the whole edit can be rolled back.

Nodes are never removed while an edit is open: a replaced node only loses its readers. So the old graph stays runnable beside the new one
(`before`), which is what contracts compare; `commit` sweeps what nobody reads any more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxcompress.program import Program, module_path, place_of

aten = torch.ops.aten


@dataclass
class Site:
    """One application of a pass: what it read, replaced and made. `name`: module path and node."""

    name: str
    node: str
    module: str
    reason: str = ""
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)  # old value -> the value its readers get now
    inserted: list[fx.Node] = field(default_factory=list)
    touched: list[fx.Node] = field(default_factory=list)  # old nodes that compute the same value in another way: new weights, new arguments
    carried: list[fx.Node] = field(default_factory=list)  # old nodes that compute as before, from or to values that carry a change
    constants: list[str] = field(default_factory=list)
    erased: list[str] = field(default_factory=list)
    places: list[fx.Node] | None = None  # what a recipe leaves out to leave this site alone: all of these; [] where it can't. None: its node


class Step(NamedTuple):
    """A node as it was when the edit began."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[fx.Node, ...]


class Edit:
    """Changes of one pass to one program. Use `with edit.site(node):` around the changes of one site."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.sites: list[Site] = []
        self.before: list[Step] = []  # filled when the first site is opened
        self.constants_before: dict[str, Tensor] = {}
        self.versions_before: dict[str, int] = {}  # of their numbers: one more for every write in place
        self.loose: dict[fx.Node, None] = {}  # old values that nothing is said about any more, and no site compares
        self.changes: dict[fx.Node, list[Callable[[Any], Any]]] = {}  # per old value what happens to it, one after the other; else nothing
        self.rewired: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}  # per reader what it was given in place of what, one after the other
        self.updated: set[fx.Node] = set()  # old nodes that were given other arguments
        self.made: dict[fx.Node, Callable[[Tensor], Tensor]] = {}  # inserted pairs, with what they make of the value they quantise
        self.nulls: set[fx.Node] = set()  # values whose zeros are 0 for every input, as the pass has shown: nothing hides behind them
        self._undo: list[Callable[[], None]] = []
        self._erased: dict[fx.Node, None] = {}
        self._open: Site | None = None

    @contextmanager
    def site(self, node: fx.Node, reason: str = "") -> Iterator[Site]:
        """Open one site at a node. The changes made inside belong to it."""
        if not self.before:
            self.before = [Step(n, n.target, n.args, n.kwargs, tuple(n.all_input_nodes)) for n in self.graph.nodes]
            self.constants_before = dict(self.program.constants)
            self.versions_before = {name: version(t) for name, t in self.constants_before.items()}
        self._open = Site(place_of(node), node.name, module_path(node), reason)
        self.sites.append(self._open)
        try:
            yield self._open
        finally:
            self._open = None

    def insert(
        self, target: Callable[..., Any], *args: Any, like: fx.Node, before: fx.Node | None = None, val: Any = None, **kwargs: Any
    ) -> fx.Node:
        """A new op node, before `before` or `like`; module path and source come from `like`. val: its fake value, computed if left out."""
        with self.graph.inserting_before(before or like):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**like.meta, "val": val if val is not None else fake_value(target, args, kwargs, like)}
        return self._inserted(node)

    def constant(self, name: str, tensor: Tensor, *, like: fx.Node, before: fx.Node | None = None) -> fx.Node:
        """A node reading a new constant; the name gets a suffix if taken."""
        name = self._free(name)
        with self.graph.inserting_before(before or like):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta = {"module": like.meta.get("module", ("",)), "val": tensor}
        self.program.constants[name] = tensor
        self._undo.append(lambda: self._forget(name))
        self._site().constants.append(name)
        return self._inserted(node)

    def replace(self, old: fx.Node, new: fx.Node, readers: Iterable[fx.Node] | None = None) -> None:
        """Every reader of old, or only those given, reads new, except nodes inserted at this site."""
        site = self._site()
        own = set(site.inserted)
        for reader in [u for u in (old.users if readers is None else readers) if u not in own]:
            self._rewire(reader, old, new)
        site.replaced[old] = new

    def fold(self, constant: fx.Node, tensor: Tensor, resized: bool = False) -> None:
        """The constant gets another value of the same dtype and, unless it is said to be resized, shape; its readers are checked with it."""
        name, old = str(constant.target), self.program.constants[str(constant.target)]
        if (tensor.shape != old.shape and not resized) or tensor.dtype != old.dtype:
            raise ValueError(f"fold of {name}: {tensor.dtype}{list(tensor.shape)} in place of {old.dtype}{list(old.shape)}")
        self.program.constants[name] = tensor
        self._undo.append(lambda: self.program.constants.__setitem__(name, old))
        if resized:
            self.reshape(constant, list(tensor.shape))
        self._site().constants.append(name)
        readers = [constant if u.op == "output" else u for u in constant.users]
        self._site().touched.extend(u for u in readers if u not in self._site().touched)

    def carry(self, node: fx.Node, change: Callable[[Any], Any]) -> None:
        """Record that the node's value is another one from now on: `change` of the old. The ops around it are checked under the record."""
        self.changes.setdefault(node, []).append(change)
        self._undo.append(lambda: _drop_last(self.changes, node))
        made = node.args[0] if node.target is operator.getitem else node  # a tuple is checked whole
        around = [n for n in (made, *node.users) if isinstance(n, fx.Node) and n.op == "call_function"]
        self._site().carried.extend(n for n in around if n not in self._site().carried)

    def makes(self, pair: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Record what an inserted pair makes of the value it quantises: a Lossy contract, which has no limit, holds it to that."""
        self.made[pair] = change
        self._undo.append(lambda: self.made.pop(pair))  # type: ignore[arg-type]

    def loosen(self, nodes: Iterable[fx.Node]) -> None:
        """Record that these values change in a way that only what swallows it makes good; their readers are checked from what they read."""
        for node in nodes:
            if node not in self.loose:
                self.loose[node] = None
                self._undo.append(lambda n=node: self.loose.pop(n))  # type: ignore[misc]
            self._site().carried.extend(u for u in node.users if u.op == "call_function" and u not in self._site().carried)

    def update(self, node: fx.Node, *args: Any, op: Any = None, **kwargs: Any) -> None:
        """The node computes its value from other arguments, and with another op if one is given."""
        old_op, old_args, old_kwargs = node.target, node.args, node.kwargs
        self._undo.append(lambda: _set(node, old_args, old_kwargs, old_op))
        _set(node, args, kwargs, op or old_op)
        self._site().touched.append(node)
        self.updated.add(node)

    def reshape(self, node: fx.Node, shape: list[Any]) -> None:
        """The node's value has another shape from now on; its fake value follows."""
        meta = node.meta
        self._undo.append(lambda: setattr(node, "meta", meta))
        if isinstance(meta.get("val"), Tensor):
            node.meta = {**meta, "val": meta["val"].new_empty(shape)}

    def mark(self, nodes: Iterable[fx.Node], fact: str) -> None:
        """Note a fact about values for later passes, in their meta; it isn't stored."""
        for node in nodes:
            meta = node.meta
            self._undo.append(lambda n=node, m=meta: setattr(n, "meta", m))  # type: ignore[misc]
            node.meta = {**meta, fact: True}

    def erase(self, node: fx.Node) -> None:
        """Journal that a node goes which nobody reads, or only nodes erased before it; `commit` removes it."""
        if readers := [u for u in node.users if u not in self._erased]:
            raise ValueError(f"{node.name} is still read by {readers[0].name}")
        self._erased[node] = None
        self._site().erased.append(node.name)

    def rollback(self) -> None:
        """The program as it was before this edit."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._erased.clear()
        self.rewired.clear()
        self.updated.clear()
        self.sites.clear()

    def commit(self) -> list[str]:
        """Sweep nodes and constants nobody reads any more, starting from what this edit replaced. Returns the names swept."""
        swept = self._sweep()
        read = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"} | {s.initial for s in self.program.states}
        for name in [n for n in self.program.constants if n not in read]:
            del self.program.constants[name]
        self._undo.clear()
        return swept

    def _sweep(self) -> list[str]:
        touched = {n for site in self.sites for n in site.touched}
        queue = [n for site in self.sites for n in (*site.replaced, *site.inserted)]
        queue += [n for step in self.before if step.node in touched for n in step.inputs]
        queue += self._erased
        swept: dict[fx.Node, None] = {}
        while queue:
            node = queue.pop()
            if node in swept or node.users or node.op in ("placeholder", "output"):
                continue
            queue.extend(node.all_input_nodes)
            self.graph.erase_node(node)
            swept[node] = None
        return [n.name for n in swept]

    def _inserted(self, node: fx.Node) -> fx.Node:
        self._site().inserted.append(node)
        self._undo.append(lambda: self.graph.erase_node(node))
        return node

    def _rewire(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        args, kwargs = reader.args, reader.kwargs
        reader.replace_input_with(old, new)
        self.rewired.setdefault(reader, []).append((old, new))
        self._undo.append(lambda: _set(reader, args, kwargs))

    def _free(self, name: str) -> str:
        return (
            name
            if name not in self.program.constants
            else next(f"{name}_{i}" for i in range(1, len(self.program.constants) + 2) if f"{name}_{i}" not in self.program.constants)
        )

    def _forget(self, name: str) -> None:
        del self.program.constants[name]

    def _site(self) -> Site:
        if self._open is None:
            raise ValueError("an edit changes the program only inside `with edit.site(node):`")
        return self._open


def mixed_axes(changes: Iterable[Callable[[Any], Any]]) -> set[int] | None:
    """The axes, counted from the end, along which recorded changes sum the numbers of a value; None where one doesn't say."""
    mixed = [getattr(change, "mixed", None) for change in changes]
    return None if None in mixed else set[int]().union(*mixed)  # type: ignore[arg-type]


def version(constant: Tensor) -> int:
    """How often the numbers were written in place; 0 where torch doesn't count."""
    return 0 if constant.is_inference() else constant._version


def fake_value(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], like: fx.Node | None = None) -> Any:
    """The fake value of an op from its arguments' fake values; None where one of them has none. like: a node of the same fake mode, for an op
    without tensor arguments."""
    nodes = [n for n in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
    modes = (getattr(n.meta.get("val"), "fake_mode", None) for n in (*nodes, *([like] if like else [])))
    mode = next((m for m in modes if m is not None), None)
    if mode is None or any(n.meta.get("val") is None for n in nodes):
        return None
    values = fx.node.map_arg((tuple(args), kwargs), lambda n: _faked(n.meta["val"], mode))
    with mode:
        return target(*values[0], **values[1])


def op_node(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new op where the graph inserts, outside any edit; module path and source come from `like`, an op."""
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": fake_value(target, args, {}, like.all_input_nodes[0])}
    return node


def _faked(value: Any, mode: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) and not hasattr(value, "fake_mode") else value


def _drop_last(changes: dict[fx.Node, list[Any]], node: fx.Node) -> None:
    changes[node].pop()
    if not changes[node]:
        del changes[node]


def _set(node: fx.Node, args: Any, kwargs: Any, target: Any = None) -> None:
    node.args, node.kwargs, node.target = args, kwargs, target or node.target
