"""Runs passes over a program: finds sites, applies, measures the contract, commits or rolls back, and reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxcompress import checker
from fxcompress.calibrate.statistics import Statistics
from fxcompress.contract import Exact, Measured
from fxcompress.edit import Edit, Site
from fxcompress.errors import ContractViolation, FxcError
from fxcompress.history import History
from fxcompress.interpret import run
from fxcompress.numerics.noise import sqnr
from fxcompress.program import ROOT, Program, module_path
from fxcompress.recipe import Step, Where, check_step, exclusions, step_options
from fxcompress.report import Change, Check, Declined, Excluded, PassReport, worst_of
from fxcompress.rewrite import Context, Kept, Match, Pass, Reject, Rewrite, Transform
from fxcompress.target import Target
from fxcompress.verify import verify

CheckMode = Literal["each", "end", "off"]
Progress = Callable[[str, int, int], None]  # pass name, passes finished, passes in all


@dataclass(frozen=True)
class Found:
    """What looking at a program gave: declined sites and how many legal ones the recipe excluded."""

    declined: tuple[Declined, ...]
    excluded: int


class _Gate:
    """What the recipe lets a pass touch, and what it asked about in vain."""

    def __init__(self, where: Where) -> None:
        self.where, self.refused = where, dict[str, Excluded]()

    def __call__(self, node: fx.Node) -> bool:
        """Whether the recipe admits the node."""
        if (glob := self.where.against(node)) is not None:
            self.refused.setdefault(node.name, Excluded(site=node.name, module=module_path(_place(node)), glob=glob))
        return glob is None


class Manager:
    """Runs the passes of one recipe, one after the other, on one program."""

    def __init__(
        self, program: Program, target: Target, probe: Sequence[Tensor], check: CheckMode = "each", statistics: Statistics | None = None
    ) -> None:
        self.tell: Callable[[str], None] = lambda sentence: None  # how far the pass that runs is
        self.kept: Callable[[], Kept] = Kept  # where it keeps what it has finished of itself
        self.program, self.target, self.probe, self.check, self.statistics = program, target, tuple(probe), check, statistics
        self.reference = run(program, self.probe) if check != "off" else []  # what the end-to-end figures compare with
        self.done: list[PassReport] = []
        self.history = History()
        self.gave: set[str] = set()  # facts about the program that finished passes gave

    def run(
        self, passes: Sequence[tuple[Step, Pass]], progress: Progress = lambda *_: None, keep: Callable[[], None] = lambda: None
    ) -> list[PassReport]:
        """Run all passes; keep() is called after each. On an error the program is as after the last finished pass, and the error says how many
        finished."""
        if not self.history.graphs:
            self.history.record(self.program)
        for number, (step, item) in enumerate(passes):
            progress(item.name, number, len(passes))
            report, recast = self._step(step, item)
            self.done.append(report)
            self.gave |= item.gives
            self.history.record(self.program, {name for change in report.changes for name in change.constants}, recast)
            keep()
        progress("", len(passes), len(passes))
        return self.done

    def output_sqnr(self) -> float:
        """Lowest SQNR over the floating-point outputs against the captured program, in dB, on the probe."""
        return lowest_sqnr(self.reference, run(self.program, self.probe))

    def _step(self, step: Step, item: Pass) -> tuple[PassReport, list[str]]:
        """The pass's report, and the values that carry a change since."""
        start, bytes_before, nodes_before = time.process_time(), weight_bytes(self.program), len(self.program.graph.nodes)
        edit, notes, gate = Edit(self.program), list[str](), _Gate(step.where)
        try:
            check_step(step, self.program, item.name)
            found = self._apply(item, edit, gate, notes)
            checks = tuple(as_check(m) for m in self._checked(step, item, edit))
            verify(self.program)
            sites, excluded = list(edit.sites), self._excluded(item, edit.sites)
            recast = [n.name for n in (*edit.changes, *edit.loose)]
            moved = _moved(edit)
            edit.commit()
        except BaseException as error:
            edit.rollback()
            if isinstance(error, FxcError):
                raise error.placed(state=f"program as before this pass; {len(self.done)} finished passes are kept") from None
            raise
        exact, opened = isinstance(item.contract, Exact), {s.node for s in sites if not s.places or any(p.name == s.node for p in s.places)}
        report = PassReport(
            name=item.name,
            options=step_options(step, item),
            cpu_seconds=round(time.process_time() - start, 3),
            fired=len(sites),
            legal=len(sites) + found.excluded,
            declined=found.declined,
            contract=item.contract.kind,
            unit=item.contract.unit,
            checks=checks,
            worst=worst_of(checks, item.contract.unit),
            output_sqnr=None if exact or self.check == "off" or not sites else self.output_sqnr(),
            bytes_before=bytes_before,
            bytes_after=weight_bytes(self.program),
            nodes_before=nodes_before,
            nodes_after=len(self.program.graph.nodes),
            changes=tuple(as_change(s, globs, moved) for s, globs in zip(sites, excluded, strict=True)),
            notes=tuple(notes),
            whole=item.whole,
            excluded=tuple(e for e in gate.refused.values() if e.site not in opened),  # another of its places may let it in
        )
        return report, recast

    def _excluded(self, item: Pass, sites: Sequence[Site]) -> list[tuple[str, ...]]:
        """Per site the globs that would leave it alone. A recipe is checked on the captured program, so it can name nodes that a pass made only
        behind a pass of which that is said."""
        if item.whole:
            return [()] * len(sites)
        captured, nodes = self.history.graphs[0].nodes, {n.name: n for n in self.program.graph.nodes}
        places = [[nodes[s.node]] if s.places is None else s.places for s in sites]
        return exclusions(places, lambda node: "opened" in self.gave or node.name in captured)

    def _apply(self, item: Pass, edit: Edit, gate: _Gate, notes: list[str]) -> Found:
        context = Context(self.program, self.target, self.probe, gate, note=notes.append, progress=self.tell, kept=self.kept())
        if (known := self.statistics) is not None:
            context = replace(context, observe=partial(known, self.program), items=lambda: known.items)
        if isinstance(item, Rewrite):
            return apply_rewrite(item, context, edit)
        assert isinstance(item, Transform)
        rejects = item.run(context, edit)
        nodes = {n.name: n for n in self.program.graph.nodes}
        places = {n: nodes.get(n.partition(".")[0]) for n in rejects}  # a part of a node, as norm.beta, is where the node is
        modules = {n: "" if place is None else module_path(_place(place)) for n, place in places.items()}
        return Found(tuple(Declined(site=n, module=modules[n], reason=r.reason) for n, r in rejects.items()), 0)

    def _checked(self, step: Step, item: Pass, edit: Edit) -> list[Measured]:
        if self.check != "each" or not edit.sites:
            return []
        contract = item.contract if step.limit is None else replace(item.contract, limit=step.limit)
        measured = checker.check(self.program, edit, contract, self.probe)
        if broken := [m for m in measured if m.verdict == "broken"]:
            raise _violation(item, broken, len(edit.sites))
        unseen = [m for m in measured if m.verdict == "unverified"]
        if unseen and step.unverified == "refuse":
            raise _unverified(item, unseen, len(edit.sites))
        return measured


def apply_rewrite(item: Rewrite, context: Context, edit: Edit) -> Found:
    """Ask the pass about every node of its targets in order, and apply it where it matches and the recipe admits the node."""
    declined: list[Declined] = []
    excluded = 0
    for node in candidates(context.program.graph, item):
        answer, known = item.match(node, context), len(edit.sites)
        if isinstance(answer, Match) and all(context.admits(n) for n in answer.places):
            item.apply(answer, edit)
            for site in edit.sites[known:]:
                site.places = [answer.places[0]]  # one is enough: the recipe has to admit all
        elif isinstance(answer, Match):
            excluded += 1
        elif isinstance(answer, Reject) and context.admits(_place(node)):
            declined.append(Declined(site=node.name, module=module_path(_place(node)), reason=answer.reason))
    return Found(tuple(declined), excluded)


def _place(node: fx.Node) -> fx.Node:
    """The node whose module path tells where a node is: a constant has none, its first reader has."""
    return min(node.users) if node.op == "get_attr" and node.users else node


def candidates(graph: fx.Graph, item: Rewrite) -> Iterator[fx.Node]:
    """The nodes whose op (or kind, for "get_attr") is among the pass's targets, in order."""
    ops = {t for t in item.targets if not isinstance(t, str)}
    kinds = {t for t in item.targets if isinstance(t, str)}
    for node in list(graph.nodes):
        if node.op in kinds or (node.op == "call_function" and node.target in ops):
            yield node


def weight_bytes(program: Program) -> int:
    """Bytes of all constants, each stored once."""
    return sum(t.numel() * t.element_size() for t in program.constants.values())


def lowest_sqnr(reference: Sequence[Any], outputs: Sequence[Any]) -> float:
    """The lowest SQNR in dB over floating-point outputs; inf if there is none or all are equal."""
    pairs = [(a, b) for a, b in zip(reference, outputs, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    return min((sqnr(_finite(a), _finite(b)) for a, b in pairs), default=float("inf"))


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.double(), nan=float("nan"), posinf=0.0, neginf=0.0)


def as_check(measured: Measured) -> Check:
    """A measurement as it stands in the report."""
    spread = measured.histogram and measured.histogram._asdict()
    return Check(**{**{f: getattr(measured, f) for f in Check.model_fields}, "histogram": spread})


def as_change(site: Site, exclude: tuple[str, ...] = (), moved: Mapping[str, float] | None = None) -> Change:
    """A site of an edit as it stands in the journal."""
    return Change(
        site=site.name,
        module=site.module,
        reason=site.reason,
        replaced={old.name: new.name for old, new in site.replaced.items()},
        inserted=tuple(n.name for n in site.inserted),
        touched=tuple(n.name for n in site.touched),
        constants=tuple(site.constants),
        erased=tuple(site.erased),
        exclude=exclude,
        moved={name: moved[name] for name in site.constants if name in moved} if moved else {},
    )


def _moved(edit: Edit) -> dict[str, float]:
    """How far an edit moved each floating-point constant, |new - old| / |old|; of those that it resized, added or took away nothing."""
    both = {n: (edit.constants_before.get(n), edit.program.constants.get(n)) for s in edit.sites for n in s.constants}
    found = {}
    for name, (old, new) in both.items():
        if old is not None and new is not None and old.shape == new.shape and old.is_floating_point() and new.is_floating_point():
            size, gap = (float(torch.linalg.vector_norm(v)) for v in (old.double(), new.double() - old.double()))
            if size and math.isfinite(gap):
                found[name] = float(f"{gap / size:.3g}")
    return found


def _worst(measured: Sequence[Measured], exact: bool) -> Measured:
    """Closest to its limit, or furthest beyond."""
    return max(measured, key=lambda m: m.figure - m.limit) if exact else min(measured, key=lambda m: m.figure - m.limit)


def _unverified(item: Pass, unseen: Sequence[Measured], sites: int) -> ContractViolation:
    first, places = unseen[0], {m.site for m in unseen}
    return ContractViolation(
        f"{item.name} can't be checked at {len(places)} of {sites} sites",
        where=f"{first.site}" + (f"   and {len(places) - 1} more" if len(places) > 1 else ""),
        why=f"the contract at {first.value} can't bite on the probe inputs: {first.why}",
        do=f"pass example inputs that reach these sites, exclude them, or let them through: - {item.name}: {{unverified: allow}}",
    )


def _figure(item: Pass, worst: Measured) -> str:
    return f"{worst.figure:.3g} dB" if item.contract.unit == "dB" else f"{item.contract.unit} {worst.figure:.3g}"


def _violation(item: Pass, broken: Sequence[Measured], sites: int) -> ContractViolation:
    worst = _worst(broken, isinstance(item.contract, Exact))
    module, _, node = worst.site.rstrip(")").partition("  (")
    place = node if module == ROOT else module
    count = len({m.site for m in broken})
    more = f"   and {count - 1} more" if count > 1 else ""
    return ContractViolation(
        f"{item.name} breaks its {item.contract.kind} contract at {count} of {sites} sites",
        where=f"{worst.site}{more}",
        why=worst.why or f"{_figure(item, worst)} at {worst.value} on the probe inputs, limit {worst.limit:.3g}",
        do=f'- {item.name}: {{where: {{exclude: ["{place}"]}}}}',
    )
