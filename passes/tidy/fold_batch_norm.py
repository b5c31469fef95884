"""Batch norm in eval mode goes into the convolution or linear layer before it.

    (W x + b - mean) s + beta = (s W) x + ((b - mean) s + beta),    s = gamma / sqrt(var + eps), along the output channels

A frozen norm that is spelled out, a product with a constant per channel and then a sum with one, or either alone, is one too: detection models
have it behind each convolution.
Legal where the layer's output has no other reader, its weight belongs to it alone and everything is a constant: a batch norm that uses the
statistics of the batch is no affine map. A missing gamma is 1; a missing beta or bias is 0. Computed in float64, cast once. Costs nothing: the
norm's work and its four vectors go. The error is rounding alone, so the contract is Exact.
Source: Ioffe and Szegedy, Batch Normalization (ICML 2015), section 3.1: at inference the transform is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.passes.tidy.schema import arguments
from fxcompress.rewrite import Context, Match, Reject, Rewrite

aten = torch.ops.aten

# per layer: the groups whose output channels lie in axis 1 of the weight; None where the output channels are axis 0
LAYERS: Mapping[Any, Callable[[dict[str, Any]], int | None]] = {
    **dict.fromkeys((aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), lambda given: None),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), lambda given: None),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), lambda given: given["groups"]),
    aten.convolution.default: lambda given: given["groups"] if given["transposed"] else None,
}


@dataclass(frozen=True)
class Norm:
    """The constants of a batch norm, each [C] in its own dtype; gamma and beta may be missing."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float

    def scale(self) -> Tensor:
        """s = gamma / sqrt(var + eps), [C], float64."""
        s = (self.var.double() + self.eps).rsqrt()
        return s if self.gamma is None else s * self.gamma.double()


def fold_weight(weight: Tensor, s: Tensor, groups: int | None) -> Tensor:
    """s_o W_o over the output channels o, in W's dtype. s: [C], float64. groups: None where o is axis 0 of W.

    A transposed convolution's W is [in, C / groups, ...]: its rows fall into groups, and those of group g make the g-th C / groups channels.
    """
    axes = [1] * (weight.dim() - 2)
    if groups is None:
        return (weight.double() * s.view(-1, 1, *axes)).to(weight.dtype)
    grouped = weight.double().reshape(groups, -1, *weight.shape[1:]) * s.view(groups, 1, -1, *axes)
    return grouped.reshape(weight.shape).to(weight.dtype)


def fold_bias(bias: Tensor | None, norm: Norm, dtype: torch.dtype) -> Tensor:
    """(b - mean) s + beta, [C], in the given dtype."""
    b = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
    folded = b * norm.scale()
    return (folded if norm.beta is None else folded + norm.beta.double()).to(dtype)


class FoldBatchNorm(Rewrite):
    """Layer and norm become one layer."""

    name = "tidy.fold_batch_norm"
    contract = Exact()
    targets = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.mul.Tensor, aten.add.Tensor)

    def match(self, node: fx.Node, on: Context) -> Match | Reject | None:
        """A batch norm of constants whose layer feeds nothing else and owns its weight."""
        if node.target in (aten.mul.Tensor, aten.add.Tensor):
            return self._frozen(node, on)
        given, layer = arguments(node), node.args[0]
        if given.get("training"):
            return Reject("{} uses the statistics of the batch", node)
        if not isinstance(layer, fx.Node) or layer.target not in LAYERS:
            return Reject("{} reads {}, which is no convolution or linear layer", node, layer)
        own = arguments(layer)
        operands = {k: given[k] for k in ("weight", "bias", "running_mean", "running_var")}
        if reason := _not_one_chain(node, layer, own["weight"]) or _not_constant(
            {node: operands.values(), layer: (own["weight"], own["bias"])}, on
        ):
            return reason
        gamma, beta, mean, var = (on.constant(v) for v in operands.values())
        assert mean is not None and var is not None, "torch has no eval mode without statistics"
        return _folded(node, layer, Norm(gamma, beta, mean, var, given["eps"]), on)

    def _frozen(self, node: fx.Node, on: Context) -> Match | Reject | None:
        """A product and a sum with constants along the channels of a layer; None for any other product or sum."""
        shifted, shift = _by_channel(node, on) if node.target is aten.add.Tensor else (node, None)
        layer, gain = _by_channel(shifted, on) if shifted.target is aten.mul.Tensor else (shifted, None)
        is_part = node.target is aten.mul.Tensor and any(u.target is aten.add.Tensor and _by_channel(u, on)[1] is not None for u in node.users)
        if (shift is None and gain is None) or layer.target not in LAYERS or is_part:
            return None
        if shifted is not node and shifted is not layer and len(shifted.users) > 1:
            return Reject("{} is also read by {}", shifted, next(u for u in shifted.users if u is not node))
        own = arguments(layer)
        first = node if shifted is layer else shifted
        if reason := _not_one_chain(first, layer, own["weight"]) or _not_constant({layer: (own["weight"], own["bias"])}, on):
            return reason
        s, t = (None if v is None else v.flatten() for v in (gain, shift))
        some = t if s is None else s
        assert some is not None
        return _folded(node, layer, Norm(s, t, torch.zeros_like(some), torch.ones_like(some), 0.0), on)

    def apply(self, match: Any, edit: Edit) -> None:
        """A new layer under the old one's name and place; a bias of zeros is left out."""
        layer, norm, own = match.layer, match.norm, arguments(match.layer)
        name = str(own["weight"].target)
        bias_name = str(own["bias"].target) if own["bias"] is not None else f"{name.removesuffix('weight')}bias"
        bias = fold_bias(match.bias, norm, match.weight.dtype)
        with edit.site(match.node, f"folded into {layer.name}"):
            weight_node = edit.constant(name, fold_weight(match.weight, norm.scale(), match.groups), like=layer)
            bias_node = edit.constant(bias_name, bias, like=layer) if bias.any() else None
            rest = {k: v for k, v in layer.kwargs.items() if k != "bias"}
            new = edit.insert(layer.target, layer.args[0], weight_node, bias_node, *layer.args[3:], like=layer, val=layer.meta["val"], **rest)
            for result in match.results:
                edit.replace(result, new)


def _folded(node: fx.Node, layer: fx.Node, norm: Norm, on: Context) -> Match | Reject:
    own = arguments(layer)
    weight, bias = on.constant(own["weight"]), on.constant(own["bias"])
    assert weight is not None
    if reason := _unfit_numbers(node, norm, weight, bias):
        return reason
    return Match(node, layer=layer, norm=norm, weight=weight, bias=bias, groups=LAYERS[layer.target](own), results=_results(node))


def _by_channel(node: fx.Node, on: Context) -> tuple[fx.Node, Tensor | None]:
    """The operand of a product or sum and the constant along the channels of what computes it; the constant is None for any other."""
    a, b = node.args[:2]
    value, other = (b, a) if on.constant(a) is not None else (a, b)
    constant = on.constant(other)
    if constant is None or not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor) or node.kwargs.get("alpha", 1) != 1:
        return node, None
    layer = value.args[0] if value.target is aten.mul.Tensor and node.target is aten.add.Tensor else value
    source = _by_channel(value, on)[0] if layer is not value else value
    shape, rank = value.meta["val"].shape, value.meta["val"].dim()
    axis = rank - 1 if source.target is aten.linear.default else 1
    wanted = [shape[axis] if i == axis else 1 for i in range(rank)]
    if source.target not in LAYERS or constant.dim() > rank or [1] * (rank - constant.dim()) + list(constant.shape) != wanted:
        return node, None
    return value, constant


def _not_one_chain(node: fx.Node, layer: fx.Node, weight: Any) -> Reject | None:
    """Other readers of what would change, or a norm along another axis than the layer's channels."""
    if others := [u for u in layer.users if u is not node]:
        return Reject("{} is also read by {}", layer, others[0])
    if others := [u for u in weight.users if u is not layer]:
        return Reject("the weight {} of {} is also read by {}", weight, layer, others[0])
    if others := [u for u in _statistics(node) if u.users]:
        return Reject("{} takes the saved statistics of {}", others[0], node)
    if node.target in (aten.mul.Tensor, aten.add.Tensor):
        return None
    rank, wanted = layer.meta["val"].dim(), 2 if layer.target is aten.linear.default else weight.meta["val"].dim()
    return Reject("{} norms axis 1 of {}, and its channels are axis {}", node, layer, rank - wanted + 1) if rank != wanted else None


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that stand for the normed value: the norm, or what takes it out of the tuple that the other op returns."""
    return [node] if not _is_tuple(node) else [u for u in node.users if u.args[1] == 0]


def _is_tuple(node: fx.Node) -> bool:
    return node.target is aten._native_batch_norm_legit_no_training.default


def _statistics(node: fx.Node) -> list[fx.Node]:
    """The nodes that take saved statistics out of that tuple."""
    return [] if not _is_tuple(node) else [u for u in node.users if u.args[1] != 0]


def _not_constant(operands: Mapping[fx.Node, Iterable[Any]], on: Context) -> Reject | None:
    found = ((node, a) for node, values in operands.items() for a in values if isinstance(a, fx.Node) and on.constant(a) is None)
    return next((Reject("{} reads {}, which is no constant", node, a) for node, a in found), None)


def _unfit_numbers(node: fx.Node, norm: Norm, weight: Tensor, bias: Tensor | None) -> Reject | None:
    vectors = [t for t in (norm.gamma, norm.beta, norm.mean, norm.var, bias) if t is not None]
    if other := next((t.dtype for t in vectors if t.dtype != weight.dtype), None):
        return Reject("{} mixes {} and {}", node, weight.dtype, other)
    broken = norm.scale().isfinite().logical_not().nonzero().flatten()
    return Reject("the scale of {} is not finite in channel {}", node, int(broken[0])) if broken.numel() else None
