"""Roundings, scales and biases are trained, block by block, so that each quantised block gives what the float block gave.

    min Σ_outputs |f̂(x̂) - f(x)|² / |f(x)|²        over h in W_q = s (clip(floor(W / s) + h + z) - z), activation scales s, biases b

To nearest is the best rounding of a weight, not of a sum of products: which neighbour each weight goes to is learned for all weights of a
block together. A block is what lies between two places of the graph where few values are alive (`pieces`). A site is a constant that was
trained. Declined: constants that several blocks read, or that are read otherwise too, and blocks whose error on the feed didn't fall, which
stay as they were. Lossy by nature: the figures are those of the outputs. Costs nothing at run time; needs a feed of some hundred rows. Give it
before `quant.finalize`.
Source: AdaRound (arXiv 2004.10568), BRECQ (arXiv 2102.05426), LSQ (arXiv 1902.08153), QDrop (arXiv 2203.05740).
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from pydantic import Field
from torch import Tensor, fx

from fxcompress.calibrate.learned import Bias, Learned, Rounding, Scale
from fxcompress.calibrate.reconstruct import Reconstruction, Schedule, Undifferentiable
from fxcompress.contract import Lossy
from fxcompress.dataflow import before_pair, pair_of
from fxcompress.edit import Edit
from fxcompress.numerics.formats import format_of
from fxcompress.passes.quant.grids import DEQUANTIZE, QUANTIZE
from fxcompress.passes.quant.sites import matmul_sites
from fxcompress.passes.tidy.schema import arguments
from fxcompress.pieces import Granularity, Piece, pieces
from fxcompress.rewrite import Context, Kept, Options, Reject, Transform

NARROW = 8  # bits of the widest codes that are worth training


class ReconstructOptions(Options):
    """granularity: what is trained together: layer, block, stage, whole. iterations: for each, one calibration item at a time.

    rounding, scales, biases: what is trained. drop: the probability with which a value passes its quantiser while training; mix: that with
    which an entry of the block's inputs is the float model's. penalty: weight of the pull to whole codes. rate: Adam's step for roundings;
    scales and biases take a tenth. seed: of everything random.
    """

    granularity: Granularity = "block"
    iterations: int = Field(default=1000, ge=1)
    rounding: bool = True
    scales: bool = True
    biases: bool = True
    drop: float = Field(default=0.5, ge=0, lt=1)
    mix: float = Field(default=0.5, ge=0, le=1)
    penalty: float = Field(default=1.0, ge=0)
    rate: float = Field(default=2e-2, gt=0)
    seed: int = 0


class Reconstruct(Transform):
    """Train every quantised block."""

    name = "quant.reconstruct"
    contract = Lossy()
    Options = ReconstructOptions
    needs = frozenset({"quantised"})
    excludes = frozenset({"finalised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site a trained constant."""
        declined: dict[str, Reject] = {}
        layers = [s.node for s in matmul_sites(on.program) if s.family != "product"]
        parts = pieces(on.program, layers, self.options.granularity)
        walk, clock = Reconstruction(on.program, on.items()), _Clock(on.progress, len(parts), self.options.iterations)
        for number, piece in enumerate(parts):
            learned = list(self._learned(piece, on, declined))
            walk.enter(piece)
            reject = self._trained(walk, piece, learned, on.kept, partial(clock, number), edit)
            if reject:
                declined.update({x.node.name: reject for x in learned})
                walk.leave(piece)
        return declined

    def _trained(
        self, walk: Reconstruction, piece: Piece, learned: Sequence[Learned], kept: Kept, tell: Callable[[int], None], edit: Edit
    ) -> Reject | None:
        """Train a piece, store what is better and leave it; or why it stays as it was."""
        if not learned:
            return Reject("nothing of its block is trained")
        before = walk.error(piece)
        try:
            settled = self._settled(walk, piece, learned, before, kept, tell)
        except Undifferentiable as error:
            return Reject("its block can't be trained: {}", str(error))
        after = walk.improve(piece, settled, before)
        if not after < before:
            return Reject("the squared error of its block would go from {} to {}", f"{before:.3g}", f"{after:.3g}")
        _store(learned, settled, edit, f"of a block whose squared error goes from {before:.3g} to {after:.3g}")
        return None

    def _settled(
        self, walk: Reconstruction, piece: Piece, learned: Sequence[Learned], before: float, kept: Kept, tell: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """The trained constants by name; those of a run that was cut short, if it had come so far."""
        o, last = self.options, piece.nodes[-1].name
        key = json.dumps([self.name, o.model_dump(), last, [x.node.name for x in learned]])
        settled = kept.get(key)
        if settled is None:
            seed = zlib.crc32(f"{o.seed} {last}".encode())
            walk.train(piece, learned, Schedule(o.iterations, penalty=o.penalty, drop=o.drop, mix=o.mix, seed=seed), before, tell)
            settled = {str(x.constant.target): x.settled() for x in learned}
            kept.put(key, settled)
        return settled

    def _learned(self, piece: Piece, on: Context, declined: dict[str, Reject]) -> Iterator[Learned]:
        """What can be trained in a piece."""
        own, found = set(piece.nodes), dict[fx.Node, Learned]()
        for x in self._trainable(piece, on):
            if x.constant in found or not any(on.admits(n) for n in _readers(x.node)):
                continue
            found[x.constant] = x
            others = [] if x.constant is x.node else [u for u in x.constant.users if u is not x.node.args[0]]
            if others:
                declined[x.node.name] = Reject("{} is read by {} too, in float or on another grid", x.constant, others[0])
            elif stranger := next((n for n in _readers(x.constant) if n not in own), None):
                declined[x.node.name] = Reject("{} is read by {} too, in another block", x.constant, stranger)
            else:
                yield x

    def _trainable(self, piece: Piece, on: Context) -> Iterator[Learned]:
        o = self.options
        for node in piece.nodes:
            pair = pair_of(node)
            scale = pair and on.constant(pair.scale)
            if pair is None or scale is None or (format := format_of(pair.format)).kind == "float" or format.bits > NARROW:
                continue
            weight = on.constant(pair.value)
            if weight is not None and o.rounding:
                yield Rounding(node, weight, scale, on.constant(pair.zero_point), format, tuple(pair.block), o.rate)
            elif weight is None and o.scales:
                yield Scale(pair.scale, scale, o.rate / 10)
        for node in piece.layers if o.biases else ():
            bias = arguments(node).get("bias")
            if isinstance(bias, fx.Node) and (constant := on.constant(before_pair(bias))) is not None:
                yield Bias(bias, before_pair(bias), constant, o.rate / 10)


def _store(learned: Sequence[Learned], settled: Mapping[str, Tensor], edit: Edit, why: str) -> None:
    for x in learned:
        new = settled[str(x.constant.target)]
        with edit.site(min(x.node.users), f"{x.kind} {why}") as site:
            site.places = list(dict.fromkeys(_readers(x.node)))
            edit.carry(x.constant, lambda _, new=new: new)  # type: ignore[misc] # checked against what is stored, without a limit
            edit.fold(x.constant, new)


class _Clock:
    """Tells how far it is, and how long it takes at the pace so far."""

    def __init__(self, progress: Callable[[str], None], count: int, iterations: int) -> None:
        self.progress, self.count, self.iterations, self.start = progress, count, iterations, time.monotonic()

    def __call__(self, number: int, done: int) -> None:
        share = (number + done / self.iterations) / self.count
        left = (time.monotonic() - self.start) * (1 - share) / share
        self.progress(f"block {number + 1} of {self.count}, about {left / 60:.0f} min left")


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, through its pair."""
    for user in node.users:
        if user.target in (QUANTIZE, DEQUANTIZE):
            yield from _readers(user)
        else:
            yield user
