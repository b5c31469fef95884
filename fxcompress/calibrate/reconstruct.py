"""Region reconstruction: piece by piece, what rounds is trained so that the quantised piece gives what the float one gave.

    min over roundings, scales, biases of  Σ_outputs |f̂(x̂) - f(x)|² / |f(x)|²  +  λ · penalty

f, f̂: the piece in float and quantised. x: its inputs in the float program; x̂: in the quantised one, everything before already settled. Both
runs go forward through the program together, one piece at a time: no piece is computed twice for another's sake, and only the values between
two pieces are kept, on disk where they are many. While a piece is trained a value passes its quantiser with probability `drop`, and its
inputs are x with probability `mix`, entry by entry; whatever is compared, settled or stored never sees either.
Source: BRECQ (arXiv 2102.05426) for pieces, QDrop (arXiv 2203.05740) for drop and mix, AdaRound (arXiv 2004.10568) for the penalty.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn.functional import mse_loss

from fxcompress.calibrate.learned import Learned
from fxcompress.dataflow import is_constant, pair_of
from fxcompress.interpret import evaluate, last_uses
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.straight_through import fake_quantize, keep
from fxcompress.pieces import Piece
from fxcompress.program import Program

DIFFERENTIABLE: Mapping[Any, Callable[..., Any]] = {  # ops that autograd knows under another name only
    torch.ops.aten.copy.default: lambda old, new, *_: new.to(old.dtype).expand_as(old)
}
QUANTIZE, DEQUANTIZE = torch.ops.fxc.quantize.default, torch.ops.fxc.dequantize.default
WIDE = 16  # bits from which a quantiser is no matter for training
HELD = 1 << 30  # bytes of values between pieces that stay in memory; more goes to disk
POWERS = 20.0, 2.0  # of the penalty, from the end of the warm-up to the end
SOFT = 0.01  # share of a parameter that may be soft when training stops early
STILL = 0.98  # of the loss: less of a fall isn't worth the time
LOOKS = 10  # parts of a schedule whose mean losses are compared to stop early

Values = dict[fx.Node, Any]
Form = Literal["float", "rounded", "trained"]
_Step = Callable[["_Values", torch.Generator | None], Any]  # a node's value from those before it


@dataclass(frozen=True)
class Schedule:
    """iterations: of one calibration item each. warmup: the share of them before the penalty sets in. penalty: λ, in units of the loss that
    rounding to nearest has. drop, mix: see the module. seed: of the order of items and of both."""

    iterations: int = 1000
    warmup: float = 0.2
    penalty: float = 1.0
    drop: float = 0.5
    mix: float = 0.5
    seed: int = 0

    def power(self, iteration: int) -> float | None:
        """Of the penalty; None in the warm-up."""
        done = (iteration / self.iterations - self.warmup) / (1 - self.warmup)
        first, last = POWERS
        return None if done < 0 else last + (first - last) * (1 - done)


class Reconstruction:
    """Walks a program's float and quantised forms side by side, piece by piece: `enter`, perhaps `train`, then `improve` or `leave`.

    items: flat inputs, read once. The float form is the program without its quantisers, with the constants it has now.
    """

    def __init__(self, program: Program, items: Iterable[Sequence[Tensor]], held: int = HELD) -> None:
        self.program, self.constants = program, dict(program.constants)
        given = _Shelf((dict(zip(program.placeholders(), item, strict=True)) for item in items), held // 3)
        self.before = self.floats = self.rounded = given
        self.done = set[fx.Node]()

    def enter(self, piece: Piece) -> None:
        """Compute what the float piece gives."""
        self.before = self.floats
        self.floats = self._through(piece, self.before, _Forward(piece, self.constants, "float"))

    def train(
        self, piece: Piece, learned: Sequence[Learned], schedule: Schedule, before: float, tell: Callable[[int], None] = lambda _: None
    ) -> int:
        """Train; gives the iterations that were run. What is learned stays in `learned`; the program isn't changed.

        before: the piece's error so far, the unit of the loss. Raises Undifferentiable where the gradient of an op of the piece isn't known.
        """
        rng, compared = torch.Generator().manual_seed(schedule.seed), _compared(piece)
        forward = _Forward(piece, self.program.constants, "trained", learned, schedule.drop)
        rates = {x.rate: [y.parameter for y in learned if y.rate == x.rate] for x in learned}
        optimizer = torch.optim.Adam([{"params": v, "lr": rate} for rate, v in rates.items()], fused=True)
        unit, losses = max(before, 1e-12), list[float]()
        for i in range(schedule.iterations):
            at = int(torch.randint(len(self.rounded), (), generator=rng))
            values = _mixed(piece, self.before[at], self.rounded[at], schedule.mix, rng)
            loss = _relative(self.floats[at], forward(values, rng), compared) / unit
            _pull(learned, schedule.power(i), schedule.penalty)
            _backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
            if (i + 1) % max(schedule.iterations // LOOKS, 1) == 0:
                tell(i + 1)
                if _is_settled(losses, learned, schedule):
                    break
        return len(losses)

    def error(self, piece: Piece) -> float:
        """Σ over the outputs of |f̂(x̂) - f(x)|² / |f(x)|², mean over the items."""
        forward = _Forward(piece, self.program.constants, "rounded")
        with torch.no_grad():
            return self._off(piece, (forward(self.rounded[i]) for i in range(len(self.rounded))))

    def improve(self, piece: Piece, changed: Mapping[str, Tensor], before: float) -> float:
        """Leave the piece with other constants if its error, which is given, is then less than `before`; else the walk stays where it is."""
        rounded = self._through(piece, self.rounded, _Forward(piece, {**self.program.constants, **changed}, "rounded"))
        after = self._off(piece, (rounded[i] for i in range(len(rounded))))
        if after < before:
            self.rounded = rounded
        return after

    def leave(self, piece: Piece) -> None:
        """Compute what the quantised piece gives, with the constants the program has now."""
        self.rounded = self._through(piece, self.rounded, _Forward(piece, self.program.constants, "rounded"))

    def _off(self, piece: Piece, found: Iterable[Values]) -> float:
        compared = _compared(piece)
        return fmean(float(_relative(self.floats[i], values, compared)) for i, values in enumerate(found))

    def _through(self, piece: Piece, shelf: _Shelf, forward: _Forward) -> _Shelf:
        self.done.update(piece.nodes)
        return shelf.map(lambda values: self._kept(piece, {**values, **forward(values)}))

    def _kept(self, piece: Piece, values: Values) -> Values:
        own = set(piece.outputs)
        return {n: v for n, v in values.items() if n in own or any(u.op != "output" and u not in self.done for u in n.users)}


class Undifferentiable(Exception):  # noqa: N818 - caught by passes, never seen by a user
    """What autograd says of a piece that it can't differentiate."""


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "not implemented" in str(error) or "does not require grad" in str(error):
            raise Undifferentiable(str(error).splitlines()[0]) from None
        raise


class _Forward:
    """A piece as a function from the values before it to those it makes. form: float, without quantisers; rounded; or trained: what is learned
    in place of its nodes, quantisers with straight-through gradients that a value passes with probability `drop`."""

    def __init__(self, piece: Piece, constants: Mapping[str, Tensor], form: Form, learned: Sequence[Learned] = (), drop: float = 0.0) -> None:
        self.piece, self.form, self.learned, self.drop = piece, form, learned, drop
        self.fixed = _Values({}, constants)
        stand_ins = {x.node for x in learned}
        varying, steps = {*piece.inputs, *stand_ins}, dict[fx.Node, _Step]()
        with torch.no_grad():
            for node in (n for n in piece.nodes if n not in stand_ins and not self._is_skipped(n)):
                step = self._step(node)
                if varying.isdisjoint(_read(node, form)):
                    self.fixed[node] = step(self.fixed, None)
                else:
                    varying.add(node)
                    steps[node] = step
        last = last_uses(list(steps), lambda n: _read(n, form))
        self.steps = [(n, step, [d for d in last.get(n, ()) if d in steps and d not in piece.outputs]) for n, step in steps.items()]

    def __call__(self, values: Values, rng: torch.Generator | None = None) -> Values:
        """The outputs."""
        env = _Values(self.fixed, self.fixed.constants)
        env.update({n: values[n] for n in self.piece.inputs})
        env.update({x.node: x.value() for x in self.learned})
        for node, step, dead in self.steps:
            env[node] = step(env, rng)
            for done in dead:
                del env[done]
        return {n: env[n] for n in self.piece.outputs}

    def _is_skipped(self, node: fx.Node) -> bool:
        return self.form != "rounded" and node.target is QUANTIZE and all(u.target is DEQUANTIZE for u in node.users)

    def _step(self, node: fx.Node) -> _Step:
        pair = pair_of(node) if self.form != "rounded" else None
        if pair is None:
            return lambda env, _: _evaluated(node, env)
        value, scale, zero, name, block = pair
        format = format_of(name)
        if self.form == "float" or format.bits > WIDE:
            return lambda env, _: env[value]

        def quantised(env: _Values, rng: torch.Generator | None) -> Tensor:
            x = env[value]
            kept = _chance(x, self.drop, rng) if self.drop and rng is not None else None
            return fake_quantize(x, env[scale], None if zero is None else env[zero], format, block, kept)

        return quantised


class _Values(Values):
    """Values by node; a constant's own where nothing stands for it."""

    def __init__(self, values: Values, constants: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.constants = constants

    def __missing__(self, node: fx.Node) -> Tensor:
        return self.constants[str(node.target)]


class _Shelf:
    """Values of each item, in memory as far as `held` bytes go and on disk beyond; the files go with it."""

    def __init__(self, items: Iterable[Values], held: int) -> None:
        self.held, self._entries = held, list[Values | Path]()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._names = dict[str, fx.Node]()
        for values in items:
            held -= sum(v.nbytes for value in values.values() for v in _tensors(value))
            self._entries.append(values if held >= 0 else self._file(values))

    def _file(self, values: Values) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="fxcompress-values-")
        self._names.update({n.name: n for n in values})
        path = Path(self._folder.name) / f"{len(self._entries):06}.pt"
        torch.save({n.name: v for n, v in values.items()}, path)
        return path

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Values:
        entry = self._entries[index]
        if isinstance(entry, Path):
            return {self._names[name]: v for name, v in torch.load(entry, weights_only=True).items()}
        return entry

    def map(self, function: Callable[[Values], Values]) -> _Shelf:
        """Another shelf, item by item."""
        with torch.no_grad():
            return _Shelf((function(self[i]) for i in range(len(self))), self.held)


def _evaluated(node: fx.Node, env: _Values) -> Any:
    if node.target not in DIFFERENTIABLE:
        return evaluate(node, env, env.constants)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
    return DIFFERENTIABLE[node.target](*args, **kwargs)


def _read(node: fx.Node, form: Form) -> list[fx.Node]:
    """What decides a node's value."""
    pair = pair_of(node) if form != "rounded" else None
    if pair is None:
        return node.all_input_nodes
    return [pair.value] if form == "float" else [n for n in pair[:3] if n is not None]


def _compared(piece: Piece) -> list[fx.Node]:
    """The outputs that are held to the float ones: numbers, or several of them as a chunk gives."""
    return [n for n in piece.outputs if not is_constant(n) and any(v.is_floating_point() for v in _tensors(n.meta.get("val")))]


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]


def _relative(wanted: Values, found: Values, outputs: Sequence[fx.Node]) -> Tensor:
    """Σ over the outputs of |found - wanted|² / |wanted|²; what isn't finite in one is left out."""
    pairs = (pair for node in outputs for pair in zip(_tensors(wanted[node]), _tensors(found[node]), strict=True))
    return sum((_error(old.float(), new.float()) for old, new in pairs if old.is_floating_point()), torch.zeros(()))


def _error(old: Tensor, new: Tensor) -> Tensor:
    size = float(old.square().sum())
    if not math.isfinite(size):
        old, new = (torch.where(old.isfinite(), v, 0) for v in (old, new))
        size = float(old.square().sum())
    return mse_loss(new, old, reduction="sum") / max(size, 1e-12)


def _chance(x: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """True with a probability, in steps of 1/256 and at least one, at each place of x. Bytes cut from long integers, and compared in place,
    cost a tenth of bernoulli_."""
    drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=rng)
    return drawn.view(torch.uint8)[: x.numel()].le_(max(round(256 * share), 1) - 1).view(torch.bool).view(x.shape)


def _mixed(piece: Piece, floats: Values, rounded: Values, share: float, rng: torch.Generator) -> Values:
    """The piece's inputs of the quantised run, entry by entry those of the float one with a probability."""
    found = {n: rounded[n] for n in piece.inputs}
    for node, value in found.items() if share else ():
        other = floats[node]
        if other is not value and isinstance(value, Tensor) and value.is_floating_point():
            found[node] = keep(value.clone(), _chance(value, share, rng), other)
    return found


def _pull(learned: Sequence[Learned], power: float | None, weight: float) -> None:
    """Gradients start as those of the penalty, the mean over what is pulled."""
    found = [None if power is None else x.pull(power) for x in learned]
    count = sum(pull is not None for pull in found)
    for x, pull in zip(learned, found, strict=True):
        x.parameter.grad = None if pull is None else pull.mul_(weight / count)


def _is_settled(losses: Sequence[float], learned: Sequence[Learned], schedule: Schedule) -> bool:
    """Whether hardly anything soft is left and the loss of the last part is hardly below that of the two parts before."""
    part = max(schedule.iterations // LOOKS, 1)
    if len(losses) < 3 * part or any(x.soft() > SOFT for x in learned):
        return False
    return sum(losses[-part:]) > STILL * sum(losses[-3 * part : -part]) / 2
