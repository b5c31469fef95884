"""The keys of every attention, whole or opened, found by what softmax normalises over; what calibration says of their channels; how both
passes change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.calibrate.observers import Distribution, Moments, Range
from fxcompress.edit import Edit
from fxcompress.numerics.histogram import Histogram
from fxcompress.passes.quant.sites import matmul_sites
from fxcompress.passes.softmax.attentions import SOFTMAXES
from fxcompress.passes.tidy.schema import arguments
from fxcompress.program import Program
from fxcompress.rewrite import Context, Reject
from fxcompress.transport import Kind, Plan, Seed, Transport

GAIN = 0.99  # of the range, squared: what a uniform quantiser's noise goes with

aten = torch.ops.aten
ATTENTIONS = (aten.scaled_dot_product_attention.default,)
ON_SCORES = (  # what may stand between a product and its softmax, score by score
    *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.where.self, aten.where.ScalarOther, aten.tanh.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarSelf, aten._to_copy.default, aten.to.dtype, aten.clone.default),
    *(aten.reshape.default, aten.maximum.default, aten.clamp.default, aten.clamp_min.default, aten.dropout.default),
)


@dataclass(frozen=True)
class Keys:
    """node: the attention, or the product of queries and keys. value: the keys as it reads them. axes: of the value, heads and channels."""

    node: fx.Node
    value: fx.Node
    axes: tuple[int, ...]

    @property
    def seed(self) -> Seed:
        """A change of every channel of every head."""
        return Seed(self.value, self.axes)

    def wide(self, statistic: Tensor) -> Tensor:
        """A statistic per index of the axes, as one of the value's rank."""
        shape = self.value.meta["val"].shape
        return statistic.reshape([int(shape[a]) if a in self.axes else 1 for a in range(len(shape))])


@dataclass(frozen=True)
class Seen:
    """What the feed says of keys: least, greatest and mean value per channel, of the keys' rank; and all of their values."""

    lo: Tensor
    hi: Tensor
    mean: Tensor
    values: Histogram

    def gaining(self, plan: Plan, keys: Keys, vector: Tensor) -> Tensor | Reject:
        """The vector, if the keys' range shrinks under it."""
        span = self.span(plan, keys, vector)
        return vector if span**2 < GAIN else Reject("the range of {} would be {} of what it is", keys.value, f"{span:.3f}")

    def span(self, plan: Plan, keys: Keys, vector: Tensor) -> float:
        """The range of all keys once a plan has changed them, 0 included, relative to what it is."""
        changes = plan.changes(vector)
        ends = torch.stack([changes[keys.value](v) if keys.value in changes else v for v in (self.lo, self.hi)])
        return _width(ends) / max(_width(torch.stack([self.lo, self.hi])), 1e-30)


def _width(ends: Tensor) -> float:
    return float(ends.max().clamp(min=0) - ends.min().clamp(max=0))


Choice = Callable[[Keys, Plan, Seen], Tensor | Reject]


def change_keys(on: Context, edit: Edit, kind: Kind, choose: Choice, told: Callable[[Tensor], str]) -> Mapping[str, Reject]:
    """One site an attention: the keys of every one that has a free class are changed by what `choose` gives for them."""
    declined: dict[str, Reject] = {}
    engine = Transport(on.program)
    plans = {keys: engine.solve(kind, keys.seed) for keys in keys_of(on.program) if on.admits(keys.node)}
    seen = observed(plans, on)
    for keys, plan in plans.items():
        answer = choose(keys, plan, seen[keys]) if plan.count else Reject("{}", plan.reason())
        if isinstance(answer, Reject):
            declined[keys.node.name] = answer
        else:
            plan.apply(edit, answer, told(answer), at=keys.node)
    return declined


def keys_of(program: Program) -> Iterator[Keys]:
    """The keys of every attention, those that several share once."""
    found: set[fx.Node] = set()
    products = {site.node: site.activations for site in matmul_sites(program) if site.family == "product"}
    for node in program.graph.nodes:
        value: fx.Node | None = None
        if node.target in ATTENTIONS:
            value, channel = arguments(node)["key"], -1
        elif node in products and _is_normalised(node):
            value, channel = products[node][max(products[node])], -2
        if value is not None and value not in found:
            found.add(value)
            yield Keys(node, value, _axes(value, channel))


def observed(keys: Iterable[Keys], on: Context) -> dict[Keys, Seen]:
    """Their statistics, in one run over the feed."""
    asked = {k: (Range(k.axes), Moments(k.axes), Distribution()) for k in keys}
    answers = on.observe((k.value, observer) for k, observers in asked.items() for observer in observers)
    found = {}
    for k, observers in asked.items():
        extremes, moments, values = (answers[k.value, observer] for observer in observers)
        found[k] = Seen(k.wide(extremes.lo), k.wide(extremes.hi), k.wide(moments.mean), values)
    return found


def _axes(value: fx.Node, channel: int) -> tuple[int, ...]:
    """Heads, where they are an axis of their own, and channels."""
    rank = value.meta["val"].dim()
    return (1, rank + channel) if rank == 4 else (rank + channel,)


def _is_normalised(product: fx.Node) -> bool:
    """Whether a softmax over the product's last axis reads it, score by score."""
    seen, queue = set[fx.Node](), [product]
    while queue:
        node = queue.pop()
        for user in node.users:
            if user.target in SOFTMAXES:
                return int(user.args[1]) in (-1, user.meta["val"].dim() - 1)  # type: ignore[arg-type]
            if user.target in ON_SCORES and user not in seen:
                seen.add(user)
                queue.append(user)
    return False
