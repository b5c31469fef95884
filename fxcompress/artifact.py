"""Artifacts: a folder with a manifest that names every file with size and hash. Written whole or not at all, checked when loaded.

An artifact is written into a hidden folder beside its place, named after the machine and the process that writes it: what a killed process
left is removed by the next one that saves to that place.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxcompress.errors import ArtifactError

VERSION = 1
MANIFEST = "manifest.json"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A new folder beside the target that becomes the target when the block ends well, and vanishes when it doesn't.

    An artifact that is there already is replaced; anything else in the way is an ArtifactError, as is a place that can't be written.
    """
    try:
        target = folder.resolve()
        _refuse_strangers(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = working_folder(target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or str(error)
        raise ArtifactError("the output folder can't be written", where=str(folder), why=why, do="choose another folder") from None
    try:
        yield temporary
        _swap(temporary, target)
    except OSError as error:
        raise ArtifactError(
            "the artifact can't be written", where=str(folder), why=str(error), do="free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def working_folder(target: Path) -> Path:
    """A new hidden folder beside the target; those that killed processes left there are removed first."""
    remove_abandoned(target)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}-{platform.node()}-{os.getpid()}-", dir=target.parent))


def remove_abandoned(target: Path) -> None:
    """Remove the hidden folders in which processes of this machine that are gone were writing the target."""
    pattern = re.compile(rf"\.{re.escape(f'{target.name}-{platform.node()}')}-(\d+)-\w{{8}}")
    for path in target.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # there, asking would be killing
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _refuse_strangers(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(
            "the output folder can't be written", where=str(folder), why="a file of that name is in the way", do="choose another folder"
        )
    if folder.is_dir() and Path.cwd().is_relative_to(folder):
        raise ArtifactError(
            "the output folder can't be replaced", where=str(folder), why="the working directory is in it", do="choose a new folder"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ArtifactError(
            "the output folder holds something else",
            where=str(folder),
            why="it is not empty and no artifact",
            do="choose an empty or new folder",
        )


def _swap(temporary: Path, folder: Path) -> None:
    """The new folder takes the target's name in one step where the system has one for folders (Linux), so that a crash leaves the old or the
    new artifact; elsewhere in two, and a crash between them leaves the old one under a hidden name."""
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)  # some writers make files only their owner can read
    if not folder.exists():
        temporary.replace(folder)
    elif not _exchanged(temporary, folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.replace(old)
        temporary.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether the two names could be exchanged: renameat2 with RENAME_EXCHANGE, which os lacks."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    current, exchange = -100, 2
    return rename is not None and rename(current, os.fsencode(a), current, os.fsencode(b), exchange) == 0


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, and onto the disk before it has its name. OSError leaves what was there.

    What a link points to is written, and what is no file (a device, a pipe) is written into.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, **facts: Any) -> None:
    """manifest.json: version, the given facts, and size and SHA-256 of every other file of the folder."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(folder.iterdir()) if p.name != MANIFEST}
    text = json.dumps({"version": VERSION, **facts, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete, unaltered artifact of a version we know. ArtifactError naming the file and what is wrong with it."""
    if not folder.is_dir():
        why = "it's a file; an artifact is a folder" if folder.exists() else "the folder doesn't exist"
        raise ArtifactError("no artifact there", where=str(folder), why=why, do="check the path")
    data = _manifest(folder)
    version = data["version"]
    if version > VERSION:
        raise ArtifactError(
            "the artifact is from a newer fxcompress",
            where=str(folder),
            why=f"version {version}, this one reads up to {VERSION}",
            do="upgrade fxcompress",
        )
    if extra := {p.name for p in folder.iterdir()} - {MANIFEST, *data["files"]}:
        raise ArtifactError(
            "the artifact holds a file its manifest doesn't list",
            where=str(folder / min(extra)),
            why="nothing says what it should contain",
            do="copy the whole folder again",
        )
    for name, entry in data["files"].items():
        try:
            _check_file(folder / name, entry)
        except OSError as error:
            raise ArtifactError("the artifact can't be read", where=str(folder / name), why=str(error.strerror), do="mend its rights") from None
    return data


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or not isinstance(data.get("version"), int):
            raise ValueError("it names no version")
        if data["version"] <= VERSION and not _lists_files(data.get("files")):
            raise ValueError("it doesn't list the files of its own folder with size and hash")
    except FileNotFoundError:
        raise ArtifactError(
            "no artifact there", where=str(folder), why=f"it has no {MANIFEST}", do="check the path, or save the model again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError("the artifact is damaged", where=str(path), why=str(error), do="save the model again") from None
    return data


def _lists_files(files: Any) -> bool:
    return isinstance(files, dict) and all(
        Path(name).name == name and name not in ("", "..") and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
        for name, entry in files.items()
    )


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise ArtifactError("the artifact is incomplete", where=str(path), why="the file is missing", do="copy the whole folder again")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise ArtifactError(
            "the artifact is truncated or altered",
            where=str(path),
            why=f"{size} bytes, {entry['bytes']} when saved",
            do="copy the whole folder again",
        )
    if sha256_of(path) != entry["sha256"]:
        raise ArtifactError(
            "the artifact was altered",
            where=str(path),
            why="its content is not what was saved (SHA-256 differs)",
            do="copy the whole folder again",
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
