"""A diff as text: passes in order, what they declined, then what changed, by module. No times, so that two runs compare cleanly."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fxcompress.diff import Diff, Step
from fxcompress.diff.matching import attributes
from fxcompress.diff.recipes import ABSENT, differing
from fxcompress.diff.sizes import at
from fxcompress.diff.states import State
from fxcompress.history import Graph, History, Node
from fxcompress.program import ROOT
from fxcompress.report import Check, PassReport

ON_PURPOSE = "changed on purpose, not measured"
SAME = "no node differs: the same operations, arguments, shapes and weights"
NONE = "–"  # a figure that isn't known
EQUAL = "equal"
CONTENT = "    content: "
SIGNS: Mapping[State, str] = {"added": "+", "removed": "-", "changed": "~", "moved": ">"}


def text(diff: Diff) -> str:
    """The whole diff."""
    lines = [diff.title, *unfinished(diff)]
    for run, label in zip(diff.runs, diff.labels, strict=True):
        lines += ["", *[f"of {label}"] * (len(diff.runs) > 1), *_passes(run.passes, run.history)] if run.passes else []
    lines += _recipes(diff)
    lines += ["", f"in all  {_sizes(diff.whole.before, diff.whole.after, diff.sizes if len(diff.runs) == 1 else '')}", *_both(diff)]
    lines += [SAME] * diff.is_same
    for number, step in enumerate(diff.steps, 1):
        if step.states or step.rewired:
            lines += ["", f"{number}  {step.name}: {_counted(step)}", *_changes(step, diff.was)]
    return "\n".join(map(printable, lines)) + "\n"


def printable(line: str) -> str:
    """Names come from the model: what would move a terminal's cursor or its colours is spelled out."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in line)


def _counted(step: Step) -> str:
    others = [f"{len(step.rewired)} read another value"] if step.rewired else []
    return ", ".join([*([counted(step.states)] if step.states else []), *others])


def unfinished(diff: Diff) -> list[str]:
    """What of the runs isn't a finished result, named where there are two."""
    named = [(f"{label}: " if len(diff.runs) > 1 else "", run) for run, label in zip(diff.runs, diff.labels, strict=True)]
    return [f"{name}{run.unfinished}" for name, run in named if run.unfinished]


def _recipes(diff: Diff) -> Iterator[str]:
    found = differing(diff)
    yield from ["", "recipe options that differ"] * bool(found)
    yield from (f"   {d.label}  {d.option}: {d.first} -> {d.second}" for d in found if d.option)
    yield from (f"   {d.label}  only in {diff.labels[d.first == ABSENT]}" for d in found if not d.option)


def _both(diff: Diff) -> Iterator[str]:
    """What is to be said of two runs beside their graphs."""
    if len(diff.runs) < 2:
        return
    yield f"operations {diff.sizes}"
    yield from (f"output SQNR {figures}" for figures in sqnr(diff))
    yield from grouped(f"renamed {name} -> {other}" for name, other in diff.renamed.items() if numbers(name) == numbers(other))
    yield from (f"renamed {name} -> {other}" for name, other in diff.renamed.items() if numbers(name) != numbers(other))


def sqnr(diff: Diff, arrow: str = "->") -> Iterator[str]:
    """The lowest output SQNR of each side and where it was measured: in one place where there is one for all; else each with its own; nothing
    where none is known. A dash for a side of which nothing was measured."""
    if diff.measured:
        yield f"{f' {arrow} '.join(decibels(r.sqnrs[diff.measured]) for r in diff.runs)} {diff.measured}"
        return
    sides = [next((f"{decibels(v)} {place}" for place, v in r.sqnrs.items() if v is not None), NONE) for r in diff.runs]
    yield from [f" {arrow} ".join(sides)] * any(side != NONE for side in sides)


def decibels(value: float | None) -> str:
    """A figure in dB, or a dash."""
    return NONE if value is None else f"{value:.1f} dB"


def counted(states: Mapping[str, State]) -> str:
    """ "3 added, 1 removed"."""
    counts = {s: list(states.values()).count(s) for s in SIGNS}
    return ", ".join(f"{n} {s}" for s, n in counts.items() if n) or "nothing changed"


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """A figure in that many digits with a prefix: 1.23 MB."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            text = f"{value:.3g}" if digits == 3 else f"{value:#.{digits}g}".rstrip(".")
            return f"{text} {prefix}{unit}"
        value /= 1000
    raise AssertionError(value)


def change(before: int, after: int, unit: str, arrow: str = "->") -> str:
    """Two figures, in four digits where three don't tell them apart: "2.810 MB -> 2.812 MB". What four don't either is told by the
    difference: "2.81 MB -> 2.81 MB (+12 B)"."""
    if before == after:
        return quantity(before, unit).strip()
    for digits in (3, 4):
        one, other = (quantity(v, unit, digits).strip() for v in (before, after))
        if one != other:
            return f"{one} {arrow} {other}"
    one, other, by = (quantity(v, unit).strip() for v in (before, after, abs(after - before)))
    return f"{one} {arrow} {other} ({'+' if after > before else '-'}{by})"


def figure(report: PassReport) -> str:
    """The worst figure with its limit and its place, or why there is none."""
    if report.worst is not None:
        told = measured(report.worst, report.unit)
        return told if told == EQUAL else f"{told} at {report.worst.value}"
    if not report.fired:
        return "nothing to measure"
    return ON_PURPOSE if report.checks else "not measured"


def measured(check: Check, unit: str) -> str:
    """A figure with its limit: 2.5e-6 <= 1e-4 relative error."""
    if check.figure == (None if unit == "dB" else 0):
        return EQUAL
    if check.figure is None:
        return "not comparable"
    sign = "<=" if unit != "dB" else ">="
    limit = "" if check.limit is None else f" {sign} {number(check.limit)}"
    return f"{number(check.figure)}{limit} {unit}"


def number(value: float) -> str:
    """A figure in three digits; one that is very small or large in two, as 2.5e-6."""
    if 1e-3 <= abs(value) < 1e5 or not value:
        return f"{float(f'{value:.3g}'):g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def written(node: Node) -> str:
    """One node as a line of code."""
    if node.op in ("constant", "input"):
        return f"{node.name} = {node.op} {attributes(node)}  {node.shape}"
    inputs = iter(node.inputs)
    given = re.sub("%", lambda _: next(inputs, "%"), node.attributes)
    return f"{node.name} = {node.op.removeprefix('aten.').removesuffix('.default')}({given})  {node.shape}".rstrip()


def _passes(passes: Sequence[PassReport], history: History) -> Iterator[str]:
    graphs, sizes = history.graphs, at(history.sizes)
    for number, (report, before, after) in enumerate(zip(passes, graphs[:-1], graphs[1:], strict=True), 1):
        of = f" of {report.legal}" if report.legal != report.fired else ""
        sites = f"{report.fired}{of} site{'s' * (report.legal != 1)}"
        sqnr = "" if report.output_sqnr is None else f"  output {report.output_sqnr:.1f} dB"
        yield from [""] * (number > 1)
        yield f"{number}  {report.name}  {sites}, {len(report.declined)} declined"
        yield f"   {report.contract}: {figure(report)}{sqnr}"
        yield f"   {_sizes(before, after, sizes)}"
        yield from (f"   note: {n}" for n in report.notes)
        yield from (f"   declined {line}" for line in _declined(report))


def numbers(name: str) -> list[str]:
    """The numbers in a name."""
    return re.findall(r"\d+", name)


def _sizes(before: Graph, after: Graph, sizes: str) -> str:
    operations = f"{change(before.flops, after.flops, 'FLOP')} {sizes}".strip()
    return f"{change(before.stored, after.stored, 'B')}, {operations}, {len(before.nodes)} -> {len(after.nodes)} nodes"


def _declined(report: PassReport) -> Iterator[str]:
    yield from grouped(f"{d.module or d.site}: {d.reason}" for d in report.declined)


def grouped(lines: Iterable[str]) -> Iterator[str]:
    """The lines, those that differ in numbers alone counted."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"_?\d+", "", line), []).append(line)
    for alike in groups.values():
        yield alike[0] + (f"  (and {len(alike) - 1} alike)" if len(alike) > 1 else "")


def _changes(step: Step, was: Mapping[str, str]) -> Iterator[str]:
    """Changed nodes by module, in the order in which they run; modules in which the same changed stand under the first of them."""
    folded, parents, nodes, rewired = step.changed_alike, step.parents, step.nodes, {*step.rewired}
    regions: dict[str, list[Node]] = {}
    for name, node in nodes.items():
        if name in step.states or name in rewired:
            regions.setdefault(node.region, []).append(node)
    places = {n.region: place for place, n in reversed([*enumerate(nodes.values())]) if n.op != "constant"}
    for path, members in sorted(regions.items(), key=lambda item: places.get(item[0], -1)):
        if _is_folded(path, folded, parents):
            continue
        alike = [p for p, first in folded.items() if first == path or path.startswith(f"{first}.")]
        told = [line for node in members for line in _node(node, step, was)]
        yield f"  {path or ROOT}{_named_in(path, was)}{_as_well(alike, any(line.startswith(CONTENT) for line in told))}"
        yield from (f"    {line}" for line in told)


def _is_folded(path: str | None, folded: Mapping[str, str], parents: Mapping[str, str]) -> bool:
    while path:
        if path in folded:
            return True
        path = parents.get(path)
    return False


def _as_well(others: Iterable[str], has_figures: bool) -> str:
    """The numbers of the modules in which the same changed: "(the same in layers.1–29)". has_figures: contents are told, which differ."""
    groups: dict[str, list[int]] = {}
    for path in others:
        stem = path.rstrip("0123456789")
        groups.setdefault(stem, []).append(int(path[len(stem) :]))
    parts = [f"{stem}{_ranges(sorted(numbers))}" for stem, numbers in groups.items()]
    return f"  (the same in {', '.join(parts)}{', with contents of their own' * has_figures})" if parts else ""


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 -> "1–3,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _node(node: Node, step: Step, was: Mapping[str, str]) -> Iterator[str]:
    if (state := step.states.get(node.name)) is None:
        yield f"  {node.name} reads {_rewired(node, step.before.nodes[node.name])}"
        return
    yield f"{SIGNS[state]} {written(node)}{_named_in(node.name, was)}"
    old = step.before.nodes.get(node.name)
    if state == "moved" and old is not None:
        yield f"    from {old.region or ROOT}"
    if state == "changed" and old is not None:
        by = f"  moved by {share(step.moved[node.name])}" if node.name in step.moved else ""
        yield f"    was {written(old)}" if written(old) != written(node) else f"{CONTENT}{content(old)} -> {content(node)}{by}"


def share(value: float) -> str:
    """A share of 1 in percent: 12.3%."""
    return f"{number(100 * value)}%"


def _rewired(node: Node, old: Node) -> str:
    """ "dequantize_default instead of weight"."""
    pairs = [(new, was) for new, was in zip(node.inputs, old.inputs, strict=True) if new != was]
    return ", ".join(dict.fromkeys(f"{new} instead of {was}" for new, was in pairs))


def content(node: Node) -> str:
    """What a constant holds, by its statistics."""
    if not node.statistics:
        return f"version {node.revision}"
    low, high, mean, std = (NONE if v is None else f"{v:.4g}" for v in node.statistics[:4])
    return f"[{low}, {high}], mean {mean}, deviation {std}, checksum {node.statistics[4]:08x}"


def _named_in(name: str, was: Mapping[str, str]) -> str:
    return f"  (there {was[name]})" if name in was else ""
