"""Contracts: what a pass may do to the numbers, held on the user's own model (`checker`).

Checked edge by edge. Every replaced value is recomputed by its new nodes from the OLD values around them and compared with the OLD value, so
errors don't add up, overlapping edits don't mix, and the guilty node is named. Where an edit records that values change (`Edit.carry`), old
values are taken under their recorded changes on both sides; an input or output can't carry one. Nodes that the edit neither made nor touched
must read what they did, or what the edit put there. A comparison that can't bite (an operand of the new node could change sign unseen) is
`unverified`, never passed. Of a long probe, ops that do the same to every row are looked at in a part of the rows (`rows`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from fxcompress.measure import Histograms, relative_error, slice_error
from fxcompress.numerics import formats, noise, ranges
from fxcompress.numerics.deviation import Deviation

Verdict = Literal["held", "broken", "unverified"]
MEASURED = "measured"
LOSS = "loss"
ROUNDINGS = 16  # how many roundings a value may be off by
EXACT_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Measured:
    """One compared value of one site. figure and limit: relative error (Exact: figure <= limit) or SQNR in dB (Bounded: figure >= limit).
    histogram: of the value before and after, where it may lose something. unmeasured: the value changes on purpose, and the figure
    doesn't say how much: it is the relative error to what the edit recorded, or -inf of codes that differ, which have no SQNR."""

    site: str
    value: str
    figure: float
    limit: float
    verdict: Verdict
    why: str = ""
    histogram: Histograms | None = None
    unmeasured: bool = False


@dataclass(frozen=True)
class Exact:
    """The same function up to floating-point noise: max |new - old| / rms(old) <= limit (by dtype if not given), of the value and of each of
    its channels and rows beside its own rms."""

    limit: float | None = None
    kind = "exact"
    unit = "relative error"

    def figure(self, old: Tensor, new: Tensor) -> float:
        """max |new - old| / rms(old), of the value or of a slice along one axis, whichever is more."""
        return slice_error(old, new)

    def bound(self, old: Tensor, new: fx.Node) -> float:
        """The limit for this value."""
        return self.limit if self.limit is not None else EXACT_LIMIT.get(old.dtype, 0.0)

    def negated(self, figure: float) -> float:
        """The least figure of the new value negated, if the old one isn't 0: max |old + new| >= 2 max |old| - max |new - old|."""
        return 2 - figure

    def holds(self, figure: float, bound: float) -> bool:
        """Whether the figure is within the bound; NaN never is."""
        return figure <= bound


@dataclass(frozen=True)
class Bounded:
    """May lose what the number format must lose: SQNR >= that of an ideal quantiser of its width on the measured range, less 3 dB; and in a
    constant without a measured range no block loses more than rounding on its own range may (`Deviation.excess`).

    Of fewer than 32 entries, or a few different ones, every one may be half a step off, 10 log10 3 = 4.8 dB beyond the mean: less 5 dB of so
    few and where no block loses more; so on a measured range, which one number may fill, such as the background of an image.
    The measured range is the one a pass filed under meta[MEASURED] of the dequantize node, (lo, hi) from calibration; else that of the value.
    A pass that searched for the scales of a constant files the squared error of each block that it found under meta[LOSS]: it must be that.
    limit: another bound in dB, from the recipe; blocks are then not looked at one by one.
    """

    limit: float | None = None
    kind = "bounded"
    unit = "dB"
    margin, few, margin_of_few = 3.0, 32, 5.0

    def figure(self, old: Tensor, new: Tensor) -> float:
        """10 log10 (sum old² / sum (new - old)²). NaN where one is not finite and the other not the same; -inf for unequal integers."""
        if not old.is_floating_point():
            return math.inf if torch.equal(old, new) else -math.inf
        if math.isfinite(figure := noise.sqnr(old, new)):  # the usual case, without masks as large as a weight
            return figure
        odd = ~(old.isfinite() & new.isfinite())
        if relative_error(old[odd], new[odd]) > 0:
            return math.nan
        return noise.sqnr(old.masked_fill(odd, 0), new.masked_fill(odd, 0))

    def bound(self, old: Tensor, new: fx.Node) -> float:
        """The ideal quantiser's SQNR for the format and block the new node names, less the margin."""
        if self.limit is not None:
            return self.limit
        if new.target is not torch.ops.fxc.dequantize.default:
            raise ValueError(f"{new.name} is no dequantize: a Bounded pass that inserts other ops states its limit")
        format, block, symmetric = _grid(new)
        if format.kind == "log":
            raise ValueError(f"{new.name} is {format}, which has no ideal: a Bounded pass that inserts it states its limit")
        if MEASURED in new.meta:
            lo, hi = new.meta[MEASURED]
            return noise.static_sqnr(old, format, lo, hi, symmetric) - self.margin_of_few
        return noise.ideal_sqnr(old, format, block, symmetric) - self._margin(old)

    def judge(self, old: Tensor, value: Tensor, new: fx.Node, is_constant: bool) -> tuple[float, float, str]:
        """(figure, bound, which block of a constant loses more than it may, as a sentence or ""), from one look at tensors of blocks."""
        if not self._sees_blocks(old, new):
            return self.figure(old, value), self.bound(old, new), ""
        format, block, symmetric = _grid(new)
        seen = Deviation.of(old, value, block)
        if seen is None:
            return math.nan, 0.0, "not all of its numbers are finite"
        figure, ideal = seen.sqnr, seen.ideal_sqnr(format, symmetric)
        bound, block_lost = ideal - self._margin(old), _worst_block(seen, new) if is_constant else ""
        if figure < bound and format.kind == "int" and (seen.is_near(format, symmetric).all() or (is_constant and not block_lost)):
            bound = ideal - self.margin_of_few
        return figure, bound, block_lost

    def _sees_blocks(self, old: Tensor, new: fx.Node) -> bool:
        """Whether blocks are held to what their own ranges may lose."""
        is_grid = self.limit is None and new.target is torch.ops.fxc.dequantize.default and MEASURED not in new.meta
        return is_grid and old.numel() > 0 and _grid(new)[0].kind != "log"

    def _margin(self, old: Tensor) -> float:
        return self.margin if old.numel() >= self.few else self.margin_of_few

    def is_half_step(self, new: fx.Node) -> bool:
        """Whether the node's grid of integers may move no number of its range by more than half a step; another limit leaves that open."""
        is_pair = self.limit is None and new.target is torch.ops.fxc.dequantize.default
        return is_pair and formats.format_of(str(new.args[3])).kind == "int"

    def longer(self, old: Tensor, scale: Tensor, new: fx.Node) -> float:
        """How many times as long the steps of the node's grid are at most as the measured range needs them; of a block's own range they may be
        max|x| / qmax, as many make them."""
        format, block, symmetric = _grid(new)
        lo, hi = new.meta[MEASURED] if MEASURED in new.meta else ranges.extremes(old, block)
        least, _ = ranges.scale_from_range(lo, hi, format, symmetric)
        if MEASURED not in new.meta and symmetric:
            least = torch.maximum(least, torch.maximum(hi, -lo) / format.qmax)
        return float((scale / least).max() / (1 + ROUNDINGS * torch.finfo(scale.dtype).eps))

    def negated(self, figure: float) -> float:
        """The greatest figure of the new value negated, if the old one isn't 0: |old + new| >= 2 |old| - |new - old|."""
        least = 2 - 10 ** (-figure / 20)
        return -20 * math.log10(least) if least > 0 else math.inf

    def holds(self, figure: float, bound: float) -> bool:
        """Whether the figure reaches the bound; NaN never does."""
        return figure >= bound


@dataclass(frozen=True)
class Lossy(Bounded):
    """Loss is the point: measured and reported, without a limit."""

    kind = "lossy"

    def bound(self, old: Tensor, new: fx.Node) -> float:
        """No limit."""
        return float("-inf")

    def is_half_step(self, new: fx.Node) -> bool:
        """No limit."""
        return False

    def _sees_blocks(self, old: Tensor, new: fx.Node) -> bool:
        """No limit either."""
        return False


def _grid(new: fx.Node) -> tuple[formats.Format, tuple[int, ...], bool]:
    """Format and block of a dequantize, and whether it has no zero point."""
    _, _, zero_point, format_name, block = new.args
    return formats.format_of(str(format_name)), tuple(block), zero_point is None  # type: ignore[arg-type]


def _worst_block(seen: Deviation, new: fx.Node) -> str:
    """The block of a constant that loses most beyond what it may, as a sentence; "" if none does."""
    format, _, symmetric = _grid(new)
    if why := _worst_of(seen.excess(format, symmetric), new):
        return f"{why} what rounding on its own range may lose"
    if LOSS in new.meta and (why := _worst_of(seen.beyond(new.meta[LOSS]), new)):
        return f"{why} what the pass found that it loses"
    return ""


def _worst_of(excess: Tensor, new: fx.Node) -> str:
    """Which block loses most beyond what it may, and how much; "" if none does."""
    worst = excess.argmax()
    if float(excess.flatten()[worst]) <= 1:
        return ""
    at = [int(i) for i in torch.unravel_index(worst, excess.shape)]
    return f"block {at} of {new.name} loses {float(excess.flatten()[worst]):.3g} times"


Contract = Exact | Bounded | Lossy
