"""Composite ops are written out at capture: what they become, the same numbers, and folds through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.interpret import run as interpret
from fxcompress.measure import relative_error
from tests.passes.helpers import captured, error, function, ops, run, seeded

X, Y = seeded(2, 3, 4), seeded(2, 3, 4, seed=1)
ROW, NUMBER = (0, 0), (0, 0, 0)
FORMS: dict[str, tuple[Callable[..., Any], str]] = {
    "hstack": (lambda x, y: torch.hstack([x, y]), "cat"),
    "hstack of vectors": (lambda x, y: torch.hstack([x[ROW], y[ROW]]), "cat"),
    "hstack of numbers": (lambda x, y: torch.hstack([x[NUMBER], y[NUMBER]]), "unsqueeze unsqueeze cat"),
    "vstack": (lambda x, y: torch.vstack([x, y]), "cat"),
    "vstack of vectors": (lambda x, y: torch.vstack([x[ROW], y[ROW]]), "unsqueeze unsqueeze cat"),
    "dstack": (lambda x, y: torch.dstack([x, y]), "cat"),
    "dstack of matrices": (lambda x, y: torch.dstack([x[0], y[0]]), "unsqueeze unsqueeze cat"),
    "dstack of vectors": (lambda x, y: torch.dstack([x[ROW], y[ROW]]), "unsqueeze unsqueeze unsqueeze unsqueeze cat"),
    "column_stack": (lambda x, y: torch.column_stack([x[ROW], y[0].mT]), "unsqueeze cat"),
    "column_stack of numbers": (lambda x, y: torch.column_stack([x[NUMBER], y[NUMBER]]), "unsqueeze unsqueeze unsqueeze unsqueeze cat"),
    "hsplit": (lambda x, y: torch.hsplit(x, 3), "tensor_split.sections getitem getitem getitem"),
    "hsplit of a vector": (lambda x, y: torch.hsplit(x[ROW], [1]), "tensor_split.indices getitem getitem"),
    "vsplit": (lambda x, y: torch.vsplit(x, 2), "tensor_split.sections getitem getitem"),
    "dsplit": (lambda x, y: torch.dsplit(x, [1, 3]), "tensor_split.indices getitem getitem getitem"),
    "movedim": (lambda x, y: x.movedim(0, -1) + 1, "permute add.Tensor"),
    "moveaxis": (lambda x, y: torch.moveaxis(x, (2, 0), (0, 1)) + 1, "permute add.Tensor"),
    "swapdims": (lambda x, y: x.swapdims(0, 2) + 1, "transpose.int add.Tensor"),
    "glu": (lambda x, y: nn.functional.glu(x[:, :2], 1), "chunk getitem getitem sigmoid mul.Tensor"),
}


@pytest.mark.parametrize("name", FORMS)
def test_stacks_splits_and_gates(name: str) -> None:
    body, wanted = FORMS[name]
    program, expected = function(body, X, Y), body(X, Y)
    assert [op for op in ops(program) if op not in ("select.int", "slice.Tensor", "mT")] == wanted.split()
    for old, new in zip(expected if isinstance(expected, tuple | list) else [expected], interpret(program, (X, Y)), strict=True):
        assert torch.equal(old, new)


class Read(nn.Module):
    """A part that reads four hidden channels, of which the second is read by nobody."""

    def __init__(self, part: nn.Module, weight: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.part, self.is_lstm = nn.Linear(4, 4), part, isinstance(part, nn.LSTMCell)
        getattr(part, weight).data[..., 1] = 0

    def forward(self, x: Tensor, h: Tensor) -> Any:
        """The part of the hidden channels, with h as its state or second factor."""
        y = self.first(x).sigmoid()
        return self.part(h, y) if isinstance(self.part, nn.Bilinear) else self.part(y, (h, h + 1) if self.is_lstm else h)


PARTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gru": (lambda: nn.GRUCell(4, 5), "weight_ih"),
    "gru without biases": (lambda: nn.GRUCell(4, 5, bias=False), "weight_ih"),
    "lstm": (lambda: nn.LSTMCell(4, 5), "weight_ih"),
    "tanh": (lambda: nn.RNNCell(4, 5), "weight_ih"),
    "relu": (lambda: nn.RNNCell(4, 5, nonlinearity="relu"), "weight_ih"),
    "bilinear": (lambda: nn.Bilinear(5, 4, 3), "weight"),
    "bilinear without a bias": (lambda: nn.Bilinear(5, 4, 3, bias=False), "weight"),
}


@pytest.mark.parametrize("name", PARTS)
def test_cells_and_bilinear_forms(name: str) -> None:
    """The model's numbers at another batch too, and a hidden channel that they don't read goes."""
    make, weight = PARTS[name]
    model, items = Read(make(), weight), [(seeded(n, 4, seed=n), seeded(n, 5, seed=n + 9)) for n in (2, 3)]
    before, _ = run(captured(model, *items[0]), "tidy.fold_constants")
    for item in items:
        expected = model(*item)
        for old, new in zip(expected if isinstance(expected, tuple) else [expected], interpret(before, item), strict=True):
            assert relative_error(old, new) < 1e-6
    after, report = run(before, "sparsity.remove_channels")
    assert report.fired == 1
    assert after.constants["first.weight"].shape == (3, 4)
    assert error(before, after, items[1]) < 1e-6


def test_a_channel_of_the_first_factor_goes() -> None:
    """The opened weight holds it in its rows."""
    model = nn.Bilinear(4, 5, 3)
    model.weight.data[:, 1] = 0

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part = nn.Linear(4, 4), model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.part(self.first(x).sigmoid(), y)

    before, _ = run(captured(Factors(), seeded(2, 4), seeded(2, 5)), "tidy.fold_constants")
    after, report = run(before, "sparsity.remove_channels")
    assert report.fired == 1
    assert after.constants["first.weight"].shape == (3, 4)
    assert error(before, after) < 1e-6
