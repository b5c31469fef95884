"""The sides of a diff from disk: a saved artifact or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        state = checkpoint.stored_state(path)
        passes = [PassReport.model_validate(r) for r in state["reports"]]
        return Run(path.name, _history(state["history"], path), passes)
    artifact.read_manifest(path)
    return run_in(path)


def run_in(folder: Path) -> Run:
    """The run whose report and history lie in a folder, which isn't checked."""
    try:
        report = Report.model_validate_json((folder / REPORT).read_bytes())
        data = json.loads((folder / HISTORY).read_bytes())
    except (OSError, ValueError) as error:
        do = "compile and save the model again"
        raise ArtifactError("the artifact's history can't be read", where=str(folder), why=str(error), do=do) from error
    history = _history(data, folder)
    model = report.origin or history.graphs[0].kinds.get("", "") or "model"
    return Run(f"{model}, {report.recipe['name'] or 'unnamed recipe'}", history, report.passes, report)


def run_of(program: Program) -> Run:
    """A program as a run without passes."""
    history = History()
    history.record(program)
    return Run(program.origin or history.graphs[0].kinds.get("", "") or "model", history)


def _history(data: Mapping[str, Any], path: Path) -> History:
    try:
        return History.from_json(data)
    except store.UNREADABLE as error:
        why = f"{type(error).__name__}: {error}"
        raise ArtifactError("the history can't be read", where=str(path), why=why, do="compile and save the model again") from error
