"""Histories and reports that were changed by hand: an error that says what, where, why and what to do, or a page that opens all the same."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fxcompress as fxc
from fxcompress import api, artifact
from fxcompress.diff import Diff, between, of_run
from fxcompress.diff.exports import as_dot, as_model_explorer
from fxcompress.diff.read import run_in
from tests.diff.test_text import compiled

FILES = ("history.json", "report.json")
STRANGE = (None, -1, 10**30, 0.5, float("nan"), True, "x", "", [], {}, [0], {"x": 0}, "0")
ROUNDS = 700

Data = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled().save(tmp_path_factory.mktemp("damage") / "out")


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Data]:
    return {name: json.loads((folder / name).read_bytes()) for name in FILES}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of the data with every key or index in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def damaged(data: Data, rng: random.Random) -> Data:
    """One place deleted, replaced, doubled, moved by one, or exchanged with another."""
    made = copy.deepcopy(data)
    container, key = rng.choice(list(places(made)))
    kind = rng.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == 2 and type(container[key]) is int:
        container[key] += rng.choice((-1, 1))
    elif kind == 3:
        other, place = rng.choice(list(places(made)))
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = rng.choice(STRANGE)
    return made


def everything(found: Diff) -> None:
    """What a user may ask of a diff."""
    assert found.text()
    assert json.loads(as_model_explorer(found))
    assert as_dot(found.whole) and found.graph() is not None and found.summary()
    assert "<script" in found.html()


@pytest.mark.parametrize("name", FILES)
def test_no_damage_escapes(name: str, folder: Path, written: dict[str, Data], tmp_path: Path) -> None:
    """Whatever was changed, nothing but an FxcError comes out."""
    rng, refused, whole = random.Random(0), 0, run_in(folder)
    for other in FILES:
        (tmp_path / other).write_text(json.dumps(written[other]))
    for number in range(ROUNDS):
        (tmp_path / name).write_text(json.dumps(damaged(written[name], rng)))
        try:
            run = run_in(tmp_path)
            everything(of_run(run))
            everything(between(whole, run))
        except fxc.FxcError as error:
            refused += 1
            assert error.where and error.why and error.do, str(error)
        except Exception as error:
            pytest.fail(f"round {number}: {type(error).__name__}: {error}\n{(tmp_path / name).read_text()[:20000]}")
    assert ROUNDS // 5 < refused < ROUNDS


def shorter(data: Data) -> None:
    data["steps"].pop()
    data["regions"].pop()


def cyclic(data: Data) -> None:
    """A module that is in itself."""
    for row in data["regions"][0]:
        row[2] = row[0]


def backwards(data: Data) -> None:
    """The first node reads the second."""
    data["nodes"][0][2] = [data["nodes"][1][0]]


def nameless(data: Data) -> None:
    del data["recipe"]["name"]


HARM: dict[str, tuple[str, Callable[[Data], None], str]] = {
    "a graph too few": ("history.json", shorter, "it holds 3 graphs, and the report 3 passes, which lie between them"),
    "a cycle of modules": ("history.json", cyclic, "is in none"),
    "a node before its inputs": ("history.json", backwards, "which no node before it computes"),
    "another version": ("history.json", lambda data: data.update(version=99), "version 99, this one reads 1"),
    "no graphs": ("history.json", lambda data: data.update(steps=[], regions=[]), "it holds no graph"),
    "a figure that is none": ("history.json", lambda data: data["sqnr"].update(linear="high"), "the SQNR at linear is 'high'"),
    "an unknown field": ("report.json", lambda data: data.update(hidden=1), "Extra inputs are not permitted"),
}


@pytest.mark.parametrize(("name", "harm", "why"), HARM.values(), ids=HARM)
def test_damage_is_named(name: str, harm: Callable[[Data], None], why: str, folder: Path, written: dict[str, Data], tmp_path: Path) -> None:
    """With a manifest that was mended to fit, so that only the content can tell."""
    target = tmp_path / "out"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    data = copy.deepcopy(written[name])
    harm(data)
    (target / name).write_text(json.dumps(data))
    facts = {k: v for k, v in json.loads((folder / artifact.MANIFEST).read_bytes()).items() if k not in ("version", "files")}
    artifact.write_manifest(target, **facts)
    with pytest.raises(fxc.ArtifactError, match="the history of the run can't be read") as caught:
        api.diff(target)
    assert caught.value.where == str(target / name)
    assert why in caught.value.why
    assert caught.value.do == "compile and save the model again"


def test_a_recipe_without_a_name_is_an_unnamed_one(folder: Path, written: dict[str, Data], tmp_path: Path) -> None:
    report = copy.deepcopy(written["report.json"])
    nameless(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "history.json").write_text(json.dumps(written["history.json"]))
    assert of_run(run_in(tmp_path)).title == "Net, unnamed recipe"


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"null", b"[]", b'"\xff"', b"{}"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none(name: str, content: bytes, written: dict[str, Data], tmp_path: Path) -> None:
    for other in FILES:
        (tmp_path / other).write_text(json.dumps(written[other]))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(fxc.ArtifactError, match="the history of the run can't be read"):
        run_in(tmp_path)
