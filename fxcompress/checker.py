"""How contracts are measured: the old graph is walked once on the probe, and every new value compared with the old one as soon as all it needs
has been seen. See `contract` for what is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxcompress import rows, sums
from fxcompress.contract import ROUNDINGS, Bounded, Contract, Exact, Lossy, Measured
from fxcompress.dataflow import is_read, is_zero
from fxcompress.edit import Edit, Step, mixed_axes
from fxcompress.interpret import evaluate
from fxcompress.looks import Looks, worst_error
from fxcompress.measure import (
    error_along,
    has_numbers,
    has_zeros,
    histograms,
    is_beyond,
    is_wide,
    slice_error,
    varied,
)
from fxcompress.numerics import noise
from fxcompress.pairs import Pair, Pairs
from fxcompress.program import Program
from fxcompress.values import Floors, Values, between, both, leaves, like
from fxcompress.wiring import misreads

PRODUCTS: Mapping[Any, bool] = {  # ops that multiply their first two operands, and whether the third is added to the result
    torch.ops.fxc.dequantize.default: False,  # codes, less a zero point, times a scale
    **dict.fromkeys((torch.ops.aten.mul.Tensor, torch.ops.aten.matmul.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default), False),
    **dict.fromkeys(
        (torch.ops.aten.linear.default, torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default), True
    ),
}
OF_SUMS = 4  # times the rounding of a number is that of a sum of many
_NO_FLOORS: Floors = ()


@torch.no_grad()
def check(program: Program, edit: Edit, contract: Contract, probe: Sequence[Tensor]) -> list[Measured]:
    """Measure every site of an open edit. One walk of the old graph on the probe, restricted to what the sites read; none if they read
    constants only. Returns one entry per compared value."""
    checker = _Checker(program, edit, contract)
    return list(checker.run(probe))


class _Checker:
    def __init__(self, program: Program, edit: Edit, contract: Contract) -> None:
        self.program, self.edit, self.contract = program, edit, contract
        self.pairs = Pairs(edit)
        self.values = Values(edit, self.pairs)
        self.looks = Looks(self.values, contract)

    def run(self, probe: Sequence[Tensor]) -> Iterator[Measured]:
        """Who reads what; then walk the old graph and compare each value as soon as everything it needs has been seen."""
        worst = math.inf if isinstance(self.contract, Exact) else -math.inf
        yield from (Measured(wrong.site, wrong.node.name, worst, 0.0, "broken", wrong.why) for wrong in misreads(self.edit))
        pending: dict[fx.Node, list[Pair]] = {}
        readers: dict[fx.Node, int] = {}
        known: dict[tuple[fx.Node, fx.Node, str], Measured] = {}
        for pair in self.pairs:
            for node in pair.needed:
                readers[node] = readers.get(node, 0) + 1
            pending.setdefault(max(pair.needed, key=self.pairs.position.__getitem__), []).append(pair)
        for node in self.values.walk(set(readers), probe):
            for pair in pending.pop(node, ()):
                same = (pair.old, pair.new, pair.role)  # two sites may have their hands in one value
                if same not in known:
                    known[same] = self._measured(pair)
                yield replace(known[same], site=pair.site.name)
                for used in pair.needed:
                    readers[used] -= 1
                    if not readers[used]:
                        self.values.forget(used)

    def _measured(self, pair: Pair) -> Measured:
        """The quick comparison; what doesn't hold in it once more, thoroughly."""
        measure = self._compare if pair.role == "value" else self._recorded
        found = measure(pair)
        if found.verdict == "held" or not (self.edit.changes or isinstance(self.contract, Exact)):
            return found
        with self.values.thoroughly():
            return measure(pair)

    def _compare(self, pair: Pair) -> Measured:
        with self.values.standing_in(self._some_rows(pair)):
            return self._compared(pair)

    def _compared(self, pair: Pair) -> Measured:
        before, env = self.values.changed(pair.old, pair.new), self.values.operands(pair)
        is_new = not self.pairs.is_old(pair.new)
        after = like(before, evaluate(pair.new, env, self.values.constants) if is_new else env[pair.new])
        (figure, bound, block), floors = self._judged(pair, before, after), _NO_FLOORS
        if self.values.is_thorough and isinstance(self.contract, Exact) and 0 < bound < figure < math.inf and is_new:
            floors = self.values.floors(pair, env, after, bound)
            figure = self._figure(before, after, floors)
        holds = self.contract.holds(figure, bound)
        looks: tuple[Callable[[], str], ...] = (
            partial(self.looks.unrecorded, pair),
            partial(str, block),
            partial(self.looks.off_grid, pair, env, before, after),
            partial(self.looks.hidden, pair, bound),
            partial(self.looks.unread, pair, bound),
        )
        wrong = next((why for look in looks if (why := look())), "") if holds else block if math.isnan(figure) else ""
        spread = None if isinstance(self.contract, Exact) else histograms(before, after)
        product = after if pair.new.target in PRODUCTS else None
        del after  # a decoded weight may be large, and the flipped ones are as large
        if not holds or wrong:
            return Measured(pair.site.name, pair.new.name, figure, bound, "broken", wrong, spread)
        why = (
            self._unseen(pair, env, (before, product), floors, figure, bound)
            if not isinstance(self.contract, Lossy) and pair.new not in self.pairs.carried
            else ""
        )
        if why and (filling := self._once_more(pair)) is not None:
            return Measured(pair.site.name, pair.new.name, figure, bound, filling.verdict, filling.why, spread)
        return Measured(pair.site.name, pair.new.name, figure, bound, "unverified" if why else "held", why, spread, figure == -math.inf)

    def _judged(self, pair: Pair, before: Any, after: Any) -> tuple[float, float, str]:
        """(figure, bound, what is wrong with a block of it)."""
        alike = isinstance(before, Tensor) and isinstance(after, Tensor) and (before.shape, before.dtype) == (after.shape, after.dtype)
        if isinstance(self.contract, Bounded) and alike:
            return self.contract.judge(before, after, pair.new, is_constant=pair.old.op == "get_attr")
        return self._figure(before, after), self.contract.bound(leaves(before)[0], pair.new), ""

    def _some_rows(self, pair: Pair) -> dict[fx.Node, Any]:
        """Of a long probe a part of the old values around a pair, where the new op does the same to every row, as the old one did; {} where it
        may not. What changed of a linear one's weights is measured number by number in their own record."""
        step, new, result = self.pairs.steps[pair.old], pair.new, self.values.old[pair.old]
        is_same = step.target is new.target and pair.old not in pair.frontier.values() and isinstance(result, Tensor)
        if self.values.is_thorough or not isinstance(self.contract, Exact) or not is_same:
            return {}
        before, after = rows.reads(step.target, step.args, step.kwargs), rows.reads(new.target, new.args, new.kwargs, pair.frontier)
        if before is None or after is None or after.along & after.whole or not all(map(self.values.is_recorded, after.weights)):
            return {}
        if (before.along, before.whole) != (after.along, after.whole):
            return {}
        axis, n = rows.part_of(result, after, self._changed_along(pair))
        fixed = [self.program.constants[str(n.target)] for n in after.fixed]
        along = {root: self.values.old[root] for root in after.along}
        sizes = {rows.length(value, axis) for value in along.values()} | {result.shape[axis]}
        if n == 1 or sizes - {1, result.shape[axis]} or any(rows.length(t, axis) > 1 for t in fixed) or any(map(rows.is_mask, along.values())):
            return {}
        places = rows.places(along.values(), axis, result.shape[axis], n)
        return {root: rows.at(value, axis, places) for root, value in {pair.old: result, **along}.items()}

    def _changed_along(self, pair: Pair) -> set[int]:
        """The axes, counted from the end, that recorded changes of the pair's values may mix; all where that isn't known."""
        around = {pair.old, pair.new, *pair.frontier, *pair.frontier.values()}
        changes = [change for node in around for change in self.edit.changes.get(node, ())]
        return {a for change in changes for a in getattr(change, "axes", range(-self.values.old[pair.old].dim(), 0))}

    def _once_more(self, pair: Pair) -> Measured | None:
        """The comparison with numbers that say more than the probe's: those of `_telling`; or, if it holds there, any in place of values with
        zeros and of constants that are nothing else, under the changes on record. None if there are none."""
        if (telling := self.looks.telling(pair)) is not None:
            return self._with({pair.old: telling}, {}, pair, None)
        cone = self.pairs.cone(pair) if isinstance(self.contract, Exact) else None
        if cone is None:
            return None
        around = self.looks.around(pair)
        stored = [n for n in (*between(pair.new, pair.frontier), *(s.node for s in cone)) if n.op == "get_attr"]
        values = {root: varied(self.values.old[root]) for root in around if has_zeros(self.values.old[root])}
        zeros = {
            n: varied(t)
            for n in stored
            if self.values.is_recorded(n) and is_wide(t := self.values.constants_before[str(n.target)]) and not t.any()
        }
        found = self._with(values, zeros, pair, cone) if values or zeros else None
        return found if found and found.verdict == "held" else None

    def _with(
        self, values: Mapping[fx.Node, Any], constants: Mapping[fx.Node, Tensor], pair: Pair, cone: Sequence[Step] | None
    ) -> Measured | None:
        """The comparison from other numbers, from which the cone computes the old value; None if an op can't take them."""
        try:
            with self.values.instead(pair, cone, values, constants):
                return self._compared(pair)
        except (IndexError, RuntimeError):
            return None

    def _recorded(self, pair: Pair) -> Measured:
        """A constant against the old one under its record: readers may be blind to parts of it. An input or output against itself."""
        is_end = pair.role == "end"
        after = self.values.old[pair.old] if is_end else self.program.constants[str(pair.new.target)]
        stored = leaves(after)[0]
        limit = Exact(self.contract.limit if isinstance(self.contract, Exact) else None).bound(stored, pair.new)
        if not is_end and stored.is_floating_point():  # computed in float64 and cast once a change
            limit = min(limit, ROUNDINGS * torch.finfo(stored.dtype).eps)
        if pair.new in self.edit.loose:
            figure = math.inf
        elif is_end:
            figure = worst_error(self.values.changed(pair.old, pair.new), after)
        elif (figure := self._error_of_sums(pair, stored)) <= OF_SUMS * limit:
            limit *= OF_SUMS
        else:
            figure = self._error_of_numbers(pair, stored)
        why = "an input or output carries a change" if is_end and figure > limit else ""
        return Measured(pair.site.name, pair.new.name, figure, limit, "held" if figure <= limit else "broken", why, unmeasured=True)

    def _error_of_numbers(self, pair: Pair, stored: Tensor) -> float:
        """The error of each number beside those that its changes sum it with; of a row or channel, where that isn't known."""
        before, mixed = self.values.changed(pair.old, pair.new), mixed_axes(self.edit.changes[pair.new])
        return slice_error(before, stored) if mixed is None else error_along(before, stored, mixed)

    def _error_of_sums(self, pair: Pair, stored: Tensor) -> float:
        """The error of random sums of a rotated weight's rows, which are under the recorded changes what the rows are, and which a wrong row or
        column would move; inf where no axis lends itself, and where nothing is mixed: each number is looked at then."""
        old, changes = self.values.old[pair.old], self.edit.changes.get(pair.new, [])
        if self.values.is_thorough or not stored.is_floating_point() or stored.itemsize < 4:
            return math.inf
        axis, mixed = sums.summed_axis(old, changes), mixed_axes(changes)
        if axis is None or not mixed or stored.dim() != old.dim() or stored.shape[axis] != old.shape[axis]:
            return math.inf
        factors = sums.factors(old, axis)
        if factors is None:
            return math.inf
        before, after = self.values.undergone(pair.new, sums.sums(old, axis, factors)), sums.sums(stored, axis, factors)
        return error_along(before, after, {axis, *mixed})

    def _unseen(self, pair: Pair, env: Mapping[fx.Node, Any], values: tuple[Any, Any], floors: Floors, figure: float, bound: float) -> str:
        """Why the comparison can't bite; "" if it can. Zeros that stay zeros have no sign; what they multiply is seen in its own record.
        values: the old one, and the new one if it is a product."""
        before, product = values
        if is_zero(pair.old):
            return ""
        zeros = {n.name for n in pair.new.all_input_nodes if is_zero(n)}
        spared = zeros | ({n.name for n in self.edit.changes if n.op == "get_attr"} if zeros else set())
        is_seen = not floors and not self.contract.holds(self.contract.negated(figure), bound)
        is_signed = is_seen and is_wide(before) and has_numbers(before)
        spared |= {n.name for n in pair.new.all_input_nodes if self._is_kept(pair, n)}
        for operand, flipped in self._flips(pair.new, env, product, is_signed):
            if operand not in spared and self._is_alike(before, flipped, floors, bound) and not self._is_null(pair.new, operand):
                return f"{operand} could change sign unseen"
        return ""

    def _is_kept(self, pair: Pair, operand: fx.Node) -> bool:
        """Whether the new node reads a constant as the old one did, which is what it was: an op that is the same can't change its sign."""
        step, new = self.pairs.steps[pair.old], pair.new
        if step.target is not new.target or operand in self.edit.changes or not self.values.is_recorded(operand):
            return False
        now, then = ([at for at, a in (*enumerate(n.args), *n.kwargs.items()) if a is operand] for n in (new, step))
        return bool(now) and now == then

    def _is_null(self, new: fx.Node, operand: str) -> bool:
        """Whether the operand of this name is a constant of zeros."""
        return any(n.name == operand and n.op == "get_attr" and not self.values.constants[str(n.target)].any() for n in new.all_input_nodes)

    def _figure(self, old: Any, new: Any, floors: Floors = _NO_FLOORS) -> float:
        """The worst figure over the tensors of a value; a value of another form is infinitely far. floors: of an Exact one."""
        a, b = both(old, new)
        exact = isinstance(self.contract, Exact)
        if len(a) != len(b) or any((x.shape, x.dtype) != (y.shape, y.dtype) for x, y in zip(a, b, strict=True)):
            return math.inf if exact else -math.inf
        if floors:
            return max(map(slice_error, a, b, floors))
        return (max if exact else min)(map(self.contract.figure, a, b))

    def _is_alike(self, old: Any, new: Any, floors: Floors, bound: float) -> bool:
        """Whether the contract holds between two values of one form."""
        a, b = both(old, new)
        if isinstance(self.contract, Exact):
            return not any(map(is_beyond, a, b, repeat(bound), floors or repeat(None)))
        return not any(map(noise.is_far, a, b, repeat(bound))) and self.contract.holds(self._figure(old, new), bound)

    def _flips(self, new: fx.Node, env: Mapping[fx.Node, Any], product: Any, is_signed: bool) -> Iterator[tuple[str, Any]]:
        """The new node's value with each of its float operands negated in turn. product: the value, if it is one of two operands. is_signed:
        whether the value itself, negated, would be seen; where it is no other, it isn't made."""
        if self.pairs.is_old(new):
            if not is_signed:
                yield "the value", _negated(env[new])
            return
        for n in new.all_input_nodes:
            if is_wide(env[n]) and is_read(new, n):
                added = None if product is None else _added(new, n, env)
                if added is None:
                    yield n.name, evaluate(new, {**env, n: -env[n]}, self.values.constants)
                elif not (is_signed and isinstance(added, float)):
                    yield n.name, 2 * added - product


def _added(new: fx.Node, operand: fx.Node, env: Mapping[fx.Node, Any]) -> Tensor | float | None:
    """b of a value x W + b that is 2 b - (x W + b) with x or W negated, 0.0 if nothing is added; None where it isn't as simple as that."""
    first, second, *rest = new.args
    if new.target is torch.ops.fxc.dequantize.default and operand is not second:
        return None
    bias = rest[0] if rest and PRODUCTS[new.target] else None
    if (
        (operand is first) == (operand is second)
        or operand is bias
        or operand in new.kwargs.values()
        or isinstance(new.kwargs.get("bias"), fx.Node)
    ):
        return None
    if not isinstance(bias, fx.Node):
        return 0.0
    spatial = 0 if new.target is rows.LINEAR else env[second].dim() - 2  # type: ignore[index]
    added: Tensor = env[bias].reshape(-1, *[1] * spatial)
    return added


def _negated(value: Any) -> Any:
    return pytree.tree_map(_negated_leaf, value)


def _negated_leaf(v: Any) -> Any:
    """-v; for integers -v - 1, so that zeros change too, and for booleans the opposite."""
    if isinstance(v, Tensor):
        return -v if v.is_floating_point() or v.is_complex() else ~v
    return None if v is None else -v - 1
