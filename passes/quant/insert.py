"""Weights and activations as integers: a quantiser on every operand of every product.

    y = W x  ->  dequantize(quantize(W)) dequantize(quantize(x)),    x_q = clip(round(x / s) + z)

A site is a linear layer, a convolution or a product of two activations (attention), found by what the op contracts. An activation's range is
measured on the calibration feed (static) or taken from each vector when the model runs (per token). A value that several sites read has one
quantiser; other readers keep the float value. Declined: values that are constant on the whole feed, that a graph output or an unquantisable
partner needs in float, and what the target has no kernel for. Weights follow `quant.weight_only`, symmetric. A convolution's bias sits on
the grid of its products, s = s_x s_W, in int32. Costs the noise of the formats: each value is held to the SQNR of an ideal quantiser of its
range.
Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference (arXiv 1806.08342); Jacob et al. (arXiv 1712.05877).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from pydantic import ValidationError, field_validator
from torch import Tensor, fx

from fxcompress.contract import MEASURED, Bounded
from fxcompress.dataflow import before_moves, contracts_unopened, decided_by_inputs, weight_uses
from fxcompress.edit import Edit
from fxcompress.errors import CalibrationError, RecipeError
from fxcompress.numerics.formats import Format, format_of
from fxcompress.numerics.ranges import least_scale
from fxcompress.passes.quant.grids import DEQUANTIZE, QUANTIZE, Grid, check_method, grid_of, insert_pair, observer_of
from fxcompress.passes.quant.sites import POOLS, SUMMED, MatmulSite, matmul_sites, result_of, source_of
from fxcompress.passes.quant.weight_only import WeightOnly, WeightOnlyOptions, parse
from fxcompress.passes.tidy.schema import arguments
from fxcompress.program import Program, place_of
from fxcompress.rewrite import Context, Match, Options, Reject, Transform
from fxcompress.target import ActivationKernel, Target

aten = torch.ops.aten


class InsertOptions(Options):
    """weights, embeddings: as in quant.weight_only. activations: "format/tensor" (static) or "format/token" (dynamic); unsigned formats have
    zero points. products: whether both operands of attention products are quantised. range: minmax, mse, entropy or percentile:99.99.
    storage: whether weights of layers that stay in float are quantised too: only the file gets smaller.
    """

    weights: str = "int8/channel"
    embeddings: str | None = None
    activations: str = "uint8/tensor"
    products: bool = True
    range: str = "minmax"
    storage: bool = False

    @field_validator("activations")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            format, granularity = parse(value)
        except RecipeError as error:
            raise ValueError(f"{error.what}; {error.why or error.do}") from None
        if format.kind == "log":
            raise ValueError(f"{format} holds nothing below 0: softmax.adaptive has it for probabilities")
        if granularity not in ("tensor", "token"):
            raise ValueError("an activation has one scale in all or one a token: tensor or token")
        if granularity == "token" and not format.signed:
            raise ValueError(f"{format} holds nothing below 0 without zero points, which tokens don't have; say int8/token")
        if granularity == "tensor" and format.kind == "float":
            raise ValueError(f"{format} has no calibrated range; say {format}/token")
        return value

    @field_validator("weights", "embeddings")
    @classmethod
    def _is_weight(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                WeightOnlyOptions(weights=value)
            except ValidationError as error:
                text = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(text.removesuffix("; say symmetric: false")) from None
        return value

    @field_validator("range")
    @classmethod
    def _is_method(cls, value: str) -> str:
        return check_method(value)

    @property
    def format(self) -> Format:
        """Of activations."""
        return parse(self.activations)[0]

    @property
    def is_static(self) -> bool:
        """Whether ranges come from the feed."""
        return parse(self.activations)[1] == "tensor"


class Insert(Transform):
    """Quantise every legal product."""

    name = "quant.insert"
    contract = Bounded()
    Options = InsertOptions
    gives = frozenset({"quantised"})
    excludes = frozenset({"finalised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site a value, a weight and a bias."""
        declined = {n.name: Reject("{} multiplies in a way that isn't opened: matmul, linear and convolutions are", n) for n in _unopened(on)}
        asked = [s for s in matmul_sites(on.program) if on.admits(s.node) and (s.family != "product" or self.options.products)]
        sites = _kept(asked, partial(self._refusal, on), declined)
        grids = self._grids(sites, on) if self.options.is_static else {}
        sites = _kept(sites, lambda s: next((g for v in self._values(s, on) if isinstance(g := grids.get(v), Reject)), None), declined)
        weights = self._weights(sites, on, declined)
        covered = {n for m in weights for n in m.places}
        sites = _kept(
            sites, lambda s: None if s.family == "product" or s.node in covered or not self._values(s, on) else _uncovered(s), declined
        )
        wanted = [(s.node, self._values(s, on)) for s in sites]
        for value, readers in self._readers(sites, on).items():
            self._insert(value, readers, grids.get(value), edit)
            edit.sites[-1].places = [node for node, values in wanted if value in values]
        for match in weights:
            self._weight_only.apply(match, edit)
        for site in sites:
            if site.family in ("conv", "transposed"):
                _insert_bias(site, edit)
        whole = {n.name for n in covered}
        return {name: reject.but("its weight is quantised") if name in whole else reject for name, reject in declined.items()}

    @cached_property
    def _weight_only(self) -> WeightOnly:
        return WeightOnly(WeightOnlyOptions(weights=self.options.weights, embeddings=self.options.embeddings, storage=self.options.storage))

    def _kernel(self, site: MatmulSite, on: Context) -> ActivationKernel | str:
        return on.target.activation_kernel(site.family, self.options.activations, parse(self.options.weights)[0].name)

    def _refusal(self, on: Context, site: MatmulSite) -> Reject | None:
        kernel, result = self._kernel(site, on), result_of(site.node)
        if isinstance(kernel, str):
            return Reject("{}: {}", site.node, kernel)
        wrong = next((v for v in site.activations.values() if not v.meta["val"].is_floating_point()), None)
        if wrong is not None:
            return Reject("{} multiplies {}, which is of {}", site.node, wrong, wrong.meta["val"].dtype)
        if not self.options.is_static and (site.family in ("conv", "transposed") or max(site.activations) != _position(site)):
            return Reject("{} sums over other axes than the last one of {}, so its tokens can't have scales", site.node, _last(site))
        if on.target.activations is not None and (codes := _log_codes(site)) is not None:
            return Reject("{} stays in float: {} has no kernel for {}, codes of {}", site.node, on.target.name, codes, codes.args[3])
        if kernel.needs_output and any(u.op == "output" for u in result.users):
            return Reject("{} is a result of the model; {} computes {} only into integers", result, on.target.name, site.family)
        return None

    def _values(self, site: MatmulSite, on: Context) -> list[fx.Node]:
        """What has to be quantised for a site: its activations, and its result where the kernel gives integers, unless they are already."""
        kernel, result = self._kernel(site, on), result_of(site.node)
        values = [v for v, _ in self._operands(site) if v.target is not DEQUANTIZE]
        if isinstance(kernel, ActivationKernel) and kernel.needs_output and any(u.target is not QUANTIZE for u in result.users):
            values.append(result)
        return values

    def _operands(self, site: MatmulSite) -> list[tuple[fx.Node, fx.Node]]:
        """The site's activations, each with the node that reads it. A static scale is the same before as after what only moves numbers: there
        the quantiser stands before, where one serves several readers and a value that the model returns too stays apart."""
        found = [(v, site.node) for v in site.activations.values()]
        return [source_of(v, r) for v, r in found] if self.options.is_static else found

    def _readers(self, sites: Sequence[MatmulSite], on: Context) -> dict[fx.Node, list[fx.Node] | None]:
        """Per value the sites that read it from now on as integers; None, all its readers, for results that are integers anyway."""
        found: dict[fx.Node, list[fx.Node] | None] = {}
        for site in sites:
            operands = self._operands(site)
            for value in self._values(site, on):
                known, own = found.setdefault(value, []), [reader for v, reader in operands if v is value]
                if not own:
                    found[value] = None
                elif known is not None:
                    known.extend(own)
        for total in _sums_of_codes(found) if self.options.activations in on.target.sums else ():
            for value in total.all_input_nodes:
                if (known := found[value]) is not None:
                    known.append(total)
        return found

    def _grids(self, sites: Sequence[MatmulSite], on: Context) -> dict[fx.Node, Grid | Reject]:
        """A grid for every value of every site, from the feed; a Reject where a value never changes. A max pool and
        what it alone reads share the grid that suits what is left, so that codes can be pooled."""
        values = dict.fromkeys(v for s in sites for v in self._values(s, on))
        observer = observer_of(self.options.range)
        answers = on.observe((v, observer) for v in values)
        grids = {v: grid_of(v, answers[v, observer], self.options.format, self.options.range, self.name) for v in values}
        for pool in (v for v in values if v.target in POOLS and v.all_input_nodes[0] in grids):
            whole = pool.all_input_nodes[0]
            given, taker = (pool, whole) if len(whole.users) == 1 else (whole, pool)
            grids[taker] = grids[given]
        if grids and all(isinstance(g, Reject) for g in grids.values()):
            first = next(iter(grids))
            raise CalibrationError(
                "no value changes on the calibration feed",
                where=place_of(first),
                why=f"{cast(Reject, grids[first]).reason}; {self.name} can use none of the {len(grids)} values it would quantise",
                do="pass items that differ from one another, as the model meets them in use",
            )
        return grids

    def _weights(self, sites: Sequence[MatmulSite], on: Context, declined: dict[str, Reject]) -> list[Match]:
        """The legal weights. One that only quantised sites read needs no kernel for float activations."""
        quantised = {s.node for s in sites}
        free = replace(on, target=Target(name=on.target.name))
        found: list[Match] = []
        for leaf in [n for n in on.program.graph.nodes if n.op == "get_attr"]:
            uses, _ = weight_uses(leaf, on.program.constants[str(leaf.target)])
            answer = self._weight_only.match(leaf, free if quantised.issuperset(u.node for u in uses) else on)
            if isinstance(answer, Reject) and on.admits(min(leaf.users)):
                declined[leaf.name] = answer
            elif isinstance(answer, Match) and all(on.admits(n) for n in answer.places):
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
            pair = insert_pair(edit, value, scale, zero, format, block, **at)
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


def _log_codes(site: MatmulSite) -> fx.Node | None:
    """An operand that is dequantised from a log format, which multiplies as numbers only."""
    values = (before_moves(v) for v in site.activations.values())
    return next((v for v in values if v.target is DEQUANTIZE and format_of(str(v.args[3])).kind == "log"), None)


def _unopened(on: Context) -> list[fx.Node]:
    """What multiplies values or weights and can't be a site, as einsum."""
    decided = decided_by_inputs(on.program)
    return [n for n in on.program.graph.nodes if n in decided and contracts_unopened(n) and on.admits(n)]


def _uncovered(site: MatmulSite) -> Reject:
    """Why a layer stays in float whose weight does."""
    return Reject("{} multiplies {} by a weight that stays in float", site.node, _last(site))


def _sums_of_codes(values: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Sums of two quantised values of one shape that are quantised themselves: a runtime adds such codes without leaving the integers."""
    return [
        n
        for n in dict.fromkeys(u for v in values for u in v.users)
        if n.target is aten.add.Tensor
        and result_of(n) in values
        and len(set(n.all_input_nodes)) == 2
        and all(x in values and x.meta["val"].shape == n.meta["val"].shape for x in n.all_input_nodes)
        and n.kwargs.get("alpha", 1) == 1
    ]


def _position(site: MatmulSite) -> int:
    """Where the operand stands that is summed over its last axis."""
    return 1 if site.node.target in SUMMED else 0


def _last(site: MatmulSite) -> fx.Node:
    return site.activations[max(site.activations)]


def _token_scale(value: fx.Node, format: Format, op: Any) -> fx.Node:
    """max|x| / qmax of every vector along the last axis, or the least positive scale for one of zeros."""
    greatest = op(aten.amax.default, op(aten.abs.default, value), [-1], True)
    scale: fx.Node = op(aten.clamp_min.default, op(aten.div.Tensor, greatest, format.qmax), least_scale(value.meta["val"].dtype))
    return scale


def _insert_bias(site: MatmulSite, edit: Edit) -> None:
    """The bias on the grid of the products, int32. Its scale s_x s_W is computed in the graph, so that it follows both, until quant.finalize
    folds it. Left in float where it is 0 or beyond int32, and where one channel sums products of several scales."""
    given = arguments(site.node)
    bias = given.get("bias")
    value = edit.program.constant(bias) if isinstance(bias, fx.Node) else None
    product = _product_scale(given["input"], given["weight"], edit.program)
    if bias is None or value is None or product is None or not value.any():
        return
    repeats = len(value) // len(product)  # grouped transposed kernels repeat their channels
    scales = product.repeat(repeats).to(value.dtype).double()
    limit = 2.0**31 * scales
    if bool((value.double().abs() >= limit).any()) or not bool((scales > 0).all()):
        return
    with edit.site(site.node, "bias on the grid of the products"):
        at: dict[str, Any] = {"like": site.node, "before": site.node}
        one, many = (edit.insert(aten.reshape.default, before_moves(given[k]).args[1], [-1], **at) for k in ("input", "weight"))
        scale = edit.insert(aten.mul.Tensor, many, one, **at)
        if repeats > 1:
            scale = edit.insert(aten.repeat.default, scale, [repeats], **at)
        pair = insert_pair(edit, bias, scale, None, format_of("int32"), [1], **at)
        pair.meta[MEASURED] = -limit, limit
        edit.replace(bias, pair, [site.node])


def _product_scale(x: fx.Node, weight: fx.Node, program: Program) -> Tensor | None:
    """s_x s_W, one entry or one a channel of the weight, float64; None unless both are quantised by constants and all that is summed into one
    channel has the same two."""
    x = before_moves(x)
    if x.target is not DEQUANTIZE or weight.target is not DEQUANTIZE or -1 not in weight.args[4][:2]:  # type: ignore[index, operator]
        return None
    s_x, s_w = (program.constant(n.args[1]) for n in (x, weight))  # type: ignore[arg-type]
    return None if s_x is None or s_w is None or s_x.numel() > 1 else s_x.double().reshape(()) * s_w.double().flatten()
