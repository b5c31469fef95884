"""Transport: changes of variables on channels, pushed through the graph until constants absorb them.

    engine = Transport(program)
    plan = engine.solve(Kind.SCALE, Seed(x, (2,), power=-1))     # symbolic: what may change together, what is pinned and why
    plan.apply(edit, vector)                                     # numbers: one entry per free class

Nothing is looked up by name: a change is a label on a value, every op has one relation between the labels of its operands and its result
(`relations/`), and a worklist runs them to a fixed point. A weight is a value like any other, so a fold is a label that has reached one.
Run dead-code elimination and constant folding before: dead readers pin, and values made in the graph can't absorb.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Literal

from torch import fx

from fxcompress.program import Program
from fxcompress.transport.facts import Facts
from fxcompress.transport.labels import Kind, Label, Stop
from fxcompress.transport.plan import Plan, solved
from fxcompress.transport.solver import Extra, Seed, Solver

__all__ = ["Extra", "Kind", "Label", "Plan", "Seed", "Stop", "Transport", "transport"]


Require = Literal["any", "all"]
FLIPS = {"a-out": ("b-out", "a-b"), "b-out": ("a-out", "a-b"), "a-b": ("a-out", "b-out"), "b-a": ("a-out", "b-out")}  # per route the others
OTHERS = {**FLIPS, "entries": ("channels",), "channels": ("entries",)}  # the same for all choices


class Transport:
    """Plans on one program as it stands; facts about it are computed once. After an edit that changes its graph, make a new one."""

    def __init__(self, program: Program) -> None:
        self.facts = Facts(program)

    def solve(
        self,
        kind: Kind,
        *seeds: Seed,
        choices: Mapping[fx.Node, str] | None = None,
        shuffle: int | None = None,
        is_open: bool = False,
        require: Require = "any",
    ) -> Plan:
        """The plan of a change that starts at the seeds, one vector for all.

        choices: routes to take where there is a choice. What is stopped tries the others of one choice after another, then to give products'
        changes to factors that tell fewer of them apart; the first that frees more is taken. shuffle: a seed for the order of work, which the
        result doesn't depend on. is_open: inputs and outputs may change too; the caller sees to them. require "all": nothing is free if
        anything is pinned. ValueError for a seed axis of dynamic size.
        """
        given, passed_over = dict(choices or {}), False

        def attempt(routes: Mapping[fx.Node, str], is_frugal: bool = False) -> Plan:
            """One solve by these routes."""
            nonlocal passed_over
            solver = Solver(self.facts, Kind(kind), {**given, **routes}, shuffle, is_open, is_frugal)
            for seed in seeds:
                solver.seed(seed)
            plan = solved(solver)
            passed_over |= solver.passed_over
            return plan

        plan = attempt({})
        flipped = (attempt({n: other}) for n in _worth_flipping(plan) if n not in given for other in OTHERS[plan.choices[n]])
        frugal = (attempt({}, is_frugal=True) for _ in range(bool(plan.pinned) and passed_over))
        found = next((p for p in chain(flipped, frugal) if p.count > plan.count), plan)
        return found.nothing() if require == "all" and found.pinned else found


def _worth_flipping(plan: Plan) -> list[fx.Node]:
    """Choices that may be wrong: of a stopped shift or removal all, of other kinds those that stop themselves."""
    stops = {stop.node for stop in plan.pinned}
    return [n for n in plan.choices if n in stops or (stops and plan.kind in (Kind.SHIFT, Kind.REMOVE))]


def transport(program: Program, kind: Kind, *seeds: Seed) -> Plan:
    """One plan on a program."""
    return Transport(program).solve(kind, *seeds)
