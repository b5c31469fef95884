"""Target: what a backend can run, as plain data. Passes read it, so that what they insert is what the runtime has a kernel for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fxcompress.numerics.formats import Format

Family = Literal["linear", "embedding", "conv"]
SiteFamily = Literal["linear", "conv", "transposed", "product"]  # what multiplies an activation: a weight, a kernel window, another activation


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
    """One kind of integer kernel whose activations are quantised too.

    activations: "format/granularity", "tensor" for a scale from calibration, "token" for one a vector, computed in the call. weights: formats
    of the constant operand. needs_output: whether the kernel gives integers, so that its result must be quantised as well.
    """

    model_config = ConfigDict(frozen=True)

    families: tuple[SiteFamily, ...]
    activations: tuple[str, ...]
    weights: tuple[str, ...] = ("int8",)
    needs_output: bool = False


class Target(BaseModel):
    """name: the backend's. kernels: weight kernels, activations: kernels with quantised activations; None where everything runs (reference).
    sums: quantised activations, as "uint8/tensor", whose additions run on codes."""

    model_config = ConfigDict(frozen=True)

    name: str
    kernels: tuple[WeightKernel, ...] | None = None
    activations: tuple[ActivationKernel, ...] | None = None
    sums: tuple[str, ...] = ()

    def activation_kernel(self, family: SiteFamily, activation: str, weight: str) -> ActivationKernel | str:
        """The kernel for such a site (weight: the format of the constant operand), or why there is none."""
        if self.activations is None:
            return ActivationKernel(families=(family,), activations=(activation,), weights=(weight,))
        same_family = [k for k in self.activations if family in k.families]
        fitting = [k for k in same_family if activation in k.activations and (family == "product" or weight in k.weights)]
        if fitting:
            return fitting[0]
        offered = ", ".join(f"{a} by {w}" for k in same_family for a in k.activations for w in k.weights)
        return f"{self.name} has no integer kernel for {family} with activations {activation} and weights {weight}" + (
            f", only for {offered}" if offered else ""
        )

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
