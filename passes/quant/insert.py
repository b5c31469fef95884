"""Weights and activations as integers: a quantiser on every operand of every product.

    y = W x  ->  dequantize(quantize(W)) dequantize(quantize(x)),    x_q = clip(round(x / s) + z)

A site is a linear layer, a convolution or a product of two activations (attention), found by what the op contracts. An activation's range is
measured on the calibration feed (static) or taken from each vector when the model runs (per token). A value that several sites read has one
quantiser; other readers keep the float value. Declined: values that are constant on the whole feed, that a graph output or an unquantisable
partner needs in float, and what the target has no kernel for. Weights follow `quant.weight_only`. A convolution's bias sits on the grid of
its products, s = s_x s_W, in int32. Costs the noise of the formats: each value is held to the SQNR of an ideal quantiser of its range.
Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference (arXiv 1806.08342); Jacob et al. (arXiv 1712.05877).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor, fx

from fxcompress.calibrate.observers import Distribution, Observer, Range
from fxcompress.contract import MEASURED, Bounded
from fxcompress.dataflow import weight_uses
from fxcompress.edit import Edit
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.numerics.formats import Format
from fxcompress.numerics.histogram import Histogram, least_divergence, least_error, percentile
from fxcompress.numerics.ranges import scale_from_range
from fxcompress.passes.quant.sites import SUMMED, MatmulSite, matmul_sites, result_of
from fxcompress.passes.quant.weight_only import WeightOnly, WeightOnlyOptions, parse
from fxcompress.passes.tidy.schema import arguments
from fxcompress.program import module_path
from fxcompress.rewrite import Context, Match, Options, Reject, Transform
from fxcompress.target import ActivationKernel, Target

aten = torch.ops.aten
QUANTIZE, DEQUANTIZE = torch.ops.fxc.quantize.default, torch.ops.fxc.dequantize.default


class InsertOptions(Options):
    """weights, embeddings: as in quant.weight_only. activations: "format/tensor" (static) or "format/token" (dynamic); unsigned formats have
    zero points. products: whether both operands of attention products are quantised. range: minmax, mse, entropy or percentile:99.99.
    """

    weights: str = "int8/channel"
    embeddings: str | None = None
    activations: str = "uint8/tensor"
    products: bool = True
    range: str = "minmax"

    @field_validator("activations")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            _, granularity = parse(value)
        except RecipeError as error:
            raise ValueError(f"{error.what}; {error.why or error.do}") from None
        if granularity not in ("tensor", "token"):
            raise ValueError("an activation has one scale in all or one a token: tensor or token")
        return value

    @field_validator("range")
    @classmethod
    def _is_method(cls, value: str) -> str:
        name, _, share = value.partition(":")
        if name not in ("minmax", "mse", "entropy", "percentile") or bool(share) != (name == "percentile"):
            raise ValueError(f"{value!r}: one of minmax, mse, entropy, percentile:99.99")
        if share and not 50 < float(share) <= 100:
            raise ValueError("a percentile lies above 50, up to 100")
        return value

    @property
    def format(self) -> Format:
        """Of activations."""
        return parse(self.activations)[0]

    @property
    def is_static(self) -> bool:
        """Whether ranges come from the feed."""
        return parse(self.activations)[1] == "tensor"


@dataclass(frozen=True)
class Grid:
    """A static quantiser: scale and zero point 0-d, lo and hi the range it was made for."""

    scale: Tensor
    zero_point: Tensor | None
    lo: Tensor
    hi: Tensor


class Insert(Transform):
    """Quantise every legal product."""

    name = "quant.insert"
    contract = Bounded()
    Options = InsertOptions
    gives = frozenset({"quantised"})
    excludes = frozenset({"finalised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site a value, a weight and a bias."""
        declined: dict[str, Reject] = {}
        sites = _kept(matmul_sites(on.program), partial(self._refusal, on), declined)
        sites = [s for s in sites if on.admits(s.node) and (s.family != "product" or self.options.products)]
        grids = self._grids(sites, on) if self.options.is_static else {}
        sites = _kept(sites, lambda s: next((g for v in self._values(s, on) if isinstance(g := grids.get(v), Reject)), None), declined)
        weights = self._weights(sites, on, declined)
        sites = [s for s in sites if s.family == "product" or any(s.node in _readers_of(m) for m in weights)]
        for value, readers in self._readers(sites, on).items():
            self._insert(value, readers, grids.get(value), edit)
        for match in weights:
            self._weight_only.apply(match, edit)
        for site in sites:
            if site.family == "conv":
                _insert_bias(site, edit)
        return declined

    @property
    def _weight_only(self) -> WeightOnly:
        return WeightOnly(WeightOnlyOptions(weights=self.options.weights, embeddings=self.options.embeddings))

    def _kernel(self, site: MatmulSite, on: Context) -> ActivationKernel | str:
        return on.target.activation_kernel(site.family, self.options.activations, parse(self.options.weights)[0].name)

    def _refusal(self, on: Context, site: MatmulSite) -> Reject | None:
        kernel, result = self._kernel(site, on), result_of(site.node)
        if isinstance(kernel, str):
            return Reject("{}: {}", site.node, kernel)
        wrong = next((v for v in site.activations.values() if not v.meta["val"].is_floating_point()), None)
        if wrong is not None:
            return Reject("{} multiplies {}, which is of {}", site.node, wrong, wrong.meta["val"].dtype)
        if not self.options.is_static and (site.family == "conv" or max(site.activations) != _position(site)):
            return Reject("{} sums over other axes than the last one of {}, so its tokens can't have scales", site.node, _last(site))
        if kernel.needs_output and any(u.op == "output" for u in result.users):
            return Reject("{} is a result of the model; {} computes {} only into integers", result, on.target.name, site.family)
        return None

    def _values(self, site: MatmulSite, on: Context) -> list[fx.Node]:
        """What has to be quantised for a site: its activations, and its result where the kernel gives integers."""
        kernel = self._kernel(site, on)
        needs_output = isinstance(kernel, ActivationKernel) and kernel.needs_output
        values = [*site.activations.values(), *([result_of(site.node)] if needs_output else [])]
        return [v for v in values if v.target is not DEQUANTIZE]

    def _readers(self, sites: Sequence[MatmulSite], on: Context) -> dict[fx.Node, list[fx.Node] | None]:
        """Per value the sites that read it from now on as integers; None, all its readers, for results that are integers anyway."""
        found: dict[fx.Node, list[fx.Node] | None] = {}
        for site in sites:
            operands = list(site.activations.values())
            for value in self._values(site, on):
                known = found.setdefault(value, [])
                if value not in operands:
                    found[value] = None
                elif known is not None:
                    known.append(site.node)
        return found

    def _grids(self, sites: Sequence[MatmulSite], on: Context) -> dict[fx.Node, Grid | Reject]:
        """A grid for every value of every site, from the feed; a Reject where a value never changes."""
        values = dict.fromkeys(v for s in sites for v in self._values(s, on))
        observer: Observer = Range() if self.options.range == "minmax" else Distribution()
        answers = on.observe((v, observer) for v in values)
        return {v: self._grid(v, answers[v, observer], on) for v in values}

    def _grid(self, value: fx.Node, seen: Any, on: Context) -> Grid | Reject:
        lo, hi = float(seen.lo), float(seen.hi)
        if lo == hi:
            return Reject("{} is {} everywhere on the calibration feed", value, f"{lo:g}")
        if isinstance(seen, Histogram):
            lo, hi = self._range(value, seen)
        format, dtype = self.options.format, value.meta["val"].dtype
        ends = torch.tensor(lo, dtype=torch.float64), torch.tensor(hi, dtype=torch.float64)
        scale, zero = scale_from_range(torch.minimum(*ends).to(dtype), torch.maximum(*ends).to(dtype), format, format.signed)
        return Grid(scale, zero, *ends)

    def _range(self, value: fx.Node, seen: Histogram) -> tuple[float, float]:
        name, _, share = self.options.range.partition(":")
        if name == "mse":
            return least_error(seen, self.options.format, self.options.format.signed)
        if name == "entropy":
            return least_divergence(seen, self.options.format)
        try:
            return percentile(seen, float(share) / 100)
        except ValueError as error:
            where = f"{module_path(value) or '<root>'}  ({value.name})"
            do = f"pass more items, or a lower percentile: - {self.name}: {{range: 'percentile:99.9'}}"
            raise CalibrationError("the calibration feed is too small", where=where, why=str(error), do=do) from None

    def _weights(self, sites: Sequence[MatmulSite], on: Context, declined: dict[str, Reject]) -> list[Match]:
        """The legal weights. One that only quantised sites read needs no kernel for float activations."""
        quantised = {s.node for s in sites}
        free = replace(on, target=Target(name=on.target.name))
        found: list[Match] = []
        for leaf in [n for n in on.program.graph.nodes if n.op == "get_attr"]:
            uses, _ = weight_uses(leaf, on.program.constants[str(leaf.target)])
            answer = self._weight_only.match(leaf, free if quantised.issuperset(u.node for u in uses) else on)
            if isinstance(answer, Reject):
                declined[leaf.name] = answer
            elif answer is not None and all(on.admits(n) for n in answer.places):
                found.append(answer)
        return found

    def _insert(self, value: fx.Node, readers: list[fx.Node] | None, grid: Grid | Reject | None, edit: Edit) -> None:
        """The pair between a value and these readers."""
        first = min(readers or value.users)
        format, rank = self.options.format, value.meta["val"].dim()
        with edit.site(first, f"{value.name} as {self.options.activations}"):
            at: dict[str, Any] = {"like": first, "before": first}
            if isinstance(grid, Grid):
                one = (1,) * rank
                scale = edit.constant(f"{value.name}.scale", grid.scale.reshape(one), **at)
                zero = None if grid.zero_point is None else edit.constant(f"{value.name}.zero_point", grid.zero_point.reshape(one), **at)
                block = [-1] * rank
            else:
                scale, zero, block = _token_scale(value, format, partial(edit.insert, **at)), None, [*[1] * (rank - 1), -1]
            codes = edit.insert(QUANTIZE, value, scale, zero, format.name, block, **at)
            pair = edit.insert(DEQUANTIZE, codes, scale, zero, format.name, block, val=value.meta["val"], **at)
            if isinstance(grid, Grid):
                pair.meta[MEASURED] = grid.lo, grid.hi
            edit.replace(value, pair, readers)


def _kept(sites: Iterable[MatmulSite], refusal: Callable[[MatmulSite], Reject | None], declined: dict[str, Reject]) -> list[MatmulSite]:
    """The sites without a refusal; the others are filed under their node."""
    kept = []
    for site in sites:
        if reject := refusal(site):
            declined[site.node.name] = reject
        else:
            kept.append(site)
    return kept


def _readers_of(match: Match) -> Sequence[fx.Node]:
    return match.places


def _position(site: MatmulSite) -> int:
    """Where the operand stands that is summed over its last axis."""
    return 1 if site.node.target in SUMMED else 0


def _last(site: MatmulSite) -> fx.Node:
    return site.activations[max(site.activations)]


def _token_scale(value: fx.Node, format: Format, op: Any) -> fx.Node:
    """max|x| / qmax of every vector along the last axis, and 1 for one of zeros."""
    greatest = op(aten.amax.default, op(aten.abs.default, value), [-1], True)
    least = torch.finfo(value.meta["val"].dtype).tiny
    scale: fx.Node = op(aten.clamp_min.default, op(aten.div.Tensor, greatest, format.qmax), least)
    return scale


def _insert_bias(site: MatmulSite, edit: Edit) -> None:
    """The bias on the grid of the products: scale s_x s_W per channel, int32. Left in float where it is 0 or beyond int32."""
    given = arguments(site.node)
    bias, x, weight = given.get("bias"), given["input"], given["weight"]
    value = edit.program.constant(bias) if isinstance(bias, fx.Node) else None
    if bias is None or value is None or not value.any():
        return
    constants = edit.program.constants
    scale = (constants[str(x.args[1].target)].double().reshape(()) * constants[str(weight.args[1].target)].double().reshape(-1)).to(value.dtype)
    scale = scale.expand(value.shape).contiguous()
    limit = 2.0**31 * scale.double()
    if bool((value.double().abs() >= limit).any()) or not bool((scale > 0).all()):
        return
    with edit.site(site.node, "bias on the grid of the products"):
        at = {"like": site.node, "before": site.node}
        name = edit.constant(f"{bias.target}.scale", scale, **at)
        codes = edit.insert(QUANTIZE, bias, name, None, "int32", [1], **at)
        pair = edit.insert(DEQUANTIZE, codes, name, None, "int32", [1], val=bias.meta["val"], **at)
        pair.meta[MEASURED] = -limit, limit
        edit.replace(bias, pair, [site.node])
