"""What the tests of the published legality tables share: a row is a small graph with a seed, and lands, exact, or is refused by a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxcompress.passes.tidy.fold_constants import FoldConstants
from fxcompress.program import Program
from fxcompress.transport import Kind, Plan, Seed, Transport
from tests.passes.helpers import function, node, run, seeded
from tests.transport.helpers import LIMIT, proved, vector_for

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers over the root of the last size, float64."""
    return seeded(*shape, seed=seed, dtype=F64) / shape[-1] ** 0.5


def mark(x: Tensor) -> Tensor:
    """Where the seed goes: the first of them in a graph."""
    return x.clone()


@dataclass(frozen=True)
class Row:
    """body(inputs.., weights by name) with one `mark`. wanted: the number of free classes, or (node, reason) of the stop that pins them all."""

    body: Callable[..., Any]
    kind: Kind
    wanted: int | tuple[str, str]
    axes: tuple[int, ...] = (-1,)
    inputs: tuple[Tensor, ...] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def program(self) -> Program:
        """The row's graph, constants folded."""
        return run(function(self.body, *self.inputs, **self.weights, dynamic=False), FoldConstants(), check="off")[0]

    def plan(self, program: Program) -> Plan:
        """The engine's verdict."""
        return Transport(program).solve(self.kind, Seed(node(program, "clone"), self.axes))


def confirm(row: Row) -> None:
    """A landing is exact for a random vector, and checked everywhere; a refusal names its node and reason."""
    program = row.program()
    plan = row.plan(program)
    stop = next(iter(plan.pinned), None)
    found = plan.count if plan.count or stop is None else (stop.node.name, stop.reason)
    assert found == row.wanted, plan.reason()
    if plan.count:
        figures = proved(program, plan, vector_for(plan))
        assert max(figures["output"], figures["audit"]) < LIMIT
        assert figures["checks"]
        assert not figures["broken"]
        assert not figures["unverified"]
