"""What a compiled model must never do in silence: give numbers that rounding alone decides, read past a table, skip what it promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc

X = torch.linspace(-1, 1, 64).view(2, 32)
INT8 = "int8-weight-only"


class Ties(nn.Module):
    """A router whose scores are all equal: rounding alone picks the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 64)

    def forward(self, x):
        p = (self.a(x) * 0).softmax(-1)
        return torch.zeros_like(p).scatter(1, p.topk(2, -1).indices, 1.0) * torch.arange(64.0)


class TiedIndices(Ties):
    def forward(self, x):
        return (self.a(x) > 0).float().topk(5)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.mix = nn.LSTM(32, 32, batch_first=True), nn.Parameter(torch.randn(32, 32))
        self.out = nn.Linear(32, 32)

    def forward(self, x):
        return self.out(torch.einsum("bsk,kn->bsn", self.lstm(x)[0], self.mix))


class ConstantOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.register_buffer("k", torch.ones(3))

    def forward(self, x):
        return self.a(x), self.k


def built(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Ties, TiedIndices])
def test_outputs_that_rounding_decides_are_refused(kind: Any) -> None:
    with pytest.raises(fxc.BackendRefusal, match="other numbers than the program"):
        fxc.compile(built(kind), INT8, (X,))


@pytest.mark.parametrize("bad", [20, -1, 10**7])
def test_an_index_past_the_table_is_an_error_as_in_the_model(bad: int, tmp_path: Path) -> None:
    compiled = fxc.compile(built(Table), INT8, (torch.tensor([[1, 2, 3]]),))
    compiled.save(tmp_path / "out")
    for model in (compiled, fxc.load(tmp_path / "out")):
        assert model(torch.tensor([[0, 19]])).shape == (1, 2, 20)
        with pytest.raises(fxc.InputError, match="it indexes a table of 20 rows"):
            model(torch.tensor([[bad, 1]]))


def test_a_loaded_model_is_the_one_that_was_checked(tmp_path: Path) -> None:
    first, second = (fxc.compile(nn.Linear(32, 32).eval(), INT8, (X,)) for _ in range(2))
    first.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    second.save(tmp_path / "out")
    assert torch.equal(loaded(X), first(X))
    assert not torch.equal(second(X), first(X))


@pytest.mark.parametrize("excluded", ["head", "table"])
def test_excluding_one_reader_of_a_tied_weight_leaves_it_alone(excluded: str) -> None:
    steps = [{"quant.weight_only": {"weights": "int8/channel", "where": {"exclude": [excluded]}}}, "quant.finalize"]
    report = fxc.compile(built(Table), {"passes": steps}, (torch.tensor([[1, 2, 3]]),)).report
    assert (report.passes[0].fired, report.passes[0].legal) == (0, 1)


def test_weights_inside_opaque_ops_are_declined_and_their_work_is_counted() -> None:
    report = fxc.compile(built(Recurrent), INT8, (torch.randn(2, 7, 32),)).report
    reasons = [d.reason for d in next(p for p in report.passes if p.name == "quant.weight_only").declined]
    assert [r.split(" is ")[1] for r in reasons] == ["multiplied inside lstm, where its axes aren't known"] * 2
    assert report.backend is not None
    assert report.backend.integer_share == 0.2, "a linear and an einsum of ten equal matrices"


def test_a_constant_among_the_outputs_is_refused_by_name() -> None:
    with pytest.raises(fxc.BackendRefusal) as caught:
        fxc.compile(built(ConstantOutput), INT8, (X,))
    assert str(caught.value) == (
        "output 'output_1' is a constant of the model\n"
        "  where <root>  (k)\n"
        "  why   no input decides it\n"
        '  do    leave it out, or backend="reference"'
    )


def test_nan_in_the_example_is_refused() -> None:
    with pytest.raises(fxc.InputError, match="holds NaN"):
        fxc.compile(nn.Linear(32, 32).eval(), INT8, (X * float("nan"),))


def test_meta_examples() -> None:
    with pytest.raises(fxc.InputError, match="on the meta device"):
        fxc.capture(nn.Linear(2, 2).eval(), (torch.zeros(1, 2, device="meta"),))


@pytest.mark.parametrize("place", [None, 3])
def test_an_artifact_lies_in_a_folder(place: object) -> None:
    with pytest.raises(fxc.ArtifactError, match=f"an artifact lies in a folder\n  why   {place} names none"):
        fxc.load(place)  # type: ignore[arg-type]


def test_what_the_runtime_lacks_is_a_refusal_not_a_broken_artifact() -> None:
    with pytest.raises(fxc.BackendRefusal, match="onnxruntime can't run the program"):
        fxc.compile(nn.Sequential(nn.Linear(32, 32), nn.GELU()).double().eval(), INT8, (X.double(),))


@pytest.mark.parametrize("recipe", [None, 5, ""])
def test_what_is_no_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(fxc.RecipeError, match="this is no recipe"):
        fxc.compile(nn.Linear(32, 32).eval(), recipe, (X,))


def test_unknown_check_and_threads_are_refused_before_any_work() -> None:
    with pytest.raises(fxc.RecipeError, match="check='foo' is unknown"):
        fxc.compile(nn.Linear(32, 32).eval(), INT8, (X,), check="foo")  # type: ignore[arg-type]
    with pytest.raises(fxc.InputError, match="threads=0"):
        fxc.compile(nn.Linear(32, 32).eval(), INT8, (X,), threads=0)


def test_a_file_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    fxc.compile(nn.Linear(32, 32).eval(), INT8, (X,)).save(tmp_path / "out")
    (tmp_path / "out" / "more.bin").write_bytes(b"x")
    with pytest.raises(fxc.ArtifactError, match="doesn't list"):
        fxc.load(tmp_path / "out")


def test_saved_files_can_be_read_by_everybody(tmp_path: Path) -> None:
    fxc.compile(nn.Linear(32, 32).eval(), INT8, (X,)).save(tmp_path / "out")
    assert {f.stat().st_mode & 0o444 for f in (tmp_path / "out").iterdir()} == {0o444}
