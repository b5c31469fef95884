"""Probabilities of attentions as codes of few bits, on the grid that suits each attention: even steps, or powers of 2^(1/τ).

    softmax(S) V  ->  dequantize(quantize(softmax(S))) V,    uniform  A ≈ s c        log  A ≈ s 2^(-c / τ), the last code 0

A site is a product with the probabilities on its left, behind masks and casts too. An attention that is one op is opened first. On the
calibration feed every candidate is tried with several scales, up to s = max A; the one with the least error ‖Q(A) V - A V‖ wins, scales chosen
on even items, candidates on odd ones, of fewer than four items on all. Even steps win what is closer than 0.1 dB: integer kernels multiply
their codes, while products with log codes run in float. Declined: a softmax over another axis than the product sums over, probabilities that
never change or are only 0 and 1 on the feed, or are quantised already. Other readers of the probabilities keep them in float.
Costs, int8 recipe on ONNX Runtime with one thread, the SAM testbed: 1.02 times the latency at 4 and 6 bits, logs at 5 and 6 of 11 sites, as
with logs at all; of the multiply-accumulates 93 % in integer kernels instead of 95 %. At 4 bits logs gain 6 to 11 dB of A V where they win.
Source: PTQ4SAM, adaptive granularity quantisation (CVPR 2024, arXiv 2405.03144, section 3.3), without its value beyond 2^bits; the uniform
grid and the held-out choice are additions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator
from torch import fx

from fxcompress.calibrate.observers import Extremes, Range
from fxcompress.contract import Lossy
from fxcompress.edit import Edit
from fxcompress.passes.quant.grids import insert_pair
from fxcompress.passes.softmax.attentions import Attention, attentions
from fxcompress.passes.softmax.candidates import QUANTISERS, Candidate, Judged, Quantiser, Trial
from fxcompress.passes.tidy.open_attention import OpenAttention, inserted
from fxcompress.rewrite import Context, Match, Options, Reject, Transform

WORTH = 0.1  # dB that a grid must win against even steps, which have integer kernels


class AdaptiveOptions(Options):
    """bits: of a code. candidates: grids to choose from, "uniform" and the τ of logs: 1, 2, 4, 8."""

    bits: int = Field(default=8, ge=2, le=8)
    candidates: tuple[Candidate, ...] = tuple(QUANTISERS)

    @field_validator("candidates")
    @classmethod
    def _are_known(cls, value: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        unknown = [c for c in value if c not in QUANTISERS]
        if unknown or not value:
            raise ValueError(f"{unknown[0] if unknown else 'nothing'!r}: some of {', '.join(map(str, QUANTISERS))}")
        return tuple(c for c in QUANTISERS if c in value)


@dataclass(frozen=True)
class Chosen:
    """The quantiser of one site's probabilities, and what it gains."""

    quantiser: Quantiser
    why: str


class Adaptive(Transform):
    """Quantise the probabilities of every attention."""

    name = "softmax.adaptive"
    contract = Lossy()
    Options = AdaptiveOptions
    gives = frozenset({"quantised", "opened"})
    excludes = frozenset({"finalised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site an attention."""
        declined: dict[str, Reject] = {}
        sites = list(self._found(on, declined))
        for site, answer in self._chosen(sites, on, edit).items():
            if isinstance(answer, Reject):
                declined[site.node.name] = answer
            else:
                self._apply(site, answer, edit)
        return declined

    def _found(self, on: Context, declined: dict[str, Reject]) -> Iterator[Attention | Match]:
        """Attentions that the recipe admits: products, and matches of ops that are to be opened."""
        for node, found in attentions(on.program):
            if not on.admits(node):
                continue
            if isinstance(found, Reject):
                declined[node.name] = found
            else:
                yield found
        opener = OpenAttention()
        for node in [n for n in on.program.graph.nodes if n.target in opener.targets and on.admits(n)]:
            answer = opener.match(node, on)
            if isinstance(answer, Match):
                yield answer
            else:
                declined[node.name] = answer

    def _chosen(self, sites: list[Attention | Match], on: Context, edit: Edit) -> dict[Attention | Match, Chosen | Reject]:
        """What each site gets. Ops are opened on trial, to ask about their probabilities, and closed again."""
        operands = {site: self._operands(site, edit) for site in sites}
        ranges = on.observe((a, Range()) for a, _ in operands.values())
        seen: dict[Any, Extremes] = {site: ranges[a, Range()] for site, (a, _) in operands.items()}
        trials = {s: Trial(float(e.hi), self.options.bits, self.options.candidates) for s, e in seen.items() if 0 <= e.lo < e.hi}
        judged = on.observe((operands[site], trial) for site, trial in trials.items())
        edit.rollback()
        return {
            site: self._choice(site.node, trials[site], judged[pair, trials[site]]) if site in trials else _unchanging(site.node, seen[site])
            for site, pair in operands.items()
        }

    def _operands(self, site: Attention | Match, edit: Edit) -> tuple[fx.Node, fx.Node]:
        """The probabilities and values of a site."""
        if isinstance(site, Attention):
            return site.left, site.right
        with edit.site(site.node):
            product = inserted(site, edit)
        return product.args  # type: ignore[return-value]

    def _choice(self, node: fx.Node, trial: Trial, judged: Judged) -> Chosen | Reject:
        if judged.is_hard:
            return Reject("the probabilities of {} are only 0 and 1 on the calibration feed, which doesn't tell grids apart", node)
        shares, gains = judged.best()
        names = self.options.candidates
        best = max(range(len(names)), key=gains.__getitem__)
        if names[0] == "uniform" and gains[0] >= gains[best] - WORTH:
            best = 0
        quantiser = trial.quantiser(best, shares[best], node.meta["val"].dtype)
        kind = "" if names[best] == "uniform" else "log, "
        told = f"{kind}{_called(names[best])}, s = {float(quantiser.scale):.4g}: {gains[best]:.1f} dB of A V"
        rest = [f"{_called(n)} {g:.1f}" for n, g in zip(names, gains, strict=True) if n != names[best]]
        return Chosen(quantiser, f"{told}; {', '.join(rest)}" if rest else told)

    def _apply(self, site: Attention | Match, chosen: Chosen, edit: Edit) -> None:
        with edit.site(site.node, chosen.why):
            if isinstance(site, Attention):
                edit.replace(site.probabilities, _pair(site.probabilities, chosen.quantiser, site.reader, edit), [site.reader])
            else:
                edit.replace(site.node, inserted(site, edit, lambda a: _pair(a, chosen.quantiser, site.node, edit)))


def _unchanging(node: fx.Node, seen: Extremes) -> Reject:
    where = "on the calibration feed"
    if seen.lo < 0:
        return Reject("the probabilities of {} go down to {:.3g} " + where, node, float(seen.lo))
    return Reject("the probabilities of {} are {} " + where, node, f"{float(seen.hi):g} everywhere" if seen.lo == seen.hi else "empty")


def _pair(a: fx.Node, quantiser: Quantiser, before: fx.Node, edit: Edit) -> fx.Node:
    """The probabilities on the grid, before a node."""
    at, one = {"like": before, "before": before}, (1,) * a.meta["val"].dim()
    zero = quantiser.zero_point
    scale_node = edit.constant(f"{a.name}.scale", quantiser.scale.reshape(one), **at)
    zero_node = None if zero is None else edit.constant(f"{a.name}.zero_point", zero.reshape(one), **at)
    pair = insert_pair(edit, a, scale_node, zero_node, quantiser.format, [-1] * len(one), **at)
    edit.makes(pair, quantiser)
    return pair


def _called(candidate: Candidate) -> str:
    return candidate if isinstance(candidate, str) else f"τ = {candidate}"
