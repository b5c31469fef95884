"""The residual stream and the values of attention in another basis, so that no channel stands out.

    R1: x -> x R on the whole stream: writers W -> R^T W, readers W -> W R, embedding E -> E R;  rms(x R) = rms(x)
    R2: v -> v R per key/value head: W_v -> R^T W_v, and R into the columns of W_o for every query head that reads it

A product with the values is linear in them, so R2 takes no softmax: whatever weighs them, in whatever op (`values`).

R is a randomised Hadamard matrix: +-1 signs times a matrix of entries of about equal size. Legal where only additions, norms without gain, and
layers touch the stream, all found from the dataflow; declined with the op that doesn't commute: run tidy.fold_norm_gain before, since a gain is
no rotation. A stream with layer norms turns about its mean, R 1 = 1: then (x R - mean) / std = (x - mean) / std R, and the norms stay as they
are, where SliceGPT takes the mean out of the stream and root mean square norms in their place. A head tied to the embedding can't take the last
gain: `keep_tied` puts one linear layer [d, d] before the head, R^T diag(g) R, and keeps the table shared. A vector that a branch is multiplied
by (LayerScale) goes into what makes the branch first. Exact but for rounding. Costs nothing else at run time.
Source: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406), SliceGPT (arXiv 2401.15024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.numerics.hadamard import mean_keeping, randomised_hadamard
from fxcompress.passes.norms import CASTS, Norm, branch_scales, norms, tied_heads
from fxcompress.passes.rotate.values import weighings
from fxcompress.passes.tidy.fold_norm_gain import fold_gain, is_gain_free
from fxcompress.passes.vectors import fold_vector
from fxcompress.program import Program
from fxcompress.rewrite import Context, Options, Reject, Transform
from fxcompress.transport import Kind, Plan, Seed, Transport
from fxcompress.transport.insert import insert

aten = torch.ops.aten
ADDS = (aten.add.Tensor,)
TURNED = "turned"  # a fact about values; what has turned once stays, whatever the seed


class ResidualOptions(Options):
    """seed: of the signs. values: whether the values of attention turn too. keep_tied: a layer more rather than declining a tied head."""

    seed: int = 0
    values: bool = True
    keep_tied: bool = True


class Residual(Transform):
    """Turn every residual stream that can turn, and the values of every attention."""

    name = "rotate.residual"
    contract = Exact()
    Options = ResidualOptions
    gives = frozenset({"rotated"})
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per stream, at its first norm; two more for a tied head; one per op that weighs values."""
        declined: dict[str, Reject] = {}
        for norm, plan in self._freed(on, edit):
            read = [n.node for n in norms(on.program) if n.x in plan.values]
            _turn(plan, norm.node, read, edit, declined, self.options.seed)
        if self.options.values:
            for product, read, plan in _values(on):
                _turn(plan, product, read, edit, declined, self.options.seed)
        return declined

    def _freed(self, on: Context, edit: Edit) -> list[tuple[Norm, Plan]]:
        """Every stream, after the least of STEPS that frees most of them: what is done for nothing is taken back."""
        streams, kept, done = _streams(on), 0, 0
        while _stuck(streams) and done < len(STEPS) - (not self.options.keep_tied):
            done += 1
            edit.rollback()
            if [step(on.program, edit) for step in STEPS[:done]][-1]:
                freed = _streams(on)
                if _stuck(freed) < _stuck(streams):
                    streams, kept = freed, done
                else:  # what still stops is the better reason
                    streams = [old if old[1].is_whole else new for old, new in zip(streams, freed, strict=True)]
        if kept < done:
            edit.rollback()
            for step in STEPS[:kept]:
                step(on.program, edit)
        return streams


def rotations(plan: Plan, seed: int) -> dict[int, Tensor]:
    """One matrix per block, each with signs of its own; blocks count in the order of their first channel."""
    blocks = plan.blocks.tolist()
    matrices = {b: randomised_hadamard(blocks.count(b), seed + number) for number, b in enumerate(dict.fromkeys(blocks))}
    return {b: mean_keeping(matrix) if b in plan.steady else matrix for b, matrix in matrices.items()}


def fold_scales(program: Program, edit: Edit) -> bool:
    """Vectors that multiply branches of streams go into what makes the branch, g (W x) = (diag(g) W) x. Returns whether any did."""
    engine, before = Transport(program), len(edit.sites)
    for product, scale in branch_scales(program):
        fold_vector(engine, product, scale, edit, {product: "a-b"})
    for site in edit.sites[before:]:
        site.places = []  # it is there for the streams
    return len(edit.sites) > before


def free_tied_heads(program: Program, edit: Edit) -> bool:
    """Put a layer before every head whose weight is an embedding's; the gain of its norm goes into it. Returns whether there is such a head."""
    heads = list(tied_heads(program))
    for head, _ in heads:
        x = head.args[0]
        assert isinstance(x, fx.Node)
        with edit.site(head, "a layer before the tied head") as site:
            site.places = []  # it is there for the streams
            layer = insert(edit, x, Kind.ROTATE, readers=[head])
        engine = Transport(program)
        for norm in [n for n in norms(program) if n.gain is not None and not is_gain_free(program, n)]:
            plan = engine.solve(Kind.SCALE, Seed(norm.gain, (-1,), power=-1))  # type: ignore[arg-type]
            if layer.args[1] in plan.values:
                fold_gain(engine, norm, edit)
    return bool(heads)


STEPS = (fold_scales, free_tied_heads)  # what may free a stream, in the order of their costs


def _turn(plan: Plan, site: fx.Node, read: list[fx.Node], edit: Edit, declined: dict[str, Reject], seed: int) -> None:
    """Turn what these nodes read."""
    if plan.is_whole:
        plan.apply(edit, rotations(plan, seed), f"turned in {plan.blocks.max() + 1} blocks", at=site).places = read
        edit.mark(plan.values, TURNED)
    else:
        declined[site.name] = _refused(plan)


def _refused(plan: Plan) -> Reject:
    """Why a stream stays; a gain that a tied head keeps from being folded is told as such."""
    stop, program = next(iter(plan.pinned)), plan.facts.program
    read = {n.gain: n.node for n in norms(program) if n.gain is not None and program.constant(n.gain) is not None}
    gained = [_source(node) for gain, node in read.items() if gain in stop.node.all_input_nodes]
    for head, table in tied_heads(program):
        if _source(head.args[0]) in gained:
            return Reject("{}, and {} can't take it: its weight {} is the embedding's too", stop.reason, head, table)
    return Reject("{}", stop.reason)


def _source(value: Any) -> Any:
    """What a value is, without the views and casts of it."""
    while isinstance(value, fx.Node) and value.op == "call_function" and len(value.all_input_nodes) == 1:
        value = value.all_input_nodes[0]
    return value


def _stuck(streams: list[tuple[Norm, Plan]]) -> int:
    """How many streams can't turn."""
    return sum(not plan.is_whole for _, plan in streams)


def _streams(on: Context) -> list[tuple[Norm, Plan]]:
    """Per residual stream its first norm and how the stream may turn. A plan knows every value of its stream."""
    engine, seen, found = Transport(on.program), set[fx.Node](), []
    for norm in norms(on.program):
        if norm.x not in seen and TURNED not in norm.x.meta and _is_residual(norm.x) and on.admits(norm.node):
            plan = engine.solve(Kind.ROTATE, Seed(norm.x, (norm.axis,)))
            seen.update(plan.values)
            found.append((norm, plan))
    return found


def _values(on: Context) -> Iterator[tuple[fx.Node, list[fx.Node], Plan]]:
    """Every op that weighs values, with how they may turn, and all ops that weigh some of these."""
    engine, seen = Transport(on.program), set[fx.Node]()
    found = list(weighings(engine))
    for node, seeds in found:
        if on.admits(node) and not any(seed.node in seen or TURNED in seed.node.meta for seed in seeds):
            plans = [engine.solve(Kind.ROTATE, seed) for seed in seeds]
            plan = next((p for p in plans if p.is_whole), plans[0])
            seen.update(plan.values)
            yield node, [at for at, others in found if any(seed.node in plan.values for seed in others)], plan


def _is_residual(x: fx.Node) -> bool:
    """Whether a sum is normed, or what is normed goes into a sum."""
    while x.target in CASTS:
        x = x.args[0]  # type: ignore[assignment]
    return x.target in ADDS or any(u.target in ADDS for u in x.users)
