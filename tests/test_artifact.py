"""Artifacts: whole or not there. Every way a folder can lie is an error with its whole text; a crash at any step leaves the old or the new."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress import artifact

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def compiled(seed: int, name: str) -> fxc.CompiledModel:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    steps = [{"quant.weight_only": {"weights": "int8/channel"}}, "quant.finalize"]
    return fxc.compile(model, {"name": name, "passes": steps}, (X,), backend="reference")


@pytest.fixture(scope="module")
def old() -> fxc.CompiledModel:
    return compiled(0, "old")


@pytest.fixture(scope="module")
def new() -> fxc.CompiledModel:
    return compiled(1, "new")


@pytest.fixture
def out(old: fxc.CompiledModel, tmp_path: Path) -> Path:
    return old.save(tmp_path / "out")


def message(action: Callable[[], Any]) -> str:
    with pytest.raises(fxc.ArtifactError) as caught:
        action()
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / artifact.MANIFEST).read_text())
    change(data)
    (folder / artifact.MANIFEST).write_text(json.dumps(data))


# what stands there


def test_the_manifest_names_every_file(out: Path) -> None:
    data = json.loads((out / "manifest.json").read_text())
    assert data["version"] == artifact.VERSION
    assert data["files"].keys() == {p.name for p in out.iterdir()} - {"manifest.json"}
    for name, entry in data["files"].items():
        assert entry == {"bytes": (out / name).stat().st_size, "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest()}
    assert data["backend"] == {"name": "reference", "options": {}}
    page = {"report.html", "history.json"}
    assert {*page, "recipe.lock.yaml", "report.json", "program.json", "constants.safetensors", "example.safetensors"} == data["files"].keys()


def test_others_may_read_it(out: Path) -> None:
    assert oct(out.stat().st_mode & 0o777) == "0o755"


def test_the_round_trip_is_bit_identical(old: fxc.CompiledModel, out: Path) -> None:
    for x in (X, torch.randn(5, 4)):
        assert torch.equal(fxc.load(out)(x), old(x))


def test_saving_twice_gives_the_same_bytes(old: fxc.CompiledModel, out: Path, tmp_path: Path) -> None:
    assert content(old.save(tmp_path / "again")) == content(out)


def test_a_loaded_model_saves_the_same_bytes(out: Path, tmp_path: Path) -> None:
    assert content(fxc.load(out).save(tmp_path / "again")) == content(out)


# what can't be loaded


def test_missing_folder(tmp_path: Path) -> None:
    assert message(lambda: fxc.load(tmp_path / "no")) == (
        f"no artifact there\n  where {tmp_path}/no\n  why   the folder doesn't exist\n  do    check the path"
    )


def test_no_manifest(out: Path) -> None:
    (out / "manifest.json").unlink()
    assert message(lambda: fxc.load(out)) == (
        f"no artifact there\n  where {out}\n  why   it has no manifest.json\n  do    check the path, or save the model again"
    )


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "cut": (b'{"version": 1, "files"', "Expecting ':' delimiter: line 1 column 23 (char 22)"),
    "no object": (b"[1]", "it names no version"),
    "no version": (b'{"files": {}}', "it names no version"),
    "version as text": (b'{"version": "1", "files": {}}', "it names no version"),
    "no files": (b'{"version": 1}', "it doesn't list the files of its own folder with size and hash"),
    "files as a list": (b'{"version": 1, "files": ["a"]}', "it doesn't list the files of its own folder with size and hash"),
    "a file without hash": (b'{"version": 1, "files": {"a": 3}}', "it doesn't list the files of its own folder with size and hash"),
    "not UTF-8": (b'{"\xff": 1}', "'utf-8' codec can't decode byte 0xff in position 2: invalid start byte"),
    "nested": (b"[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
}


@pytest.mark.parametrize(("text", "why"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_manifest(text: bytes, why: str, out: Path) -> None:
    (out / "manifest.json").write_bytes(text)
    assert message(lambda: fxc.load(out)) == (
        f"the artifact is damaged\n  where {out}/manifest.json\n  why   {why}\n  do    save the model again"
    )


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a/"])
def test_a_file_outside_the_folder(name: str, out: Path) -> None:
    (out.parent / "secret").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite_manifest(out, lambda data: data["files"].update({name: entry}))
    assert message(lambda: fxc.load(out)) == (
        f"the artifact is damaged\n  where {out}/manifest.json\n"
        "  why   it doesn't list the files of its own folder with size and hash\n  do    save the model again"
    )


def test_a_missing_file(out: Path) -> None:
    (out / "constants.safetensors").unlink()
    assert message(lambda: fxc.load(out)) == (
        f"the artifact is incomplete\n  where {out}/constants.safetensors\n  why   the file is missing\n  do    copy the whole folder again"
    )


def test_a_truncated_file(out: Path) -> None:
    path = out / "constants.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert message(lambda: fxc.load(out)) == (
        f"the artifact is truncated or altered\n  where {path}\n  why   {size - 1} bytes, {size} when saved\n"
        "  do    copy the whole folder again"
    )


@pytest.mark.parametrize(
    "name", ["constants.safetensors", "program.json", "report.json", "recipe.lock.yaml", "example.safetensors", "history.json", "report.html"]
)
@pytest.mark.parametrize("place", [0, -1])
def test_an_altered_byte(name: str, place: int, out: Path) -> None:
    data = bytearray((out / name).read_bytes())
    data[place] ^= 1
    (out / name).write_bytes(data)
    assert message(lambda: fxc.load(out)) == (
        f"the artifact was altered\n  where {out}/{name}\n  why   its content is not what was saved (SHA-256 differs)\n"
        "  do    copy the whole folder again"
    )


def test_a_newer_version_is_not_read_further(out: Path) -> None:
    (out / "manifest.json").write_text('{"version": 2, "files": "in another form"}')
    assert message(lambda: fxc.load(out)) == (
        f"the artifact is from a newer fxcompress\n  where {out}\n  why   version 2, this one reads up to 1\n  do    upgrade fxcompress"
    )


def test_a_report_of_another_form(out: Path) -> None:
    """Hashes right, content wrong: written by something else."""
    (out / "report.json").write_text("{}")
    with artifact.writing(out) as folder:
        for file in out.iterdir():
            shutil.copy2(file, folder / file.name)
        artifact.write_manifest(folder, backend={"name": "reference", "options": {}})
    text = message(lambda: fxc.load(out))
    assert text.startswith(f"the artifact's report can't be read\n  where {out}\n  why   ")
    assert text.endswith("\n  do    compile and save it again")


def test_a_backend_that_is_not_installed(out: Path) -> None:
    rewrite_manifest(out, lambda data: data["backend"].update(name="referense"))
    with pytest.raises(fxc.RecipeError) as caught:
        fxc.load(out)
    assert str(caught.value) == "unknown backend 'referense'\n  why   did you mean 'reference'?"


# where it can't be written


def test_a_file_in_the_way(old: fxc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert message(lambda: old.save(tmp_path / "out")) == (
        f"the output folder can't be written\n  where {tmp_path}/out\n  why   a file of that name is in the way\n  do    choose another folder"
    )
    assert content_of_tree(tmp_path) == {"out": b"mine"}


def test_a_file_on_the_way(old: fxc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert message(lambda: old.save(tmp_path / "file" / "deep" / "out")) == (
        f"the output folder can't be written\n  where {tmp_path}/file/deep/out\n  why   Not a directory\n  do    choose another folder"
    )


def test_a_folder_that_holds_something_else(old: fxc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    assert message(lambda: old.save(tmp_path / "out")) == (
        f"the output folder holds something else\n  where {tmp_path}/out\n  why   it is not empty and no artifact\n"
        "  do    choose an empty or new folder"
    )
    assert content_of_tree(tmp_path) == {"out/thesis.txt": b"years"}


def test_the_working_directory(old: fxc.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing it would leave the shell in a folder that is gone."""
    monkeypatch.chdir(tmp_path)
    assert message(lambda: old.save(".")) == (
        f"the output folder can't be replaced\n  where {tmp_path}\n  why   the working directory is in it\n  do    choose a new folder"
    )


def test_a_name_too_long(old: fxc.CompiledModel, tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300)
    assert message(lambda: old.save(path)) == (
        f"the output folder can't be written\n  where {path}\n  why   File name too long\n  do    choose another folder"
    )


def test_a_name_that_is_none(old: fxc.CompiledModel, tmp_path: Path) -> None:
    text = message(lambda: old.save(f"{tmp_path}/a\0b"))
    assert text.startswith("the output folder can't be written\n")
    assert "embedded null byte" in text


def test_no_permission(old: fxc.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    assert message(lambda: old.save(tmp_path / "out")) == (
        f"the output folder can't be written\n  where {tmp_path}/out\n  why   Permission denied\n  do    choose another folder"
    )


def test_a_full_disk(old: fxc.CompiledModel, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(out)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copy2", full)
    text = message(lambda: old.save(out))
    assert text.startswith(f"the artifact can't be written\n  where {out}\n  why   [Errno 28] No space left on device: ")
    assert text.endswith("\n  do    free space or choose another folder")
    assert content(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"], "the half-written folder is gone"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_whatever_stops_a_save_leaves_the_old_one(
    error: type[BaseException], old: fxc.CompiledModel, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    before = content(out)
    monkeypatch.setattr(artifact, "write_manifest", stop)
    with pytest.raises(error):
        old.save(out)
    assert content(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


# replacing


@pytest.mark.parametrize("exchanged", [True, False], ids=["in one step", "in two steps"])
def test_an_artifact_is_replaced_whole(
    exchanged: bool, new: fxc.CompiledModel, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanged:
        monkeypatch.setattr(artifact, "_exchanged", lambda a, b: False)
    (out / "left_over.onnx").write_bytes(b"of the old one")
    new.save(out)
    assert content(out) == content(new.save(tmp_path / "fresh"))
    assert torch.equal(fxc.load(out)(X), new(X))
    assert {p.name for p in tmp_path.iterdir()} == {"out", "fresh"}


def test_this_system_replaces_in_one_step(out: Path, tmp_path: Path) -> None:
    """Otherwise the crash tests below would say nothing about that step."""
    (tmp_path / "other").mkdir()
    assert artifact._exchanged(tmp_path / "other", out)
    assert list(out.iterdir()) == []
    assert not artifact._exchanged(tmp_path / "other", tmp_path / "not there")


def test_an_empty_folder_is_taken(old: fxc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert torch.equal(fxc.load(old.save(tmp_path / "out"))(X), old(X))


def test_missing_parents_are_made(old: fxc.CompiledModel, tmp_path: Path) -> None:
    assert torch.equal(fxc.load(old.save(tmp_path / "a/b/c"))(X), old(X))


def test_a_link_stays_a_link(old: fxc.CompiledModel, new: fxc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for model in (old, new):
        model.save(tmp_path / "link")
        assert torch.equal(fxc.load(tmp_path / "real")(X), model(X))
    assert (tmp_path / "link").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link"}


def test_a_file_is_written_where_a_link_points_and_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_bytes(b"old")
    link.symlink_to(target)
    artifact.write_file(link, b"new")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"new")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    artifact.write_file(pipe, b"told")
    assert (os.read(reader, 10), pipe.is_fifo()) == (b"told", True)
    os.close(reader)


def test_a_loaded_model_replaces_its_own_folder(out: Path, old: fxc.CompiledModel) -> None:
    model = fxc.load(out)
    model.save(out)
    assert torch.equal(model(X), old(X))
    assert torch.equal(fxc.load(out)(X), old(X))


# crashes


Step = tuple[Any, str, bool]
STEPS: dict[str, Step] = {
    f"{'after' if after else 'before'} {name}": (where, name, after)
    for where, name in (
        (tempfile, "mkdtemp"),
        (shutil, "copy2"),
        (artifact, "write_manifest"),
        (Path, "chmod"),
        (artifact, "_exchanged"),
        (Path, "replace"),
        (shutil, "rmtree"),
    )
    for after in (False, True)
}


def crash(step: Step, action: Callable[[], Any], counter: int = 1) -> int:
    """The exit code of the action in a process of its own that dies at the counter-th call of the step: before it, or when it is done."""
    where, name, after = step
    right, calls = getattr(where, name), iter(range(1, 1000))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if (last := next(calls) == counter) and not after:
            os._exit(7)
        result = right(*args, **kwargs)
        if last:
            os._exit(7)
        return result

    pid = os.fork()
    if pid == 0:
        setattr(where, name, dying)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state(out: Path, **models: fxc.CompiledModel) -> str:
    """Which of the models stands there, or the first line of the error."""
    try:
        found = fxc.load(out)
    except fxc.ArtifactError as error:
        return error.what
    result: Tensor = found(X)
    return next(name for name, model in models.items() if name == found.report.recipe["name"] and torch.equal(result, model(X)))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_crash_while_replacing(step: Step, old: fxc.CompiledModel, new: fxc.CompiledModel, out: Path) -> None:
    code = crash(step, lambda: new.save(out))
    found = state(out, old=old, new=new)
    exchanged = step in (STEPS["after _exchanged"], STEPS["before rmtree"], STEPS["after rmtree"])
    assert code == (0 if step[1] == "replace" else 7), "replace isn't called where the names can be exchanged"
    assert found == ("new" if exchanged or code == 0 else "old")
    no_artifact_among(hidden(out))
    new.save(out)
    assert state(out, old=old, new=new) == "new"
    assert list(hidden(out)) == [], "what the crash left is gone"


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_crash_while_writing_the_first(step: Step, new: fxc.CompiledModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = crash(step, lambda: new.save(out))
    arrived = step in (STEPS["after replace"], STEPS["before rmtree"], STEPS["after rmtree"])
    assert code == (0 if step[1] == "_exchanged" else 7)
    assert state(out, new=new) == ("new" if arrived or code == 0 else "no artifact there")
    no_artifact_among(hidden(out))
    new.save(out)
    assert state(out, new=new) == "new"
    assert list(hidden(out)) == [], "what the crash left is gone"


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_while_replacing_in_two_steps(
    call: int, after: bool, old: fxc.CompiledModel, new: fxc.CompiledModel, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names can't be exchanged, a crash between the two renames leaves no artifact there; never a mix."""
    monkeypatch.setattr(artifact, "_exchanged", lambda a, b: False)
    assert crash((Path, "replace", after), lambda: new.save(out), call) == 7
    expected = {(1, False): "old", (1, True): "no artifact there", (2, False): "no artifact there", (2, True): "new"}
    assert state(out, old=old, new=new) == expected[call, after]


def dead_process() -> int:
    """The number of a process that has ended."""
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_only_what_dead_processes_of_this_machine_left_is_removed(new: fxc.CompiledModel, tmp_path: Path) -> None:
    host, dead, end = platform.node(), dead_process(), "abcd_123"
    gone = [f".out-{host}-{dead}-{end}", f".out-{host}-{10**30}-{end}"]
    others = {
        "of a process that runs": f".out-{host}-{os.getpid()}-{end}",
        "of the first process": f".out-{host}-1-{end}",
        "of another machine": f".out-{host}x-{dead}-{end}",
        "of another artifact": f".out-{host}-{dead}-{host}-{dead}-{end}",
        "of another one": f".outer-{host}-{dead}-{end}",
        "with another end": f".out-{host}-{dead}-{end}.keep",
        "an old artifact between two renames": f".out-old-{end}",
        "not hidden": f"out-{host}-{dead}-{end}",
    }
    for name in (*gone, *others.values()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_bytes(b"half")
    new.save(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", *others.values()}


def test_asking_for_a_process_does_not_end_it() -> None:
    assert artifact._is_running(os.getpid())
    assert artifact._is_running(1)
    assert not artifact._is_running(dead_process())


def hidden(out: Path) -> Iterator[Path]:
    return (p for p in out.parent.iterdir() if p.name != out.name)


def no_artifact_among(left: Iterator[Path]) -> None:
    """What a crash leaves lies under a hidden name, and as an artifact it is whole or refused."""
    for folder in left:
        assert folder.name.startswith(".out-")
        try:
            fxc.load(folder)
        except fxc.ArtifactError:
            continue
        assert content(folder).keys() == {"manifest.json", *json.loads((folder / "manifest.json").read_text())["files"]}


def content_of_tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
