"""tidy.no_ops: what it drops, what it leaves with its reason, and what its contract catches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fxcompress.errors import ContractViolation
from fxcompress.passes.tidy import no_ops
from tests.passes.helpers import declined, error, function, lines, node, op_name, run, seeded, text, unchanged_by_second_run, zoo

aten = torch.ops.aten
X = seeded(2, 3, 4)

DROPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: nnf.dropout(x, 0.1, training=False),
    "dropout1d": lambda x: nnf.dropout1d(x, 0.1, training=False),
    "to": lambda x: x.to(torch.float32),
    "copying to": lambda x: x.to(torch.float32, copy=True),
    "type_as": lambda x: x.type_as(x),
    "clone": lambda x: x.clone(),
    "view": lambda x: x.view(-1, 3, 4),
    "reshape by size": lambda x: x.reshape(x.shape[0], 3, 4),
    "flatten": lambda x: x.flatten(1, 1),
    "expand": lambda x: x.expand(-1, 3, -1),
    "expand by size": lambda x: x.expand(x.shape[0], 3, 4),
    "slice": lambda x: aten.slice.Tensor(x, 1, 0),
    "long slice": lambda x: aten.slice.Tensor(x, 1, 0, 3),
    "squeeze": lambda x: x.squeeze(1),
    "repeat": lambda x: x.repeat(1, 1, 1),
    "permute": lambda x: x.permute(0, -2, -1),
    "transpose": lambda x: x.transpose(1, -2),
    "pad": lambda x: nnf.pad(x, (0, 0, 0, 0)),
    "cat": lambda x: torch.cat([x], 1),
    "times 1": lambda x: x * 1,
    "1 times": lambda x: torch.mul(torch.ones(()), x),
    "times a wider 1": lambda x: x * torch.tensor(1, dtype=torch.float64),
    "over 1": lambda x: x / 1.0,
    "plus 0": lambda x: x + 0,
    "minus 0": lambda x: x - 0.0,
    "to the power 1": lambda x: x**1,
}


def body(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The change between two ops, so that it is neither input nor output."""
    return lambda x: change(x.exp()).sin()


@pytest.mark.parametrize("change", [pytest.param(c, id=i) for i, c in DROPPED.items()])
def test_drops(change: Callable[[Tensor], Tensor]) -> None:
    before = function(body(change), X)
    if change is DROPPED["1 times"] or change is DROPPED["times a wider 1"]:  # a literal tensor: constant only once its cone is folded
        before, _ = run(before, "tidy.fold_constants")
    after, report = run(before, "tidy.no_ops")
    assert text(after) == lines("""
        exp = exp(x)
        sin = sin(exp)
        return sin""")
    assert report.fired == 1
    assert declined(report) == []
    assert error(before, after) == 0


def test_integers_are_dropped_and_verified() -> None:
    before = function(lambda ids: (ids.view(-1, 3) * 1)[:, :] + 2, torch.zeros(2, 3, dtype=torch.int64))
    after, report = run(before, "tidy.no_ops")
    assert text(after) == lines("""
        add = add.Tensor(ids, 2)
        return add""")
    assert {c.verdict for c in report.checks} == {"held"}


def test_chain_goes_in_one_run() -> None:
    before = function(lambda x: x.exp().clone().view(-1, 3, 4).squeeze(1).mul(1).sin(), X)
    after, report = run(before, "tidy.no_ops")
    assert (text(after), report.fired) == ("exp = exp(x)\nsin = sin(exp)\nreturn sin", 4)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda x: x.to(torch.float64),
    "view": lambda x: x.flatten(1),
    "view that swaps sizes": lambda x: x.reshape(x.shape[1], x.shape[0], 4),
    "expand": lambda x: x.sum(2, keepdim=True).expand(-1, -1, 4),
    "slice": lambda x: aten.slice.Tensor(x, 1, 1),
    "slice in steps": lambda x: aten.slice.Tensor(x, 1, 0, 3, 2),
    "permute": lambda x: x.permute(0, 2, 1),
    "pad that shifts": lambda x: nnf.pad(x, (-1, 1)),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "cat": lambda x: torch.cat([x, x], 1),
    "times 2": lambda x: x * 2,
    "times a vector of ones": lambda x: x * torch.ones(4),
    "0 minus": lambda x: torch.sub(torch.zeros(()), x),
    "1 over": lambda x: torch.div(torch.ones(()), x),
    "0 plus twice": lambda x: torch.add(torch.zeros(()), x, alpha=2),
    "floor over 1": lambda x: torch.div(x, 1, rounding_mode="floor"),
}


@pytest.mark.parametrize("change", [pytest.param(c, id=i) for i, c in KEPT.items()])
def test_keeps_what_does_something(change: Callable[[Tensor], Tensor]) -> None:
    before, _ = run(function(body(change), torch.cat([X, X]), dynamic={"x": [0]}), "tidy.fold_constants")
    after, report = run(before, "tidy.no_ops")
    assert text(after) == text(before)
    assert declined(report) == []


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "dropout in training": (
        lambda x: nnf.dropout(x.exp(), 0.5, training=True) * 0 + x,
        "dropout",
        "dropout drops at random in every call, with p = 0.5",
    ),
    "promotion": (lambda x: (x > 0) * 1, "mul", "mul turns torch.bool into torch.int64"),
    "true division": (lambda x: (x > 0).long() / 1, "div", "div turns torch.int64 into torch.float32"),
    "broadcast": (lambda x: x.sum() * torch.ones(1, 1), "mul", "mul broadcasts sum_1 to [1, 1]"),
    "copy of an input": (lambda x: x.clone(), "clone", "clone is an output of its own: x is an input, a constant or another output"),
    "second copy": (
        lambda x: [y := x.exp(), y.clone()],
        "clone",
        "clone is an output of its own: exp is an input, a constant or another output",
    ),
    "strides read": (
        lambda x: torch.view_as_complex(x.view(-1, 3, 2, 2).transpose(1, 2).contiguous().exp()).real.exp(),
        "contiguous",
        "contiguous lays transpose out anew in memory, and view_as_complex may depend on that",
    ),
}


@pytest.mark.parametrize(("change", "site", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(change: Callable[[Tensor], Any], site: str, reason: str) -> None:
    before, _ = run(function(change, X), "tidy.fold_constants")
    after, report = run(before, "tidy.no_ops")
    assert text(after) == text(before)
    assert declined(report) == [(site, reason)]


def test_layout_made_anew_before_the_reader_is_free() -> None:
    """The linear layer between lays its result out alike for all strides."""
    before = function(lambda x, w: torch.view_as_complex(nnf.linear(x.transpose(1, 2).contiguous(), w)).real.exp(), X, w=seeded(2, 3))
    _, report = run(before, "tidy.no_ops")
    assert (report.fired, declined(report)) == (1, [])


def test_views_follow_a_dropped_copy() -> None:
    """The copy made the view legal; without the copy, the program still runs."""
    before = function(lambda x: x.transpose(1, 2).contiguous().exp().view(-1, 12).sin(), X)
    after, report = run(before, "tidy.no_ops")
    assert text(after) == lines("""
        transpose = transpose.int(x, 1, 2)
        exp = exp(transpose)
        view = reshape(exp, [-1, 12])
        sin = sin(view)
        return sin""")
    assert report.fired == 1
    assert error(before, after) == 0


def test_second_run_changes_nothing() -> None:
    unchanged_by_second_run(function(lambda x: (x.exp().contiguous().view(-1, 3, 4) * 1).transpose(1, 2).contiguous().exp(), X), "tidy.no_ops")


def test_negative_zero_stays() -> None:
    before = function(lambda x: x.abs().neg().add(0).sin(), torch.tensor([0.0, 1.0]))
    after, _ = run(before, "tidy.no_ops")
    assert "add" not in text(after)


def anything(value: Any, *_: Any) -> bool:
    return True


FAULTS: dict[str, tuple[str, Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "sign": ("_is", anything, lambda x: x * -1),
    "factor": ("_is", anything, lambda x: x * 1.5),
    "offset": ("_is", anything, lambda x: x + 1e-6),
    "precision": ("same_form", anything, lambda x: x.half()),
    "wider": ("same_form", anything, lambda x: x.double()),
    "other rows": ("same_form", anything, lambda x: aten.slice.Tensor(x, 1, 1)),
}


@pytest.mark.parametrize(("helper", "fault", "change"), [pytest.param(*f, id=i) for i, f in FAULTS.items()])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, helper: str, fault: Callable[..., Any], change: Callable[[Tensor], Tensor]) -> None:
    before = function(body(change), X)
    monkeypatch.setattr(no_ops, helper, fault)
    with pytest.raises(ContractViolation, match=r"tidy\.no_ops breaks its exact contract at 1 of 1 sites"):
        run(before, "tidy.no_ops")


@pytest.mark.parametrize("op", [aten.permute.default, aten.transpose.int, aten.constant_pad_nd.default])
def test_contract_bites_on_wrong_axes(monkeypatch: pytest.MonkeyPatch, op: Any) -> None:
    bodies = {"permute.default": lambda x: x.permute(0, 2, 1), "transpose.int": lambda x: x.transpose(1, 2)}
    change = bodies.get(str(op).removeprefix("aten."), lambda x: aten.constant_pad_nd.default(x, [1, -1]))
    before = function(body(change), seeded(2, 3, 3))
    monkeypatch.setitem(no_ops.RULES, op, lambda node, on: node.args[0])  # type: ignore[arg-type]
    with pytest.raises(ContractViolation):
        run(before, "tidy.no_ops")


@pytest.mark.parametrize(
    ("name", "fired"), [("llama", 35), ("resnet", 0), ("vae_decoder", 15), pytest.param("sam", 50, marks=pytest.mark.slow)]
)
def test_real_models(name: str, fired: int) -> None:
    before, _ = run(zoo(name), "tidy.fold_constants")
    after, report = run(before, "tidy.no_ops")
    assert report.fired == fired
    assert declined(report) == []
    assert error(before, after) < 1e-6  # layouts change, so kernels may round otherwise
    assert not {op_name(n) for n in after.graph.nodes if n.op == "call_function"} & {"contiguous", "dropout", "clone", "to.dtype_layout"}


def test_names_are_those_of_the_nodes() -> None:
    before = function(lambda x: nnf.dropout(x.exp(), 0.1, training=False).sin(), X)
    _, report = run(before, "tidy.no_ops")
    assert report.changes[0].replaced == {"dropout": "exp"}
    assert node(before, "dropout").args[0] is node(before, "exp")
