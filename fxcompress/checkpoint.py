"""Checkpoints: a compilation on disk as after its last finished pass, so that a crash costs no finished pass.

`checkpoint.json` names what it needs of `objects/`, whose files are named by the SHA-256 of their content: the program after the last pass,
the captured one, and memory of constants that isn't the model's own, so only what a pass changed is written. Objects come first, then
checkpoint.json is replaced in one step, then what nothing names any more goes: a crash at any moment leaves the old or the new state. The
`artifact/` of a finished compilation lies beside; `progress.json` names what the pass that runs has finished of itself. One process at a time:
it holds the system's lock on `lock`, which ends with it.

A checkpoint belongs to a model, feed, Target, versions and the passes that are finished; passes still to come may change.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fxcompress import artifact, snapshot, store
from fxcompress.errors import ArtifactError, FxcError, VerifierError
from fxcompress.program import Program
from fxcompress.report import PassReport
from fxcompress.rewrite import Kept

VERSION = 2
STATE, OBJECTS, LOCK, ARTIFACT, PROGRESS = "checkpoint.json", "objects", "lock", "artifact", "progress.json"
MOST = 6  # differences that an error lists
ANEW = "delete the folder to start anew"


@contextlib.contextmanager
def opened(folder: str | Path, run: Mapping[str, Any], captured: Program, recipe: str = "") -> Iterator[Checkpoint]:
    """The checkpoint in the folder, made if there is none, for this process alone. An error inside gets a note that says what is kept.

    run: what the finished passes depend on beside the captured model, as plain data: "versions", "check", "target", "feed", and "passes", one
    {name: options} each. recipe: what it is called, only to be told. ArtifactError if the checkpoint is in use, altered or of another run (it
    says what differs), or can't be written.
    """
    path = Path(folder)
    with _locked(path):
        checkpoint = Checkpoint(path, run, captured, recipe)
        try:
            yield checkpoint
        except BaseException as error:
            if count := len(checkpoint.done):
                error.add_note(f"{count} finished {'pass is' if count == 1 else 'passes are'} kept in {path}; the same call goes on from there")
            raise


class Checkpoint:
    """done: reports of the finished passes. program: as after the last of them; None before the first. history: its graphs as plain data."""

    def __init__(self, folder: Path, run: Mapping[str, Any], captured: Program, recipe: str = "") -> None:
        self.folder, self.captured, self.objects = folder, captured, Objects(folder / OBJECTS)
        self.done: list[PassReport] = []
        self.program: Program | None = None
        self.history: dict[str, Any] = {}
        self._run = json.loads(json.dumps(run))
        self._plan = {"recipe": recipe, "passes": [name for entry in run["passes"] for name in entry]}  # told, and nothing depends on it
        self._model = json.dumps(_model(captured), sort_keys=True).encode()
        self._contents = _contents(captured)
        self._kept = _read(folder)
        if self._kept:
            self._load(self._kept)
        with self._writing():
            self._sweep()

    def save(self, program: Program, done: Sequence[PassReport], history: Mapping[str, Any]) -> None:
        """Keep program and history as after these passes. ArtifactError if they can't be written; what was kept before still is."""
        used: list[str] = []

        def put(content: bytes | memoryview) -> str:
            used.append(self.objects.put(content))
            return used[-1]

        with self._writing():
            state = {**snapshot.take(program, self.captured, put), "reports": [r.model_dump(mode="json") for r in done], "history": history}
            names = {"model": put(self._model), "state": put(json.dumps(state).encode())}
            run = {**self._run, "passes": self._run["passes"][: len(done)]}
            self._commit({**names, "run": run, "plan": self._plan, "contents": self._contents, "objects": sorted(set(used)), "artifact": None})
            (self.folder / PROGRESS).unlink(missing_ok=True)
            self.done = list(done)

    def progress(self) -> Kept:
        """Where the pass that runs may keep what it has finished, for the same pass of the same run; it goes once the pass is through."""
        run = {k: v for k, v in self._run.items() if k != "passes"}
        before = {"run": run, "passes": self._run["passes"][: len(self.done)], "contents": self._contents}
        return _Progress(self, f"{_digest_of(before)} {hashlib.sha256(self._model).hexdigest()}")

    def finished(self, recipe: Mapping[str, Any]) -> Path | None:
        """The artifact of exactly this recipe and backend, checked; None if there is none. ArtifactError if it was altered."""
        entry = (self._kept or {}).get("artifact")
        path = self.folder / ARTIFACT
        if not entry or entry["recipe"] != json.loads(json.dumps(recipe)) or not path.exists():
            return None
        manifest = path / artifact.MANIFEST
        try:
            if manifest.is_file() and artifact.sha256_of(manifest) != entry["sha256"]:
                raise _altered(manifest)
            artifact.read_manifest(path)
        except ArtifactError as error:
            error.do = f"delete {path} to lower the program again"
            raise
        return path

    def finish(self, recipe: Mapping[str, Any], save: Callable[[Path], Any]) -> None:
        """Keep the artifact that save(folder) writes, as that of this recipe and backend."""
        save(self.folder / ARTIFACT)
        entry = {"recipe": recipe, "sha256": artifact.sha256_of(self.folder / ARTIFACT / artifact.MANIFEST)}
        with self._writing():
            self._commit({**(self._kept or {}), "artifact": entry})

    def _commit(self, kept: dict[str, Any]) -> None:
        data = {"version": VERSION, "sha256": _digest_of(kept), "kept": kept}
        artifact.write_file(self.folder / STATE, json.dumps(data, indent=1).encode())
        self._kept = kept
        self._sweep()

    def _sweep(self) -> None:
        """Remove what nothing names any more: of the state before, of a process that was killed."""
        kept = self._kept or {"objects": (), "artifact": None}
        self.objects.keep_only([*kept["objects"], *_entries(self.folder).values()])
        artifact.remove_abandoned(self.folder / ARTIFACT)
        if kept["artifact"] is None:
            shutil.rmtree(self.folder / ARTIFACT, ignore_errors=True)

    def _load(self, kept: Mapping[str, Any]) -> None:
        try:
            self._refuse_another_run(kept)
            state = json.loads(self.objects.get(kept["state"]).numpy().tobytes())
            self.program = snapshot.restore(state, self.captured, self.objects.get)
            self.done = [PassReport.model_validate(r) for r in state["reports"]]
            self.history = state["history"]
        except (*store.UNREADABLE, VerifierError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ArtifactError("the checkpoint can't be read", where=str(self.folder), why=why, do=ANEW) from error

    def _refuse_another_run(self, kept: Mapping[str, Any]) -> None:
        lines = list(_differences(kept["run"], self._run))
        if kept["model"] != hashlib.sha256(self._model).hexdigest():
            was = json.loads(self.objects.get(kept["model"]).numpy().tobytes())
            lines += [f"the captured model: {c}" for c in _changes(was, json.loads(self._model))]
        lines += [f"the content of {name}" for name, digest in kept["contents"].items() if self._contents.get(name) != digest]
        if lines:
            more = [f"and {len(lines) - MOST} more"] * (len(lines) > MOST)
            raise ArtifactError(
                "the checkpoint is of another run",
                where=str(self.folder),
                why="\n".join(["these differ:", *lines[:MOST], *more]),
                state=f"{len(kept['run']['passes'])} finished passes are kept",
                do=f"undo the change to go on from there, pass another folder, or {ANEW}",
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                "the checkpoint can't be written",
                where=str(self.folder),
                why=str(error),
                state=f"{len(self.done)} finished passes are kept",
                do="free space, then make the same call again",
            ) from error


class _Progress(Kept):
    """Tensors of a pass that isn't through, as safetensors objects named in PROGRESS under the run and the pass's own key."""

    def __init__(self, checkpoint: Checkpoint, run: str) -> None:
        self.checkpoint, self.run = checkpoint, run

    def get(self, key: str) -> dict[str, Tensor] | None:
        name = _entries(self.checkpoint.folder).get(f"{self.run} {key}")
        return None if name is None else load(self.checkpoint.objects.get(name).numpy().tobytes())

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        with self.checkpoint._writing():
            name = self.checkpoint.objects.put(save({k: v.contiguous() for k, v in tensors.items()}))
            entries = {**_entries(self.checkpoint.folder), f"{self.run} {key}": name}
            data = {"sha256": _digest_of(entries), "entries": entries}
            artifact.write_file(self.checkpoint.folder / PROGRESS, json.dumps(data).encode())


def _entries(folder: Path) -> dict[str, str]:
    """What PROGRESS names. ArtifactError if it was altered."""
    path = folder / PROGRESS
    try:
        data = json.loads(path.read_bytes())
        if data["sha256"] != _digest_of(data["entries"]):
            raise _altered(path)
    except FileNotFoundError:
        return {}
    except (*store.UNREADABLE, RecursionError) as error:
        raise ArtifactError("the checkpoint is damaged", where=str(path), why=f"{type(error).__name__}: {error}", do=ANEW) from None
    return dict(data["entries"])


class Objects:
    """Files named by the SHA-256 of their content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, content: bytes | memoryview) -> str:
        """The name of the content, which is written unless it is there. OSError if that fails."""
        name = hashlib.sha256(content).hexdigest()
        if not (self.folder / name).exists():
            self.folder.mkdir(exist_ok=True)
            artifact.write_file(self.folder / name, content)
        return name

    def get(self, name: str) -> Tensor:
        """The content as a tensor of bytes, in memory aligned as torch's own. ArtifactError naming the file if it is missing or altered."""
        path = self.folder / name
        if not path.is_file():
            raise ArtifactError("the checkpoint is incomplete", where=str(path), why="the file is missing", do=ANEW)
        content = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with path.open("rb") as file:
            file.readinto(snapshot.bytes_of(content))
        if hashlib.sha256(snapshot.bytes_of(content)).hexdigest() != name:
            raise _altered(path)
        return content

    def keep_only(self, names: Sequence[str]) -> None:
        """Remove all others."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in names:
                path.unlink()


def stored_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint keeps, to be looked at: "reports", "history", and the last program; "plan": the recipe's name and all its passes, None
    where it is older than that; "is_lowered": whether it holds an artifact. ArtifactError if an object of it is damaged."""
    kept = _read(folder)
    if kept is None:
        raise ArtifactError("no checkpoint there", where=str(folder), why=f"it has no {STATE}", do="check the path")
    objects = Objects(folder / OBJECTS)
    for name in kept["objects"]:
        objects.get(name)
    state: dict[str, Any] = json.loads(objects.get(kept["state"]).numpy().tobytes())
    return {**state, "plan": kept.get("plan"), "is_lowered": kept["artifact"] is not None}


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / STATE
    try:
        data = json.loads(path.read_bytes())
        if data["version"] != VERSION:
            why = f"version {data['version']}, this one reads {VERSION}"
            raise ArtifactError("the checkpoint is from another fxcompress", where=str(path), why=why, do=ANEW)
        kept: dict[str, Any] = data["kept"]
        if data["sha256"] != _digest_of(kept):
            raise _altered(path)
    except FileNotFoundError:
        return None
    except (*store.UNREADABLE, RecursionError) as error:
        raise ArtifactError("the checkpoint is damaged", where=str(path), why=f"{type(error).__name__}: {error}", do=ANEW) from None
    return kept


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl  # POSIX only

    try:
        _refuse_strangers(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="ascii")
    except OSError as error:
        why, do = str(error.strerror), "choose another folder"
        raise ArtifactError("the checkpoint can't be written", where=str(folder), why=why, do=do) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            why, do = f"process {file.read()} compiles with it", "wait for that process, or pass another folder"
            raise ArtifactError("the checkpoint is in use", where=str(folder), why=why, do=do) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _refuse_strangers(folder: Path) -> None:
    own = {STATE, f"{STATE}.new", OBJECTS, LOCK, ARTIFACT, PROGRESS, f"{PROGRESS}.new"}
    strange = [p.name for p in folder.iterdir() if p.name not in own and not p.name.startswith(".")] if folder.is_dir() else []
    if strange:
        raise ArtifactError(
            "the checkpoint folder holds something else",
            where=str(folder / min(strange)),
            why="no checkpoint has a file of that name",
            do="choose an empty or new folder",
        )


def _model(captured: Program) -> dict[str, Any]:
    """What the captured model computes and how it is called, without the content of its constants."""
    data = store.program_to_json(captured)
    nodes = {f"node {n['name']}": {k: v for k, v in n.items() if k != "shape"} for n in data["nodes"]}
    return {**nodes, **{k: data[k] for k in ("inputs", "outputs", "states", "symbols", "constants", "signature")}}


def _contents(captured: Program) -> dict[str, str]:
    constants = {f"constant {name}": _digest(t) for name, t in captured.constants.items()}
    return {**constants, **{f"example input {v.name}": _digest(t) for v, t in zip(captured.inputs, captured.example, strict=True)}}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(snapshot.bytes_of(tensor.resolve_conj().resolve_neg().contiguous())).hexdigest()


def _digest_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for part in ("versions", "check", "target"):
        yield from _changes(was[part], now[part], part)
    if was["feed"] != now["feed"]:
        yield "the calibration feed"
    for number, (old, new) in enumerate(itertools.zip_longest(was["passes"], now["passes"][: len(was["passes"])]), 1):
        if new is None or old.keys() != new.keys():
            yield f"pass {number}: {' '.join(new or ['nothing'])}, was {' '.join(old)}"
        else:
            yield from (f"pass {number}, {change}" for change in _changes(old, new))


def _changes(was: Any, now: Any, path: str = "") -> Iterator[str]:
    """A line for every leaf of plain data that is another one, with its path."""
    if type(was) is type(now) and isinstance(was, dict | list):
        old, new = (dict(enumerate(v)) if isinstance(v, list) else v for v in (was, now))
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif was != now or type(was) is not type(now):
        yield f"{path}: {_short(now)}, was {_short(was)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value["target"] if isinstance(value, dict) and "target" in value else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _altered(path: Path) -> FxcError:
    return ArtifactError("the checkpoint was altered", where=str(path), why="its content is not what was saved (SHA-256 differs)", do=ANEW)
