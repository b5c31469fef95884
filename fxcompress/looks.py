"""What a comparison on the probe's numbers doesn't see: rows it doesn't read, channels that are dead on it, ranges it doesn't fill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.contract import MEASURED, Bounded, Contract, Exact
from fxcompress.dataflow import pair_of
from fxcompress.edit import Step
from fxcompress.interpret import evaluate
from fxcompress.measure import filled, has_zeros, is_flat, is_wide, relative_error, slice_error, varied
from fxcompress.pairs import Pair
from fxcompress.values import Values, between, both, leaves, like

HALF = 0.501  # of a step, with a little for rounding
SMALL = 1e-3  # how small operands are made where a number among an op's arguments may not be seen beside them
HIDDEN = 1e-5  # relative: rounding of numbers that no pass has seen, where the limit is 0
SPREAD = 1 << 16  # numbers that meet every code of a range
Figure = Callable[..., float]  # of an old tensor, a new one, and perhaps how far rounding moves each number


class Looks:
    """Each says what is wrong with a pair of a new value and an old one as a sentence, "" if nothing is."""

    def __init__(self, values: Values, contract: Contract) -> None:
        self.values, self.contract = values, contract
        self.edit, self.pairs = values.edit, values.pairs

    def unrecorded(self, pair: Pair) -> str:
        """How a pair makes something else of its value than the edit recorded, or how the new nodes, with the value itself in the pair's
        place, give another one than the old node, here or with other numbers where the probe has zeros, as a sentence; "" if neither, and
        where no pair is recorded."""
        nodes = [] if self.pairs.is_old(pair.new) else [*between(pair.new, pair.frontier), pair.new]
        if self.edit.made.keys().isdisjoint(nodes):
            return ""
        env = self._unpaired(pair, nodes)
        if isinstance(env, fx.Node):
            return f"{env.name} makes something else of its value than {pair.site.name} recorded"
        limit = Exact().bound(leaves(env[pair.new])[0], pair.new)
        error = _worst_slice(self.values.changed(pair.old, pair.new), env[pair.new])
        if error <= limit:
            error = self._unpaired_elsewhere(pair, nodes)
        return "" if error <= limit else f"without its quantiser {pair.new.name} is {error:.3g} off, not {limit:.3g}"

    def _unpaired(self, pair: Pair, nodes: Sequence[fx.Node]) -> dict[fx.Node, Any] | fx.Node:
        """The values of the new nodes with every recorded pair's own value in its place; the pair that isn't as recorded, if there is one."""
        env = {node: self.values.changed(root, node) for node, root in pair.frontier.items()}
        for node in nodes:
            env[node] = evaluate(node, env, self.values.constants)
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
        other = {root: filled(self.values.old[root]) for root in pair.frontier.values() if has_zeros(self.values.old[root])}
        other |= {root: varied(self.values.old[root]) for root in pair.frontier.values() if is_flat(self.values.old[root])}
        cone = self.pairs.cone(pair) if other else None
        if cone is None:
            return 0.0
        try:
            with self.values.instead(pair, cone, other):
                env = self._unpaired(pair, nodes)
                return math.inf if isinstance(env, fx.Node) else worst_error(self.values.changed(pair.old, pair.new), env[pair.new])
        except (IndexError, RuntimeError):
            return 0.0

    def off_grid(self, pair: Pair, env: Mapping[fx.Node, Any], before: Any, after: Any) -> str:
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
        with self.values.standing_in({pair.old: value}):
            env = self.values.operands(pair)
            return value, env[pair.new.args[1]], evaluate(pair.new, env, self.values.constants)  # type: ignore[index]

    def _is_on_range(self, pair: Pair) -> bool:
        """Whether the pair quantises one value on a range measured before, which its other numbers may fill better than the probe's."""
        value = self.values.old[pair.old]
        if MEASURED not in pair.new.meta or not pair.is_alone or not isinstance(value, Tensor):
            return False
        lo, hi = pair.new.meta[MEASURED]
        return bool(lo.numel() == 1 and value.numel() > 1) and not torch.equal(value, _spread(value, lo, hi))

    def telling(self, pair: Pair) -> Tensor | None:
        """Numbers that say more of a pair that quantises one value than the probe's, all of which may be far below one step: spread over the
        range measured before; any at all where the value is zeros and its scale is computed from it. None where there are no such numbers."""
        if self._is_on_range(pair):
            return _spread(self.values.old[pair.old], *pair.new.meta[MEASURED])
        value, found = self.values.old[pair.old], pair_of(pair.new)
        if found is None or MEASURED in pair.new.meta or not pair.is_alone or not isinstance(value, Tensor):
            return None
        is_computed = isinstance(found.scale, fx.Node) and found.scale.op != "get_attr"
        return _spread(value, -torch.ones(()), torch.ones(())) if is_computed and value.numel() > 1 and not value.any() else None

    def hidden(self, pair: Pair, bound: float) -> str:
        """What the probe's numbers hide, as a sentence: a channel that is dead on the probe may be multiplied by anything, and a number among
        the arguments, such as the eps of a norm, may not matter beside them. Both values are computed once more, with other numbers in place
        of the zeros and with small ones; where the old one hangs on more than the new one, they can't be."""
        if not isinstance(self.contract, Exact) or pair.new in self.pairs.carried or self.pairs.is_old(pair.new):
            return ""
        limit = max(bound, HIDDEN)
        for other, where in self._others(pair):
            cone = self.pairs.cone(pair) if other else None
            if cone and (figure := self._off(pair, cone, other, limit, _whole_error)) > limit:
                return f"{figure:.3g} at {pair.new.name} where its operands {where}"
        return ""

    def unread(self, pair: Pair, bound: float) -> str:
        """How rows of a table that isn't on record differ where the probe doesn't read them, as a sentence: all of them are read once."""
        new = pair.new
        if new.target is not torch.ops.aten.embedding.default or not isinstance(self.contract, Exact):
            return ""
        table, index = new.args[:2]
        if index not in pair.frontier or table in pair.frontier or self.values.is_recorded(table):  # type: ignore[arg-type]
            return ""
        ids = self.values.old[pair.frontier[index]]  # type: ignore[index]
        every = torch.arange(table.meta["val"].shape[0], dtype=ids.dtype).reshape(*[1] * (ids.dim() - 1), -1)  # type: ignore[union-attr]
        cone = self.pairs.cone(pair)
        error = self._off(pair, cone, {pair.frontier[index]: every}, bound, slice_error) if cone else 0.0  # type: ignore[index]
        return f"{error:.3g} in a row that the probe doesn't read" if error > bound else ""

    def _off(self, pair: Pair, cone: Sequence[Step], other: Mapping[fx.Node, Any], limit: float, figure: Figure) -> float:
        """How far the new value is from the old one, both from other numbers; beside what a few roundings do, where it is more than the limit.
        0 where an op can't take them, as an index made of floats."""
        try:
            with self.values.instead(pair, cone, other):
                before, env = self.values.changed(pair.old, pair.new), self.values.operands(pair)
                after = like(before, evaluate(pair.new, env, self.values.constants))
                worst = max(map(figure, *both(before, after)))
                if not 0 < limit < worst < math.inf:
                    return worst
                return max(map(figure, *both(before, after), self.values.floors(pair, env, after, limit)))
        except (IndexError, RuntimeError):
            return 0.0

    def around(self, pair: Pair) -> list[fx.Node]:
        """The old values that the new node is computed from, but those that are 0 for every input."""
        return [root for root in pair.frontier.values() if root not in self.edit.nulls]

    def _others(self, pair: Pair) -> Iterator[tuple[dict[fx.Node, Any], str]]:
        """Numbers in place of the old values around the pair, and what is other about them."""
        around = self.around(pair)
        yield {root: filled(self.values.old[root]) for root in around if has_zeros(self.values.old[root])}, "aren't 0, as they are on the probe"
        if any(isinstance(a, float) for a in (*pair.new.args, *pair.new.kwargs.values())):
            yield (
                {root: self.values.old[root] * SMALL for root in around if is_wide(self.values.old[root])},
                f"are {SMALL} of what they are on the probe",
            )


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


def worst_error(old: Any, new: Any) -> float:
    """The greatest `relative_error` of a tensor."""
    return max(relative_error(x, y) for x, y in zip(*both(old, new), strict=True))


def _whole_error(old: Tensor, new: Tensor, noise: Tensor | None = None) -> float:
    return relative_error(old, new, 0.0 if noise is None else float(noise.max()))


def _worst_slice(old: Any, new: Any) -> float:
    """Of each row and channel; of a value in 16 bits, whose quiet rows may be rounding noise, whole."""
    return max(slice_error(x, y) if x.itemsize >= 4 else relative_error(x, y) for x, y in zip(*both(old, new), strict=True))
