"""Contracts: what a pass may do to the numbers, and how it is measured on the user's own model.

Checked edge by edge. Every replaced value is recomputed by its new nodes from the OLD values around them and compared with the OLD value, so
errors don't add up, overlapping edits don't mix, and the guilty node is named. Where an edit records that values change (`Edit.carry`), old
values are taken under their recorded changes on both sides. A comparison that can't bite (an operand of the new node could
change sign unseen) is `unverified`, never passed.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxcompress.edit import Edit, Site, Step
from fxcompress.interpret import evaluate
from fxcompress.measure import relative_error
from fxcompress.numerics import formats, noise
from fxcompress.program import Program

Verdict = Literal["held", "broken", "unverified"]
MEASURED = "measured"
EXACT_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Measured:
    """One compared value of one site. figure and limit: relative error (Exact: figure <= limit) or SQNR in dB (Bounded: figure >= limit)."""

    site: str
    value: str
    figure: float
    limit: float
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class Exact:
    """The same function up to floating-point noise: max |new - old| / rms(old) <= limit (by dtype if not given)."""

    limit: float | None = None
    kind = "exact"
    unit = "relative error"

    def figure(self, old: Tensor, new: Tensor) -> float:
        """max |new - old| / rms(old)."""
        return relative_error(old, new)

    def bound(self, old: Tensor, new: fx.Node) -> float:
        """The limit for this value."""
        return self.limit if self.limit is not None else EXACT_LIMIT.get(old.dtype, 0.0)

    def holds(self, figure: float, bound: float) -> bool:
        """Whether the figure is within the bound; NaN never is."""
        return figure <= bound


@dataclass(frozen=True)
class Bounded:
    """May lose what the number format must lose: SQNR >= that of an ideal quantiser of its width on the measured range, less 3 dB.

    Of fewer than 32 entries every one may be half a step off by chance, 10 log10 3 = 4.8 dB beyond the mean: less 5 dB there.
    The measured range is the one a pass filed under meta[MEASURED] of the dequantize node, (lo, hi) from calibration; else that of the value.
    limit: another bound in dB, from the recipe.
    """

    limit: float | None = None
    kind = "bounded"
    unit = "dB"
    margin, few, margin_of_few = 3.0, 32, 5.0

    def figure(self, old: Tensor, new: Tensor) -> float:
        """10 log10 (sum old² / sum (new - old)²). NaN where one is not finite and the other not the same; -inf for unequal integers."""
        if not old.is_floating_point():
            return math.inf if torch.equal(old, new) else -math.inf
        if math.isfinite(old.sum()) and math.isfinite(new.sum()):  # the usual case, without masks as large as a weight
            return noise.sqnr(old, new)
        odd = ~(old.isfinite() & new.isfinite())
        if relative_error(old[odd], new[odd]) > 0:
            return math.nan
        return noise.sqnr(old.masked_fill(odd, 0), new.masked_fill(odd, 0))

    def bound(self, old: Tensor, new: fx.Node) -> float:
        """The ideal quantiser's SQNR for the format and block the new node names, less the margin."""
        if self.limit is not None:
            return self.limit
        if new.target is not torch.ops.fxc.dequantize.default:
            raise ValueError(f"{new.name} is no dequantize: a Bounded pass that inserts other ops states its limit")
        _, _, zero_point, format_name, block = new.args
        format, symmetric = formats.format_of(str(format_name)), zero_point is None
        margin = self.margin if old.numel() >= self.few else self.margin_of_few
        if MEASURED in new.meta:
            lo, hi = new.meta[MEASURED]
            return noise.static_sqnr(old, format, lo, hi, symmetric) - margin
        return noise.ideal_sqnr(old, format, tuple(block), symmetric) - margin  # type: ignore[arg-type]

    def holds(self, figure: float, bound: float) -> bool:
        """Whether the figure reaches the bound; NaN never does."""
        return figure >= bound


@dataclass(frozen=True)
class Lossy(Bounded):
    """Loss is the point: measured and reported, without a limit."""

    kind = "lossy"

    def bound(self, old: Tensor, new: fx.Node) -> float:
        """No limit."""
        return float("-inf")


Contract = Exact | Bounded | Lossy


@torch.no_grad()
def check(program: Program, edit: Edit, contract: Contract, probe: Sequence[Tensor]) -> list[Measured]:
    """Measure every site of an open edit. One walk of the old graph on the probe, restricted to what the sites read; none if they read
    constants only. Returns one entry per compared value."""
    checker = _Checker(program, edit, contract)
    return list(checker.run(probe))


class _Checker:
    def __init__(self, program: Program, edit: Edit, contract: Contract) -> None:
        self.program, self.edit, self.contract = program, edit, contract
        self.steps = {s.node: s for s in edit.before}
        self.position = {s.node: i for i, s in enumerate(edit.before)}
        self.origin = self._origins()
        self.touched = {n for site in edit.sites for n in site.touched}
        self.carried = _first_sites(edit, self.touched)
        self.taken: dict[Any, dict[Any, fx.Node]] = {}  # per tuple, the changed values that are taken out of it
        for node in edit.changes:
            if node.target is operator.getitem and node in self.steps:
                self.taken.setdefault(self.steps[node].args[0], {})[self.steps[node].args[1]] = node
        self.old: dict[fx.Node, Any] = {}

    def run(self, probe: Sequence[Tensor]) -> Iterator[Measured]:
        """Walk the old graph; compare each value as soon as everything it needs has been seen."""
        pending: dict[fx.Node, list[_Pair]] = {}
        readers: dict[fx.Node, int] = {}
        for pair in self._pairs():
            for node in pair.needed:
                readers[node] = readers.get(node, 0) + 1
            pending.setdefault(max(pair.needed, key=self.position.__getitem__), []).append(pair)
        for node in self._walk(set(readers), probe):
            for pair in pending.pop(node, ()):
                yield self._compare(pair)
                for used in pair.needed:
                    readers[used] -= 1
                    if not readers[used]:
                        del self.old[used]

    def _pairs(self) -> Iterator[_Pair]:
        for site in self.edit.sites:
            touched = (n for n in site.touched if n not in self.edit.loose)
            for old, new in [*site.replaced.items(), *((n, n) for n in touched)]:
                if old in self.steps or old in self.origin:
                    yield _Pair(site, self._root(old), new, self._frontier(new))
        for node, site in self.carried.items():
            yield _Pair(site, node, node, self._frontier(node))

    def _origins(self) -> dict[fx.Node, fx.Node]:
        """New node -> the old node whose value it stands for. What replaces a helper node of another site stands for none."""
        origin: dict[fx.Node, fx.Node] = {}
        for old, new in ((old, new) for site in self.edit.sites for old, new in site.replaced.items()):
            if new not in self.steps and (old in self.steps or old in origin):
                origin[new] = old
        return origin

    def _root(self, node: fx.Node) -> fx.Node:
        """The old value a node stands for: itself, or what it replaced, through earlier sites of this edit."""
        while node not in self.steps:
            node = self.origin[node]
        return node

    def _frontier(self, new: fx.Node) -> dict[fx.Node, fx.Node]:
        """The nodes whose OLD values the new node is computed from, each with the old node it stands for. Constants are read anew."""
        if self._is_old(new):
            return {new: new}
        found: dict[fx.Node, fx.Node] = {}
        seen: set[fx.Node] = set()
        stack = list(new.all_input_nodes)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.origin or (node in self.steps and node.op != "get_attr" and node not in self.edit.loose):
                found[node] = self._root(node)
            else:
                stack.extend(node.all_input_nodes)
        return found

    def _is_old(self, node: fx.Node) -> bool:
        return node in self.steps and node not in self.touched and node not in self.carried

    def _walk(self, wanted: set[fx.Node], probe: Sequence[Tensor]) -> Iterator[fx.Node]:
        """Evaluate the old graph as far as `wanted` needs; keep wanted values in self.old."""
        needed = self._ancestors(wanted)
        steps = [s for s in self.edit.before if s.node in needed]
        uses = Counter(n for s in steps for n in (s.node, *s.inputs))
        inputs = dict(zip((s.node for s in self.edit.before if s.node.op == "placeholder"), probe, strict=False))
        values: dict[fx.Node, Any] = {}
        for step in steps:
            values[step.node] = inputs[step.node] if step.node in inputs else _evaluate(step, values, self.edit.constants_before)
            if step.node in wanted:
                self.old[step.node] = values[step.node]
            for used in (step.node, *step.inputs):
                uses[used] -= 1
                if not uses[used]:
                    del values[used]
            yield step.node

    def _ancestors(self, wanted: set[fx.Node]) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(self.steps[node].inputs)
        return seen

    def _compare(self, pair: _Pair) -> Measured:
        before = self._changed(pair.old, pair.new)
        after, flips = self._fresh(pair)
        bound = self.contract.bound(_leaves(before)[0], pair.new)
        figure = self._figure(before, after)
        del after  # a decoded weight may be large, and the flipped ones are as large
        why = ""
        if (verified := self.contract.holds(figure, bound)) and not isinstance(self.contract, Lossy) and pair.new not in self.carried:
            unseen = [operand for operand, flipped in flips if self.contract.holds(self._figure(before, flipped), bound)]
            why = f"{unseen[0]} could change sign unseen" if unseen else ""
        verdict: Verdict = "broken" if not verified else "unverified" if why else "held"
        return Measured(pair.site.name, pair.new.name, figure, bound, verdict, why)

    def _changed(self, node: fx.Node, stand_in: fx.Node) -> Any:
        """An old value under the change recorded for it, or for the new node that stands for it; a tuple under those of what is taken out."""
        value = self.old[node]
        if stand_in in self.edit.changes:
            return self._applied(stand_in, value)
        if isinstance(value, tuple | list):
            taken = self.taken.get(node, {})
            return type(value)(self._applied(taken[i], v) if i in taken else v for i, v in enumerate(value))
        return self._applied(node, value)

    def _applied(self, node: fx.Node, value: Any) -> Any:
        for change in self.edit.changes.get(node, ()):
            value = change(value)
        return value

    def _figure(self, old: Any, new: Any) -> float:
        """The worst figure over the tensors of a value; a value of another form is infinitely far."""
        a, b = _leaves(old), _leaves(new)
        worst = max if isinstance(self.contract, Exact) else min
        if len(a) != len(b) or any((x.shape, x.dtype) != (y.shape, y.dtype) for x, y in zip(a, b, strict=True)):
            return math.inf if isinstance(self.contract, Exact) else -math.inf
        return worst(self.contract.figure(x, y) for x, y in zip(a, b, strict=True))

    def _fresh(self, pair: _Pair) -> tuple[Any, Iterator[tuple[str, Any]]]:
        """The new node's value from old values, and the same with each of its float operands negated in turn."""
        new = pair.new
        env = {node: self._changed(root, node) for node, root in pair.frontier.items()}
        if self._is_old(new):
            return env[new], iter([("the value", _negated(env[new]))])
        for node in self._between(new, env):
            env[node] = evaluate(node, env, self.program.constants)
        floats = [n for n in new.all_input_nodes if isinstance(env[n], Tensor) and env[n].is_floating_point() and env[n].itemsize > 1]
        flips = ((n.name, evaluate(new, {**env, n: -env[n]}, self.program.constants)) for n in floats)
        return evaluate(new, env, self.program.constants), flips

    def _between(self, new: fx.Node, env: Mapping[fx.Node, Any]) -> list[fx.Node]:
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


def _first_sites(edit: Edit, touched: set[fx.Node]) -> dict[fx.Node, Site]:
    """Nodes that only carry changes, each with the first site that says so."""
    found: dict[fx.Node, Site] = {}
    old_nodes = {step.node for step in edit.before}
    gone = {old for site in edit.sites for old in site.replaced}
    for site in edit.sites:
        for node in site.carried:
            if node in old_nodes and node not in touched and node not in gone and node not in edit.loose:
                found.setdefault(node, site)
    return found


@dataclass(frozen=True)
class _Pair:
    """One comparison: the new node's value, computed from `frontier`, against the old node's."""

    site: Site
    old: fx.Node
    new: fx.Node
    frontier: dict[fx.Node, fx.Node]

    @property
    def needed(self) -> set[fx.Node]:
        return {self.old, *self.frontier.values()}


def _leaves(value: Any) -> list[Tensor]:
    return [v if isinstance(v, Tensor) else torch.tensor(v) for v in pytree.tree_leaves(value)]


def _negated(value: Any) -> Any:
    return pytree.tree_map(_negated_leaf, value)


def _negated_leaf(v: Any) -> Any:
    """-v; for integers -v - 1, so that zeros change too, and for booleans the opposite."""
    if isinstance(v, Tensor):
        return -v if v.is_floating_point() or v.is_complex() else ~v
    return -v - 1


def _evaluate(step: Step, values: Mapping[fx.Node, Any], constants: Mapping[str, Tensor]) -> Any:
    if step.node.op == "get_attr":
        return constants[str(step.node.target)]
    args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: values[n])
    return step.node.target(*args, **kwargs)  # type: ignore[operator]
