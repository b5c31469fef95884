"""How far every value of a compiled program is from the one it stands for in the captured program: the loss as it adds up, node by node."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.interpret import evaluate, last_uses
from fxcompress.numerics.noise import sqnr
from fxcompress.program import Program


def stand_ins(names: Iterable[str], replaced: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Per captured value the one that its readers read now. replaced: old -> new, one mapping a pass, in order."""
    found = {name: name for name in names}
    for step in replaced:
        for name, now in found.items():
            seen = {now}
            while (new := step.get(found[name])) is not None and new not in seen:
                found[name] = new
                seen.add(new)
    return found


@torch.no_grad()
def losses(
    before: Program, after: Program, inputs: Sequence[Tensor], replaced: Sequence[Mapping[str, str]], recast: Collection[str] = ()
) -> dict[str, float | None]:
    """SQNR in dB of the floating-point values of `after` against those of `before` that they are or stand for; None where they are equal.

    recast: values that carry a change and can't be compared. Both programs are walked side by side, so that few values are held at a time.
    """
    names = [n.name for n in before.graph.nodes if n.op == "call_function" and n.name not in recast]
    origin = {new: old for old, new in stand_ins(names, replaced).items() if new not in recast} | {name: name for name in names}
    origin = {n.name: origin[n.name] for n in after.graph.nodes if n.op == "call_function" and n.name in origin}
    readers, olds, news, found = Counter(origin.values()), dict[str, Any](), dict[str, Any](), dict[str, float | None]()
    for old_step, new_step in zip_longest(_values(before, inputs), _values(after, inputs)):
        if old_step is not None and old_step[0] in readers:
            olds[old_step[0]] = old_step[1]
        if new_step is not None and new_step[0] in origin:
            news[new_step[0]] = new_step[1]
        for name in [n for n in news if origin[n] in olds]:
            old = olds[origin[name]]
            if (figure := _figure(old, news.pop(name))) is not None:
                found[name] = round(figure, 2) if math.isfinite(figure) else None
            readers[origin[name]] -= 1
            if not readers[origin[name]]:
                del olds[origin[name]]
    return {name: found[name] for name in origin if name in found}


def _values(program: Program, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Any]]:
    ordered = [n for n in program.graph.nodes if n.op != "output"]
    last, given, env = last_uses(ordered), iter(inputs), dict[fx.Node, Any]()
    for node in ordered:
        env[node] = next(given) if node.op == "placeholder" else evaluate(node, env, program.constants)
        if node.op == "call_function":
            yield node.name, env[node]
        for dead in last.get(node, ()):
            del env[dead]


def _figure(old: Any, new: Any) -> float | None:
    if not all(isinstance(v, Tensor) and v.is_floating_point() and v.numel() for v in (old, new)) or old.shape != new.shape:
        return None
    if torch.equal(old, new):
        return math.inf
    same = old.isfinite() & new.isfinite()
    return sqnr(torch.where(same, old, 0), torch.where(same, new, 0))
