"""What the journal of a run says about a node, a module or a constant: what passes did there and why, what was measured, what was declined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fxcompress.diff import Run
from fxcompress.diff.recipes import flow, numbered
from fxcompress.diff.text import measured
from fxcompress.errors import InputError, nearest
from fxcompress.history import Graph
from fxcompress.program import ROOT, place_name
from fxcompress.report import Change, Check, Excluded, PassReport, worst_of

BESIDES = "what shares a value or a weight with a place that is left out goes with it"
UNREAD = "nothing reads it after this: "
Row = dict[str, Any]


def explained(run: Run, name: str) -> list[Row]:
    """Rows in the order of the passes: {"pass", "site", "what", "why"} each, and "exclude" or "alone" where the site was changed: the recipe's
    line that leaves out all that the name stands for, or why there is none. what: changed, removed, declined, excluded, a verdict, or "not
    measured". None where no pass did anything and no recipe kept one from it.

    InputError with the nearest names for a name that neither the model nor a pass ever had.
    """
    graphs, name = run.history.graphs, "" if name == ROOT else name
    labels = numbered(run.passes)
    asked = {name, *_named_by(name, graphs)}
    steps = zip(run.passes, graphs[:-1], graphs[1:], strict=True)
    told = ((label, _told(*step, name, asked)) for label, step in zip(labels, steps, strict=True))
    rows = [{**row, "pass": label} for label, found in told for row in found]
    if not rows and not asked & (known := _known(run)):
        do = "fxcompress inspect MODEL lists the module paths"
        raise InputError(f"the artifact has no {name!r}", where=run.folder, why=nearest(name, known, most=5), do=do)
    return rows


def _told(done: PassReport, before: Graph, after: Graph, name: str, asked: set[str]) -> Iterator[Row]:
    touched = [c for c in done.changes if asked & _names(c) or is_inside(c.module, name)]
    for change in touched:
        yield {"pass": done.name, "site": change.site, "what": "changed", "why": change.reason, **_leaving_out(done, change, touched)}
    sites = {t.site for t in touched}
    for site, verdict, figure in verdicts(done):
        if site in sites:
            yield {"pass": done.name, "site": site, "what": verdict, "why": figure}
    for number in sorted({n for node, numbers in swept(done, before, after).items() if node in asked for n in numbers}):
        if (change := done.changes[number]) not in touched:
            yield {"pass": done.name, "site": change.site, "what": "removed", "why": UNREAD + change.reason, **_leaving_out(done, change)}
    read = {i for n in asked & before.nodes.keys() for i in before.nodes[n].inputs if before.nodes[i].op == "constant"}
    for declined in done.declined:
        if (asked | read) & {declined.site, declined.module} or is_inside(declined.module, name):
            yield {"pass": done.name, "site": place_name(declined.module, declined.site), "what": "declined", "why": declined.reason}
    readers = {n.name for n in before.nodes.values() if any(i in asked and before.nodes[i].op == "constant" for i in n.inputs)}
    for excluded in done.excluded:
        if (asked | readers) & {excluded.site, excluded.module} or is_inside(excluded.module, name):
            yield {"pass": done.name, "site": place_name(excluded.module, excluded.site), "what": "excluded", "why": barred(excluded, done)}


def barred(excluded: Excluded, done: PassReport) -> str:
    """What of the recipe keeps a pass from a place."""
    if excluded.glob:
        return f"the recipe leaves it out: where: {{exclude: [{flow(excluded.glob)}]}}"
    return f"the recipe doesn't include it: where: {{include: {flow(done.options['where']['include'])}}}"


def concerned(change: Change) -> set[str]:
    """The nodes that a change made, touched or put another in place of. A constant's node is named after it."""
    constants = (c.replace(".", "_") for c in change.constants)
    return {*change.replaced, *change.replaced.values(), *change.inserted, *change.touched, *change.erased, *constants}


def site_node(change: Change) -> str:
    """The node of "fc  (linear)"."""
    return change.site.rpartition("(")[2].rstrip(")")


def swept(done: PassReport, before: Graph, after: Graph) -> dict[str, list[int]]:
    """Nodes that went though no change names them -> the numbers of the changes after which nothing read them."""
    named: dict[str, list[int]] = {}
    for number, change in enumerate(done.changes):
        for name in concerned(change) | {site_node(change)}:
            named.setdefault(name, []).append(number)
    if not any(name not in after.nodes and name not in named for name in before.nodes):
        return {}
    readers: dict[str, list[str]] = {}
    for node in before.nodes.values():
        for name in node.inputs:
            readers.setdefault(name, []).append(node.name)
    found: dict[str, list[int]] = {}
    for name in reversed(list(before.nodes)):
        if name not in after.nodes and name not in named:
            found[name] = sorted({n for r in readers.get(name, ()) for n in named.get(r, found.get(r, []))})
    return found


def exclusion(done: PassReport, change: Change, others: Sequence[Change] = ()) -> tuple[str, str]:
    """The pass with its options and this place left out, and other places with it, as a line of a recipe; or "" and why there is none."""
    if done.whole:
        return "", done.whole
    if not change.exclude:
        return "", "a recipe has no name that means this place and no other"
    where = done.options.get("where") or {}
    out = dict.fromkeys(glob for c in (*others, change) for glob in c.exclude)
    options = {**done.options, "where": {**where, "exclude": [*(where.get("exclude") or ()), *out]}}
    return f"- {done.name}: {flow(options)}", ""


def _leaving_out(done: PassReport, change: Change, asked: Sequence[Change] = ()) -> Row:
    line, why = exclusion(done, change, asked)
    return {"exclude": line} if line else {"alone": why}


def verdicts(done: PassReport) -> Iterator[tuple[str, str, str]]:
    """Every site and verdict with the worst figure and where it is; "not measured" where all values were changed on purpose."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in done.checks:
        groups.setdefault((check.site, check.verdict), []).append(check)
    for (site, verdict), members in groups.items():
        has_figure = worst_of(members, done.unit) is not None
        yield site, verdict if has_figure or verdict != "held" else "not measured", _verdict(members, done.unit)


def _verdict(checks: Sequence[Check], unit: str) -> str:
    """The worst figure of some checks and where it is."""
    worst, compared = worst_of(checks, unit), [c for c in checks if unit != "dB" or not c.unmeasured]
    if worst is None:
        return f"changed on purpose, at {checks[0].value if len(checks) == 1 else f'{len(checks)} values'}"
    told, count = measured(worst, unit), len(compared)
    place = f"{count} values" if told == "equal" and count > 1 else worst.value + (f", the worst of {count} values" if count > 1 else "")
    return f"{told} at {place}{': ' if worst.why else ''}{worst.why}"


def is_inside(module: str, name: str) -> bool:
    """Whether a module path lies below another; all lie below the root, ""."""
    return not name or module.startswith(f"{name}.")


def _named_by(name: str, graphs: Sequence[Graph]) -> set[str]:
    """The nodes of a constant, or of a module and those inside it. A site whose ops are in one module may change a value of another."""
    nodes = (n for g in graphs for n in g.nodes.values())
    return {n.name for n in nodes if n.region == name or is_inside(n.region, name) or (n.op == "constant" and n.attributes == name)}


def _known(run: Run) -> set[str]:
    nodes = [n for g in run.history.graphs for n in g.nodes.values()]
    paths = {path for g in run.history.graphs for path in g.kinds}
    made = {n for done in run.passes for c in done.changes for n in _names(c)}
    return {*paths, *made, *(n.name for n in nodes), *(n.attributes for n in nodes if n.op == "constant")}


def _names(change: Change) -> set[str]:
    return {change.module, change.site, site_node(change), *change.constants, *concerned(change)}
