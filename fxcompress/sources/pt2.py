"""Exported programs (.pt2), inspected before torch reads them, because reading one can run code that is stored in it.

What torch 2.13 does with a .pt2, and what is refused here for it:
- it unpickles weights and constants flagged `use_pickle`, opaque and custom objects, and sample inputs that `weights_only` refuses;
- it loads compiled libraries, and falls back to older layouts that unpickle: only the entries named here may be in the file;
- it turns texts of the graph into Python: `pt2_text` says what each may look like.
Guards are Python too. They are dropped after loading: the captured program checks its inputs itself.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader

from fxcompress.errors import CaptureError
from fxcompress.sources.pt2_text import faults, plain

GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
REQUIRED = ("archive_format", "archive_version", GRAPH, SAMPLES, WEIGHTS, CONSTANTS)
OTHERS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*|byteorder|\.data/\w+|\.format_version|\.storage_alignment")
PAYLOADS = {WEIGHTS: re.compile(r"weight_\d+"), CONSTANTS: re.compile(r"tensor_\d+")}


def load_pt2(path: Path) -> ExportedProgram:
    """The exported program of the file, without its guards. CaptureError naming the entry when reading the file could run code."""
    inspect_pt2(path)
    from torch.export.pt2_archive._package import load_pt2 as read

    try:
        # Not torch.export.load: on an error it would try an older layout, which unpickles.
        program = read(str(path)).exported_programs["model"]
    except Exception as error:
        raise _unreadable(path, f"{type(error).__name__}: {_first_line(error)}") from error
    program._guards_code = []
    return program


def inspect_pt2(path: Path) -> None:
    """CaptureError unless everything in the file is something torch reads without running code.

    The entries are read with torch's own reader, so what is inspected is what will be loaded.
    """
    try:
        archive = PT2ArchiveReader(str(path))
        names = archive.get_file_names()
    except (RuntimeError, AssertionError) as error:
        raise _unreadable(path, _first_line(error)) from None
    _check_entries(path, names)
    for entry, payload in PAYLOADS.items():
        _check_payloads(path, entry, _json(path, archive, entry), payload)
    _check_samples(path, archive.read_bytes(SAMPLES))
    _check_graph(path, _json(path, archive, GRAPH))


def _check_entries(path: Path, names: list[str]) -> None:
    for name in names:
        if name not in REQUIRED and not OTHERS.fullmatch(name):
            raise _unsafe(path, name, "torch.export.save writes no such entry for one program")
    lost = [n for n in REQUIRED if n not in names]
    if lost:
        raise _unreadable(path, f"it has no {lost[0]}")


def _check_payloads(path: Path, entry: str, document: Any, payload: re.Pattern[str]) -> None:
    """Every tensor must be raw bytes in a file of its own kind."""
    config = document.get("config") if isinstance(document, dict) else None
    if not isinstance(config, dict):
        raise _unreadable(path, f"{entry} lists no tensors")
    for name, meta in config.items():
        if not isinstance(meta, dict) or meta.get("use_pickle") is not False:
            raise _unsafe(path, entry, f"{name!r} is flagged use_pickle, and a pickle runs code while it is read")
        if not payload.fullmatch(str(meta.get("path_name"))):
            raise _unsafe(path, entry, f"{name!r} is stored in {meta.get('path_name')!r}, which is no plain tensor")
        if reason := plain(name):
            raise _unsafe(path, entry, f"{name!r} {reason}")


def _check_samples(path: Path, data: bytes) -> None:
    """torch tries the same `weights_only` load first, and unpickles only when that fails."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:
        raise _unsafe(path, SAMPLES, "the sample inputs hold more than tensors, numbers, texts, tuples, lists and dicts") from None


def _check_graph(path: Path, document: Any) -> None:
    try:
        fault = next(faults(document), "")
    except RecursionError:
        raise _unreadable(path, f"{GRAPH} is nested too deeply") from None
    if fault:
        raise _unsafe(path, GRAPH, fault)


def _json(path: Path, archive: PT2ArchiveReader, entry: str) -> Any:
    try:
        return json.loads(archive.read_bytes(entry))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"{entry}: {error}") from None


def _unsafe(path: Path, entry: str, why: str) -> CaptureError:
    return CaptureError(
        "the exported program isn't safe to load",
        where=f"{path.name}: {entry}",
        why=why,
        state="nothing in the file has been run",
        do="export the model again with plain tensors: torch.export.save(torch.export.export(model, args), 'model.pt2')",
    )


def _unreadable(path: Path, why: str) -> CaptureError:
    return CaptureError(
        "the exported program can't be read",
        where=str(path),
        why=why,
        do=f"export the model again with torch {torch.__version__.partition('+')[0]}: torch.export.save(program, 'model.pt2')",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
