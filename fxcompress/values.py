"""The old values around an open edit, as far as the walk of the old graph has come, under the changes that the edit recorded; and others that
stand in for them, to see what the probe's numbers hide."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxcompress.contract import ROUNDINGS
from fxcompress.edit import Edit, Step
from fxcompress.interpret import evaluate
from fxcompress.measure import distances, rounded
from fxcompress.pairs import Pair, Pairs

DRAWS = 4  # how often operands are rounded at random
Floors = tuple[Tensor, ...]  # per tensor of a value, and per number of it, the least scale that its error is beside; () for none


class Values:
    """old: those that are kept for comparisons to come. constants, constants_before: now, and before the edit. is_thorough: whether changes are
    computed in float64."""

    def __init__(self, edit: Edit, pairs: Pairs) -> None:
        self.edit, self.pairs = edit, pairs
        self.taken: dict[Any, dict[Any, fx.Node]] = {}  # per tuple, the changed values that are taken out of it
        for node in edit.changes:
            if node.target is operator.getitem and node in pairs.steps:
                made, place = pairs.steps[node].args
                self.taken.setdefault(made, {})[place] = node
        self.old: dict[fx.Node, Any] = {}
        self.constants: Mapping[str, Tensor] = edit.program.constants
        self.constants_before: Mapping[str, Tensor] = edit.constants_before
        self.is_thorough = False
        self._known: dict[fx.Node, dict[fx.Node, tuple[Any, Any]]] = {}  # per old value and carrier of its changes: before, after

    @cached_property
    def read(self) -> dict[fx.Node, set[Any]]:
        """Per value the parts that are taken of it, before or now; None: all."""
        uses = [(s.target, s.args, s.inputs) for s in self.edit.before]
        uses += [(n.target, n.args, tuple(n.all_input_nodes)) for n in self.edit.graph.nodes]
        found: dict[fx.Node, set[Any]] = {}
        for target, args, inputs in uses:
            for made in inputs:
                found.setdefault(made, set()).add(args[1] if target is operator.getitem else None)
        return found

    def forget(self, node: fx.Node) -> None:
        """No comparison needs the value any more."""
        del self.old[node]
        self._known.pop(node, None)

    @contextmanager
    def thoroughly(self) -> Iterator[None]:
        """Changes in float64, for a moment."""
        self.is_thorough, known, self._known = True, self._known, {}
        try:
            yield
        finally:
            self.is_thorough, self._known = False, known

    def walk(self, wanted: set[fx.Node], probe: Sequence[Tensor]) -> Iterator[fx.Node]:
        """Evaluate the old graph as far as `wanted` needs; keep wanted values in self.old."""
        steps = self.pairs.before(wanted)
        uses = Counter(n for s in steps for n in (s.node, *s.inputs))
        inputs = dict(zip((s.node for s in self.edit.before if s.node.op == "placeholder"), probe, strict=False))
        values: dict[fx.Node, Any] = {}
        for step in steps:
            values[step.node] = inputs[step.node] if step.node in inputs else _evaluate(step, values, self.constants_before)
            if step.node in wanted:
                self.old[step.node] = values[step.node]
            for used in (step.node, *step.inputs):
                uses[used] -= 1
                if not uses[used]:
                    del values[used]
            yield step.node

    @contextmanager
    def standing_in(self, values: Mapping[fx.Node, Any], constants: Mapping[fx.Node, Tensor] = MappingProxyType({})) -> Iterator[None]:
        """Other old values, and other constants under their recorded changes, for a moment."""
        kept = self.old, self.constants, self.constants_before
        self.old = {**self.old, **values}
        if constants:
            self.constants_before = {**self.constants_before, **{str(n.target): t for n, t in constants.items()}}
            self.constants = {**self.constants, **{str(n.target): self.undergone(n, t) for n, t in constants.items()}}
        try:
            yield
        finally:
            self.old, self.constants, self.constants_before = kept

    def changed(self, node: fx.Node, stand_in: fx.Node) -> Any:
        """An old value under the change recorded for it, or for the new node that stands for it; a tuple under those of what is taken out, with
        None for what nobody takes where anything is."""
        value = self.old[node]
        if stand_in in self.edit.changes or (node in self.edit.changes and isinstance(value, Tensor)):
            carrier = stand_in if stand_in in self.edit.changes else node
            known = self._known.setdefault(node, {})
            if carrier not in known or known[carrier][0] is not value:  # another value stands there for a moment
                known[carrier] = value, self.undergone(carrier, value)
            return known[carrier][1]
        if isinstance(value, tuple | list):
            taken = self.taken.get(node, {})
            read = self.read.get(node, set()) | self.read.get(stand_in, set()) or {None}
            parts = [v if {i, None} & read else None for i, v in enumerate(value)]
            return type(value)(self.undergone(taken[i], v) if i in taken else v for i, v in enumerate(parts))
        return self.undergone(node, value)

    def undergone(self, node: fx.Node, value: Any) -> Any:
        """A value under the changes recorded for this node."""
        for change in self.edit.changes.get(node, ()):
            wide = self.is_thorough and isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            value = change(value.to(torch.promote_types(value.dtype, torch.float64))).to(value.dtype) if wide else change(value)
        return value

    def operands(self, pair: Pair) -> dict[fx.Node, Any]:
        """What the new node is computed from, from old values."""
        env = {node: self.changed(root, node) for node, root in pair.frontier.items()}
        for node in between(pair.new, env) if not self.pairs.is_old(pair.new) else ():
            env[node] = evaluate(node, env, self.constants)
        return env

    def old_value(self, cone: Sequence[Step], seen: Callable[[Any], Any]) -> Any:
        """The last of the steps from old values; seen: what becomes of each step's value."""
        values = dict(self.old)
        for step in cone:
            values[step.node] = seen(_evaluate(step, values, self.constants_before))
        return values[cone[-1].node]

    @contextmanager
    def instead(
        self,
        pair: Pair,
        cone: Sequence[Step] | None,
        values: Mapping[fx.Node, Any],
        constants: Mapping[fx.Node, Tensor] = MappingProxyType({}),
        seen: Callable[[Any], Any] = lambda value: value,
    ) -> Iterator[None]:
        """As `standing_in`, with the old value of the pair computed from these by the cone, if there is one. seen: as for `old_value`."""
        with self.standing_in(values, constants):
            if cone is not None:
                self.old[pair.old] = self.old_value(cone, seen)
            yield

    def floors(self, pair: Pair, env: Mapping[fx.Node, Any], after: Any, limit: float) -> Floors:
        """Where a limit allows what ROUNDINGS roundings of all that the old value is computed from do to it; of the new one where the old one's
        way isn't known. A sum of numbers that cancel isn't known any better. env: the new node's operands; after: its value."""
        cone = self.pairs.cone(pair)
        if cone:
            noise = _farthest(self.changed(pair.old, pair.new), lambda rng: self._old_rounded(pair, cone, rng))
        else:
            noise = _farthest(after, lambda rng: self._rounded(pair, env, rng))
        return tuple(n * (ROUNDINGS / limit) for n in noise)

    def _rounded(self, pair: Pair, env: Mapping[fx.Node, Any], rng: torch.Generator) -> Any:
        """The new value from rounded ones."""
        off = {node: rounded(env[node], rng) for node in pair.frontier}
        for node in between(pair.new, off):
            off[node] = rounded(evaluate(node, off, self.constants), rng)
        return evaluate(pair.new, off, self.constants)

    def _old_rounded(self, pair: Pair, cone: Sequence[Step], rng: torch.Generator) -> Any:
        """The old value, under its changes, from rounded ones."""
        off = {root: rounded(self.old[root], rng) for root in pair.frontier.values()}
        with self.instead(pair, cone, off, seen=lambda value: rounded(value, rng)):
            return self.changed(pair.old, pair.new)

    def is_recorded(self, leaf: fx.Node) -> bool:
        """Whether a constant is an old one, unchanged or with its change on record."""
        if leaf.op != "get_attr" or leaf not in self.pairs.steps:
            return False
        name = str(leaf.target)
        return leaf in self.edit.changes or self.edit.program.constants[name] is self.edit.constants_before[name]


def between(new: fx.Node, env: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Constants and inserted nodes the new node is computed from, in order."""
    found: dict[fx.Node, None] = {}
    stack = [new]
    while stack:
        if missing := [n for n in stack[-1].all_input_nodes if n not in env and n not in found]:
            stack.extend(missing)
        else:
            found[stack.pop()] = None
    del found[new]
    return list(found)


def _farthest(exact: Any, again: Callable[[torch.Generator], Any]) -> Floors:
    """Per number of a value how far other roundings of it are off."""
    farthest = tuple(torch.zeros(x.shape, dtype=torch.float64) for x in leaves(exact))
    for seed in range(DRAWS):
        farthest = tuple(map(torch.maximum, farthest, map(distances, *both(exact, again(torch.Generator().manual_seed(seed))))))
    return farthest


def both(old: Any, new: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of two values that are compared."""
    return leaves(old), leaves(like(old, new))


def like(old: Any, new: Any) -> Any:
    """A new value without the parts of a tuple that the old one lacks."""
    is_tuple = isinstance(old, tuple | list) and isinstance(new, tuple | list) and len(old) == len(new)
    return type(new)(b if a is not None else None for a, b in zip(old, new, strict=True)) if is_tuple else new


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a value, and its numbers as such."""
    return [v if isinstance(v, Tensor) else torch.tensor(v) for v in pytree.tree_leaves(value) if v is not None]


def _evaluate(step: Step, values: Mapping[fx.Node, Any], constants: Mapping[str, Tensor]) -> Any:
    if step.node.op == "get_attr":
        return constants[str(step.target)]
    args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: values[n])
    return step.target(*args, **kwargs)
