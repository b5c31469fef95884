"""Outliers move from activations into weights, channel by channel, before both are quantised.

    W x = (W diag s) (x / s),    s_j = max|x_j|^a / max|W_j|^(1 - a)

A site is the input of linear layers and convolutions; what makes it must take 1 / s: a norm's gain, a layer before, whatever commutes on the
way, found from the dataflow. Channels that some op can't tell apart (shared heads, rotary pairs) get one factor. Declined with the op that
stops it. a is searched per site, 0 to 1, for the least noise that quantising x and W is predicted to leave in the results, no change included:

    noise = sum over layers of  (D_x² / 12) ‖W s‖² + sum_o (D_o² / 12) E‖x / s‖²,  each relative to E‖W x‖²

with D the steps of the formats; for D_x, s is from the extremes in one half of the items and the range of x / s that of the other half, for
what few items have as extremes is much by chance. Needs calibration: extremes and moments per channel. Exact but for rounding; costs nothing
at run time.
Source: SmoothQuant (arXiv 2211.10438), equation 4; the objective is derived here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, fx

from fxcompress.calibrate.observers import Extremes, Halves, Moments
from fxcompress.contract import Exact
from fxcompress.dataflow import WeightUse, weight_uses
from fxcompress.edit import Edit
from fxcompress.passes.quant.sites import matmul_sites, summed_axis
from fxcompress.program import Program
from fxcompress.rewrite import Context, Options, Reject, Transform
from fxcompress.transport import Kind, Plan, Seed, Transport
from fxcompress.transport.labels import as_tensor

ALPHAS = tuple(i / 20 for i in range(21))
LEAST = 1e-4  # factor; beyond it float32 loses the channel


class SmoothOptions(Options):
    """alpha: how much of the outliers moves, 0 to 1; left out, it is searched per site. activation_bits, weight_bits: of
    the formats to come. products: whether factors of attention products will be quantised too."""

    products: bool = True
    alpha: float | None = Field(default=None, ge=0, le=1)
    activation_bits: int = Field(default=8, ge=2, le=16)
    weight_bits: int = Field(default=8, ge=2, le=16)


@dataclass(frozen=True)
class Layer:
    """A layer with a constant weight. axis: of x, summed over. use: how the weight, a constant named `leaf`, stands in it."""

    node: fx.Node
    x: fx.Node
    axis: int
    leaf: str
    use: WeightUse

    def matrix(self, program: Program) -> Tensor:
        """|W| as [out, in, window]."""
        turned = program.constants[self.leaf].movedim((self.use.channel, self.use.contraction), (0, 1))
        return turned.abs().float().reshape(*turned.shape[:2], -1)


@dataclass(frozen=True)
class Channels:
    """What is known of a value per index along some of its axes, float64: mean square, and extremes in both halves of the items."""

    square: Tensor
    halves: tuple[Extremes, Extremes]

    def divided(self, s: Tensor) -> Channels:
        """The same of x / s."""
        first, second = (Extremes(half.lo / s, half.hi / s) for half in self.halves)
        return Channels(self.square / s.square(), (first, second))

    @property
    def amax(self) -> tuple[Tensor, Tensor, Tensor]:
        """Greatest magnitude in all items and in each half."""
        first, second = (torch.maximum(half.hi, -half.lo) for half in self.halves)
        return torch.maximum(first, second), first, second

    def step(self, half: int, levels: int) -> Tensor:
        """Of a quantiser of the whole value in one half."""
        return (self.halves[half].hi.max().clamp(min=0) - self.halves[half].lo.min().clamp(max=0)) / (levels - 1)


Key = tuple[fx.Node, tuple[int, ...]]  # a value and some of its axes
Known = dict[Key, Channels]


class Smooth(Transform):
    """Balance every legal layer input."""

    name = "reparam.smooth"
    contract = Exact()
    Options = SmoothOptions
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per layer input."""
        declined: dict[str, Reject] = {}
        layers = list(_layers(on.program))
        factors = (
            [v for s in matmul_sites(on.program) if s.family == "product" for v in s.activations.values()] if self.options.products else []
        )
        firsts: dict[fx.Node, Layer] = {}
        for layer in layers:
            if on.admits(layer.node):
                firsts.setdefault(layer.x, layer)
        engine = Transport(on.program)
        plans = {first: engine.solve(Kind.SCALE, _seed(first)) for first in firsts.values()}
        asked: list[Key] = [key for plan in plans.values() for key in _reached(plan, factors)]
        asked += [(y.x, (y.axis,)) for y in layers]
        known = _observed(asked, on)
        for first, plan in plans.items():
            site = _Site(plan, [y for y in layers if (y.x, (y.axis,)) in set(_reached(plan, [y.x]))], _reached(plan, factors))
            if not plan.count:
                declined[first.node.name] = Reject("{}", plan.reason())
            elif (vector := self._vector(site, known, on.program)) is None:
                declined[first.node.name] = Reject("no factors lower the predicted noise of {}", first.x)
            else:
                made = plan.apply(edit, vector, f"factors {float(vector.min()):.2g} to {float(vector.max()):.2g}", at=first.node)
                made.places = [y.node for y in layers if y.x is first.x]
                known.update({key: known[key].divided(s) for key, s in site.divisors(vector).items()})
        return declined

    def _vector(self, site: _Site, known: Known, program: Program) -> Tensor | None:
        """The vector of the alpha with the least predicted noise; None if leaving everything as it is has less."""
        matrices = {y: y.matrix(program) for y in site.layers}
        powers = {y: w.square().sum((0, 2)).double() for y, w in matrices.items()}
        activations = [site.gathered({y: known[y.x, (y.axis,)].amax[part] for y in site.layers}) for part in range(3)]
        weights = site.gathered({y: w.amax((0, 2)).double() for y, w in matrices.items()})
        alphas = ALPHAS if self.options.alpha is None else (self.options.alpha,)
        vectors = [tuple(_balanced(x, weights, alpha) for x in activations) for alpha in alphas]
        if self.options.alpha is None:
            vectors.insert(0, (torch.ones_like(weights),) * 3)
        best, *_ = min(vectors, key=lambda v: self._noise(site, v, matrices, powers, known))
        return None if bool((best == 1).all()) else best

    def _noise(
        self,
        site: _Site,
        vectors: Sequence[Tensor],
        matrices: Mapping[Layer, Tensor],
        powers: Mapping[Layer, Tensor],
        known: Known,
    ) -> float:
        """Of the results of the layers and the factors of the products that a vector reaches, each relative to its power. vectors: that of all
        items, and those of each half, which the other half judges. powers: ‖W_j‖² per input channel."""
        whole, *halves = (site.divisors(v) for v in vectors)
        levels_x, levels_w = 2**self.options.activation_bits, 2**self.options.weight_bits
        total = 0.0
        for layer, w in matrices.items():
            key: Key = (layer.x, (layer.axis,))
            x, power = known[key], powers[layer]
            steps = [x.divided(s[key]).step(1 - i, levels_x) for i, s in enumerate(halves)]
            of_x = sum(step.square() * (power * s[key].square()).sum() / 2 for step, s in zip(steps, halves, strict=True))
            of_rows = (2 * (w * whole[key][:, None].float()).amax((1, 2)) / (levels_w - 1)).square().sum()
            of_w = of_rows * (x.square / whole[key].square()).sum() * w.shape[2]
            total += _ratio(of_x + of_w, 12 * (power * x.square).sum())
        for key in site.factors:
            x = known[key]
            steps = [x.divided(s[key]).step(1 - i, levels_x) for i, s in enumerate(halves)]
            total += _ratio(torch.stack(steps).square().mean(), 12 * x.divided(whole[key]).square.mean())
        return total


@dataclass(frozen=True)
class _Site:
    """A plan with the layers whose inputs it changes, and the factors of products it changes, each with the axes it tells apart."""

    plan: Plan
    layers: list[Layer]
    factors: list[Key]

    def divisors(self, vector: Tensor) -> dict[Key, Tensor]:
        """What each of these values is divided by, per index along its axes."""
        numbers = self.plan.numbers(vector)
        keys: list[Key] = [*((y.x, (y.axis,)) for y in self.layers), *self.factors]
        return {key: _divisor(self.plan, numbers, *key) for key in keys}

    def gathered(self, values: Mapping[Layer, Tensor]) -> Tensor:
        """The greatest of some figures [in] of the layers' inputs, per class."""
        found = [self.plan.gather({y.x: _along(v, y.axis, y.x.meta["val"].dim())}) for y, v in values.items()]
        return torch.stack(found).amax(0)


def _layers(program: Program) -> Iterator[Layer]:
    """Every linear layer and convolution of one group with a constant weight, in order."""
    sites = {site.node: site for site in matmul_sites(program) if site.family != "product"}
    found: dict[fx.Node, Layer] = {}
    for leaf in program.graph.find_nodes(op="get_attr"):
        tensor = program.constants[str(leaf.target)]
        for use in weight_uses(leaf, tensor)[0] if tensor.is_floating_point() else ():
            if (site := sites.get(use.node)) is None:
                continue
            x = next(iter(site.activations.values()))
            axis = summed_axis(site) % x.meta["val"].dim()
            if x.meta["val"].shape[axis] == tensor.shape[use.contraction]:  # not so in grouped convolutions
                found[use.node] = Layer(use.node, x, axis, str(leaf.target), use)
    yield from (found[node] for node in sites if node in found)


def _seed(layer: Layer) -> Seed:
    return Seed(layer.x, (layer.axis,), power=-1)


def _observed(asked: Iterable[Key], on: Context) -> Known:
    keys = list(dict.fromkeys(asked))
    answers = on.observe((value, observer(axes)) for value, axes in keys for observer in (Halves, Moments))
    found: Known = {}
    for value, axes in keys:
        moments = answers[value, Moments(axes)]
        found[value, axes] = Channels(moments.var + moments.mean.square(), answers[value, Halves(axes)])
    return found


def _reached(plan: Plan, values: Iterable[fx.Node]) -> list[Key]:
    """The values among these that the plan changes, with the axes it tells apart."""
    slots = {v: sorted({a for label in plan.values.get(v, ()) for a in label.slot}) for v in values}
    return [(v, tuple(slot)) for v, slot in slots.items() if slot]


def _divisor(plan: Plan, numbers: Tensor, value: fx.Node, axes: tuple[int, ...]) -> Tensor:
    sizes = [int(value.meta["val"].shape[a]) for a in axes]
    result = torch.ones(sizes, dtype=torch.float64)
    for label in plan.values[value]:
        own = [label.index.shape[a] for a in axes]
        result = result * (numbers[as_tensor(label.index)] ** -label.power).reshape(own)
    return result


def _balanced(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Equation 4 per class, of geometric mean 1; 1 where one of the two is unknown or 0."""
    s = activations.pow(alpha) / weights.pow(1 - alpha)
    usable = s.isfinite() & (activations > 0) & (weights > 0)
    if not usable.any():
        return torch.ones_like(s)
    s = s / s[usable].log().mean().exp()
    return torch.where(usable, s, 1.0).clamp(min=LEAST, max=1 / LEAST)


def _ratio(noise: Tensor, power: Tensor) -> float:
    return float(noise / power) if power else 0.0


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    """[in] in the rank of a value."""
    return values.reshape([-1 if a == axis else 1 for a in range(rank)])
