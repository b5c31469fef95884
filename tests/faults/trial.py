"""Whether anybody notices a fault, and whether there was anything to notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxcompress import rows
from fxcompress.checker import check
from fxcompress.contract import Bounded, Contract
from fxcompress.dataflow import ancestors
from fxcompress.edit import Edit
from fxcompress.interpret import walk
from fxcompress.measure import relative_error
from fxcompress.program import Program
from fxcompress.verify import verify
from tests.faults.fault import Fault

NOISE = 1e-5  # relative: what sums in another order do to a value a few layers deep in float32
AS_GOOD = 1.01  # times as far from the values before the pass as without the fault
DRAWS = 3  # of random inputs, besides the example


@dataclass(frozen=True)
class Outcome:
    """What became of a fault. caught: "contract", the name of an error, or ""; named: the values called broken. Measured only where nobody
    noticed: change, the greatest relative change of a value over all inputs; and of a pass that rounds loss, how many times as far from what
    they were before the pass values are as without the fault."""

    fault: Fault
    caught: str
    named: tuple[str, ...] = ()
    change: float = float("nan")
    loss: float = float("inf")

    @property
    def verdict(self) -> str:
        """Who caught it, "equivalent" if there was nothing to catch, "as good" if it rounds otherwise and no worse, or "survived"."""
        return self.caught or ("equivalent" if self.change <= NOISE else "as good" if self.loss <= AS_GOOD else "survived")


class Trial:
    """An open edit with the values its program gives on random inputs."""

    def __init__(self, edit: Edit, contract: Contract) -> None:
        self.edit, self.contract, self.program = edit, contract, edit.program
        self.inputs = [self.program.example, *(drawn(self.program, seed) for seed in range(DRAWS))]
        self.kept = kept_nodes(edit)
        self.right = [self._values(x) for x in self.inputs]

    def run(self, fault: Fault) -> Outcome:
        """Plant it, check as the manager does, take it back."""
        undo = fault.plant()
        try:
            caught, named = self._noticed()
            if caught:
                return Outcome(fault, caught, named)
            change = self._change()
            return Outcome(fault, "", (), change, self._loss() if change < float("inf") and type(self.contract) is Bounded else float("inf"))
        finally:
            undo()

    def _noticed(self) -> tuple[str, tuple[str, ...]]:
        try:
            with mock.patch.multiple(rows, ROWS=2, LEAST=2):  # probes are short here; of long ones a part is looked at
                measured = check(self.program, self.edit, self.contract, self.program.example)
            broken = tuple(m.value for m in measured if m.verdict == "broken")
            if not broken:
                verify(self.program)
        except Exception as error:  # an op that can't run on what it is given
            return type(error).__name__, ()
        return ("contract" if broken else ""), broken

    def _change(self) -> float:
        """inf where the program no longer runs."""
        try:
            wrong = [self._values(x) for x in self.inputs]
        except Exception:
            return float("inf")
        pairs = [(a[n], b[n]) for a, b in zip(self.right, wrong, strict=True) for n in a.keys() & b.keys()]
        return max(apart(a, b) for a, b in pairs)

    def _loss(self) -> float:
        """inf where changes are on record, under which the values before are others. The greatest over values and inputs."""
        if self.edit.changes:
            return float("inf")
        roots = {new: old for site in self.edit.sites for old, new in site.replaced.items()}
        losses = [0.0]
        for x, right in zip(self.inputs, self.right, strict=True):
            before, wrong = self._before(x), self._values(x)
            for key in right.keys() & wrong.keys():
                old = key
                while old in roots:
                    old = roots[old]
                if old in before:
                    losses.append(times_as_far(before[old], right[key], wrong[key]))
        return max(losses)

    def _before(self, inputs: Sequence[Tensor]) -> dict[Any, Any]:
        """The values of the old graph by node, its results by number."""
        values, given = dict[Any, Any](), iter(inputs)
        for step in self.edit.before[:-1]:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda n: values[n])
            if step.node.op == "get_attr":
                values[step.node] = self.edit.constants_before[str(step.target)]
            else:
                values[step.node] = next(given) if step.node.op == "placeholder" else step.target(*args, **kwargs)
        return values | dict(enumerate(values[n] for n in self.edit.before[-1].args[0]))

    def _values(self, inputs: Sequence[Tensor]) -> dict[Any, Any]:
        """Kept values by node, results by number."""
        alive, values = ancestors([self.program.output_node]), dict[Any, Any]()
        nodes = [n for n in self.program.graph.nodes if n in alive or n.op == "placeholder"]
        wanted = [n for n in nodes if n in self.kept]
        values.update(zip(wanted, walk(nodes, self.program.constants, inputs, wanted), strict=True))
        return values | dict(enumerate(walk(nodes, self.program.constants, inputs, self.program.results())))


def kept_nodes(edit: Edit) -> set[fx.Node]:
    """The live values that something is said about: the old ones, and those in the place of old ones; none that nobody has written yet."""
    old = {s.node for s in edit.before if s.node.op == "call_function"}
    new = {n for site in edit.sites for n in site.replaced.values()}
    return {n for n in ancestors([edit.program.output_node]) & (old | new) if "empty" not in str(n.target)}


def drawn(program: Program, seed: int) -> list[Tensor]:
    """Other inputs: floats as spread as the example's, indices from the whole table, other integers and booleans from among the example's."""
    rng = torch.Generator().manual_seed(seed)
    return [_drawn(x, value.below, rng) for x, value in zip(program.example, program.inputs, strict=True)]


def _drawn(x: Tensor, below: int | None, rng: torch.Generator) -> Tensor:
    if x.is_floating_point():
        return x.mean() + torch.randn(x.shape, generator=rng, dtype=x.dtype) * (x.std() if x.numel() > 1 else 1.0)
    if below is not None:
        return torch.randint(below, x.shape, generator=rng, dtype=x.dtype)
    return x.flatten()[torch.randint(x.numel(), x.shape, generator=rng)]


def times_as_far(before: Any, right: Any, wrong: Any) -> float:
    """|wrong - before| / |right - before| of tensors of floats, 1 where both are 0; of anything else 1 if right and wrong are equal, or inf."""
    if not (isinstance(right, Tensor) and right.is_floating_point()):
        return 1.0 if apart(right, wrong) == 0 else float("inf")
    far, near = (float((x.double() - before.double()).norm()) for x in (wrong, right))
    return far / near if near else 1.0 if not far else float("inf")


def apart(right: Any, wrong: Any) -> float:
    """The greatest relative error over the tensors and numbers of two values; inf if their forms differ."""
    a, b = ([torch.as_tensor(v) for v in pytree.tree_leaves(x)] for x in (right, wrong))
    if [(x.shape, x.dtype) for x in a] != [(x.shape, x.dtype) for x in b]:
        return float("inf")
    return max((relative_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
