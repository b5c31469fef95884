"""What can be trained in a quantised piece of a program: each stands in for one node's value while it is trained, and is settled afterwards.

Others plug in the same way: a mask, a low-rank part, a clipping bound is a `Learned` with its own value and its own settled form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxcompress.numerics.affine import working_dtype
from fxcompress.numerics.blocks import Block, expanded
from fxcompress.numerics.formats import Format

STRETCH = 0.1  # how far the sigmoid of a rounding reaches beyond 0 and 1, so that both are reached


class Learned(ABC):
    """In place of the value of `node`, `value()` is used, a function of `parameter`, which Adam changes at `rate`."""

    kind: ClassVar[str]
    node: fx.Node
    parameter: Tensor
    rate: float

    @abstractmethod
    def value(self) -> Tensor:
        """The node's value in training; has a gradient."""

    @abstractmethod
    def settled(self) -> Tensor:
        """The constant that stays: of `constant`, in its dtype."""

    def pull(self, power: float) -> Tensor | None:
        """The gradient of what pulls the parameter to where it may be settled without a change; None if it may be anywhere."""
        return None

    def soft(self) -> float:
        """The share of the parameter that settling would still change."""
        return 0.0

    @property
    @abstractmethod
    def constant(self) -> fx.Node:
        """The constant that is replaced."""


class Rounding(Learned):
    """Whether each weight is rounded down or up: s (clip(floor(W / s) + h + z) - z), h = clip(1.2 sigmoid(V) - 0.1, 0, 1).

    Starts where h is what floor leaves, so that the value is W where nothing is clipped. Settled: h = 1 where V >= 0, else 0.
    Source: AdaRound (arXiv 2004.10568), equations 21 to 24.
    """

    kind = "rounding"

    def __init__(
        self, node: fx.Node, weight: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Block, rate: float
    ) -> None:
        self.node, self.rate, self.format, self.dtype = node, rate, format, weight.dtype
        work = working_dtype(format, weight.dtype, scale.dtype)
        self.scale = expanded(scale, weight.shape, block).to(work)
        self.zero = None if zero_point is None else expanded(zero_point, weight.shape, block).to(work)
        ratio = weight.to(work) / self.scale
        self.floor = ratio.floor()
        below, above = (self._weight(up) for up in (torch.zeros_like(ratio), torch.ones_like(ratio)))
        self.below, self.step = below, above - below  # a step is 0 where both neighbours are clipped to one code
        inside = ((ratio - self.floor + STRETCH) / (1 + 2 * STRETCH)).clamp(0.01, 0.99)
        self.parameter = inside.logit().requires_grad_()
        self._last: tuple[Tensor, Tensor] | None = None  # what `value` has computed in this step

    @property
    def constant(self) -> fx.Node:
        """The weight."""
        return self.node.args[0].args[0]  # type: ignore[union-attr, return-value]

    @torch.no_grad()
    def share(self) -> tuple[Tensor, Tensor]:
        """h and dh/dV, of the weight's shape. In place, and without bools: time goes into memory here."""
        whole, sigmoid = 1 + 2 * STRETCH, self.parameter.sigmoid()
        slope = torch.rsub(sigmoid, whole, alpha=whole).mul_(sigmoid)
        free = sigmoid.mul_(whole).sub_(STRETCH)
        up = free.clamp(0, 1)
        return up, slope.mul_(free.eq_(up))

    def value(self) -> Tensor:
        """The weight with h in place of rounding."""
        up, slope = self._last = self.share()
        return _Known.of(self.parameter, (up * self.step).add_(self.below), slope, self.step).to(self.dtype)

    def settled(self) -> Tensor:
        """The weight on its grid."""
        with torch.no_grad():
            return self._weight((self.parameter >= 0).to(self.floor.dtype)).to(self.dtype)

    @torch.no_grad()
    def pull(self, power: float) -> Tensor:
        """That of the mean of 1 - |2 h - 1|^power, power > 2. x |x|^(power - 2) as x exp(log(x²) (power / 2 - 1)): `pow` takes longer."""
        (up, slope), self._last = self._last or self.share(), None
        off = up.mul_(2).sub_(1)
        lower = off.square().log_().mul_(power / 2 - 1).exp_()
        return lower.mul_(off).mul_(slope).mul_(-2 * power / off.numel())

    def soft(self) -> float:
        """The share of h that is neither 0 nor 1."""
        h, _ = self.share()
        return float(((h > 0.01) & (h < 0.99)).double().mean())

    def _weight(self, up: Tensor) -> Tensor:
        codes = self.floor + up
        if self.zero is None:
            return codes.clamp(self.format.qmin, self.format.qmax) * self.scale
        return ((codes + self.zero).clamp(self.format.qmin, self.format.qmax) - self.zero) * self.scale


class _Known(torch.autograd.Function):
    """A function of each entry of a parameter whose value and slope, a product of two, are known."""

    @classmethod
    def of(cls, parameter: Tensor, value: Tensor, slope: Tensor, factor: Tensor) -> Tensor:
        """The value, with slope times factor as its gradient."""
        found: Tensor = cls.apply(parameter, value, slope, factor)  # type: ignore[no-untyped-call]
        return found

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor, slope: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(slope, factor)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        slope, factor = ctx.saved_tensors
        return (grad * slope).mul_(factor), None, None, None


class Scale(Learned):
    """A quantiser's scale, s exp(v): a step changes every scale by the same share. The zero point stays.

    Source: LSQ (ICLR 2020), with the logarithm for its gradient factor.
    """

    kind = "scale"

    def __init__(self, node: fx.Node, scale: Tensor, rate: float) -> None:
        self.node, self.scale, self.rate = node, scale, rate
        self.parameter = torch.zeros_like(scale).requires_grad_()

    @property
    def constant(self) -> fx.Node:
        """The scale."""
        return self.node

    def value(self) -> Tensor:
        """The scale now."""
        return self.scale * self.parameter.exp()

    def settled(self) -> Tensor:
        """The scale now."""
        return self.value().detach()


class Bias(Learned):
    """A layer's bias, moved in units of its own size. node: the bias, or what dequantises it."""

    kind = "bias"

    def __init__(self, node: fx.Node, constant: fx.Node, bias: Tensor, rate: float) -> None:
        self.node, self._constant, self.bias, self.rate = node, constant, bias, rate
        self.unit = float(bias.double().square().mean().sqrt().clamp(min=1e-3))
        self.parameter = torch.zeros_like(bias).requires_grad_()

    @property
    def constant(self) -> fx.Node:
        """The bias."""
        return self._constant

    def value(self) -> Tensor:
        """The bias now."""
        return self.bias + self.unit * self.parameter

    def settled(self) -> Tensor:
        """The bias now."""
        return self.value().detach()
