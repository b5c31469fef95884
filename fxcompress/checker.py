"""How contracts are measured: the old graph is walked once on the probe, and every new value compared with the old one as soon as all it needs
has been seen. See `contract` for what is checked."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxcompress import rows
from fxcompress.contract import MEASURED, ROUNDINGS, Bounded, Contract, Exact, Lossy, Measured
from fxcompress.dataflow import is_read, is_zero, pair_of
from fxcompress.edit import Edit, Step
from fxcompress.interpret import evaluate
from fxcompress.measure import (
    distances,
    filled,
    has_numbers,
    has_zeros,
    histograms,
    is_beyond,
    is_flat,
    relative_error,
    rounded,
    slice_error,
    varied,
)
from fxcompress.numerics import noise
from fxcompress.pairs import Pair, Pairs
from fxcompress.program import Program
from fxcompress.wiring import misreads

HALF = 0.501  # of a step, with a little for rounding
SMALL = 1e-3  # how small operands are made where a number among an op's arguments may not be seen beside them
HIDDEN = 1e-5  # relative: rounding of numbers that no pass has seen, where the limit is 0
PRODUCTS: Mapping[Any, bool] = {  # ops that multiply their first two operands, and whether the third is added to the result
    torch.ops.fxc.dequantize.default: False,  # codes, less a zero point, times a scale
    **dict.fromkeys((torch.ops.aten.mul.Tensor, torch.ops.aten.matmul.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default), False),
    **dict.fromkeys(
        (torch.ops.aten.linear.default, torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default), True
    ),
}
SPREAD = 1 << 16  # numbers that meet every code of a range
OF_SUMS = 4  # times the rounding of a number is that of a sum of many
DRAWS = 4  # how often operands are rounded at random
Floors = tuple[Tensor, ...]  # per tensor of a value, and per number of it, the least scale that its error is beside; () for none
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
        self.taken: dict[Any, dict[Any, fx.Node]] = {}  # per tuple, the changed values that are taken out of it
        for node in edit.changes:
            if node.target is operator.getitem and node in self.pairs.steps:
                made, place = self.pairs.steps[node].args
                self.taken.setdefault(made, {})[place] = node
        uses = [*((s.target, s.args, s.inputs) for s in edit.before), *((n.target, n.args, n.all_input_nodes) for n in program.graph.nodes)]
        self.read: dict[fx.Node, set[Any]] = {}  # per value the parts that are taken of it; None: all
        for target, args, inputs in uses:
            for made in inputs:
                self.read.setdefault(made, set()).add(args[1] if target is operator.getitem else None)
        self.old: dict[fx.Node, Any] = {}
        self.constants: Mapping[str, Tensor] = program.constants
        self.constants_before: Mapping[str, Tensor] = edit.constants_before
        self.is_thorough = False  # whether changes are computed in float64, and all rows of a linear compared
        self.applied: dict[fx.Node, dict[fx.Node, tuple[Any, Any]]] = {}  # per old value and carrier of its changes: before, after

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
        for node in self._walk(set(readers), probe):
            for pair in pending.pop(node, ()):
                same = (pair.old, pair.new, pair.role)  # two sites may have their hands in one value
                if same not in known:
                    known[same] = self._measured(pair)
                yield replace(known[same], site=pair.site.name)
                for used in pair.needed:
                    readers[used] -= 1
                    if not readers[used]:
                        del self.old[used]
                        self.applied.pop(used, None)

    def _measured(self, pair: Pair) -> Measured:
        """The quick comparison; what doesn't hold in it once more, thoroughly."""
        measure = self._compare if pair.role == "value" else self._recorded
        found = measure(pair)
        if found.verdict == "held" or not (self.edit.changes or isinstance(self.contract, Exact)):
            return found
        self.is_thorough, applied, self.applied = True, self.applied, {}
        try:
            return measure(pair)
        finally:
            self.is_thorough, self.applied = False, applied

    def _walk(self, wanted: set[fx.Node], probe: Sequence[Tensor]) -> Iterator[fx.Node]:
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

    def _compare(self, pair: Pair) -> Measured:
        with self._standing_in(self._some_rows(pair)):
            return self._compared(pair)

    @contextmanager
    def _standing_in(self, values: Mapping[fx.Node, Any], constants: Mapping[fx.Node, Tensor] = MappingProxyType({})) -> Iterator[None]:
        """Other old values, and other constants under their recorded changes, for a moment."""
        kept = self.old, self.constants, self.constants_before
        self.old = {**self.old, **values}
        if constants:
            self.constants_before = {**self.constants_before, **{str(n.target): t for n, t in constants.items()}}
            self.constants = {**self.constants, **{str(n.target): self._applied(n, t) for n, t in constants.items()}}
        try:
            yield
        finally:
            self.old, self.constants, self.constants_before = kept

    def _compared(self, pair: Pair) -> Measured:
        before, env = self._changed(pair.old, pair.new), self._operands(pair)
        after = _like(before, env[pair.new] if self.pairs.is_old(pair.new) else evaluate(pair.new, env, self.constants))
        bound = self.contract.bound(_leaves(before)[0], pair.new)
        figure, floors = self._figure(before, after), _NO_FLOORS
        if self.is_thorough and isinstance(self.contract, Exact) and bound < figure < math.inf and bound > 0:
            floors = self._floors(pair, env, after, bound)
            figure = self._figure(before, after, floors)
        holds = self.contract.holds(figure, bound)
        looks: tuple[Callable[[], str], ...] = (
            partial(self._unrecorded, pair),
            partial(self._worst_block, pair, before, after),
            partial(self._off_grid, pair, env, before, after),
            partial(self._hidden, pair, bound),
            partial(self._unread, pair, bound),
        )
        wrong = next((why for look in looks if (why := look())), "") if holds else ""
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

    def _some_rows(self, pair: Pair) -> dict[fx.Node, Any]:
        """Of a long probe a part of the old values around a pair, where the new op does the same to every row, as the old one did; {} where it
        may not. What changed of a linear one's weights is measured number by number in their own record."""
        step, new, result = self.pairs.steps[pair.old], pair.new, self.old[pair.old]
        old_of, new_of = rows.operands(step.target, step.args, step.kwargs), rows.operands(new.target, new.args, new.kwargs)
        is_same = step.target is new.target and pair.old not in pair.frontier.values() and isinstance(result, Tensor)
        if self.is_thorough or not isinstance(self.contract, Exact) or old_of is None or new_of is None or not is_same:
            return {}
        along, whole = ({pair.frontier.get(n, n) for n in part if n.op != "get_attr"} for part in (new_of.along, new_of.whole))
        reads = [{n for n in part if n.op != "get_attr"} for part in (old_of.along, old_of.whole)]
        weights = [n for n in new_of.whole if n.op == "get_attr"]
        is_known = along | whole <= set(pair.frontier.values())
        if [along, whole] != reads or along & whole or not is_known or not all(map(self._is_recorded, weights)):
            return {}
        axis, n = rows.part_of(result, new_of, self._changed_along(pair))
        fixed = [self.program.constants[str(n.target)] for n in new_of.along if n.op == "get_attr"]
        sizes = {rows.length(self.old[root], axis) for root in along} | {result.shape[axis]}
        if n == 1 or sizes - {1, result.shape[axis]} or any(rows.length(t, axis) > 1 for t in fixed):
            return {}
        return {root: rows.every(self.old[root], axis, n) for root in (pair.old, *along)}

    def _changed_along(self, pair: Pair) -> set[int]:
        """The axes, counted from the end, that recorded changes of the pair's values may mix; all where that isn't known."""
        around = {pair.old, pair.new, *pair.frontier, *pair.frontier.values()}
        changes = [change for node in around for change in self.edit.changes.get(node, ())]
        return {a for change in changes for a in getattr(change, "axes", range(-self.old[pair.old].dim(), 0))}

    def _is_recorded(self, leaf: fx.Node) -> bool:
        """Whether a constant is an old one, unchanged or with its change on record."""
        if leaf.op != "get_attr" or leaf not in self.pairs.steps:
            return False
        name = str(leaf.target)
        return leaf in self.edit.changes or self.program.constants[name] is self.edit.constants_before[name]

    def _unrecorded(self, pair: Pair) -> str:
        """How a pair makes something else of its value than the edit recorded, or how the new nodes, with the value itself in the pair's
        place, give another one than the old node, here or with other numbers where the probe has zeros, as a sentence; "" if neither, and
        where no pair is recorded."""
        nodes = [] if self.pairs.is_old(pair.new) else [*_between(pair.new, pair.frontier), pair.new]
        if self.edit.made.keys().isdisjoint(nodes):
            return ""
        env = self._unpaired(pair, nodes)
        if isinstance(env, fx.Node):
            return f"{env.name} makes something else of its value than {pair.site.name} recorded"
        limit = Exact().bound(_leaves(env[pair.new])[0], pair.new)
        error = _worst_error(self._changed(pair.old, pair.new), env[pair.new])
        if error <= limit:
            error = self._unpaired_elsewhere(pair, nodes)
        return "" if error <= limit else f"without its quantiser {pair.new.name} is {error:.3g} off, not {limit:.3g}"

    def _unpaired(self, pair: Pair, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any] | fx.Node:
        """The values of the new nodes with every recorded pair's own value in its place; the pair that isn't as recorded, if there is one."""
        env = {node: self._changed(root, node) for node, root in pair.frontier.items()}
        for node in nodes:
            env[node] = evaluate(node, env, self.constants)
            if node in self.edit.made:
                found = pair_of(node)
                value = None if found is None else env[found.value]
                if value is None or not torch.equal(self.edit.made[node](value), env[node]):
                    return node
                env[node] = value
        return env

    def _unpaired_elsewhere(self, pair: Pair, nodes: Sequence[fx.Node]) -> float:
        """The error of the new nodes without recorded pairs where other numbers stand for zeros, and for values that don't change along an
        axis, of which softmax makes the same whatever its scores; 0 where that can't be said."""
        other = {root: filled(self.old[root]) for root in pair.frontier.values() if has_zeros(self.old[root])}
        other |= {root: varied(self.old[root]) for root in pair.frontier.values() if is_flat(self.old[root])}
        cone = self.pairs.cone(pair) if other else None

        def unpaired() -> Any:
            env = self._unpaired(pair, nodes)
            return math.nan if isinstance(env, fx.Node) else env[pair.new]

        found = self._from(pair, cone, other, unpaired) if cone else None
        return _worst_error(*found) if found else 0.0

    def _off_grid(self, pair: Pair, env: Mapping[fx.Node, Any], before: Any, after: Any) -> str:
        """How a number of the range that a quantiser of integers is for moves by more than half a step, or how its steps are longer than the
        range needs, as a sentence; "" if neither. The range is the one measured before; or the value's own where its scale is computed from
        it, and then that of its negative too if it isn't greatest on both sides of 0."""
        new = pair.new
        if not isinstance(self.contract, Bounded) or not self.contract.is_half_step(new) or pair.old.op == "get_attr":
            return ""
        scale = env[new.args[1]]  # type: ignore[index]
        if self._is_on_range(pair):
            looks = [self._again(pair, _spread(before, *new.meta[MEASURED]))]
        elif MEASURED in new.meta or new.args[1].op == "get_attr":  # type: ignore[union-attr]
            return ""
        else:
            looks = [(before, scale, after), *([self._again(pair, -before)] if pair.is_alone and not _is_two_sided(before, scale) else [])]
        steps = max(_steps_off(*look) for look in looks)
        if steps > HALF:
            return f"{new.name} moves a number of its range by {steps:.3g} steps"
        longer = max(self.contract.longer(value, scale, new) for value, scale, _ in looks) if pair.is_alone else 1.0
        return f"the steps of {new.name} are {longer:.4g} times as long as its range needs" if longer > 1 else ""

    def _again(self, pair: Pair, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Another old value, and the new node's scale and value from it."""
        with self._standing_in({pair.old: value}):
            env = self._operands(pair)
            return value, env[pair.new.args[1]], evaluate(pair.new, env, self.constants)  # type: ignore[index]

    def _is_on_range(self, pair: Pair) -> bool:
        """Whether the pair quantises one value on a range measured before, which its other numbers may fill better than the probe's."""
        value = self.old[pair.old]
        if MEASURED not in pair.new.meta or not pair.is_alone or not isinstance(value, Tensor):
            return False
        lo, hi = pair.new.meta[MEASURED]
        return bool(lo.numel() == 1 and value.numel() > 1) and not torch.equal(value, _spread(value, lo, hi))

    def _telling(self, pair: Pair) -> Tensor | None:
        """Numbers that say more of a pair that quantises one value than the probe's, all of which may be far below one step: spread over the
        range measured before; any at all where the value is zeros and its scale is computed from it. None where there are no such numbers."""
        if self._is_on_range(pair):
            return _spread(self.old[pair.old], *pair.new.meta[MEASURED])
        value, found = self.old[pair.old], pair_of(pair.new)
        if found is None or MEASURED in pair.new.meta or not pair.is_alone or not isinstance(value, Tensor):
            return None
        is_computed = isinstance(found.scale, fx.Node) and found.scale.op != "get_attr"
        return _spread(value, -torch.ones(()), torch.ones(())) if is_computed and value.numel() > 1 and not value.any() else None

    def _once_more(self, pair: Pair) -> Measured | None:
        """The comparison with numbers that say more than the probe's: those of `_telling`; or, if it holds there, any in place of values with
        zeros and of constants that are nothing else, under the changes on record. None if there are none."""
        if (telling := self._telling(pair)) is not None:
            return self._with({pair.old: telling}, {}, pair, None)
        cone = self.pairs.cone(pair) if isinstance(self.contract, Exact) else None
        if cone is None:
            return None
        around = self._around(pair)
        leaves = [n for n in (*_between(pair.new, pair.frontier), *(s.node for s in cone)) if n.op == "get_attr"]
        values = {root: varied(self.old[root]) for root in around if has_zeros(self.old[root])}
        zeros = {n: varied(t) for n in leaves if self._is_recorded(n) and _is_wide(t := self.constants_before[str(n.target)]) and not t.any()}
        found = self._with(values, zeros, pair, cone) if values or zeros else None
        return found if found and found.verdict == "held" else None

    def _with(
        self, values: Mapping[fx.Node, Any], constants: Mapping[fx.Node, Tensor], pair: Pair, cone: Sequence[Step] | None
    ) -> Measured | None:
        """The comparison from other numbers, from which the cone computes the old value; None if an op can't take them."""
        try:
            with self._standing_in(values, constants):
                if cone is not None:
                    self.old[pair.old] = self._old_value(cone, lambda value: value)
                return self._compared(pair)
        except (IndexError, RuntimeError):
            return None

    def _recorded(self, pair: Pair) -> Measured:
        """A constant against the old one under its record: readers may be blind to parts of it. An input or output against itself."""
        is_end = pair.role == "end"
        after = self.old[pair.old] if is_end else self.program.constants[str(pair.new.target)]
        stored = _leaves(after)[0]
        limit = Exact(self.contract.limit if isinstance(self.contract, Exact) else None).bound(stored, pair.new)
        if not is_end and stored.is_floating_point():  # computed in float64 and cast once a change
            limit = min(limit, ROUNDINGS * torch.finfo(stored.dtype).eps)
        is_loose = pair.new in self.edit.loose
        of_sums = math.inf if is_end or is_loose else self._error_of_sums(pair, stored)
        if of_sums <= OF_SUMS * limit:
            figure, limit = of_sums, OF_SUMS * limit
        else:
            figure = math.inf if is_loose else _worst_error(self._changed(pair.old, pair.new), after)
        why = "an input or output carries a change" if is_end and figure > limit else ""
        return Measured(pair.site.name, pair.new.name, figure, limit, "held" if figure <= limit else "broken", why, unmeasured=True)

    def _error_of_sums(self, pair: Pair, stored: Tensor) -> float:
        """The error of random sums of a weight's rows, which are under the recorded changes what the rows are, and which a wrong number in any
        row would move; inf where no axis lends itself."""
        old, changes = self.old[pair.old], self.edit.changes.get(pair.new, [])
        if self.is_thorough or not stored.is_floating_point() or stored.itemsize < 4:
            return math.inf
        axis = rows.summed_axis(old, changes)
        if axis is None or stored.dim() != old.dim() or stored.shape[axis] != old.shape[axis]:
            return math.inf
        return relative_error(self._applied(pair.new, rows.sums(old, axis)), rows.sums(stored, axis))

    def _hidden(self, pair: Pair, bound: float) -> str:
        """What the probe's numbers hide, as a sentence: a channel that is dead on the probe may be multiplied by anything, and a number among
        the arguments, such as the eps of a norm, may not matter beside them. Both values are computed once more, with other numbers in place
        of the zeros and with small ones; where the old one hangs on more than the new one, they can't be."""
        if not isinstance(self.contract, Exact) or pair.new in self.pairs.carried or self.pairs.is_old(pair.new):
            return ""
        for other, where in self._others(pair):
            cone = self.pairs.cone(pair) if other else None
            found = self._from(pair, cone, other) if cone else None
            if found and (figure := _worst_error(*found)) > max(bound, HIDDEN):
                return f"{figure:.3g} at {pair.new.name} where its operands {where}"
        return ""

    def _unread(self, pair: Pair, bound: float) -> str:
        """How rows of a table that isn't on record differ where the probe doesn't read them, as a sentence: all of them are read once."""
        new = pair.new
        if new.target is not torch.ops.aten.embedding.default or not isinstance(self.contract, Exact):
            return ""
        table, index = new.args[:2]
        if index not in pair.frontier or table in pair.frontier or self._is_recorded(table):  # type: ignore[arg-type]
            return ""
        ids = self.old[pair.frontier[index]]  # type: ignore[index]
        every = torch.arange(table.meta["val"].shape[0], dtype=ids.dtype).reshape(*[1] * (ids.dim() - 1), -1)  # type: ignore[union-attr]
        cone = self.pairs.cone(pair)
        found = self._from(pair, cone, {pair.frontier[index]: every}) if cone else None  # type: ignore[index]
        return f"{error:.3g} in a row that the probe doesn't read" if found and (error := self._figure(*found)) > bound else ""

    def _around(self, pair: Pair) -> list[fx.Node]:
        """The old values that the new node is computed from, but those that are 0 for every input."""
        return [root for root in pair.frontier.values() if root not in self.edit.nulls]

    def _others(self, pair: Pair) -> Iterator[tuple[dict[fx.Node, Any], str]]:
        """Numbers in place of the old values around the pair, and what is other about them."""
        around = self._around(pair)
        yield {root: filled(self.old[root]) for root in around if has_zeros(self.old[root])}, "aren't 0, as they are on the probe"
        if any(isinstance(a, float) for a in (*pair.new.args, *pair.new.kwargs.values())):
            yield {root: self.old[root] * SMALL for root in around if _is_wide(self.old[root])}, f"are {SMALL} of what they are on the probe"

    def _from(
        self, pair: Pair, cone: Sequence[Step], other: Mapping[fx.Node, Any], new: Callable[[], Any] | None = None
    ) -> tuple[Any, Any] | None:
        """(the old value under its changes, the new one) from other numbers; None if an op can't take them, as an index made of floats.
        new: how the new value is computed, if not by evaluating the node."""
        try:
            with self._standing_in(other):
                self.old[pair.old] = self._old_value(cone, lambda value: value)
                value = new() if new else evaluate(pair.new, self._operands(pair), self.constants)
                return self._changed(pair.old, pair.new), value
        except (IndexError, RuntimeError):
            return None

    def _old_value(self, cone: Sequence[Step], seen: Callable[[Any], Any]) -> Any:
        """The last of the steps from old values; seen: what becomes of each step's value."""
        values = dict(self.old)
        for step in cone:
            values[step.node] = seen(_evaluate(step, values, self.constants_before))
        return values[cone[-1].node]

    def _worst_block(self, pair: Pair, before: Any, after: Any) -> str:
        is_constant = pair.old.op == "get_attr" and isinstance(self.contract, Bounded)
        return self.contract.worst_block(before, after, pair.new) if is_constant else ""  # type: ignore[union-attr]

    def _unseen(self, pair: Pair, env: Mapping[fx.Node, Any], values: tuple[Any, Any], floors: Floors, figure: float, bound: float) -> str:
        """Why the comparison can't bite; "" if it can. Zeros that stay zeros have no sign; what they multiply is seen in its own record.
        values: the old one, and the new one if it is a product."""
        before, product = values
        if is_zero(pair.old):
            return ""
        zeros = {n.name for n in pair.new.all_input_nodes if is_zero(n)}
        spared = zeros | ({n.name for n in self.edit.changes if n.op == "get_attr"} if zeros else set())
        is_seen = not floors and not self.contract.holds(self.contract.negated(figure), bound)
        is_signed = is_seen and _is_wide(before) and has_numbers(before)
        for operand, flipped in self._flips(pair.new, env, product, is_signed):
            if operand not in spared and self._is_alike(before, flipped, floors, bound) and not self._is_null(pair.new, operand):
                return f"{operand} could change sign unseen"
        return ""

    def _is_null(self, new: fx.Node, operand: str) -> bool:
        """Whether the operand of this name is a constant of zeros."""
        return any(n.name == operand and n.op == "get_attr" and not self.constants[str(n.target)].any() for n in new.all_input_nodes)

    def _changed(self, node: fx.Node, stand_in: fx.Node) -> Any:
        """An old value under the change recorded for it, or for the new node that stands for it; a tuple under those of what is taken out, with
        None for what nobody takes where anything is."""
        value = self.old[node]
        if stand_in in self.edit.changes or (node in self.edit.changes and isinstance(value, Tensor)):
            carrier = stand_in if stand_in in self.edit.changes else node
            known = self.applied.setdefault(node, {})
            if carrier not in known or known[carrier][0] is not value:  # another value stands there for a moment
                known[carrier] = value, self._applied(carrier, value)
            return known[carrier][1]
        if isinstance(value, tuple | list):
            taken = self.taken.get(node, {})
            read = self.read.get(node, set()) | self.read.get(stand_in, set()) or {None}
            parts = [v if {i, None} & read else None for i, v in enumerate(value)]
            return type(value)(self._applied(taken[i], v) if i in taken else v for i, v in enumerate(parts))
        return self._applied(node, value)

    def _applied(self, node: fx.Node, value: Any) -> Any:
        for change in self.edit.changes.get(node, ()):
            wide = self.is_thorough and isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            value = change(value.to(torch.promote_types(value.dtype, torch.float64))).to(value.dtype) if wide else change(value)
        return value

    def _figure(self, old: Any, new: Any, floors: Floors = _NO_FLOORS) -> float:
        """The worst figure over the tensors of a value; a value of another form is infinitely far. floors: of an Exact one."""
        a, b = _both(old, new)
        exact = isinstance(self.contract, Exact)
        if len(a) != len(b) or any((x.shape, x.dtype) != (y.shape, y.dtype) for x, y in zip(a, b, strict=True)):
            return math.inf if exact else -math.inf
        if floors:
            return max(map(slice_error, a, b, floors))
        return (max if exact else min)(map(self.contract.figure, a, b))

    def _is_alike(self, old: Any, new: Any, floors: Floors, bound: float) -> bool:
        """Whether the contract holds between two values of one form."""
        a, b = _both(old, new)
        if isinstance(self.contract, Exact):
            return not any(map(is_beyond, a, b, repeat(bound), floors or repeat(None)))
        return not any(map(noise.is_far, a, b, repeat(bound))) and self.contract.holds(self._figure(old, new), bound)

    def _operands(self, pair: Pair) -> dict[fx.Node, Any]:
        """What the new node is computed from, from old values."""
        env = {node: self._changed(root, node) for node, root in pair.frontier.items()}
        for node in _between(pair.new, env) if not self.pairs.is_old(pair.new) else ():
            env[node] = evaluate(node, env, self.constants)
        return env

    def _flips(self, new: fx.Node, env: Mapping[fx.Node, Any], product: Any, is_signed: bool) -> Iterator[tuple[str, Any]]:
        """The new node's value with each of its float operands negated in turn. product: the value, if it is one of two operands. is_signed:
        whether the value itself, negated, would be seen; where it is no other, it isn't made."""
        if self.pairs.is_old(new):
            if not is_signed:
                yield "the value", _negated(env[new])
            return
        for n in new.all_input_nodes:
            if _is_wide(env[n]) and is_read(new, n):
                added = None if product is None else _added(new, n, env)
                if added is None:
                    yield n.name, evaluate(new, {**env, n: -env[n]}, self.constants)
                elif not (is_signed and isinstance(added, float)):
                    yield n.name, 2 * added - product

    def _floors(self, pair: Pair, env: Mapping[fx.Node, Any], after: Any, bound: float) -> Floors:
        """Per number the scale below which it is rounding noise: where the bound allows what a few roundings of everything that it is computed
        from do to it, the old way and the new. A sum of numbers that cancel isn't known any better."""
        if self.pairs.is_old(pair.new):
            return _NO_FLOORS
        least = _noise(after, lambda rng: self._rounded(pair, env, rng))
        cone = self.pairs.cone(pair)
        if cone:
            old = _noise(self._changed(pair.old, pair.new), lambda rng: self._old_rounded(pair, cone, rng))
            least = tuple(map(torch.minimum, least, old))
        return tuple(n * (ROUNDINGS / bound) for n in least)

    def _rounded(self, pair: Pair, env: Mapping[fx.Node, Any], rng: torch.Generator) -> Any:
        """The new value from rounded ones."""
        off = {node: rounded(env[node], rng) for node in pair.frontier}
        for node in _between(pair.new, off):
            off[node] = rounded(evaluate(node, off, self.constants), rng)
        return evaluate(pair.new, off, self.constants)

    def _old_rounded(self, pair: Pair, cone: Sequence[Step], rng: torch.Generator) -> Any:
        """The old value, under its changes, from rounded ones."""
        with self._standing_in({root: rounded(self.old[root], rng) for root in pair.frontier.values()}):
            self.old[pair.old] = self._old_value(cone, lambda value: rounded(value, rng))
            return self._changed(pair.old, pair.new)


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


def _noise(exact: Any, again: Callable[[torch.Generator], Any]) -> Floors:
    """Per number of a value how far other roundings of it are off."""
    farthest = tuple(torch.zeros(x.shape, dtype=torch.float64) for x in _leaves(exact))
    for seed in range(DRAWS):
        farthest = tuple(map(torch.maximum, farthest, map(distances, *_both(exact, again(torch.Generator().manual_seed(seed))))))
    return farthest


def _between(new: fx.Node, env: Mapping[fx.Node, Any]) -> list[fx.Node]:
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
    """As many numbers in equal steps from lo to hi, but no more than SPREAD, along the last axis."""
    dtype, shape = torch.promote_types(value.dtype, torch.float32), value.shape
    if value.numel() > SPREAD:
        shape = torch.Size([*[1] * (value.dim() - 1), SPREAD])
    return torch.linspace(float(lo), float(hi), shape.numel(), dtype=dtype).to(value.dtype).reshape(shape)


def _steps_off(before: Tensor, scale: Tensor, after: Tensor) -> float:
    """By how many steps a number moves at most, but for rounding in its own dtype; 0 where the scale is one of blocks."""
    if any(n not in (1, size) for n, size in zip(reversed(scale.shape), reversed(before.shape), strict=False)):
        return 0.0
    rounding = 8 * torch.finfo(before.dtype).eps * before.abs()
    return float((((after - before).abs() - rounding) / scale).max())


def _is_two_sided(value: Tensor, scale: Tensor) -> bool:
    """Whether of the parts of a value with a scale each one is greatest above 0, and another below."""
    inside = [axis for axis, n in enumerate([*[1] * (value.dim() - scale.dim()), *scale.shape]) if n == 1]
    low, high = value.amin(inside), value.amax(inside)
    return bool((high > -low).any() and (high < -low).any())


def _worst_error(old: Any, new: Any) -> float:
    return max(relative_error(x, y) for x, y in zip(*_both(old, new), strict=True))


def _leaves(value: Any) -> list[Tensor]:
    return [v if isinstance(v, Tensor) else torch.tensor(v) for v in pytree.tree_leaves(value) if v is not None]


def _both(old: Any, new: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of two values that are compared."""
    return _leaves(old), _leaves(_like(old, new))


def _like(old: Any, new: Any) -> Any:
    """A new value without the parts of a tuple that the old one lacks."""
    is_tuple = isinstance(old, tuple | list) and isinstance(new, tuple | list) and len(old) == len(new)
    return type(new)(b if a is not None else None for a, b in zip(old, new, strict=True)) if is_tuple else new


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1


def _negated(value: Any) -> Any:
    return pytree.tree_map(_negated_leaf, value)


def _negated_leaf(v: Any) -> Any:
    """-v; for integers -v - 1, so that zeros change too, and for booleans the opposite."""
    if isinstance(v, Tensor):
        return -v if v.is_floating_point() or v.is_complex() else ~v
    return None if v is None else -v - 1


def _evaluate(step: Step, values: Mapping[fx.Node, Any], constants: Mapping[str, Tensor]) -> Any:
    if step.node.op == "get_attr":
        return constants[str(step.target)]
    args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: values[n])
    return step.target(*args, **kwargs)
