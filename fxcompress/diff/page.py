"""The HTML file: the data of a diff as JSON, with the viewer around it. One file, no network; the same diff gives the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from fxcompress.diff import Diff, Run, Step
from fxcompress.diff.journal import barred, concerned, site_node, swept, verdicts
from fxcompress.diff.matching import attributes
from fxcompress.diff.read import model_name
from fxcompress.diff.recipes import differing, numbered
from fxcompress.diff.text import NONE, change, decibels, figure, quantity, sqnr
from fxcompress.history import Graph, History, Node, quantised_share
from fxcompress.report import BackendReport, Change, Check, Histogram, PassReport

SCRIPTS = ("model.js", "layout.js", "draw.js", "cards.js", "app.js")
VERDICTS = ("held", "broken", "unverified")
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def page(
    diff: Diff,
    formulas: Mapping[str, str] | None = None,
    tables: Iterable[Mapping[str, Any]] = (),
    forecasts: Mapping[str, Sequence[PassReport]] | None = None,
) -> str:
    """The whole file. formulas: per module path its operations in the dynamic sizes. tables: more for the first page, {title, head, rows}.
    forecasts: by recipe what its passes would do."""
    content = {**_data(diff, forecasts or {}), "formulas": dict(formulas or {})}
    content["tables"] = [table for table in (*content["tables"], *tables) if table["rows"]]
    parts = {
        "style": _file("style.css").strip(),
        "data": embedded(content),
        "dagre": f"{_file('dagre.LICENSE.txt').strip()}\n{_file('dagre.min.js').replace('//# sourceMappingURL=dagre.min.js.map', '').strip()}",
        "script": "\n".join(_file(name).strip().removeprefix('"use strict";\n') for name in SCRIPTS),
    }
    before, made = _file("page.html"), []
    for name, part in parts.items():
        head, before = before.split("{{" + name + "}}")
        made += [head, part]
    return "".join([*made, before])


def embedded(content: Any) -> str:
    """JSON that no text in it can close the script element of."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return (
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def _file(name: str) -> str:
    return (resources.files("fxcompress.diff") / "viewer" / name).read_text(encoding="utf-8")


class _Texts:
    """Every text once, by number."""

    def __init__(self, known: Iterable[str]) -> None:
        self.numbers = {text: number for number, text in enumerate(known)}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def _data(diff: Diff, forecasts: Mapping[str, Sequence[PassReport]]) -> dict[str, Any]:
    run = diff.runs[-1]
    is_run = len(diff.runs) == 1
    graphs = run.history.graphs if is_run else [diff.whole.before, diff.whole.after]
    written = History(_shortened(graphs)).to_json()
    texts = _Texts(written["texts"])
    whole = _view(diff.whole, "all", 0, len(graphs) - 1, None, texts)
    views = [_view(s, str(i + 1), i, i + 1, i, texts) for i, s in enumerate(diff.steps)] if is_run else []
    labels = numbered(run.passes) if is_run else []
    passes = [{**_pass(p, s, texts), "label": label} for label, p, s in zip(labels, run.passes, diff.steps, strict=True)] if is_run else []
    here = {} if is_run else {other: known for known, other in diff.was.items()}
    losses = [_losses(diff.runs[0].history, diff.whole.before, {}, texts), _losses(run.history, diff.whole.after, here, texts)]
    would = [{"name": name, "passes": [_done(p, graphs[-1], {}, texts) for p in passes]} for name, passes in forecasts.items()]
    was = [[texts(name), texts(other)] for name, other in diff.was.items()]
    return {
        "title": diff.title,
        "sizes": diff.sizes,
        "root": graphs[-1].kinds.get("") or "model",
        "single": len(graphs) == 1,
        "nodes": written["nodes"],
        "steps": written["steps"],
        "regions": written["regions"],
        "views": [*views, {**whole, "name": "the graph" if len(graphs) == 1 else whole["name"]}],
        "passes": passes,
        "sides": would if is_run else [*_sides(diff, texts)],
        "sqnr": losses[1],
        "sqnr_there": [] if is_run else losses[0],
        "was": was,
        "renamed": [texts(path) for path in diff.renamed],
        "tiles": [[*map(typeset, tile)] for tile in _tiles(diff)],
        "tables": [*_tables(run)] if is_run else [*_compared(diff)],
        "texts": list(texts.numbers),
    }


def _shortened(graphs: Iterable[Graph]) -> list[Graph]:
    """With the constants named behind a dot as in their modules, so that few texts tell what all are called."""
    known: dict[int, Node] = {}

    def shortened(node: Node) -> Node:
        own = attributes(node)
        return node if own == node.attributes else replace(node, attributes=f".{own}")

    for node in (n for g in graphs for n in g.nodes.values()):
        if id(node) not in known:
            known[id(node)] = shortened(node)
    return [replace(g, nodes={name: known[id(n)] for name, n in g.nodes.items()}) for g in graphs]


def _view(step: Step, hash: str, before: int, after: int, number: int | None, texts: _Texts) -> dict[str, Any]:
    by_state = {s: [texts(name) for name, state in step.states.items() if state == s] for s in ("changed", "moved")}
    folded: dict[str, list[int]] = {}
    for path, first in step.folded.items():
        folded.setdefault(first, [texts(first)]).append(texts(path))
    return {"name": step.name, "hash": hash, "before": before, "after": after, "pass": number, **by_state, "alike": [*folded.values()]}


def _pass(report: PassReport, step: Step, texts: _Texts) -> dict[str, Any]:
    before, after, worst = step.before, step.after, report.worst
    sites, places = {}, {}
    for number, made in reversed([*enumerate(report.changes)]):
        sites[made.site] = number
        places.update({(made.site, name): number for name in concerned(made)})
    return {
        "name": report.name,
        "options": report.options,
        "contract": report.contract,
        "unit": report.unit,
        "cpu": report.cpu_seconds,
        "fired": report.fired,
        "legal": report.legal,
        "worst": worst and _worst(worst, step, texts),
        "output_sqnr": report.output_sqnr,
        "stored": [before.stored, after.stored],
        "flops": [before.flops, after.flops],
        "nodes": [len(before.nodes), len(after.nodes)],
        "notes": list(report.notes),
        "whole": report.whole,
        "declined": [[texts(d.site), texts(d.module), texts(d.reason)] for d in report.declined],
        "excluded": [[texts(e.site), texts(e.module), texts(barred(e, report))] for e in report.excluded],
        "sites": [_site(c, texts) for c in report.changes],
        "moved": [[texts(name), by] for name, by in step.moved.items()],
        "swept": [[texts(name), *numbers] for name, numbers in swept(report, before, after).items() if numbers],
        "checks": [_check(c, places.get((c.site, c.value), sites.get(c.site, -1)), texts) for c in report.checks],
    }


def _losses(history: History, graph: Graph, here: Mapping[str, str], texts: _Texts) -> list[list[Any]]:
    """Values of a graph and how far they are from the captured model's, under the names that they have here."""
    return [[texts(here.get(name, name)), loss] for name, loss in history.sqnr.items() if here.get(name, name) in graph.nodes]


def _worst(check: Check, step: Step, texts: _Texts) -> dict[str, Any]:
    facts = check.model_dump(include={"figure", "limit", "verdict"})
    return {**facts, "value": texts(check.value), "is_node": check.value in step.before.nodes or check.value in step.after.nodes}


def _sides(diff: Diff, texts: _Texts) -> Iterator[dict[str, Any]]:
    """Of each side of a comparison what its passes did to the nodes that are compared, under the names that they have here."""
    for number, (run, name, graph) in enumerate(zip(diff.runs, _short(diff), (diff.whole.before, diff.whole.after), strict=True)):
        here = {other: known for known, other in diff.was.items()} if number else {}
        yield {"name": name, "passes": [_done(p, graph, here, texts) for p in run.passes]}


def _done(report: PassReport, graph: Graph, here: Mapping[str, str], texts: _Texts) -> dict[str, Any]:
    """sites: module, reason, the worst figure, the globs that leave it out, and the nodes that are still there. left: node, module and reason
    of each place left alone."""
    worst = {site: figure for site, what, figure in verdicts(report) if what in ("held", "not measured")}
    sites = []
    for made in report.changes:
        names = {here.get(n, n) for n in concerned(made) | {site_node(made)}}
        told = [here.get(made.module, made.module), made.reason, typeset(worst.get(made.site, ""))]
        sites.append([*map(texts, told), [*map(texts, made.exclude)], *sorted(texts(n) for n in names if n in graph.nodes)])
    left = [(d.site, d.module, f"declined: {d.reason}") for d in report.declined]
    left += [(e.site, e.module, f"not here: {barred(e, report)}") for e in report.excluded]
    places = [[texts(here.get(site, site)), texts(here.get(module, module)), texts(why)] for site, module, why in left]
    return {"name": report.name, "options": report.options, "whole": report.whole, "sites": sites, "left": places}


def _site(change: Change, texts: _Texts) -> list[Any]:
    """Node, module, reason, the globs that leave it out (0: its module), and the names of all nodes that it concerns."""
    node = site_node(change)
    names = concerned(change) - {node}
    exclude = 0 if change.exclude == (change.module,) else [texts(glob) for glob in change.exclude]
    return [texts(node), texts(change.module), texts(change.reason), exclude, *sorted(map(texts, names))]


def _check(check: Check, site: int, texts: _Texts) -> list[Any]:
    """Number of the site, value, figure, limit, number of the verdict, why, whether it is unmeasured, and the histogram if there is one."""
    figures = [_rounded(check.figure), _rounded(check.limit), VERDICTS.index(check.verdict)]
    spread = [] if check.histogram is None else _histogram(check.histogram)
    return [site, texts(check.value), *figures, texts(check.why), int(check.unmeasured), *spread]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")  # rounded once more to three digits where it is shown


def _histogram(given: Histogram) -> list[Any]:
    """[low, high, before, after], one of 64 digits a bin."""
    most = max((*given.before, *given.after, 1))
    return [given.low, given.high, *("".join(DIGITS[63 * c // most] for c in counts) for counts in (given.before, given.after))]


def _tiles(diff: Diff) -> list[list[str]]:
    """The headline: [name, figure, note] each."""
    before, after, report = diff.whole.before, diff.whole.after, diff.runs[-1].report
    weights = f"{after.stored / before.stored:.3f} of before" if before is not after and before.stored else ""
    files = report.backend.file_bytes if len(diff.runs) == 1 and report and report.backend else None
    counted = "the same on both sides" if diff.is_same else f"{len(diff.whole.states)} differ" if before is not after else ""
    found = [
        ["Weights", change(before.stored, after.stored, "B", "→"), weights],
        *([["Files", quantity(files, "B"), f"of {report.backend.name}, graphs with weights"]] if files and report and report.backend else []),
        ["Operations a call", change(before.flops, after.flops, "", "→"), diff.sizes or "all sizes are fixed"],
        ["Nodes", f"{len(before.nodes)} → {len(after.nodes)}" if before is not after else str(len(before.nodes)), counted],
    ]
    if len(diff.runs) == 1 and (told := diff.runs[0].unfinished):
        done, _, coming = told.partition("; ")
        found.insert(0, ["Not a finished run", done, coming])
    for figures in sqnr(diff, "→"):
        found.append(["Output SQNR", figures.removesuffix(diff.measured).strip(), f"lowest output, {diff.measured}".removesuffix(", ")])
    if len(diff.runs) == 1 and report and report.backend and report.backend.integer_share is not None:
        found.append(["In integer kernels", f"{report.backend.integer_share:.1%}", "of all multiply-accumulates"])
    return found


def _tables(run: Run) -> Iterator[dict[str, Any]]:
    """What the report of a run says beside its passes."""
    report = run.report
    if report is None:
        return
    if backend := report.backend:
        rows = [row for row in _predicted(backend, report.weight_bytes, run.history.graphs[-1]) if row[2]]
        yield {"title": f"Predicted and measured on {backend.name}", "head": ["", "predicted", "measured"], "rows": rows}
        rows = [[*row] for row in _measured(backend) if row[1]]
        yield {"title": f"Measured on {backend.name}", "head": ["", "figure"], "rows": rows}
        yield from _in_float(run, "")
    if guard := report.guard:
        metrics = [
            ["float", f"{guard.float_metric:.6g}"],
            ["all sites quantised", f"{guard.quantised_metric:.6g}"],
            ["as shipped", f"{guard.metric:.6g}"],
        ]
        title = "The metric, and what went back to float for it"
        yield {"title": title, "head": ["", "metric"], "rows": [*metrics, *([n, "float"] for n in guard.given_back)]}
    widths = [[k, quantity(v, "B")] for k, v in report.bytes_by_width.items()]
    yield {"title": "Weights by width", "head": ["stored as", "bytes"], "rows": widths}
    if report.notes:
        yield {"title": "Notes of capture", "head": ["what capture fixed or left out"], "rows": [[n] for n in report.notes]}


def _in_float(run: Run, of: str) -> Iterator[dict[str, Any]]:
    if run.report and run.report.backend and run.report.backend.in_float:
        sites = [[s.module or s.site, quantity(s.macs, "").strip(), s.reason] for s in run.report.backend.in_float]
        yield {"title": f"Sites that run in float{of}", "head": ["place", "multiply-accumulates", "reason"], "rows": sites}


def _compared(diff: Diff) -> Iterator[dict[str, Any]]:
    """The figures of two runs beside each other, then the passes of each."""
    names = _short(diff)
    columns = [dict(_facts(run, step)) for run, step in zip(diff.runs, (diff.whole.before, diff.whole.after), strict=True)]
    rows = [[key, *(c.get(key, NONE) for c in columns)] for key in dict.fromkeys([*columns[0], *columns[1]])]
    yield {"title": "Side by side", "head": ["", *names], "rows": rows}
    if found := differing(diff):
        yield {"title": "Recipe options that differ", "head": ["pass", "option", *names], "rows": [d.row for d in found]}
    for run, name in zip(diff.runs, names, strict=True):
        if run.passes:
            head = ["pass", "contract", "sites", "declined", "measured"]
            rows = [[p.name, p.contract, str(p.fired), str(len(p.declined)), typeset(figure(p))] for p in run.passes]
            yield {"title": f"Passes of {name}", "head": head, "rows": rows}
        yield from _in_float(run, f" in {name}")


def _short(diff: Diff) -> list[str]:
    """The folders' names where those tell the two apart, else all that is known."""
    heads = [label.partition(": ")[0] if run.folder else label for run, label in zip(diff.runs, diff.labels, strict=True)]
    return heads if heads[0] != heads[1] else [*diff.labels]


def _facts(run: Run, graph: Graph) -> Iterator[tuple[str, str]]:
    """Name and figure of what two runs are compared by."""
    report, backend = run.report, run.report and run.report.backend
    if report:
        yield "model", model_name(report.origin, run.history)
        yield "recipe", str(report.recipe.get("name") or "unnamed")
        yield "contracts checked", report.check
    if run.unfinished:
        yield "not a finished run", run.unfinished
    yield "weights", quantity(graph.stored, "B")
    yield "operations a call", quantity(graph.flops, "").strip()
    yield "multiply-accumulates on quantised values", f"{quantised_share(graph):.1%}"
    yield from ((f"output SQNR, {place}", decibels(figure)) for place, figure in run.sqnrs.items() if figure is not None)
    if report and backend:
        yield "backend", backend.name
        kernels = [
            ("files", _shown(backend.file_bytes, lambda v: quantity(v, "B"))),
            ("in integer kernels", _shown(backend.integer_share, "{:.1%}".format)),
        ]
        yield from ((name, shown) for name, shown in (*kernels, *_measured(backend)) if shown)
        yield from ((f"weights as {width}", quantity(v, "B")) for width, v in report.bytes_by_width.items())


def _predicted(backend: BackendReport, weight_bytes: int, last: Graph) -> list[list[str]]:
    """What the cost model says before lowering, beside what the files and the runtime's own graph say after it."""
    kernels = _shown(backend.integer_share, "{:.1%}".format)
    return [
        ["weights alone; whole files, graphs among them", quantity(weight_bytes, "B"), _shown(backend.file_bytes, lambda v: quantity(v, "B"))],
        ["multiply-accumulates on quantised values; in integer kernels", f"{quantised_share(last):.1%}", kernels],
    ]


def _measured(backend: BackendReport) -> list[tuple[str, str]]:
    return [
        ("quantised sites in integer kernels, share of their work", _shown(backend.quantised_share, "{:.1%}".format)),
        ("greatest relative error against the interpreter", _shown(backend.parity, "{:.2g}".format)),
        ("the same of one site on its own input", _shown(backend.site_parity, "{:.2g}".format)),
        ("codes one step off, worst quantiser", _shown(backend.code_flips, "{:.2%}".format)),
        ("SQNR of rounding inside the kernels", _shown(backend.rounding_sqnr, "{:.1f} dB".format)),
    ]


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else typeset(form(value))


def typeset(figures: str) -> str:
    """Figures as they are printed: with a minus for a hyphen, and the signs of inequality."""
    return re.sub(r"(?<![\w)-])-(?=\d)|(?<=\de)-(?=\d)", "−", figures).replace("<=", "≤").replace(">=", "≥")
