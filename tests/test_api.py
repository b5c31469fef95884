"""compile and load: what a user says, in every form it can be said, and what comes back for what can't be."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress import api, checker, manager
from fxcompress.interpret import run
from fxcompress.passes.quant import weight_only
from fxcompress.program import Program
from tests.passes.helpers import seeded
from tests.zoo import ZOO, redraw

INT8 = {"name": "int8", "passes": [{"quant.weight_only": {"weights": "int8/channel"}}, "quant.finalize"]}
INT4 = {"name": "int4", "passes": [{"quant.weight_only": {"weights": "int4/channel"}}, "quant.finalize"]}
NOTHING = {"name": "nothing", "passes": ["tidy.dead_code"]}
X = seeded(2, 4)


class Mlp(nn.Module):
    """x -> fc2(relu(fc1(x * scale)))."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None, flip: bool = False) -> Tensor:
        y = self.fc2(self.fc1(x if scale is None else x * scale).relu())
        return -y if flip else y


def compiled(model: nn.Module, example: Any, recipe: Any = NOTHING, **options: Any) -> fxc.CompiledModel:
    return fxc.compile(model.eval(), recipe, example, backend="reference", **options)


@pytest.fixture(scope="module")
def mlp() -> fxc.CompiledModel:
    return compiled(Mlp(), (X,), INT8)


def loaded(model: fxc.CompiledModel, folder: Path) -> fxc.CompiledModel:
    return fxc.load(model.save(folder / "out"))


def same(a: Any, b: Any) -> bool:
    """The same tree with the same numbers."""
    (left, form), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return form == other and all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(left, right, strict=True))


def error(kind: type[fxc.FxcError], action: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# compile, save, load


def test_the_round_trip_is_bit_identical(mlp: fxc.CompiledModel, tmp_path: Path) -> None:
    again = loaded(mlp, tmp_path)
    for x in (X, seeded(7, 4, seed=1), seeded(1, 4, seed=2)):
        assert torch.equal(again(x), mlp(x))
    assert again.report == mlp.report
    assert (again.inputs, again.symbols) == (mlp.inputs, mlp.symbols)
    assert again.program is None
    assert (tmp_path / "out/recipe.lock.yaml").read_text().startswith("# versions: ")


def test_an_untouched_model_gives_its_own_numbers() -> None:
    model = Mlp()
    assert torch.equal(compiled(model, (X,))(X), model(X))


def test_quantised_numbers_are_those_of_the_report(mlp: fxc.CompiledModel) -> None:
    wanted = Mlp()(X).detach()
    noise = (mlp(X) - wanted).double().square().sum()
    assert mlp.report.output_sqnr == pytest.approx(10 * math.log10(wanted.double().square().sum() / noise), abs=1e-6)


def test_one_program_two_recipes() -> None:
    program = fxc.capture(Mlp().eval(), (X,))
    was = [(n, n.target, n.args, dict(n.kwargs)) for n in program.graph.nodes], {k: (id(v), v._version) for k, v in program.constants.items()}
    before = run(program, [X])[0]
    eight, four = (fxc.compile(program, recipe, backend="reference") for recipe in (INT8, INT4))
    now = [(n, n.target, n.args, dict(n.kwargs)) for n in program.graph.nodes], {k: (id(v), v._version) for k, v in program.constants.items()}
    assert now == was
    assert torch.equal(run(program, [X])[0], before)
    assert 45 > eight.report.output_sqnr > four.report.output_sqnr + 15
    assert not torch.equal(eight(X), four(X))


def test_the_model_is_not_changed() -> None:
    model = Mlp().eval()
    was = {k: (v.data_ptr(), v._version, v.clone()) for k, v in model.state_dict().items()}
    compiled(model, (X,), INT4)
    assert all((v.data_ptr(), v._version) == was[k][:2] and torch.equal(v, was[k][2]) for k, v in model.state_dict().items())
    assert not hasattr(model, "compiled")


def test_the_users_example_is_not_changed() -> None:
    example, inputs = {"x": X}, fxc.Inputs(X, roles={"x": "state"})
    compiled(Mlp(), example)
    assert compiled(Mlp(), inputs).inputs[0].role == "state"
    assert (list(example), inputs.roles) == (["x"], {"x": "state"})


def test_a_role_for_nobody() -> None:
    assert error(fxc.InputError, lambda: compiled(Mlp(), fxc.Inputs(X, roles={"scael": "timestep"}))) == (
        "a role is given to an unknown input 'scael'\n  why   known: x"
    )


def test_two_models_in_one_process(tmp_path: Path) -> None:
    models = [nn.Linear(4, 4), nn.Linear(4, 4)]
    both = [compiled(m, (X,)) for m in models]
    for model, one in zip(models, both, strict=True):
        assert torch.equal(one(X), model(X))
    folders = [one.save(tmp_path / str(i)) for i, one in enumerate(both)]
    for model, folder in zip(models, folders, strict=True):
        assert torch.equal(fxc.load(folder)(X), model(X))


def test_capturing_again_gives_the_same_program() -> None:
    model = Mlp().eval()
    one, two = fxc.capture(model, (X,)), fxc.capture(model, (X,))
    assert [(n.name, str(n.target)) for n in one.graph.nodes] == [(n.name, str(n.target)) for n in two.graph.nodes]
    assert all(one.constants[k].data_ptr() == v.data_ptr() for k, v in two.constants.items())


def test_the_folder_goes_with_the_model() -> None:
    model = compiled(Mlp(), (X,))
    module, folder = model.as_module(), model.folder
    del model
    gc.collect()
    assert folder.is_dir(), "the module still needs it"
    assert module(X).shape == (2, 3)
    del module
    gc.collect()
    assert not folder.exists()


def test_a_copy_runs_and_outlives_the_original() -> None:
    model = compiled(Mlp(), (X,))
    expected, module = model(X), copy.deepcopy(model.as_module())
    del model
    gc.collect()
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_reach_the_session(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlp: fxc.CompiledModel) -> None:
    asked = []
    right = type(mlp.backend).open
    monkeypatch.setattr(type(mlp.backend), "open", lambda self, folder, threads=None: asked.append(threads) or right(self, folder, threads))
    compiled(Mlp(), (X,), threads=threads)(X)
    fxc.load(mlp.save(tmp_path / "out"), threads=threads)(X)
    assert asked == [threads] * 2  # at compile, where it is measured and then used; after load


def test_progress_is_told_before_each_step() -> None:
    told: list[tuple[str, int, int]] = []
    compiled(Mlp(), (X,), INT8, progress=lambda *step: told.append(step))
    assert told == [("quant.weight_only", 0, 3), ("quant.finalize", 1, 3), ("lower to reference", 2, 3), ("", 3, 3)]


def test_progress_is_told_after_each_calibration_item() -> None:
    told: list[tuple[str, int, int]] = []
    compiled(Mlp(), (X,), "int8", calibration=[(X,), (X / 2,), (X / 3,)], progress=lambda *step: told.append(step))
    insert = next(number for name, number, _ in told if name == "quant.insert")
    assert [step for step in told if step[0].startswith("quant.insert, ")] == [
        (f"quant.insert, item {count}", insert, told[-1][2]) for count in (1, 2)
    ]


# check


@pytest.mark.parametrize("check", ["each", "end", "off"])
def test_how_it_was_checked_is_stamped_in(check: Any, tmp_path: Path) -> None:
    report = loaded(compiled(Mlp(), (X,), INT8, check=check), tmp_path).report
    assert report.check == check
    assert [bool(p.checks) for p in report.passes] == [check == "each"] * 2
    assert (report.output_sqnr is None) == (check == "off")
    assert (report.passes[0].output_sqnr is None) == (check == "off")


def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    right = weight_only.mse_range
    monkeypatch.setattr(weight_only, "mse_range", lambda *a: (right(*a)[0] / 2, None))


def test_a_broken_contract_stops_each_and_shows_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    halved(monkeypatch)
    text = error(fxc.ContractViolation, lambda: compiled(Mlp(), (X,), INT8))
    assert text.startswith("quant.weight_only breaks its bounded contract at 2 of 2 sites\n  where fc")
    assert text.splitlines()[3] == "  state program as before this pass; 0 finished passes are kept"
    report = compiled(Mlp(), (X,), INT8, check="end").report
    assert report.output_sqnr < 20


STOPS: dict[str, tuple[Any, str, type[BaseException]]] = {
    "in a pass": (weight_only, "mse_range", KeyboardInterrupt),
    "in a check": (checker, "check", RuntimeError),
    "in the audit": (api, "audit", KeyboardInterrupt),
    "while lowering": (api.store, "save_graph", RuntimeError),
    "while measuring": (api, "lowest_sqnr", MemoryError),
    "while reporting": (api, "_report", KeyboardInterrupt),
}


@pytest.mark.parametrize(("where", "name", "kind"), STOPS.values(), ids=STOPS)
def test_nothing_is_left_half_done(where: Any, name: str, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise kind("planted")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(where, name, stop)
    with pytest.raises(kind, match="planted"):
        compiled(Mlp(), (X,), INT8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_a_full_disk_while_lowering(backend: str, tmp_path: Path) -> None:
    """A limit of the system on the size of a file, hit by whoever writes first. Nothing is left, and it isn't called the model's fault."""
    model = fxc.capture(nn.Sequential(nn.Linear(64, 64)).eval(), (seeded(2, 64),))
    text = in_a_process_with_small_files(lambda: fxc.compile(model, NOTHING, backend=backend), tmp_path)
    what = {"reference": "the lowered program can't be written", "onnxruntime": "the model files can't be written"}[backend]
    assert text.startswith(f"ArtifactError: {what}\n  where {tmp_path}/.fxcompress-")
    assert "File too large" in text
    assert "\n  do    free space" in text
    assert list(tmp_path.iterdir()) == []


def in_a_process_with_small_files(action: Callable[[], Any], temporary: Path, most: int = 4096) -> str:
    """The error, with its type, of the action in a process of its own whose files can't grow beyond some bytes."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            tempfile.tempdir = str(temporary)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            action()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def test_a_violation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    halved(monkeypatch)
    with pytest.raises(fxc.ContractViolation):
        compiled(Mlp(), (X,), INT8)
    assert list(tmp_path.iterdir()) == []


class Masked(nn.Module):
    """A batch norm whose input is all zeros whatever comes in, so that folding it can't be checked there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 2, 1, bias=False), nn.BatchNorm1d(2)
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x * 0.0)) + x


def test_what_cannot_be_checked_is_refused_or_listed() -> None:
    torch.manual_seed(0)
    model, example = Masked(), (seeded(2, 2, 5),)
    text = error(fxc.ContractViolation, lambda: compiled(model, example, {"passes": ["tidy.fold_batch_norm"]}))
    assert text.startswith("tidy.fold_batch_norm can't be checked at 1 of 1 sites\n  where norm  (batch_norm)\n  why   the contract at ")
    assert text.splitlines()[2].endswith("could change sign unseen")
    assert text.endswith(
        "\n  state program as before this pass; 0 finished passes are kept\n"
        "  do    pass example inputs that reach these sites, exclude them, or let them through: - tidy.fold_batch_norm: {unverified: allow}"
    )
    report = compiled(model, example, {"passes": [{"tidy.fold_batch_norm": {"unverified": "allow"}}]}).report
    assert [c.verdict for c in report.passes[0].checks] == ["unverified"]


# calibration


class Probed(manager.Manager):
    """A manager that remembers what it was given as probe."""

    last: tuple[Tensor, ...] = ()

    def __init__(self, program: Program, target: Any, probe: Any, *rest: Any) -> None:
        super().__init__(program, target, probe, *rest)
        Probed.last = self.probe


@pytest.mark.parametrize("form", ["list", "iterator", "none"])
def test_the_last_item_is_the_probe(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"x": seeded(n, 4, seed=n)} for n in (3, 1, 5)]
    feed = {"list": items, "iterator": iter(items), "none": None}[form]
    monkeypatch.setattr(api, "Manager", Probed)
    compiled(Mlp(), (X,), INT8, calibration=feed)
    assert torch.equal(Probed.last[0], X if form == "none" else items[-1]["x"])


BAD_FEEDS: dict[str, tuple[Any, type[fxc.FxcError], str]] = {
    "empty": (
        [],
        fxc.CalibrationError,
        "the calibration feed is empty\n  why   it gave no item\n  do    pass at least one item; more are better",
    ),
    "one dict": (
        {"x": X},
        fxc.CalibrationError,
        "calibration needs several items\n  why   got one dict\n  do    pass a list of items: calibration=[item]",
    ),
    "a number": (3, fxc.CalibrationError, "calibration can't be iterated\n  why   got int\n  do    pass a list of items or a feed"),
    "not finite": (
        [(X,), (X / 0,)],
        fxc.CalibrationError,
        "a calibration item isn't finite\n  where item 1, input 'x'\n  why   8 of 8 values are inf or nan\n  do    remove the item",
    ),
    "not a number": (
        [{"x": X}, {"x": X}, {"x": torch.where(X[1, 2] == X, torch.nan, X)}],
        fxc.CalibrationError,
        "a calibration item isn't finite\n  where item 2, input 'x'\n  why   1 of 8 values are inf or nan\n  do    remove the item",
    ),
    "another dtype": (
        [(X,), (X.double(),)],
        fxc.CalibrationError,
        "calibration item 1 doesn't fit: input 'x' doesn't fit\n"
        "  why   expected float32 [batch, 4], got a float64 tensor of shape [2, 4]: dtype or rank differs\n"
        "  do    pass the captured form, or compile again with dynamic= naming that axis",
    ),
    "another form": (
        [(X, None), (X, None, True)],
        fxc.CalibrationError,
        "calibration item 1 doesn't fit: argument 'flip' was not among the example inputs\n"
        "  why   the program was captured with flip=False; this call passes True\n"
        "  do    compile again with flip in example_inputs, or leave it out of the call",
    ),
    "another width": (
        [(X,), (seeded(2, 5),), (X,)],
        fxc.CalibrationError,
        "calibration item 1 doesn't fit: input 'x' doesn't fit\n"
        "  why   expected float32 [batch, 4], got a float32 tensor of shape [2, 5]: axis 1 is fixed to 4\n"
        "  do    pass the captured form, or compile again with dynamic= naming that axis",
    ),
    "an unknown name": (
        [{"x": X}, {"y": X}],
        fxc.CalibrationError,
        "calibration item 1 doesn't fit: the inputs don't fit the model's forward\n"
        "  why   missing a required argument: 'x'; 'y' is unknown, known: flip, scale, x\n"
        "  do    forward takes (x, scale, flip)",
    ),
}


@pytest.mark.parametrize(("feed", "kind", "text"), BAD_FEEDS.values(), ids=BAD_FEEDS)
def test_bad_feeds(feed: Any, kind: type[fxc.FxcError], text: str) -> None:
    assert error(kind, lambda: compiled(Mlp(), (X,), INT8, calibration=feed)) == text


def test_a_feed_that_fails_on_the_way() -> None:
    """Before any pass runs; what the feed raised is the cause."""

    def items() -> Iterator[tuple[Tensor]]:
        yield (X,)
        raise FileNotFoundError("image 7")

    with pytest.raises(fxc.CalibrationError) as caught:
        compiled(Mlp(), (X,), "int8", calibration=items())
    assert str(caught.value) == (
        "the calibration feed failed\n  where item 1\n  why   FileNotFoundError: image 7\n  do    mend the feed; try list(feed)"
    )
    assert isinstance(caught.value.__cause__, FileNotFoundError)


LEFT = "  state program as before this pass; 4 finished passes are kept\n"
PERCENTILE = {"passes": [{"quant.insert": {"range": "percentile:99.99"}}, "quant.finalize"]}
UNUSABLE: dict[str, tuple[Any, Any, str]] = {
    "none": (
        "int8",
        None,
        "there is no calibration data\n"
        "  why   a pass of the recipe measures the model's values on it\n"
        f"{LEFT}"
        "  do    pass calibration=[item, ...], items of the form of the example inputs, two or more",
    ),
    "constant": (
        "int8",
        [(torch.ones(2, 4),)] * 3,
        "no value changes on the calibration feed\n"
        "  where <root>  (x)\n"
        "  why   x is 1 everywhere on the calibration feed; quant.insert can use none of the 1 values it would quantise\n"
        f"{LEFT}"
        "  do    pass items that differ from one another, as the model meets them in use",
    ),
    "too small": (
        PERCENTILE,
        [(seeded(3, 4),), (seeded(2, 4, seed=1),), (X,)],
        "the calibration feed is too small\n"
        "  where <root>  (x)\n"
        "  why   20 values can't tell the 99.99th percentile: it needs 20000\n"
        f"{LEFT.replace('4', '0')}"
        "  do    pass more items, or ask quant.insert for a lower percentile, as percentile:99.9",
    ),
}


@pytest.mark.parametrize(("recipe", "feed", "text"), UNUSABLE.values(), ids=UNUSABLE)
def test_feeds_a_pass_cannot_use(recipe: Any, feed: Any, text: str) -> None:
    class OneLayer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    assert error(fxc.CalibrationError, lambda: compiled(OneLayer(4, 3), (X,), recipe, calibration=feed)) == text


def test_statistics_beyond_the_memory_limit() -> None:
    items = [(X,), (-X,)]
    assert compiled(Mlp(), (X,), "int8", calibration=items, memory=1 << 20).report.passes
    text = error(fxc.CalibrationError, lambda: compiled(Mlp(), (X,), "int8", calibration=items, memory=1000))
    assert text.startswith("a statistic doesn't fit into memory\n  where <root>  (x)\n  why   Distribution of [s")
    assert " takes 32768 bytes, the limit is 1000\n" in text
    assert text.endswith("do    exclude the site in the recipe, or raise compile(memory=...)")
    assert "memory=0 is no number of bytes" in error(fxc.InputError, lambda: compiled(Mlp(), (X,), "int8", calibration=items, memory=0))


# calls that don't fit


class Pair(nn.Module):
    """Two inputs of one batch, a mask of two axes and a scalar."""

    def forward(self, x: Tensor, ids: Tensor, gain: Tensor, extra: Tensor | None = None) -> Tensor:
        return x * gain + ids.float().mean(1, keepdim=True) + x.shape[0] * 0


@pytest.fixture(scope="module")
def pair() -> fxc.CompiledModel:
    return compiled(Pair(), (X, torch.ones(2, 3, dtype=torch.long), torch.tensor(2.0)), dynamic={"x": [0], "ids": [0]})


IDS = torch.ones(2, 3, dtype=torch.long)
GAIN = torch.tensor(2.0)
MISFITS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "dtype": (
        (X.half(), IDS, GAIN),
        {},
        "input 'x' doesn't fit\n  why   expected float32 [batch, 4], got a float16 tensor of shape [2, 4]: dtype or rank differs",
    ),
    "rank": (
        (X[0], IDS, GAIN),
        {},
        "input 'x' doesn't fit\n  why   expected float32 [batch, 4], got a float32 tensor of shape [4]: dtype or rank differs",
    ),
    "rank of a scalar": (
        (X, IDS, GAIN[None]),
        {},
        "input 'gain' doesn't fit\n  why   expected float32 [], got a float32 tensor of shape [1]: dtype or rank differs",
    ),
    "a fixed axis": (
        (X, IDS[:, :2], GAIN),
        {},
        "input 'ids' doesn't fit\n  why   expected int64 [batch, 3], got a int64 tensor of shape [2, 2]: axis 1 is fixed to 3",
    ),
    "the range": (
        (X[:0], IDS[:0], GAIN),
        {},
        "input 'x' doesn't fit\n  why   expected float32 [batch, 4], got a float32 tensor of shape [0, 4]: axis 0 must be in 1..2147483647",
    ),
    "unequal sizes": (
        (X, torch.ones(5, 3, dtype=torch.long), GAIN),
        {},
        "input 'ids' doesn't fit\n"
        "  why   expected int64 [batch, 3], got a int64 tensor of shape [5, 3]: axis 0 is batch, which is 2 elsewhere in this call",
    ),
}
FORMS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "missing": (
        (X, IDS),
        {},
        "the inputs don't fit the model's forward\n  why   missing a required argument: 'gain'\n  do    forward takes (x, ids, gain, extra)",
    ),
    "too many": (
        (X, IDS, GAIN, None, None),
        {},
        "the inputs don't fit the model's forward\n  why   too many positional arguments\n  do    forward takes (x, ids, gain, extra)",
    ),
    "unknown": (
        (X, IDS, GAIN),
        {"extar": None},
        "the inputs don't fit the model's forward\n  why   got an unexpected keyword argument 'extar'; did you mean 'extra'?\n"
        "  do    forward takes (x, ids, gain, extra)",
    ),
    "a misspelt one that is missing": (
        (X, IDS),
        {"gian": GAIN},
        "the inputs don't fit the model's forward\n  why   missing a required argument: 'gain'; 'gian' is unknown, did you mean 'gain'?\n"
        "  do    forward takes (x, ids, gain, extra)",
    ),
    "twice": (
        (X, IDS, GAIN),
        {"x": X},
        "the inputs don't fit the model's forward\n  why   multiple values for argument 'x'\n  do    forward takes (x, ids, gain, extra)",
    ),
    "a tensor where none was": (
        (X, IDS, GAIN),
        {"extra": X},
        "argument 'extra' was not among the example inputs\n"
        "  why   the program was captured with extra=None; this call passes a float32 tensor of shape [2, 4]\n"
        "  do    compile again with extra in example_inputs, or leave it out of the call",
    ),
    "a number for a tensor": (
        (X, IDS, 2.0),
        {},
        "argument 'gain' doesn't have the form it had at capture\n  why   captured with a tensor, called with 2.0\n"
        "  do    call it in the captured form (None stays None, constants keep their value), or compile again with these inputs",
    ),
    "a list for a tensor": (
        ([[1.0, 2.0, 3.0, 4.0]], IDS, GAIN),
        {},
        "argument 'x' doesn't have the form it had at capture\n  why   captured with a tensor, called with [[1.0, 2.0, 3.0, 4.0]]\n"
        "  do    call it in the captured form (None stays None, constants keep their value), or compile again with these inputs",
    ),
}
REMEDY = "\n  do    pass the captured form, or compile again with dynamic= naming that axis"


@pytest.mark.parametrize("stage", ["compiled", "loaded"])
@pytest.mark.parametrize(("args", "kwargs", "text"), [*MISFITS.values(), *FORMS.values()], ids=[*MISFITS, *FORMS])
def test_a_call_that_does_not_fit(
    stage: str, args: tuple[Any, ...], kwargs: dict[str, Any], text: str, pair: fxc.CompiledModel, tmp_path: Path
) -> None:
    model = pair if stage == "compiled" else loaded(pair, tmp_path)
    expected = text + REMEDY if text.startswith("input ") else text
    assert error(fxc.InputError, lambda: model(*args, **kwargs)) == expected


def test_calls_that_fit_in_another_way(pair: fxc.CompiledModel) -> None:
    wanted = Pair()(X, IDS, GAIN)
    assert torch.equal(pair(ids=IDS, gain=GAIN, x=X), wanted)
    assert torch.equal(pair(X, IDS, GAIN, extra=None), wanted)
    assert torch.equal(pair(X, IDS, GAIN, None), wanted)


def test_a_dicts_order_is_no_part_of_its_form() -> None:
    class Conditioned(nn.Module):
        def forward(self, x: Tensor, more: dict[str, Any]) -> Tensor:
            return x + more["a"][0] * more["b"]

    model = Conditioned()
    program = compiled(model, (X, {"a": [X * 2], "b": torch.tensor(2.0)}))
    assert torch.equal(program(X, {"b": torch.tensor(3.0), "a": [X]}), model(X, {"a": [X], "b": torch.tensor(3.0)}))
    for wrong in ({"a": [X]}, {"a": [X], "b": GAIN, "c": GAIN}, {"a": (X,), "b": GAIN}, {"a": [X, X], "b": GAIN}):
        with pytest.raises(fxc.InputError, match="argument 'more' doesn't have the form it had at capture"):
            program(X, wrong)


# drop-ins


@pytest.mark.slow
def test_a_language_model(tmp_path: Path) -> None:
    model, example = ZOO["llama"]()
    module = compiled(model, example, INT8).as_module()
    wanted, got = model(**example), module(**example)
    assert type(got) is type(wanted)
    assert (got.logits - wanted.logits).norm() < 0.05 * wanted.logits.norm()
    ids = torch.randint(5, 99, (3, 7))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = model(**call).logits
    assert module(**call).logits.shape == wanted.shape
    assert (module(**call).logits - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(module(**call, return_dict=False)[0], module(**call).logits)
    assert (module.config is model.config, module.dtype, module.device) == (True, torch.float32, torch.device("cpu"))
    assert (list(module.parameters()), module.training, module.eval() is module, module.to("cpu") is module) == ([], False, True, True)

    again = loaded(module.compiled, tmp_path).as_module()
    assert type(again(**call)) is type(got)
    assert torch.equal(again(**call).logits, module(**call).logits)
    assert (again.config.vocab_size, again.config["hidden_size"], again.config.model_type) == (99, 64, "llama")
    assert not hasattr(again.config, "no_such_entry")


@pytest.mark.slow
def test_a_unet() -> None:
    model, example = ZOO["unet2d_cond"]()
    module = compiled(model, example, INT8).as_module()
    x, t, cond = seeded(3, 4, 16, 16), torch.tensor([5, 50, 500]), seeded(3, 7, 24)
    wanted = model(x, t, cond)
    got = module(x, t, cond)
    assert type(got) is type(wanted)
    assert (got.sample - wanted.sample).norm() < 0.05 * wanted.sample.norm()
    as_tuple = module(x, t, cond, return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], got.sample)
    optional = {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}  # what pipelines pass along
    assert torch.equal(module(x, t, encoder_hidden_states=cond, **optional, return_dict=True).sample, got.sample)
    assert (module.config.in_channels, module.dtype, module.device.type) == (4, torch.float32, "cpu")


def small_unet() -> nn.Module:
    from diffusers import UNet2DModel

    stages = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8, "sample_size": 8}
    torch.manual_seed(0)
    return redraw(UNet2DModel(**stages, **sizes), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["compiled", "loaded"])
def test_a_diffusers_pipeline(stage: str, tmp_path: Path) -> None:
    """Images of a real pipeline: untouched the same, quantised within its noise, sampler and all."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = small_unet()
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        made = pipe(batch_size=2, generator=torch.Generator().manual_seed(5), num_inference_steps=5, output_type="np").images
        return torch.from_numpy(made)

    wanted = images()
    errors = {}
    for name, recipe in (("nothing", NOTHING), ("int8", INT8), ("int4", INT4)):
        model = compiled(unet, (seeded(2, 3, 8, 8), torch.tensor(37)), recipe)
        pipe.unet = (model if stage == "compiled" else loaded(model, tmp_path / name)).as_module()
        errors[name] = float((images() - wanted).norm() / wanted.norm())
    assert errors["nothing"] < 1e-5
    assert errors["nothing"] < errors["int8"] < 0.1 < errors["int4"]
    assert (pipe.device.type, pipe.dtype, pipe.to("cpu").unet is pipe.unet) == ("cpu", torch.float32, True)


def test_a_config_comes_along_from_a_source(tmp_path: Path) -> None:
    """A folder's model has a config too, and it is in the artifact."""
    small_unet().save_pretrained(tmp_path / "unet")
    model = fxc.compile(tmp_path / "unet", NOTHING, (seeded(2, 3, 8, 8), torch.tensor(37)), backend="reference")
    assert model.as_module().config.sample_size == 8
    assert loaded(model, tmp_path).as_module().config.block_out_channels == [16, 32]


def test_a_module_without_config(mlp: fxc.CompiledModel, tmp_path: Path) -> None:
    assert mlp.as_module().config is None
    assert loaded(mlp, tmp_path).as_module().config is None


# explain and bench


def test_explain(mlp: fxc.CompiledModel, tmp_path: Path) -> None:
    folder = mlp.save(tmp_path / "out")
    by_module = api.explain(folder, "fc1")
    assert [(r["pass"], r["what"]) for r in by_module] == [(p, w) for p in ("quant.weight_only", "quant.finalize") for w in ("changed", "held")]
    options = 'weights: "int8/channel", embeddings: null, symmetric: true, range: "mse", storage: false, where: {exclude: ["fc1"]}'
    told = {"pass": "quant.weight_only", "site": "fc1  (linear)", "what": "changed", "why": "int8 in blocks of [1, -1]"}
    assert by_module[0] == {**told, "exclude": f"- quant.weight_only: {{{options}}}"}
    assert by_module[2]["alone"].startswith("codes are stored for every quantised weight")
    check = mlp.report.passes[0].checks[0]
    assert by_module[1]["why"] == f"{check.figure:.3g} >= {check.limit:.3g} dB at {check.value}"
    assert api.explain(folder, "fc1.weight")[0] == by_module[0], "by the weight"
    assert api.explain(folder, "fc1.weight.scale")[0] == by_module[0], "by a constant it made"
    assert api.explain(folder, "dequantize_default")[0] == by_module[0], "by a node it made"
    assert api.explain(folder, "relu") == []
    (line,) = {r["exclude"] for r in api.explain(folder, "<root>") if "exclude" in r}
    assert line.endswith('where: {exclude: ["fc1", "fc2"]}}'), "one line for all that is inside"


UNKNOWN = {
    "fc9": "did you mean 'fc2' or 'fc1'?",
    "fc1.wieght": "did you mean 'fc1.weight' or 'fc2.weight' or 'fc1_weight' or 'fc2_weight' or 'fc1.weight.scale'?",
}


@pytest.mark.parametrize(("name", "why"), UNKNOWN.items(), ids=UNKNOWN)
def test_explain_an_unknown_name(name: str, why: str, mlp: fxc.CompiledModel, tmp_path: Path) -> None:
    folder = mlp.save(tmp_path / "out")
    do = "fxcompress inspect MODEL lists the module paths"
    assert error(fxc.InputError, lambda: api.explain(folder, name)) == (
        f"the artifact has no {name!r}\n  where {folder}\n  why   {why}\n  do    {do}"
    )


def test_explain_a_node_that_a_pass_removed(mlp: fxc.CompiledModel, tmp_path: Path) -> None:
    """It is in no stored program any more, and not unknown."""
    folder = mlp.save(tmp_path / "out")
    gone = next(old for c in mlp.report.passes[1].changes for old in c.replaced)
    assert gone not in {n.name for n in mlp.program.graph.nodes}  # type: ignore[union-attr]
    assert api.explain(folder, gone)


def test_explain_a_node_that_went_by_itself(tmp_path: Path) -> None:
    """The pass replaced the norm; its weights, which no site names, went because nothing reads them any more."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)).eval()
    folder = compiled(model, (seeded(2, 2, 4, 4),), {"passes": ["tidy.fold_batch_norm"]}).save(tmp_path / "out")
    (row,) = api.explain(folder, "1.running_var")
    assert (row["pass"], row["what"]) == ("tidy.fold_batch_norm", "removed")
    assert row["exclude"] == '- tidy.fold_batch_norm: {where: {exclude: ["1"]}}'
    assert row["why"].startswith("nothing reads it after this: ")


def test_explain_a_decline(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc.weight.sum()

    folder = compiled(Twice(), (X,), INT8).save(tmp_path / "out")
    reason = "fc_weight is also read by sum_1, not as a weight"
    assert api.explain(folder, "fc.weight") == [{"pass": "quant.weight_only", "site": "fc  (fc_weight)", "what": "declined", "why": reason}]


def test_bench(mlp: fxc.CompiledModel, tmp_path: Path) -> None:
    facts = api.bench(mlp.save(tmp_path / "out"), runs=3)
    assert 0 < facts["least_ms"] <= facts["median_ms"] < 1000
    assert (facts["runs"], facts["threads"], facts["inputs"]) == (3, 1, {"x": [2, 4]})


# odd models


@dataclasses.dataclass
class Answer:
    """A result class of the user's."""

    value: Tensor
    spare: Tensor | None = None


class Odd(nn.Module):
    """A linear and a buffer for odd forwards to use."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("p", p)


def does(forward: Callable[..., Any], p: Tensor | None = None) -> nn.Module:
    """A module with this forward."""
    return type("Does", (Odd,), {"forward": forward})(seeded(4, seed=3) if p is None else p)  # type: ignore[no-any-return]


ODD: dict[str, tuple[nn.Module, Any, list[Any]]] = {
    # model, example, more calls
    "0-d inputs": (does(lambda m, t, x: x * t), (GAIN, X), [(torch.tensor(3.0), seeded(5, 4))]),
    "only 0-d": (does(lambda m, t: t * 2), (GAIN,), [(torch.tensor(-1.0),)]),
    "integers only": (does(lambda m, x: (x * 2, x > 1)), (IDS,), [(torch.zeros(4, 3, dtype=torch.long),)]),
    "booleans": (does(lambda m, x, mask, f: torch.where(mask, x, 0) * f), (X, X > 0, torch.tensor(True)), []),
    "a tree": (does(lambda m, x: (x + 1, {"a": [x, None]}, None, 3, "s")), (X,), [(seeded(3, 4),)]),
    "None and a tensor": (does(lambda m, x: (None, x.exp())), (X,), []),
    "keywords only": (does(lambda m, *, x, y=None: x if y is None else x + y), {"x": X}, [{"x": seeded(3, 4)}, {"x": X, "y": None}]),
    "positions only": (does(lambda m, x, /, y: x - y), (X, X + 1), [(seeded(3, 4), seeded(3, 4, seed=1))]),
    "*args": (does(lambda m, *x: x[0] - x[1]), (X, X + 1), [(seeded(3, 4), seeded(3, 4, seed=1))]),
    "**kwargs": (does(lambda m, x, **k: x - k["y"]), {"x": X, "y": X + 1}, []),
    "an input given back": (does(lambda m, x: x), (X,), [(seeded(3, 4),)]),
    "one value three times": (does(lambda m, x: [y := x.exp(), y, x, y]), (X,), []),
    "a constant given back": (does(lambda m, x: (x + 1, m.p)), (X,), []),
    "nothing but a constant": (does(lambda m, x: m.p), (X,), []),
    "views of one result": (does(lambda m, x: (y := x + 1, y[:, :2], y.t())), (X,), []),
    "not contiguous": (does(lambda m, x: m.fc(x)), (seeded(4, 2).t(),), [(seeded(3, 8)[:, ::2],), (seeded(4).expand(3, 4),)]),
    "a gradient": (does(lambda m, x: m.fc(x)), (seeded(2, 4).requires_grad_(),), []),
    "complex inside": (does(lambda m, x: torch.fft.fft(x).abs()), (X,), [(seeded(3, 4),)]),
    "complex in and out": (does(lambda m, x: x * m.p * 1j, seeded(4).to(torch.complex64)), (torch.polar(X.abs(), X),), []),
    "infinities": (does(lambda m, x: x.masked_fill(x > 0, -math.inf)), (X,), []),
    "one value a batch": (does(lambda m, x: (x.sum(), x.argmax())), (X,), [(seeded(3, 4),)]),
    "an argument called like a constant": (does(lambda m, p, add: m.p * p + add), (X, X + 1), []),
    "8 bits": (does(lambda m, x: x.float()), (torch.tensor([[-5, 4]], dtype=torch.int8),), []),
    "equal names of results": (does(lambda m, x: {"a": {"b": x}, "a_b": x * 2, "": x * 3, "a b": x * 4}), (X,), []),
    "many results": (does(lambda m, x: [x + i for i in range(100)]), (X,), []),
}


@pytest.mark.parametrize(("model", "example", "calls"), ODD.values(), ids=ODD)
def test_odd_models(model: nn.Module, example: Any, calls: list[Any], tmp_path: Path) -> None:
    program = compiled(model, example)
    again = loaded(program, tmp_path)
    for call in [example, *calls]:
        given = fxc.Inputs.of(call)
        with torch.no_grad():
            wanted = model(*given.args, **given.kwargs)
        assert same(program(*given.args, **given.kwargs), wanted)
        assert same(again(*given.args, **given.kwargs), wanted)
    assert len({v.name for v in program.program.outputs}) == len(program.program.outputs)


def test_results_of_the_users_classes(tmp_path: Path) -> None:
    """Compiled, the class itself; loaded, where its module may be missing, a dict by name or a tuple."""
    model = compiled(does(lambda m, x: Answer(x + 1)), (X,))
    assert (type(model(X)), type(loaded(model, tmp_path)(X))) == (Answer, dict)
    assert torch.equal(loaded(model, tmp_path)(X)["value"], X + 1)
    values, places = loaded(compiled(does(lambda m, x: torch.topk(x, 2)), (X,)), tmp_path)(X)
    assert torch.equal(X.gather(1, places), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = Mlp().to(dtype), X.to(dtype)
    program = compiled(model, (x,), INT8)
    assert (program(x).dtype, program.as_module().dtype) == (dtype, dtype)
    assert torch.equal(loaded(program, tmp_path)(x), program(x))
    assert program.report.output_sqnr > 35
    assert torch.equal(compiled(model, (x,))(x), model(x))


def test_odd_names() -> None:
    model = nn.Sequential()
    names = ["my-layer", "0", "class", "a b", "été", "model", "_x", "weight", "fc_weight"]
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    report = compiled(model, (X,), INT8).report
    assert [c.module for c in report.passes[0].changes] == names
    assert torch.equal(compiled(model, (X,))(X), model(X))


def test_hooks_are_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, given, result: result * 2)
    assert torch.equal(compiled(model, (X,))(X), model(X))


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal]
)
def test_parametrised_weights(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Computed weights are constants once folded, and then sites as any other."""
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 4))).eval()
    assert torch.equal(compiled(model, (X,))(X), model(X))
    report = compiled(model, (X,), {"passes": ["tidy.fold_constants", *INT8["passes"]]}).report
    assert [p.fired for p in report.passes] == [1, 1, 1]
    assert report.output_sqnr > 35


def test_default_dtype_and_grad_mode_do_not_matter() -> None:
    wanted = compiled(Mlp(), (X,), INT8)(X)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            model = Mlp().float()
            assert compiled(model, (X,), INT8)(X).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert not wanted.requires_grad


def test_a_feed_of_other_batch_sizes() -> None:
    def items() -> Iterator[tuple[Tensor]]:
        yield from ((seeded(n, 4, seed=n),) for n in (1, 3, 64))

    assert compiled(Mlp(), (X,), INT8, calibration=items()).report.output_sqnr > 35


def test_no_example() -> None:
    assert error(fxc.InputError, lambda: compiled(Mlp(), None)) == (
        "no example inputs\n  where Mlp\n  why   capture runs the model once on them\n  do    example_inputs=(tensor, ...) or {name: tensor}"
    )


def test_the_lock_file_rebuilds_the_recipe(mlp: fxc.CompiledModel, tmp_path: Path) -> None:
    folder = mlp.save(tmp_path / "out")
    again = fxc.compile(Mlp().eval(), folder / "recipe.lock.yaml", (X,))
    assert torch.equal(again(X), mlp(X))
    assert again.backend.name == "reference"
    assert json.loads((folder / "report.json").read_text())["passes"][0]["options"] == again.report.passes[0].options


def test_what_a_killed_compilation_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, running = (tmp_path / f".fxcompress-{platform.node()}-{pid}-abcdefgh" for pid in (gone.pid, os.getpid()))
    left.mkdir()
    running.mkdir()
    made = compiled(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert made.folder.parent == tmp_path
    assert not left.exists()
    assert running.exists()
