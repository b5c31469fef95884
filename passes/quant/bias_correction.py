"""The mean of the quantisation error of each output channel is taken out of the layer's bias.

    b -> b - (Ŵ E[x̂] - W E[x])

Ŵ, x̂: weight and input as the quantised layer has them, x the input just before its quantiser, so that every layer answers for its own shift
and none is corrected twice. Means per input channel come from the calibration feed; a convolution's window is summed, which takes its borders
for its inside. Legal for a layer with a bias of its own. Lossy by nature, since it changes what the quantised layer computes: the figure is
the output's. Costs nothing at run time.
Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv 1906.04721), section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.calibrate.observers import Moments
from fxcompress.contract import Lossy
from fxcompress.dataflow import WeightUse, before_pair, weight_uses
from fxcompress.edit import Edit
from fxcompress.interpret import constant_value
from fxcompress.passes.quant.grids import DEQUANTIZE
from fxcompress.passes.quant.sites import MatmulSite, matmul_sites, summed_axis
from fxcompress.passes.tidy.schema import arguments
from fxcompress.rewrite import Context, Reject, Transform


@dataclass(frozen=True)
class _Layer:
    """A quantised layer: bias, input and weight, the last two before and after quantisation."""

    site: MatmulSite
    bias: fx.Node
    before: fx.Node
    after: fx.Node
    weight: fx.Node
    quantised: fx.Node
    use: WeightUse

    @property
    def axes(self) -> tuple[int, ...]:
        return (summed_axis(self.site) % self.after.meta["val"].dim(),)


class BiasCorrection(Transform):
    """Correct the bias of every quantised layer that has one."""

    name = "quant.bias_correction"
    contract = Lossy()
    needs = frozenset({"quantised"})
    excludes = frozenset({"finalised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site a layer."""
        declined: dict[str, Reject] = {}
        layers = list(_layers(on, declined))
        asked = [(value, Moments(y.axes)) for y in layers for value in (y.before, y.after)]
        means = on.observe(asked)
        for y in layers:
            of_x, of_weight = means[y.before, Moments(y.axes)].mean, _summed(on.program.constants[str(y.weight.target)], y.use)
            quantised = _summed(constant_value(y.quantised, on.program.constants), y.use)
            shift = quantised @ means[y.after, Moments(y.axes)].mean - of_weight @ of_x
            with edit.site(y.site.node, f"shift of {float(shift.abs().max()):.2g} at most"):
                corrected = partial(_less, shift)
                edit.carry(y.bias, corrected)
                edit.fold(y.bias, corrected(on.program.constants[str(y.bias.target)]))
        return declined


def _less(shift: Tensor, bias: Tensor) -> Tensor:
    return (bias.double() - shift.reshape(bias.shape)).to(bias.dtype)


def _layers(on: Context, declined: dict[str, Reject]) -> Iterator[_Layer]:
    for site in matmul_sites(on.program):
        if site.family == "product" or not on.admits(site.node):
            continue
        given = arguments(site.node)
        found = _quantised(site, given)
        if found is None or given.get("bias") is None:
            continue
        after, weight, quantised = found
        bias = before_pair(given["bias"])
        uses = weight_uses(weight, on.program.constants[str(weight.target)])
        use = _use(quantised, site, given)
        if bias.op != "get_attr" or len(bias.users) > 1:
            declined[site.node.name] = Reject("{} is read by others too, or computed", bias)
        elif use is None or uses[0]:
            declined[site.node.name] = Reject("{} has groups, or a weight that is read otherwise too", site.node)
        else:
            yield _Layer(site, bias, before_pair(after), after, weight, quantised, use)


def _quantised(site: MatmulSite, given: Mapping[str, Any]) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Input, weight constant and quantised weight of a layer whose weight is quantised."""
    x = next(iter(site.activations.values()))
    pair = next((n for n in site.node.all_input_nodes if n is not x and n is not given.get("bias") and n.target is DEQUANTIZE), None)
    leaf = before_pair(pair) if pair is not None else None
    return None if pair is None or leaf is None or leaf.op != "get_attr" else (x, leaf, pair)


def _use(quantised: fx.Node, site: MatmulSite, given: Mapping[str, Any]) -> WeightUse | None:
    """How the quantised weight stands in the layer; None where some output isn't made from every input channel."""
    if given.get("groups", 1) != 1:
        return None
    shape = quantised.meta["val"].shape
    use = next((u for u in weight_uses(quantised, torch.empty(tuple(shape), device="meta"))[0] if u.node is site.node), None)
    x = next(iter(site.activations.values())).meta["val"]
    return use if use is not None and x.shape[summed_axis(site)] == shape[use.contraction] else None


def _summed(weight: Tensor, use: WeightUse) -> Tensor:
    """[out, in], the window summed, float64."""
    turned = weight.double().movedim((use.channel, use.contraction), (0, 1))
    return turned.reshape(*turned.shape[:2], -1).sum(2)
