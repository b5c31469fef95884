"""What the tests of the engine share: programs in float64, plans applied under the contract, audits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.checker import check
from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.hadamard import mean_keeping
from fxcompress.program import Program
from fxcompress.transport import Kind, Plan, Transport

LIMIT = 1e-10
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def doubled(program: Program) -> Program:
    """The program with float64 in place of every narrower float: constants, inputs, casts and fake values."""
    double = program.copy()
    for name, tensor in double.constants.items():
        double.constants[name] = tensor.double() if tensor.dtype in FLOATS else tensor
    for node in double.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _wide)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _wide)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype in FLOATS:
            node.meta = {**node.meta, "val": value.double()}
    example = tuple(x.double() if x.dtype in FLOATS else x for x in double.example)
    return Program(**{**vars(double), "example": example})


def _wide(value: Any) -> Any:
    return torch.float64 if value in FLOATS else value


def vector_for(plan: Plan, seed: int = 0) -> Any:
    """A random change of a plan's kind: away from the identity in every class."""
    rng = torch.Generator().manual_seed(seed)
    if plan.kind == Kind.SCALE:
        return torch.exp(torch.rand(plan.count, generator=rng, dtype=torch.float64) - 0.5) * 1.3
    if plan.kind == Kind.SIGN:
        return torch.where(torch.rand(plan.count, generator=rng) < 0.7, -1.0, 1.0).double()
    if plan.kind == Kind.SHIFT:
        return torch.randn(plan.count, generator=rng, dtype=torch.float64)
    if plan.kind == Kind.PERMUTE:
        return _shuffled(plan, rng)
    if plan.kind == Kind.ROTATE:
        turns = {b: _orthogonal(int((plan.blocks == b).sum()), rng) for b in set(plan.blocks.tolist())}
        return {b: mean_keeping(r) if b in plan.steady else r for b, r in turns.items()}
    keep = torch.rand(plan.count, generator=rng) < 0.6
    keep[0] = True
    return keep.numpy()


def _shuffled(plan: Plan, rng: torch.Generator) -> Tensor:
    order = torch.arange(plan.count)
    for block in set(plan.blocks.tolist()):
        members = torch.from_numpy(plan.blocks == block).nonzero().flatten()
        order[members] = members[torch.randperm(len(members), generator=rng)]
    return order


def _orthogonal(size: int, rng: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0]


def landed(program: Program, plan: Plan, vector: Any) -> tuple[Program, Edit]:
    """(the program changed, the open edit that did it): on a copy with the plan's own nodes kept in place, so call it on a copy."""
    edit = Edit(program)
    plan.apply(edit, vector)
    return program, edit


def error(before: Sequence[Any], after: Sequence[Any]) -> float:
    """The greatest relative error over outputs."""
    return max(relative_error(a, b) for a, b in zip(before, after, strict=True))


def proved(program: Program, plan: Plan, vector: Any) -> dict[str, float]:
    """Apply a plan, measure outputs, audit and contract, roll back. Returns the figures; `broken` and `unverified` count what the contract
    refuses, and what it can't see."""
    old, before = program.copy(), run(program, program.example)
    edit = Edit(program)
    plan.apply(edit, vector)
    after = run(program, program.example)
    audit = plan.audit(old, program, vector, program.example)
    checks = check(program, edit, Exact(limit=1e-9), program.example)
    edit.rollback()
    verdicts = Counter(m.verdict for m in checks)
    figures = {"output": error(before, after), "audit": max(audit.values(), default=0.0), "checks": len(checks)}
    return {**figures, "broken": verdicts["broken"], "unverified": verdicts["unverified"]}


def solve(program: Program, kind: Kind, *seeds: Any, **more: Any) -> Plan:
    """A plan on a program."""
    return Transport(program).solve(kind, *seeds, **more)


Figures = Mapping[str, float]
