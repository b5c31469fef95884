"""The sides of a diff from disk: a saved artifact or a checkpoint."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxcompress import artifact, checkpoint, store
from fxcompress.diff import Run
from fxcompress.errors import ArtifactError
from fxcompress.history import History
from fxcompress.program import Program
from fxcompress.report import PassReport, Report

REPORT, HISTORY, PAGE = "report.json", "history.json", "report.html"


def is_run(path: Path) -> bool:
    """Whether the folder is an artifact or a checkpoint."""
    return any((path / name).is_file() for name in (artifact.MANIFEST, checkpoint.STATE))


def run_at(path: Path) -> Run:
    """The run of an artifact or checkpoint. ArtifactError if it is damaged, or was saved without its history."""
    if (path / checkpoint.STATE).is_file() and not (path / artifact.MANIFEST).is_file():
        with _readable(path / checkpoint.STATE):
            state = checkpoint.stored_state(path)
            passes = [PassReport.model_validate(r) for r in state["reports"]]
            run = _run("", state["history"], passes, path)
            parts = [run.history.graphs[0].kinds[""] or "model", *([state["plan"]["recipe"]] if state["plan"] else []), "checkpoint"]
            return replace(run, title=", ".join(filter(None, parts)), unfinished=_unfinished(state))
    artifact.read_manifest(path)
    return replace(run_in(path), folder=str(path.resolve()))


def _unfinished(state: Mapping[str, Any]) -> str:
    """ "2 of 4 passes finished; still to come: quant.reconstruct, quant.finalize", as far as the checkpoint knows it; "" once all is done."""
    count, plan = len(state["reports"]), state["plan"]
    if state["is_lowered"]:
        return ""
    if plan is None:
        return f"{count} {'pass' if count == 1 else 'passes'} finished, and no artifact made; the checkpoint doesn't say what is still to come"
    coming = plan["passes"][count:] or ["lowering to the backend"]
    return f"{count} of {len(plan['passes'])} passes finished; still to come: {', '.join(coming)}"


def run_in(folder: Path) -> Run:
    """The run whose report and history lie in a folder, which isn't checked."""
    with _readable(folder / REPORT):
        report = Report.model_validate_json((folder / REPORT).read_bytes())
    with _readable(folder / HISTORY):
        data = json.loads((folder / HISTORY).read_bytes())
        run = _run("", data, report.passes)
    return replace(run, title=f"{model_name(report.origin, run.history)}, {report.recipe.get('name') or 'unnamed recipe'}", report=report)


def run_of(program: Program) -> Run:
    """A program as a run without passes."""
    history = History()
    history.record(program)
    return Run(model_name(program.origin, history), history)


def model_name(origin: str, history: History) -> str:
    """What the model is called: where it came from without the folders, which a reader elsewhere hasn't got; else its class."""
    return re.sub(r"\S*[/\\](?=\S)", "", origin) or history.graphs[0].kinds.get("", "") or "model"


def _run(title: str, history: Mapping[str, Any], passes: Sequence[PassReport], folder: Path | None = None) -> Run:
    read = History.from_json(history)
    if len(read.graphs) != len(passes) + 1:
        raise ValueError(f"it holds {len(read.graphs)} graphs, and the report {len(passes)} passes, which lie between them")
    return Run(title, read, passes, folder=str(folder.resolve()) if folder else "")


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """ArtifactError for whatever can't be read, or isn't what a run writes."""
    try:
        yield
    except (*store.UNREADABLE, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ArtifactError("the history of the run can't be read", where=str(file), why=why, do="compile and save the model again") from error
