"""Target: what a backend can run, as plain data. Passes read it, so that what they insert is what the runtime has a kernel for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fxcompress.numerics.formats import Format

Family = Literal["linear", "embedding", "conv"]
ActivationFamily = Literal["linear", "conv", "product"]  # with a constant weight, and products of two activations


class WeightKernel(BaseModel):
    """One kind of integer or n-bit kernel with a quantised constant weight.

    groups: smallest group and whether sizes must be powers of two; ragged: whether the last group may be shorter.
    """

    model_config = ConfigDict(frozen=True)

    families: tuple[Family, ...]
    formats: tuple[str, ...]
    least_group: int = 1
    power_of_two: bool = False
    ragged: bool = True
    asymmetric: bool = True


class ActivationKernel(BaseModel):
    """One kind of integer kernel that reads codes of activations.

    formats, granularity: of every activation operand; "token" is one scale for each vector along the last axis. dynamic: scale (and zero point)
    are values of the graph, else constants. asymmetric: whether there may be zero points. weights, weight_granularities: of a constant weight,
    whose quantiser is symmetric. bias: "int32" codes at the product of the two scales, or "float". needs_output: the result, possibly after an
    op of `Target.folded`, must go into a static quantiser of one scale and of the same formats, or the site computes in float.
    """

    model_config = ConfigDict(frozen=True)

    family: ActivationFamily
    formats: tuple[str, ...]
    granularity: Literal["tensor", "token"] = "tensor"
    dynamic: bool = False
    asymmetric: bool = True
    weights: tuple[str, ...] = ()
    weight_granularities: tuple[Literal["tensor", "channel"], ...] = ("tensor", "channel")
    bias: Literal["int32", "float"] = "float"
    needs_output: bool = False
    transposed: bool = False  # convolutions: the transposed ones too


class Target(BaseModel):
    """name: the backend's. kernels: weight kernels, or None where every format runs (the reference). activations: the same for quantised
    activations. fused: ops (torch's names) that run on codes where operands and result have static quantisers of one scale each.
    folded: ops that vanish into the kernel before them where the quantiser after them clips to the same codes.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kernels: tuple[WeightKernel, ...] | None = None
    activations: tuple[ActivationKernel, ...] | None = None
    fused: frozenset[str] = frozenset()
    folded: frozenset[str] = frozenset()

    def refusal(self, family: Family, format: Format, group: int | None, size: int, symmetric: bool) -> str | None:
        """Why this target has no kernel for such a weight, or None if it has one.

        group: elements along the contraction axis of `size` entries that share a scale; None for one scale a channel or a tensor.
        """
        if self.kernels is None:
            return None
        same_family = [k for k in self.kernels if family in k.families]
        if not same_family:
            return f"{self.name} has no n-bit kernel for {family} weights"
        fitting = [k for k in same_family if format.name in k.formats]
        if not fitting:
            return f"{self.name} has no {format.name} kernel for {family} weights, only {_listed(same_family)}"
        reasons = [_unfit(k, group, size, symmetric) for k in fitting]
        return None if None in reasons else f"{self.name}: {reasons[0]}"


def _unfit(kernel: WeightKernel, group: int | None, size: int, symmetric: bool) -> str | None:
    if not symmetric and not kernel.asymmetric:
        return "zero points are not supported"
    if group is None:
        return None
    if group < kernel.least_group:
        return f"groups of {group} are below the least of {kernel.least_group}"
    if kernel.power_of_two and group & (group - 1):
        return f"groups of {group} are not a power of two"
    if not kernel.ragged and size % group:
        return f"groups of {group} don't divide {size}"
    return None


def _listed(kernels: Sequence[WeightKernel]) -> str:
    return ", ".join(sorted({f for k in kernels for f in k.formats}))
