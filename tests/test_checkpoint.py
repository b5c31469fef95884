"""Checkpoints: whatever stops a compilation, the same call goes on after the last finished pass and gives what an undisturbed one gives; what
was altered, is in use or belongs to another run is an error that says so."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress import api, artifact, checkpoint
from fxcompress.passes.quant import finalize, weight_only
from fxcompress.passes.tidy import fold_batch_norm
from fxcompress.recipe import load_recipe, shipped
from fxcompress.report import Report
from tests.passes.helpers import seeded, zoo
from tests.test_artifact import content, crash
from tests.zoo import ZOO

QUANT = {"quant.weight_only": {"weights": "int8/channel"}}
WITHOUT_FC2 = {"quant.weight_only": {**QUANT["quant.weight_only"], "where": {"exclude": ["fc2"]}}}
STEPS: list[Any] = ["tidy.fold_constants", "tidy.fold_batch_norm", QUANT, "quant.finalize"]
RECIPE = {"name": "mine", "passes": STEPS}
X = seeded(2, 8)


class Net(nn.Module):
    """A layer with a batch norm behind it, an activation, and a layer that the passes before quantisation leave alone."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm, self.fc2, self.act = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4), act
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.norm(self.fc1(x))))


def captured(act: Callable[[Tensor], Tensor] = torch.relu, x: Tensor = X) -> fxc.Program:
    return fxc.capture(Net(act).eval(), (x,))


@pytest.fixture(scope="module")
def program() -> fxc.Program:
    return captured()


def compiled(program: fxc.Program, folder: Path | None, recipe: Any = RECIPE, **options: Any) -> fxc.CompiledModel:
    return fxc.compile(program, recipe, backend=options.pop("backend", "reference"), checkpoint=folder, **options)


def files(model: fxc.CompiledModel, folder: Path) -> dict[str, Any]:
    """What a model saves, without measured times and what follows from them."""
    saved = content(model.save(folder / "saved"))
    del saved["manifest.json"]
    report = json.loads(saved.pop("report.json"))
    for done in report["passes"]:
        del done["cpu_seconds"]
    return {**saved, "report": report, "report.html": re.sub(rb'"cpu":[^,]*', b"", saved["report.html"])}


@pytest.fixture(scope="module")
def expected(program: fxc.Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return files(compiled(program, None), tmp_path_factory.mktemp("expected"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


PLACES = {1: (fold_batch_norm, "FoldBatchNorm", "apply"), 2: (weight_only, "WeightOnly", "apply"), 3: (finalize, "Finalize", "apply")}


def stopped(program: fxc.Program, folder: Path, passes: int, error: type[BaseException] = RuntimeError, **options: Any) -> BaseException:
    """A compilation that fails in the pass after so many, or while it is lowered."""
    module, kind, method = PLACES.get(passes, (api, "store", "save_graph"))

    def fail(*_: Any) -> None:
        raise error("planted")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error) as caught:
        patch.setattr(getattr(module, kind), method, fail)
        compiled(program, folder, **options)
    return caught.value


def begun(program: fxc.Program, folder: Path, **options: Any) -> tuple[fxc.CompiledModel, list[tuple[str, int, int]]]:
    told: list[tuple[str, int, int]] = []
    return compiled(program, folder, progress=lambda *step: told.append(step), **options), told


ALL = [("tidy.fold_constants", 0, 5), ("tidy.fold_batch_norm", 1, 5), ("quant.weight_only", 2, 5), ("quant.finalize", 3, 5)]
LOWER = [("lower to reference", 4, 5), ("", 5, 5)]


def error(action: Callable[[], Any], kind: type[fxc.FxcError] = fxc.ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# going on


def test_a_checkpoint_changes_nothing(program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    model, told = begun(program, run)
    assert told == [*ALL, *LOWER]
    assert files(model, tmp_path) == expected


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_a_stopped_run_goes_on_where_it_was(passes: int, program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    stopped(program, run, passes)
    model, told = begun(program, run)
    assert told == [*ALL[passes:], *LOWER]
    assert files(model, tmp_path) == expected


def test_stopped_after_every_pass(program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    for passes in (1, 2, 3, 4):
        stopped(program, run, passes)
    assert files(compiled(program, run), tmp_path) == expected


def test_a_failure_before_the_first_pass_ends_leaves_nothing_to_go_on_from(program: fxc.Program, run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(api.Manager, "_step", lambda *_: (_ for _ in ()).throw(RuntimeError))
        compiled(program, run)
    assert [p.name for p in run.iterdir()] == ["lock"]
    assert begun(program, run)[1] == [*ALL, *LOWER]


def test_a_finished_run_does_nothing_again(program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    first = compiled(program, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.Manager, "_step", lambda *_: pytest.fail("a pass ran"))
        patch.setattr(api, "_lowered", lambda *_: pytest.fail("it was lowered"))
        model, told = begun(program, run)
    assert told == LOWER
    assert files(model, tmp_path) == expected
    assert model.report == first.report, "the times are those of the first"
    assert torch.equal(model(X), first(X))
    assert model.program is not None
    assert [n.name for n in model.program.graph.nodes] == [n.name for n in first.program.graph.nodes]  # type: ignore[union-attr]


def test_a_capture_of_its_own_goes_on(program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    """The checkpoint belongs to what was captured, not to the object."""
    stopped(program, run, 3)
    model, told = begun(captured(), run)
    assert told == [*ALL[3:], *LOWER]
    assert files(model, tmp_path) == expected


def test_another_process_goes_on(program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    stopped(program, run, 3)
    source = (
        "import sys, pathlib\nfrom tests.test_checkpoint import begun, captured\n"
        "model, told = begun(captured(), pathlib.Path(sys.argv[1]))\nmodel.save(sys.argv[2])\nprint(told)"
    )
    done = subprocess.run([sys.executable, "-c", source, run, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str([*ALL[3:], *LOWER])
    assert files(fxc.load(tmp_path / "out"), tmp_path) == expected


def test_only_memory_that_a_pass_made_is_written(program: fxc.Program, run: Path) -> None:
    """Nothing for the constants that are the model's own; what no pass needs any more goes."""
    written: list[dict[str, int]] = []
    right = checkpoint.Checkpoint.save

    def save(self: Any, *args: Any) -> None:
        right(self, *args)
        kept = json.loads((run / "checkpoint.json").read_text())["kept"]
        assert sorted(p.name for p in (run / "objects").iterdir()) == kept["objects"]
        graphs = {kept["state"], kept["model"]}
        written.append({p.name: p.stat().st_size for p in (run / "objects").iterdir() if p.name not in graphs})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", save)
        compiled(program, run)
    sizes = [sorted(w.values()) for w in written]
    folded, scales = [16 * 4, 16 * 8 * 4], [4 * 4, 16 * 4]  # bias and weight of fc1; a scale per channel of fc2 and fc1
    assert sizes == [[], folded, sorted([*folded, *scales]), sorted([16 * 4, *scales, 16 * 8, 4 * 16])]  # packed codes for the weights
    assert written[1].items() <= written[2].items()


def test_a_finished_artifact_is_not_read_for_another_recipe(program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    """A recipe that goes on where the finished one ends, and one that only describes itself otherwise; each gives its own artifact."""
    compiled(program, run, {**RECIPE, "passes": STEPS[:2]})
    assert (run / "artifact").is_dir()
    assert begun(program, run)[1] == [*ALL[2:], *LOWER]
    other = {**RECIPE, "description": "the same"}
    model, told = begun(program, run, recipe=other)
    assert told == LOWER
    assert model.report.recipe["description"] == "the same"
    assert Report.model_validate_json((run / "artifact/report.json").read_text()) == model.report
    assert files(compiled(program, run), tmp_path) == expected


def test_a_pass_that_failed_may_be_mended(program: fxc.Program, run: Path, tmp_path: Path) -> None:
    """Nothing that is kept depends on the passes still to come."""
    stopped(program, run, 2)
    recipe = {**RECIPE, "passes": [*STEPS[:2], WITHOUT_FC2, STEPS[3]]}
    model, told = begun(program, run, recipe=recipe)
    assert told == [*ALL[2:], *LOWER]
    assert files(model, tmp_path) == files(compiled(program, None, recipe), tmp_path / "other")


def test_a_folder_of_a_relative_name(program: fxc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled(program, Path("deep/run"))
    assert {p.name for p in (tmp_path / "deep/run").iterdir()} == {"lock", "checkpoint.json", "objects", "artifact"}


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_onnxruntime(passes: int, program: fxc.Program, run: Path, tmp_path: Path) -> None:
    """Lowering needs fake values, which a program read from files has none of; threads and sizes are those of the example."""
    wanted = files(compiled(program, None, backend="onnxruntime"), tmp_path / "other")
    stopped(program, run, passes, backend="onnxruntime")
    model, told = begun(program, run, backend="onnxruntime")
    assert len(told) == 6 - passes
    assert files(model, tmp_path) == wanted
    assert files(compiled(program, run, backend="onnxruntime"), tmp_path / "again") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("recipe", shipped())
def test_shipped_recipes_stopped_before_every_step(recipe: str, run: Path, tmp_path: Path) -> None:
    """On a real model, with statistics, which a process that goes on measures anew."""
    program, example = zoo("llama"), ZOO["llama"]()[1]
    feed = [{**example, "input_ids": example["input_ids"].roll(n, 1)} for n in range(3)]
    wanted = files(fxc.compile(program, recipe, calibration=feed), tmp_path / "undisturbed")
    for number in range(1, len(load_recipe(recipe).passes) + 1):

        def stop(name: str, finished: int, total: int, at: int = number) -> None:
            if finished == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fxc.compile(program, recipe, calibration=feed, checkpoint=run, progress=stop)
        assert passes_kept(run) == number
    assert files(fxc.compile(program, recipe, calibration=feed, checkpoint=run), tmp_path) == wanted


# what isn't gone on from


def altered_weight() -> fxc.Program:
    program = captured()
    program.constants["fc2.weight"] = program.constants["fc2.weight"] * 1.0000002
    return program


FEED = [(seeded(3, 8, seed=1),), (seeded(3, 8, seed=2),)]
OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "an option": (
        lambda: {"recipe": {**RECIPE, "passes": [*STEPS[:2], {"quant.weight_only": {"weights": "int4/channel"}}, STEPS[3]]}},
        "pass 3, quant.weight_only.weights: int4/channel, was int8/channel",
    ),
    "a default given up": (
        lambda: {"recipe": {**RECIPE, "passes": [*STEPS[:2], {"quant.weight_only": {**QUANT["quant.weight_only"], "range": "minmax"}}]}},
        "pass 3, quant.weight_only.range: minmax, was mse",
    ),
    "where": (
        lambda: {"recipe": {**RECIPE, "passes": [*STEPS[:2], WITHOUT_FC2]}},
        "pass 3, quant.weight_only.where: {'exclude': ['fc2']}, was nothing",
    ),
    "another pass": (
        lambda: {"recipe": {**RECIPE, "passes": ["tidy.no_ops", *STEPS[1:]]}},
        "pass 1: tidy.no_ops, was tidy.fold_constants",
    ),
    "a pass less": (lambda: {"recipe": {**RECIPE, "passes": STEPS[:2]}}, "pass 3: nothing, was quant.weight_only"),
    "a weight": (lambda: {"program": altered_weight()}, "the content of constant fc2.weight"),
    "an op": (
        lambda: {"program": captured(torch.exp)},
        "the captured model: node linear_1.args.tuple.0.node: exp, was relu\n"
        "        the captured model: node relu: nothing, was aten.relu.default",
    ),
    "the example": (lambda: {"program": captured(x=X + 1)}, "the content of example input x"),
    "a feed": (lambda: {"calibration": FEED}, "the calibration feed"),
    "the check": (lambda: {"check": "end"}, "check: end, was each"),
    "the target": (lambda: {"backend": "onnxruntime"}, "target.name: onnxruntime, was reference"),
}


def another(program: fxc.Program, folder: Path, change: Callable[[], dict[str, Any]]) -> Callable[[], Any]:
    given = change()
    given.setdefault("recipe", RECIPE)
    if len(given["recipe"]["passes"]) == 3:
        given["recipe"]["passes"].append("quant.finalize")
    return lambda: compiled(given.pop("program", program), folder, **given)


@pytest.mark.parametrize(("change", "line"), OTHERS.values(), ids=OTHERS)
def test_another_run(change: Callable[[], dict[str, Any]], line: str, program: fxc.Program, run: Path, tmp_path: Path, expected: Any) -> None:
    """What differs is named, the checkpoint stays, and the run it belongs to goes on."""
    stopped(program, run, 3)
    before = content_of_tree(run)
    text = error(another(program, run, change))
    assert text.startswith(f"the checkpoint is of another run\n  where {run}\n  why   these differ:\n        {line}\n")
    assert text.endswith(
        "\n  state 3 finished passes are kept"
        "\n  do    undo the change to go on from there, pass another folder, or delete the folder to start anew"
    )
    assert content_of_tree(run) == before
    assert files(compiled(program, run), tmp_path) == expected


def test_all_that_differs_is_listed(program: fxc.Program, run: Path) -> None:
    stopped(program, run, 3)
    text = error(another(program, run, lambda: {"program": altered_weight(), "check": "end", "calibration": FEED}))
    assert text.splitlines()[2:6] == [
        "  why   these differ:",
        "        check: end, was each",
        "        the calibration feed",
        "        the content of constant fc2.weight",
    ]


def test_of_many_differences_the_first_are_listed(program: fxc.Program, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(program, run, 3)
    changes = {"program": captured(torch.exp, X + 1), "backend": "onnxruntime", "check": "end", "calibration": FEED}
    few = error(another(program, run, lambda: dict(changes))).splitlines()[3:-2]
    monkeypatch.setattr(checkpoint, "MOST", 99)
    every = error(another(program, run, lambda: dict(changes))).splitlines()[3:-2]
    assert few == [*every[:6], f"        and {len(every) - 6} more"]
    assert len(every) > 7


def test_another_feed(program: fxc.Program, run: Path) -> None:
    stopped(program, run, 2, calibration=FEED)
    lines = error(lambda: compiled(program, run, calibration=[*FEED[:1], (FEED[1][0] + 1e-6,)])).splitlines()
    assert lines[3:5] == ["        the calibration feed", "  state 2 finished passes are kept"]
    assert begun(program, run, calibration=iter(FEED))[1] == [*ALL[2:], *LOWER], "content counts, not the form"


def test_other_versions(program: fxc.Program, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(program, run, 1)
    right = api.versions()
    monkeypatch.setattr(api, "versions", lambda: {**right, "torch": "9.9"})
    assert f"        versions.torch: 9.9, was {right['torch']}\n" in error(lambda: compiled(program, run))


def test_a_checkpoint_of_another_form(program: fxc.Program, run: Path) -> None:
    stopped(program, run, 1)
    data = json.loads((run / "checkpoint.json").read_text())
    (run / "checkpoint.json").write_text(json.dumps({**data, "version": 3}))
    assert error(lambda: compiled(program, run)) == (
        f"the checkpoint is from another fxcompress\n  where {run}/checkpoint.json\n  why   version 3, this one reads 2\n"
        "  do    delete the folder to start anew"
    )


# what was altered


def kept_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit": flipped,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" x"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_every_altered_file_is_named(damage: Callable[[Path], Any], program: fxc.Program, run: Path, tmp_path: Path) -> None:
    compiled(program, run)
    shutil.copytree(run, tmp_path / "whole")
    kept = json.loads((run / "checkpoint.json").read_text())["kept"]
    for path in kept_files(run):
        damage(path)
        if path.name == "checkpoint.json" and not path.exists():
            assert begun(program, run)[1] == [*ALL, *LOWER], "no checkpoint, and nothing that could be mistaken for one"
        elif path.name != kept["model"]:  # read only to say what differs
            text = error(lambda: compiled(program, run))
            assert f"where {path if path.exists() or path.name != 'manifest.json' else path.parent}\n" in text
            assert "\n  do    delete " in text
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "whole", run)
    assert len(kept_files(run)) == 16


def test_an_altered_captured_graph_is_named_when_it_is_needed(program: fxc.Program, run: Path) -> None:
    stopped(program, run, 1)
    path = run / "objects" / json.loads((run / "checkpoint.json").read_text())["kept"]["model"]
    flipped(path)
    assert f"the checkpoint was altered\n  where {path}\n" in error(lambda: compiled(captured(torch.exp), run))


def test_a_lie_with_the_right_hash(program: fxc.Program, run: Path) -> None:
    """Memory beyond its end is refused, and so is an op that isn't one: hashes say who wrote, not what."""
    stopped(program, run, 3)
    for change, why in ((far, "out of bounds"), (unknown_op, "unknown op 'os.system'"), (no_size, "is no size")):
        rewritten(run, change)
        text = error(lambda: compiled(program, run))
        assert text.startswith(f"the checkpoint can't be read\n  where {run}\n  why   ")
        assert why in text


def far(state: dict[str, Any]) -> None:
    next(iter(state["places"].values()))["offset"] = 10**6


def unknown_op(state: dict[str, Any]) -> None:
    next(iter(state["places"].values()))["offset"] = 0
    next(n for n in state["program"]["nodes"] if n["op"] == "call_function")["target"] = "os.system"


def no_size(state: dict[str, Any]) -> None:
    next(n for n in state["program"]["nodes"] if n["op"] == "call_function")["target"] = "aten.linear.default"
    state["values"]["relu"]["shape"][0] = "[].__class__"


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The state after a change, under its new hash everywhere."""
    data = json.loads((folder / "checkpoint.json").read_text())
    kept, objects = data["kept"], checkpoint.Objects(folder / "objects")
    state = json.loads((objects.folder / kept["state"]).read_text())
    change(state)
    kept["objects"].remove(kept["state"])
    kept["state"] = objects.put(json.dumps(state).encode())
    kept["objects"].append(kept["state"])
    data["sha256"] = checkpoint._digest_of(kept)
    (folder / "checkpoint.json").write_text(json.dumps(data))


def test_nothing_is_unpickled(program: fxc.Program, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(program, run)
    for where, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(where, name, lambda *a, **k: pytest.fail("a pickle was opened"))
    compiled(program, run)


def test_what_a_killed_process_left_is_cleaned(program: fxc.Program, run: Path) -> None:
    stopped(program, run, 3)
    before = content_of_tree(run)
    for name in ("checkpoint.json.new", "objects/0123.new", "objects/" + "0" * 64):
        (run / name).write_bytes(b"half")
    stopped(program, run, 3)
    (run / "lock").write_text("")
    after = content_of_tree(run)
    after.pop("checkpoint.json.new", None)
    assert after.keys() == before.keys()


# where it can't be written


def test_a_folder_that_holds_something_else(program: fxc.Program, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    assert error(lambda: compiled(program, tmp_path)) == (
        f"the checkpoint folder holds something else\n  where {tmp_path}/thesis.txt\n  why   no checkpoint has a file of that name\n"
        "  do    choose an empty or new folder"
    )
    assert content_of_tree(tmp_path) == {"thesis.txt": b"years"}


def test_a_file_in_the_way(program: fxc.Program, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert error(lambda: compiled(program, tmp_path / "run")) == (
        f"the checkpoint can't be written\n  where {tmp_path}/run\n  why   File exists\n  do    choose another folder"
    )


def full(patch: pytest.MonkeyPatch, room: int) -> None:
    """A disk on which so many files can still be written; the next is cut."""
    left, right = iter(range(room)), os.fsync

    def sync(handle: int) -> None:
        if next(left, None) is None:
            os.truncate(handle, 10)
            raise OSError(errno.ENOSPC, "No space left on device")
        right(handle)

    patch.setattr(os, "fsync", sync)


def test_a_disk_that_is_full_at_any_write(program: fxc.Program, tmp_path: Path, expected: dict[str, Any]) -> None:
    """After each refusal, what was kept still is, no half of a file is left, and with more room the same call goes on."""
    for room in range(100):
        run = tmp_path / str(room)
        with pytest.MonkeyPatch.context() as patch:
            full(patch, room)
            try:
                compiled(program, run)
                break
            except fxc.ArtifactError as stop:
                kept = passes_kept(run)
                assert str(stop) == (
                    f"the checkpoint can't be written\n  where {run}\n  why   [Errno 28] No space left on device\n"
                    f"  state {kept} finished passes are kept\n  do    free space, then make the same call again"
                )
        assert not list(run.rglob("*.new"))
        model, told = begun(program, run)
        assert told == [*ALL[kept:], *LOWER]
    assert room == 16, "graph and checkpoint of 4 passes, the captured graph, 2 + 2 + 2 tensors, the finished checkpoint"
    assert files(model, tmp_path) == expected


def passes_kept(run: Path) -> int:
    path = run / "checkpoint.json"
    return len(json.loads(path.read_text())["kept"]["run"]["passes"]) if path.exists() else 0


def test_a_full_disk_while_the_artifact_is_kept(program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "write_manifest", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        text = error(lambda: compiled(program, run))
    assert text.startswith(f"the artifact can't be written\n  where {run}/artifact\n")
    assert {p.name for p in run.iterdir()} == {"lock", "checkpoint.json", "objects"}
    model, told = begun(program, run)
    assert (told, files(model, tmp_path)) == (LOWER, expected)


# one at a time


@pytest.fixture
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the checkpoint."""
    source = (
        "import sys, pathlib\nfrom fxcompress.checkpoint import _locked\n"
        "with _locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    input()"
    )
    process = subprocess.Popen([sys.executable, "-c", source, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_until_the_first_is_gone(program: fxc.Program, run: Path, holder: subprocess.Popen[str]) -> None:
    assert error(lambda: compiled(program, run)) == (
        f"the checkpoint is in use\n  where {run}\n  why   process {holder.pid} compiles with it\n"
        "  do    wait for that process, or pass another folder"
    )
    assert [p.name for p in run.iterdir()] == ["lock"]
    holder.kill()
    holder.wait()
    assert begun(program, run)[1] == [*ALL, *LOWER]


def test_a_second_call_in_one_process_is_refused(program: fxc.Program, run: Path) -> None:
    refused = []

    def progress(name: str, number: int, total: int) -> None:
        if number < total:
            refused.append(error(lambda: compiled(program, run)).splitlines()[0])

    compiled(program, run, progress=progress)
    assert refused == ["the checkpoint is in use"] * 5


# being stopped


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, fxc.BackendRefusal])
@pytest.mark.parametrize(("passes", "what"), [(1, "1 finished pass is"), (3, "3 finished passes are"), (4, "4 finished passes are")])
def test_an_error_says_what_is_kept(kind: type[BaseException], passes: int, what: str, program: fxc.Program, run: Path) -> None:
    assert stopped(program, run, passes, kind).__notes__ == [f"{what} kept in {run}; the same call goes on from there"]
    assert passes_kept(run) == passes


def test_without_a_finished_pass_nothing_is_said(program: fxc.Program, run: Path) -> None:
    bad = {**RECIPE, "passes": [QUANT, "quant.finalize"]}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(weight_only.WeightOnly, "apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        compiled(program, run, bad)
    assert not hasattr(caught.value, "__notes__")


CRASHES = {
    f"{'after' if after else 'before'} {name} {count}": ((where, name, after), count)
    for where, name, counts in ((os, "fsync", (1, 4, 8, 12)), (Path, "replace", (1, 3, 6, 9, 14)), (Path, "unlink", (1, 3)))
    for count in counts
    for after in (False, True)
}


@pytest.mark.parametrize(("step", "count"), CRASHES.values(), ids=CRASHES)
def test_a_crash_while_it_is_written(step: Any, count: int, program: fxc.Program, run: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    assert crash(step, lambda: compiled(program, run), count) == 7
    kept = passes_kept(run)
    model, told = begun(program, run)
    assert told == [*ALL[kept:], *LOWER]
    assert files(model, tmp_path) == expected
    assert not list(run.rglob("*.new"))


@pytest.mark.slow
def test_kills() -> None:
    """SIGKILL at random moments, on a real model; `python -m tools.kill_test` does fifty of them."""
    command = [sys.executable, "-m", "tools.kill_test", "--kills", "4", "--model", "resnet", "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kills in ")


def content_of_tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
