"""The gain of a norm goes into the weights of its readers and becomes 1.

    W (g n) = (W diag g) n,    and with beta:  W (n + b) + c = W n + (c + W b),    n = normed(x)

A site is the gain of a layer norm or root mean square norm, kept whole or spelled out. Legal where every reader takes a factor per channel,
found from the dataflow: linear layers, convolutions, through slices, casts and whatever else commutes; declined with the op that doesn't. The
gain is set to 1, not divided by itself; where it is 0, readers get zeros. Gains that would go into each other stay. A beta stays in its norm,
divided by the gain, unless `beta` asks for it to move on and go; readers without a bias then get one. Exact but for rounding. Costs nothing; it
is what rotations of the residual stream need first.
Source: SliceGPT (arXiv 2401.15024), section 3; QuaRot (arXiv 2404.00456), stage 1a.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from fxcompress.contract import Exact
from fxcompress.dataflow import is_constant
from fxcompress.edit import Edit
from fxcompress.passes.norms import WHOLE, Norm, norms
from fxcompress.passes.vectors import factors, fold_vector, refusal
from fxcompress.program import Program
from fxcompress.rewrite import Context, Options, Reject, Transform
from fxcompress.transport import Kind, Seed, Transport


class FoldNormGainOptions(Options):
    """beta: whether the shift of a layer norm moves on and goes."""

    beta: bool = False


class FoldNormGain(Transform):
    """Set every norm's gain to 1, and drop its shift if asked to."""

    name = "tidy.fold_norm_gain"
    contract = Exact()
    Options = FoldNormGainOptions

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per gain; where gains are negative, one more for their signs. Two per beta."""
        declined: dict[str, Reject] = {}
        engine = Transport(on.program)
        for norm in owners(on, "gain"):
            if reject := fold_gain(engine, norm, edit):
                declined[norm.node.name] = reject
        for norm in owners(on, "bias") if self.options.beta else ():
            if reject := fold_beta(Transport(on.program), norm, edit):  # biases were added
                declined[f"{norm.node.name}.beta"] = reject
        return declined


def owners(on: Context, part: str) -> Iterator[Norm]:
    """The admitted norms that have a gain (or bias), each tensor once."""
    seen: set[fx.Node] = set()
    for norm in list(norms(on.program)):
        leaf = getattr(norm, part)
        if leaf is not None and leaf not in seen and on.admits(norm.node):
            seen.add(leaf)
            yield norm


def fold_gain(engine: Transport, norm: Norm, edit: Edit) -> Reject | None:
    """Set one gain to 1, and those that equal it and share its readers. Returns why it can't be."""
    assert norm.gain is not None
    if edit.program.constant(norm.gain) is None:
        return computed(norm, "gain", norm.gain)
    return fold_vector(engine, norm.node, norm.gain, edit, gains={n.gain for n in norms(edit.program) if n.gain is not None})


def computed(norm: Norm, part: str, value: fx.Node) -> Reject:
    """The refusal of a gain or shift that is no constant, or none yet."""
    after = ": tidy.fold_constants makes a constant of it" if is_constant(value) else ""
    return Reject("{} has a {} that is computed, {}{}", norm.node, part, value, after)


def fold_beta(engine: Transport, norm: Norm, edit: Edit) -> Reject | None:
    """Drop one shift. Returns why it can't be."""
    assert norm.bias is not None
    beta = edit.program.constant(norm.bias)
    if beta is None:
        return computed(norm, "shift", norm.bias)
    if not beta.any():
        return None
    plan = engine.solve(Kind.SHIFT, Seed(norm.bias, tuple(range(beta.dim())), power=-1))
    if reason := refusal(plan, norm.bias, beta):
        return Reject("{}", reason)
    plan.apply(edit, factors(plan, norm.bias, beta), "shift folded into readers", {norm.bias: torch.zeros_like(beta)}, at=norm.node)
    if not (whole := [reader for reader in norm.bias.users if reader.target in WHOLE]):
        return None  # spelled out, x + 0 is for tidy.no_ops
    with edit.site(norm.node, "a shift of 0 dropped"):
        for reader in whole:
            args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda n: None if n is norm.bias else n)
            edit.update(reader, *args, **kwargs)
    return None


def is_gain_free(program: Program, norm: Norm) -> bool:
    """Whether a norm has no gain, or one that is the same number for every channel."""
    gain = program.constant(norm.gain) if norm.gain is not None else None
    return norm.gain is None or (gain is not None and bool((gain == gain.flatten()[0]).all()))
