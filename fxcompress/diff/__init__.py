"""Diff: what every pass of a run did to the graph, or how two programs differ, as text, as one HTML file and for other viewers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fxcompress import artifact
from fxcompress.diff.matching import PRIME, Aligned, aligned
from fxcompress.diff.sizes import at, at_one_size
from fxcompress.diff.states import State, alike, merged, rewired, states
from fxcompress.errors import ArtifactError, InputError
from fxcompress.history import Graph, History, Node
from fxcompress.loss import stand_ins
from fxcompress.report import PassReport, Report

__all__ = ["Diff", "Format", "Run", "Step", "between", "of_run", "placed", "written"]


LOWERED, NOT_LOWERED = "on the backend", "before lowering"
Format = Literal["html", "text", "dot", "model-explorer"]
SUFFIXES: Mapping[Format, Sequence[str]] = {
    "html": (".html", ".htm"),
    "text": (".txt", ".text"),
    "dot": (".dot", ".gv"),
    "model-explorer": (".json",),
}


@dataclass(frozen=True)
class Run:
    """One side of a diff: a title, the graphs of its run, the reports of its passes, and the whole report where it is finished. folder: where
    it was read from. unfinished: what a checkpoint of a run that isn't through has, and what is still to come."""

    title: str
    history: History
    passes: Sequence[PassReport] = ()
    report: Report | None = None
    folder: str = ""
    unfinished: str = ""

    @property
    def sqnrs(self) -> dict[str, float | None]:
        """The lowest output SQNR by where it was measured: after the last pass, and as shipped. None where it isn't known."""
        known = [p.output_sqnr for p in self.passes if p.output_sqnr is not None]
        return {LOWERED: self.report.output_sqnr if self.report else None, NOT_LOWERED: known[-1] if known else None}


@dataclass(frozen=True)
class Step:
    """Two graphs and what is between them. states: of every node that isn't as it was. moved: node of a constant -> how far a pass moved it."""

    name: str
    before: Graph
    after: Graph
    states: Mapping[str, State]
    moved: Mapping[str, float] = field(default_factory=dict)

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes of both graphs."""
        return merged(self.before, self.after)

    @property
    def parents(self) -> dict[str, str]:
        """Module path -> the one it is in, of both graphs."""
        return {**self.before.parents, **self.after.parents}

    @property
    def rewired(self) -> list[str]:
        """The nodes that are as they were and read another value."""
        return rewired(self.before, self.after, self.states)

    @property
    def folded(self) -> dict[str, str]:
        """Numbered module -> the first of its siblings that is the same in whole."""
        return alike(self.before, self.after, self.states, changes_only=False)

    @property
    def changed_alike(self) -> dict[str, str]:
        """Numbered module -> the first of its siblings in which the same changed."""
        return alike(self.before, self.after, self.states, changes_only=True)


@dataclass(frozen=True, repr=False)
class Diff:
    """The steps of a run in order, and all of them as one. runs: the run, or the two that are compared. was: names that are other ones in the
    second, of nodes and modules. sizes: at which dynamic sizes the operations are counted, in words; "" where
    there are none."""

    steps: Sequence[Step]
    whole: Step
    runs: Sequence[Run]
    was: Mapping[str, str] = field(default_factory=dict)
    sizes: str = ""

    def __repr__(self) -> str:
        """The title."""
        return f"<Diff {self.title}>"

    @property
    def labels(self) -> list[str]:
        """What the runs are called: their titles, with the folders in front where two are compared, as much as tells them apart."""
        parts = [Path(r.folder).parts for r in self.runs] if len(self.runs) > 1 else [()]
        same = 1
        while len({p[-same:] for p in parts}) < len({*parts}):
            same += 1
        found = [f"{'/'.join(p[-same:])}: {r.title}" if p else r.title for p, r in zip(parts, self.runs, strict=True)]
        return [f"the first, {found[0]}", f"the second, {found[1]}"] if len(found) == 2 and found[0] == found[1] else found

    @property
    def title(self) -> str:
        """The runs' names."""
        return " → ".join(self.labels)

    @property
    def is_same(self) -> bool:
        """Whether the graphs on both sides are the same, but for what their nodes and modules are called."""
        return self.whole.before is not self.whole.after and not self.whole.states

    @property
    def measured(self) -> str:
        """Where the output SQNR was measured on all sides of which any is known, so that like is compared with like; "" where none is known."""
        known = [{place for place, figure in r.sqnrs.items() if figure is not None} for r in self.runs]
        common = set[str]().union(*known).intersection(*(k for k in known if k))
        return next((place for place in (LOWERED, NOT_LOWERED) if place in common), "")

    @property
    def renamed(self) -> dict[str, str]:
        """Module path -> what it was called in the second, for modules whose own name differs, not only that of one around them."""
        parents, was = self.whole.parents, self.was
        names = {path: (_local(path, above), _local(was[path], was.get(above, above))) for path, above in parents.items() if path in was}
        return {path: was[path] for path, (name, other) in names.items() if name.rstrip(PRIME) != other}

    def text(self) -> str:
        """For a terminal and for git: stable, without times."""
        from fxcompress.diff.text import text

        return text(self)

    def summary(self) -> dict[str, Any]:
        """What the text says, and which modules are folded in it, as plain data."""
        from fxcompress.diff.summary import summary

        return summary(self)

    def html(self) -> str:
        """One self-contained file."""
        from fxcompress.diff.page import page

        return page(self)

    def save(self, path: str | Path, format: Format = "html") -> Path:
        """Write the file, whole or not at all. ArtifactError if the place can't be written, InputError if its suffix is that of another
        format."""
        from fxcompress.diff.exports import as_dot, as_model_explorer

        made: dict[Format, Callable[[], str]] = {
            "html": self.html,
            "text": self.text,
            "dot": partial(as_dot, self.whole),
            "model-explorer": partial(as_model_explorer, self),
        }
        if format not in made:
            raise InputError(f"a diff has no format {format!r}", do=f"one of {', '.join(made)}")
        return written(placed(path, format), made[format]())

    def graph(self) -> Any:
        """The nodes of before and after as a networkx DiGraph; attributes: op, attributes, region, shape, state, flops, stored."""
        from fxcompress.diff.exports import as_networkx

        return as_networkx(self.whole)


def of_run(run: Run) -> Diff:
    """What each pass of a run did."""
    graphs, replaced = run.history.graphs, [_replaced(p) for p in run.passes]
    triples = zip(run.passes, graphs[:-1], graphs[1:], replaced, strict=True)
    steps = [Step(p.name, a, b, states(a, b, r), _moved(p, b)) for p, a, b, r in triples]
    whole = Step("all passes", graphs[0], graphs[-1], states(graphs[0], graphs[-1], stand_ins(graphs[0].nodes, replaced)))
    return Diff(steps, whole, [run], sizes=at(run.history.sizes))


def between(first: Run, second: Run) -> Diff:
    """How what the second run made differs from what the first made."""
    old, new, sizes = at_one_size(first.history, second.history)
    captured = (first.history.graphs[0], second.history.graphs[0]) if first.passes or second.passes else None
    found: Aligned = aligned(old, new, captured)
    here = {other: known for known, other in found.nodes.items()}
    later = {} if first.passes else stand_ins(second.history.graphs[0].nodes, [_replaced(p) for p in second.passes])
    earlier = {} if second.passes else stand_ins(first.history.graphs[0].nodes, [_replaced(p) for p in first.passes])
    known = {**{here.get(a, a): here.get(b, b) for a, b in later.items()}, **{b: a for a, b in earlier.items() if a != b}}
    step = Step("comparison", old, found.graph, states(old, found.graph, known))
    return Diff([step], step, [first, second], {**found.regions, **found.nodes}, sizes)


def _local(path: str, parent: str) -> str:
    return path.removeprefix(f"{parent}.")


def _moved(report: PassReport, after: Graph) -> dict[str, float]:
    by_constant = {name: by for change in report.changes for name, by in change.moved.items()}
    nodes = after.nodes.values() if by_constant else ()
    return {n.name: by_constant[n.attributes] for n in nodes if n.op == "constant" and n.attributes in by_constant}


def _replaced(report: PassReport) -> dict[str, str]:
    return {old: new for change in report.changes for old, new in change.replaced.items()}


def placed(path: str | Path, format: Format) -> Path:
    """The path of a file of that format. InputError if it is none, or its suffix is that of another format."""
    if not isinstance(path, str | Path):
        raise InputError(f"{path!r} is no path of a file", do="pass a str or a Path, such as 'diff.html'")
    suffix = Path(path).suffix.lower()
    if format == "html":
        fits = suffix in ("", *SUFFIXES["html"])
    else:
        fits = suffix not in {s for other, known in SUFFIXES.items() if other != format for s in known}
    if not fits:
        meant = next((f for f, known in SUFFIXES.items() if suffix in known), None)
        do = f"name it {Path(path).with_suffix(SUFFIXES[format][0]).name}" + (f", or ask for the format {meant!r}" if meant else "")
        raise InputError(f"a file of format {format!r} isn't called so", where=str(path), do=do)
    return Path(path)


def written(path: Path, content: str) -> Path:
    """Write a file whole or not at all. ArtifactError if the place can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_file(path, content.encode())
    except OSError as error:
        do = "choose another place"
        raise ArtifactError("the file can't be written", where=str(path), why=str(error.strerror), do=do) from None
    return path
