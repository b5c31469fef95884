"""Contracts: what a pass may do to the numbers, and how it is measured on the user's own model.

Checked edge by edge. Every replaced value is recomputed by its new nodes from the OLD values around them and compared with the OLD value, so
errors don't add up, overlapping edits don't mix, and the guilty node is named. Where an edit records that values change (`Edit.carry`), old
values are taken under their recorded changes on both sides; an input or output can't carry one. Nodes that the edit neither made nor touched
must read what they did, or what the edit put there. A comparison that can't bite (an operand of the new node could change sign unseen) is
`unverified`, never passed.
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
from fxcompress.measure import Histograms, filled, greatest_distance, has_zeros, histograms, relative_error, rounded
from fxcompress.numerics import formats, noise
from fxcompress.program import Program
from fxcompress.wiring import misreads

Verdict = Literal["held", "broken", "unverified"]
MEASURED = "measured"
EXACT_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

HALF = 0.501  # of a step, with a little for rounding
CONE = 64  # nodes between operands and an old value that is computed anew
HIDDEN = 1e-5  # relative: rounding of numbers that no pass has seen, where the limit is 0
DRAWS, ROUNDINGS = 4, 16  # how often operands are rounded at random, and how many roundings a value may be off by


@dataclass(frozen=True)
class Measured:
    """One compared value of one site. figure and limit: relative error (Exact: figure <= limit) or SQNR in dB (Bounded: figure >= limit).
    histogram: of the value before and after, where it may lose something."""

    site: str
    value: str
    figure: float
    limit: float
    verdict: Verdict
    why: str = ""
    histogram: Histograms | None = None


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
    """May lose what the number format must lose: SQNR >= that of an ideal quantiser of its width on the measured range, less 3 dB; and in a
    constant without a measured range no block loses more than rounding on its own range may (`noise.excess`).

    Of fewer than 32 entries every one may be half a step off by chance, 10 log10 3 = 4.8 dB beyond the mean: less 5 dB there.
    The measured range is the one a pass filed under meta[MEASURED] of the dequantize node, (lo, hi) from calibration; else that of the value.
    limit: another bound in dB, from the recipe; blocks are then not looked at one by one.
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

    def is_half_step(self, new: fx.Node) -> bool:
        """Whether the node's grid of integers may move no number of its range by more than half a step; another limit leaves that open."""
        is_pair = self.limit is None and new.target is torch.ops.fxc.dequantize.default
        return is_pair and formats.format_of(str(new.args[3])).kind == "int"

    def holds(self, figure: float, bound: float) -> bool:
        """Whether the figure reaches the bound; NaN never does."""
        return figure >= bound

    def worst_block(self, old: Tensor, value: Tensor, new: fx.Node) -> str:
        """The block of a constant that loses most beyond what it may (`noise.excess`), as a sentence; "" if none does."""
        if self.limit is not None or MEASURED in new.meta or new.target is not torch.ops.fxc.dequantize.default:
            return ""
        _, _, zero_point, format_name, block = new.args
        format, sizes = formats.format_of(str(format_name)), tuple(block)  # type: ignore[arg-type]
        excess = noise.excess(old, value, format, sizes, symmetric=zero_point is None)
        worst = excess.argmax()
        if float(excess.flatten()[worst]) <= 1:
            return ""
        at = [int(i) for i in torch.unravel_index(worst, excess.shape)]
        return f"block {at} of {new.name} loses {float(excess.flatten()[worst]):.3g} times what rounding on its own range may lose"


@dataclass(frozen=True)
class Lossy(Bounded):
    """Loss is the point: measured and reported, without a limit."""

    kind = "lossy"

    def bound(self, old: Tensor, new: fx.Node) -> float:
        """No limit."""
        return float("-inf")

    def is_half_step(self, new: fx.Node) -> bool:
        """No limit."""
        return False

    def worst_block(self, old: Tensor, value: Tensor, new: fx.Node) -> str:
        """No limit either."""
        return ""


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
        """Who reads what; then walk the old graph and compare each value as soon as everything it needs has been seen."""
        worst = math.inf if isinstance(self.contract, Exact) else -math.inf
        yield from (Measured(wrong.site, wrong.node.name, worst, 0.0, "broken", wrong.why) for wrong in misreads(self.edit))
        pending: dict[fx.Node, list[_Pair]] = {}
        readers: dict[fx.Node, int] = {}
        for pair in self._pairs():
            for node in pair.needed:
                readers[node] = readers.get(node, 0) + 1
            pending.setdefault(max(pair.needed, key=self.position.__getitem__), []).append(pair)
        for node in self._walk(set(readers), probe):
            for pair in pending.pop(node, ()):
                yield self._compare(pair) if pair.role == "value" else self._recorded(pair)
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
        for old, new in self._ends():
            if changed := [n for n in (new, old) if n in self.edit.changes or n in self.edit.loose]:
                yield _Pair(self._site_of(changed[0]), old, changed[0], {}, "end")
        for leaf in (n for n in self.edit.changes if n.op == "get_attr" and n in self.steps):
            yield _Pair(next(s for s in self.edit.sites if str(leaf.target) in s.constants), leaf, leaf, {}, "constant")

    def _ends(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Inputs and outputs: the old value, and the node that stands for it now."""
        inputs = [n for n in self.steps if n.op == "placeholder"]
        yield from zip(inputs, inputs, strict=True)
        yield from zip(self.edit.before[-1].args[0], self.program.results(), strict=True)

    def _site_of(self, carrier: fx.Node) -> Site:
        """The site that recorded a change of this value."""
        return next(s for s in self.edit.sites if not {carrier, *carrier.users}.isdisjoint(s.carried))

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
        env = self._operands(pair)
        after = env[pair.new] if self._is_old(pair.new) else evaluate(pair.new, env, self.program.constants)
        bound = self.contract.bound(_leaves(before)[0], pair.new)
        figure, floors = self._figure(before, after), (0.0,) * len(_leaves(after))
        if isinstance(self.contract, Exact) and bound < figure < math.inf and bound > 0:
            floors = self._floors(pair, env, after, bound)
            figure = self._figure(before, after, floors)
        holds = self.contract.holds(figure, bound)
        wrong = (
            (self._worst_block(pair, before, after) or self._off_grid(pair, env, before, after) or self._hidden(pair, bound)) if holds else ""
        )
        spread = None if isinstance(self.contract, Exact) else histograms(before, after)
        del after  # a decoded weight may be large, and the flipped ones are as large
        if not holds or wrong:
            return Measured(pair.site.name, pair.new.name, figure, bound, "broken", wrong, spread)
        why = self._unseen(pair, env, before, floors, bound) if not isinstance(self.contract, Lossy) and pair.new not in self.carried else ""
        if why and self._is_on_range(pair):
            filling = self._over_range(pair)
            return Measured(pair.site.name, pair.new.name, figure, bound, filling.verdict, filling.why, spread)
        return Measured(pair.site.name, pair.new.name, figure, bound, "unverified" if why else "held", why, spread)

    def _off_grid(self, pair: _Pair, env: Mapping[fx.Node, Any], before: Any, after: Any) -> str:
        """How a number of the range that a quantiser of integers is for moves by more than half a step, as a sentence; "" if none does. The
        range is the one measured before; or the value's own where its scale is computed from it."""
        new = pair.new
        if not isinstance(self.contract, Bounded) or not self.contract.is_half_step(new) or pair.old.op == "get_attr":
            return ""
        scale = env[new.args[1]]  # type: ignore[index]
        if self._is_on_range(pair):
            before = _spread(before, *new.meta[MEASURED])
            after = self._again(pair, before)
        elif MEASURED in new.meta or new.args[1].op == "get_attr":  # type: ignore[union-attr]
            return ""
        if any(n not in (1, size) for n, size in zip(reversed(scale.shape), reversed(before.shape), strict=False)):
            return ""
        noise = 8 * torch.finfo(before.dtype).eps * before.abs() / scale
        steps = float(((after - before).abs() / scale - noise).max())
        return f"{new.name} moves a number of its range by {steps:.3g} steps" if steps > HALF else ""

    def _again(self, pair: _Pair, value: Tensor) -> Any:
        """The new node's value from another old one."""
        kept, self.old = self.old, {**self.old, pair.old: value}
        try:
            return evaluate(pair.new, self._operands(pair), self.program.constants)
        finally:
            self.old = kept

    def _is_on_range(self, pair: _Pair) -> bool:
        """Whether the pair quantises one value on a range measured before, which its other numbers may fill better than the probe's."""
        value, frontier = self.old[pair.old], set(pair.frontier.values())
        if MEASURED not in pair.new.meta or frontier != {pair.old} or not isinstance(value, Tensor):
            return False
        lo, hi = pair.new.meta[MEASURED]
        return bool(lo.numel() == 1 and value.numel() > 1) and not torch.equal(value, _spread(value, lo, hi))

    def _over_range(self, pair: _Pair) -> Measured:
        """The comparison on numbers spread over the measured range: the probe's may all be far below one step of it."""
        kept, self.old = self.old, {**self.old, pair.old: _spread(self.old[pair.old], *pair.new.meta[MEASURED])}
        try:
            return self._compare(pair)
        finally:
            self.old = kept

    def _recorded(self, pair: _Pair) -> Measured:
        """A constant against the old one under its record: readers may be blind to parts of it. An input or output against itself."""
        is_end = pair.role == "end"
        before = self._changed(pair.old, pair.new)
        after = self.old[pair.old] if is_end else self.program.constants[str(pair.new.target)]
        limit = Exact(self.contract.limit if isinstance(self.contract, Exact) else None).bound(_leaves(after)[0], pair.new)
        figure = math.inf if pair.new in self.edit.loose else _worst_error(before, after)
        why = "an input or output carries a change" if is_end and figure > limit else ""
        return Measured(pair.site.name, pair.new.name, figure, limit, "held" if figure <= limit else "broken", why)

    def _hidden(self, pair: _Pair, bound: float) -> str:
        """What zeros of the probe hide, as a sentence: a channel that is dead on the probe may be multiplied by anything. Both values are
        computed once more with other numbers in place of the zeros; where the old one hangs on more than the new one, they can't be."""
        if not isinstance(self.contract, Exact) or pair.new in self.carried or self._is_old(pair.new):
            return ""
        other = {root: filled(self.old[root]) for root in pair.frontier.values() if root not in self.edit.nulls and has_zeros(self.old[root])}
        cone = self._old_cone(pair) if other else None
        if not cone:
            return ""
        kept, self.old = self.old, {**self.old, **other}
        try:
            self.old[pair.old] = self._old_value(cone)
            after = evaluate(pair.new, self._operands(pair), self.program.constants)
            figure = self._figure(self._changed(pair.old, pair.new), after)
        except (IndexError, RuntimeError):  # an op that can't take other numbers, such as an index made of floats
            return ""
        finally:
            self.old = kept
        return "" if figure <= max(bound, HIDDEN) else f"{figure:.3g} at {pair.new.name} where its operands aren't 0, as they are on the probe"

    def _old_cone(self, pair: _Pair) -> list[Step] | None:
        """The steps from the new value's operands to the old value, in order; None if there is another way to it, or it is long."""
        roots, found, stack = set(pair.frontier.values()), dict[fx.Node, None](), [pair.old]
        if pair.old in roots:
            return None
        while stack:
            node = stack.pop()
            if node.op == "placeholder" or len(found) > CONE:
                return None
            found[node] = None
            stack += [n for n in self.steps[node].inputs if n not in roots and n not in found]
        return [self.steps[n] for n in sorted(found, key=self.position.__getitem__)]

    def _old_value(self, cone: Sequence[Step]) -> Any:
        values = dict(self.old)
        for step in cone:
            values[step.node] = _evaluate(step, values, self.edit.constants_before)
        return values[cone[-1].node]

    def _worst_block(self, pair: _Pair, before: Any, after: Any) -> str:
        is_constant = pair.old.op == "get_attr" and isinstance(self.contract, Bounded)
        return self.contract.worst_block(before, after, pair.new) if is_constant else ""  # type: ignore[union-attr]

    def _unseen(self, pair: _Pair, env: Mapping[fx.Node, Any], before: Any, floors: Sequence[float], bound: float) -> str:
        """Why the comparison can't bite; "" if it can."""
        for operand, flipped in self._flips(pair.new, env):
            if self.contract.holds(self._figure(before, flipped, floors), bound):
                return f"{operand} could change sign unseen"
        return ""

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

    def _figure(self, old: Any, new: Any, floors: Sequence[float] = ()) -> float:
        """The worst figure over the tensors of a value; a value of another form is infinitely far. floors: least scales of an Exact one."""
        a, b = _leaves(old), _leaves(new)
        exact = isinstance(self.contract, Exact)
        if len(a) != len(b) or any((x.shape, x.dtype) != (y.shape, y.dtype) for x, y in zip(a, b, strict=True)):
            return math.inf if exact else -math.inf
        if exact and any(floors):
            return max(relative_error(x, y, floor) for x, y, floor in zip(a, b, floors, strict=True))
        return (max if exact else min)(self.contract.figure(x, y) for x, y in zip(a, b, strict=True))

    def _operands(self, pair: _Pair) -> dict[fx.Node, Any]:
        """What the new node is computed from, from old values."""
        env = {node: self._changed(root, node) for node, root in pair.frontier.items()}
        for node in self._between(pair.new, env) if not self._is_old(pair.new) else ():
            env[node] = evaluate(node, env, self.program.constants)
        return env

    def _flips(self, new: fx.Node, env: Mapping[fx.Node, Any]) -> Iterator[tuple[str, Any]]:
        """The new node's value with each of its float operands negated in turn."""
        if self._is_old(new):
            yield "the value", _negated(env[new])
            return
        for n in new.all_input_nodes:
            if isinstance(env[n], Tensor) and env[n].is_floating_point() and env[n].itemsize > 1:
                yield n.name, evaluate(new, {**env, n: -env[n]}, self.program.constants)

    def _floors(self, pair: _Pair, env: Mapping[fx.Node, Any], after: Any, bound: float) -> tuple[float, ...]:
        """Per tensor of the new value the scale below which it is rounding noise: where the bound allows what a few roundings of everything
        that it is computed from do to it. A sum of numbers that cancel isn't known any better."""
        exact, noise = _leaves(after), [0.0] * len(_leaves(after))
        for seed in range(DRAWS if not self._is_old(pair.new) else 0):
            rng = torch.Generator().manual_seed(seed)
            off = {node: rounded(env[node], rng) for node in pair.frontier}
            for node in self._between(pair.new, off):
                off[node] = rounded(evaluate(node, off, self.program.constants), rng)
            other = _leaves(evaluate(pair.new, off, self.program.constants))
            noise = [max(n, greatest_distance(x, y)) for n, x, y in zip(noise, exact, other, strict=True)]
        return tuple(ROUNDINGS * n / bound for n in noise)

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


def _spread(value: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """As many numbers in equal steps from lo to hi."""
    return torch.linspace(float(lo), float(hi), value.numel(), dtype=torch.float64).to(value.dtype).reshape(value.shape)


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
    """One comparison: the new node's value, computed from `frontier`, against the old node's. role "constant": the tensor stored now against
    the old one under its record; "end": an input's or output's old value under its record against itself."""

    site: Site
    old: fx.Node
    new: fx.Node
    frontier: dict[fx.Node, fx.Node]
    role: Literal["value", "constant", "end"] = "value"

    @property
    def needed(self) -> set[fx.Node]:
        return {self.old, *self.frontier.values()}


def _worst_error(old: Any, new: Any) -> float:
    return max(relative_error(x, y) for x, y in zip(_leaves(old), _leaves(new), strict=True))


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
        return constants[str(step.target)]
    args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: values[n])
    return step.target(*args, **kwargs)
