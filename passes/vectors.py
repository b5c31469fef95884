"""A constant vector that scales channels becomes 1, and the weights around it take its numbers.

    W (v x) = (W diag v) x,    v = |v| sign v

Each part moves by its own plan, so that a sign goes where a scale may not. Where v is 0 its readers get
zeros and leave those channels unread.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from fxcompress.edit import Edit
from fxcompress.passes.norms import tied_heads
from fxcompress.program import Program
from fxcompress.rewrite import Reject
from fxcompress.transport import Kind, Plan, Seed, Transport
from fxcompress.transport.labels import Label, as_tensor


def fold_vector(
    engine: Transport,
    at: fx.Node,
    leaf: fx.Node,
    edit: Edit,
    choices: Mapping[fx.Node, str] | None = None,
    gains: Container[fx.Node] = frozenset(),
) -> Reject | None:
    """Set a constant vector that scales channels to 1, and let others take it. Returns why it can't be.

    choices: for the engine. gains: vectors that take nothing, since they are to be 1 too.
    """
    vector = edit.program.constants[str(leaf.target)]
    if bool((vector == 1).all()):
        return None
    if not vector.isfinite().all():
        return Reject("{} has a gain that isn't finite, {}", at, leaf)
    dead = vector == 0
    plans = {Kind.SCALE: vector.abs() + dead, Kind.SIGN: vector.sign() + dead}
    wanted = [kind for kind, part in plans.items() if not (part == 1).all() or (dead.any() and kind == Kind.SCALE)]
    seed = Seed(leaf, tuple(range(vector.dim())), power=-1)
    solved = [(engine.solve(kind, seed, choices=choices), plans[kind]) for kind in wanted]
    others = dict.fromkeys(n for plan, _ in solved for n in plan.leaves if n in gains and n is not leaf)
    for plan, part in solved:
        if reason := refusal(plan, leaf, part) or unequal(plan, leaf, others) or (undead(plan, leaf, dead) if plan.kind == Kind.SCALE else ""):
            return tied_reject(edit.program, plan, reason) or Reject("{}", reason)
    to = "what it multiplies" if choices else "readers"
    for number, (plan, part) in enumerate(solved):
        last = {n: torch.ones_like(vector) for n in (leaf, *others)} if number == len(solved) - 1 else {}
        plan.apply(edit, factors(plan, leaf, part), f"gain folded into {to}", last, at=at)
    if dead.any():
        leave_unread(solved[0][0], (leaf, *others), dead, edit, at)
    return None


def unequal(plan: Plan, leaf: fx.Node, others: Iterable[fx.Node]) -> str:
    """Why gains that change together can't all become 1; "" if they can: they are equal, and divided by the same."""
    held, powers = plan.facts.program.constants, {label.power for label in plan.leaves[leaf]}
    for other in others:
        if not torch.equal(held[str(other.target)], held[str(leaf.target)]) or {label.power for label in plan.leaves[other]} != powers:
            return f"{leaf.name} and {other.name} are gains of two norms, and one would go into the other"
    return ""


def undead(plan: Plan, leaf: fx.Node, dead: Tensor) -> str:
    """Why nobody may stop reading channels of gain 0 instead: something else is in them. "" if there is nothing, or no such channel."""
    if not dead.any():
        return ""
    if refusal(plan, leaf, dead.double()):
        return f"{leaf.name} is 0 where a reader can't tell channels apart"
    if extra := next(iter(plan.extras), None):
        return f"{leaf.name} is 0 for channels to which {extra.node.name} gives something else"
    for node, labels in plan.leaves.items():
        tensor = plan.facts.program.constants[str(node.target)]
        if node is not leaf and any(label.power != 1 and (tensor * _dead_in(plan, leaf, dead, label)).any() for label in labels):
            return f"{leaf.name} is 0 for channels to which {node.name} gives something else"
    return ""


def leave_unread(plan: Plan, gains: Sequence[fx.Node], dead: Tensor, edit: Edit, at: fx.Node) -> None:
    """W g n = W n with W = 0 in the channels where g was 0; what is in them on the way is seen by nobody."""
    with edit.site(at, f"{int(dead.sum())} channels of gain 0 are read no more"):
        edit.loosen(n for n in plan.values if n.op != "get_attr")
        for gain in gains:
            edit.carry(gain, dead.to(edit.program.constants[str(gain.target)]).add)
            edit.fold(gain, torch.ones_like(edit.program.constants[str(gain.target)]))
        for node, labels in plan.leaves.items():
            for label in labels if node not in gains else ():
                if label.power == 1:
                    keep = ~_dead_in(plan, gains[0], dead, label)
                    edit.carry(node, keep.mul)
                    edit.fold(node, edit.program.constants[str(node.target)] * keep)


def _dead_in(plan: Plan, leaf: fx.Node, dead: Tensor, label: Label) -> Tensor:
    """Which positions of a label are those channels."""
    return torch.cat([plan.gather({leaf: dead.double()}) > 0, torch.tensor([False])])[as_tensor(plan.class_of(label.index))]


def tied_reject(program: Program, plan: Plan, reason: str) -> Reject | None:
    """The refusal of a plan that a head carried back into the embedding's table; None for any other."""
    head, table = next((pair for pair in tied_heads(program) if pair[1] in plan.leaves and pair[0].args[0] in plan.values), (None, None))
    return Reject("{} is tied, its weight {} is the embedding's too, and so {}", head, table, reason) if head else None


def refusal(plan: Plan, leaf: fx.Node, part: Tensor) -> str:
    """Why a plan can't take the leaf's numbers away: something is pinned, or it must be equal where the leaf isn't. "" if it can."""
    if not plan.is_whole:
        return plan.reason()
    if not torch.equal(factors(plan, leaf, part), plan.gather({leaf: part}, "amin")):
        return f"{leaf.name} differs between channels that a reader can't tell apart"
    return ""


def factors(plan: Plan, leaf: fx.Node, part: Tensor) -> Tensor:
    """The leaf's numbers, one per class."""
    return plan.gather({leaf: part})
