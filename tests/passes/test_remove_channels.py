"""sparsity.remove_channels: rows and columns go together; what another layer reads stays; refusals; faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fxcompress.errors import ContractViolation
from fxcompress.passes.sparsity import remove_channels
from fxcompress.passes.sparsity.remove_channels import RemoveChannels
from fxcompress.program import Program
from tests.passes.helpers import declined, error, function, planted, run, seeded, text, zoo

X, IMAGE = seeded(2, 3, 6), seeded(2, 3, 8, 8)
ALIVE = torch.tensor([True, False, True, True, False, True, True, True])
W, B, V = seeded(8, 6, seed=1), seeded(8, seed=2), seeded(5, 8, seed=3) * ALIVE
C, K, D = seeded(8, 3, 3, 3, seed=4), seeded(4, 8, 3, 3, seed=5) * ALIVE.view(1, -1, 1, 1), seeded(5, 8, seed=6)


def perceptron(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return nnf.linear(nnf.sigmoid(nnf.linear(x, w, b)), v)


def mlp() -> Program:
    return function(perceptron, X, w=W, b=B, v=V, dynamic=False)


def test_rows_and_columns_go() -> None:
    """Though sigmoid(0) isn't 0: what goes is what nobody reads."""
    after, report = run(mlp(), RemoveChannels())
    assert text(after) == text(mlp())
    assert (report.fired, declined(report)) == (1, [])
    wanted = {"w": W[ALIVE], "b": B[ALIVE], "v": V[:, ALIVE]}
    assert all(torch.equal(after.constants[n], t) for n, t in wanted.items())
    assert error(mlp(), after) < 1e-6


def test_convolution() -> None:
    before = function(lambda x, w, b, k: nnf.conv2d(nnf.relu(nnf.conv2d(x, w, b)), k, padding=1), IMAGE, w=C, b=B, k=K, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (1, [])
    assert torch.equal(after.constants["w"], C[ALIVE])
    assert torch.equal(after.constants["k"], K[:, ALIVE])
    assert error(before, after) < 1e-6


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "read elsewhere": (
        lambda x, w, b, v, d: [y := nnf.linear(x, w, b).relu(), nnf.linear(y, v), nnf.linear(y, d)][1:],
        "every channel is read by some layer",
    ),
    "an output": (lambda x, w, b, v, d: [y := nnf.linear(x, w, b).relu(), nnf.linear(y, v)], "the value is an output of the program"),
    "scores": (
        lambda x, w, b, v, d: [y := nnf.linear(x, w, b), nnf.linear(y, v), y @ y.transpose(-1, -2)][1:],
        "matmul reads the channels too, without a weight",
    ),
}


@pytest.mark.parametrize(("body", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(body: Callable[..., Any], reason: str) -> None:
    before = function(body, X, w=W, b=B, v=V, d=D, dynamic=False)
    after, report = run(before, RemoveChannels())
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (0, [("linear_1", reason)])


def test_refuses_to_leave_nothing() -> None:
    _, report = run(function(perceptron, X, w=W, b=B, v=V * 0, dynamic=False), RemoveChannels())
    assert (report.fired, declined(report)) == (0, [("linear_1", "no channel would be left")])


def test_second_run_changes_nothing() -> None:
    once, _ = run(mlp(), RemoveChannels())
    _, report = run(once, RemoveChannels())
    assert (report.fired, declined(report)) == (0, [])


@pytest.mark.parametrize("fault", [lambda k: k.roll(1), lambda k: ~k, lambda k: k & (torch.arange(len(k)) != 3)])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any]) -> None:
    planted(monkeypatch, remove_channels, "kept", fault)
    with pytest.raises(ContractViolation, match=r"sparsity\.remove_channels breaks its exact contract"):
        run(mlp(), RemoveChannels())


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_real_model(name: str) -> None:
    """Half of the hidden units of the perceptrons pruned."""
    before, _ = run(zoo(name), "tidy.fold_constants")
    wide = [n for n, t in before.constants.items() if t.shape == (64, 128)]
    for constant in wide:
        before.constants[constant] = before.constants[constant] * (torch.arange(128) % 2)
    after, report = run(before, RemoveChannels())
    assert (report.fired, declined(report)) == (len(wide), [])
    assert len(wide) == 2
    assert all(after.constants[n].shape == (64, 64) for n in wide)
    assert error(before, after) < 1e-5
