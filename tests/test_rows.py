"""Of a long probe a contract compares as many rows as tell an op, where all rows are alike; faults in what tells them apart are still found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from fxcompress.checker import check
from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.measure import slice_error
from fxcompress.program import Program
from fxcompress.rows import LEAST, ROWS
from fxcompress.transport.change import Elementwise
from fxcompress.transport.labels import Kind, Label
from tests.passes.helpers import Builder, function, seeded

F = torch.nn.functional
LONG = 4 * ROWS


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def of_linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


WEIGHT, GAIN, PLACES = seeded(3, 4), seeded(4), seeded(LONG, 4)
LIKE: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor], tuple[int, ...]]] = {  # body, inputs, the shape that is compared
    "linear": (lambda x: F.linear(x, WEIGHT, GAIN[:3]), [seeded(1, LONG, 4)], (1, ROWS, 3)),
    "linear, many sequences": (lambda x: F.linear(x, WEIGHT), [seeded(64, 8 * ROWS, 4)], (64, LEAST, 3)),
    "linear, a batch of few": (lambda x: F.linear(x, WEIGHT), [seeded(LONG, 2, 4)], (ROWS // 2, 2, 3)),
    "sum of two": (lambda x, y: x + y, [seeded(1, LONG, 4), seeded(1, LONG, 4, seed=1)], (1, ROWS, 4)),
    "sum with one row": (lambda x, y: x + y, [seeded(1, LONG, 4), seeded(4, seed=1)], (1, ROWS, 4)),
    "a size": (lambda x: x * x.shape[1], [seeded(1, LONG, 4)], (1, ROWS, 4)),
    "gain": (lambda x: x * GAIN, [seeded(1, LONG, 4)], (1, ROWS, 4)),
    "cast": (lambda x: x.to(torch.float64), [seeded(1, LONG, 4)], (1, ROWS, 4)),
    "norm": (lambda x: F.layer_norm(x, (4,), GAIN), [seeded(1, LONG, 4)], (1, ROWS, 4)),
    "norm of two axes": (lambda x: F.layer_norm(x, (3, 4)), [seeded(LONG, 3, 4)], (LEAST, 3, 4)),
    "a matrix of inputs": (of_linear, [seeded(1, LONG, 4), seeded(3, 4, seed=1)], (1, ROWS, 3)),
    "mean": (lambda x: x.mean(-1, keepdim=True), [seeded(1, LONG, 4)], (1, ROWS, 1)),
    "attention": (attention, [seeded(1, 2, LONG, 4), *(seeded(1, 2, 5, 4, seed=s) for s in (1, 2))], (1, 2, ROWS // 2, 4)),
    "attention, masked": (
        masked,
        [seeded(1, 1, LONG, 4), *(seeded(1, 1, 5, 4, seed=s) for s in (1, 2)), seeded(1, 1, LONG, 5)],
        (1, 1, ROWS, 4),
    ),
}
UNLIKE: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "few rows": (lambda x: F.linear(x, WEIGHT), [seeded(1, ROWS, 4)]),
    "positions": (lambda x: x + PLACES, [seeded(1, LONG, 4)]),
    "norm of the rows": (lambda x: F.layer_norm(x, (LONG, 4)), [seeded(1, LONG, 4)]),
    "mean over rows": (lambda x: x.mean(1, keepdim=True), [seeded(1, LONG, 4)]),
    "softmax": (lambda x: x.softmax(1), [seeded(1, LONG, 4)]),
    "causal": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), [seeded(1, 1, LONG, 4), seeded(1, 1, LONG, 4, seed=1)]),
    "keys are queries": (lambda q: F.scaled_dot_product_attention(q, q, q), [seeded(1, 1, LONG, 4)]),
}


def again(edit: Edit, old: fx.Node) -> fx.Node:
    return edit.insert(old.target, *old.args, like=old, val=old.meta["val"], **old.kwargs)


def verdict(program: Program, change: Callable[[Edit, fx.Node], fx.Node]) -> str:
    """That of the result, computed in another way."""
    old, edit = program.results()[0], Edit(program)
    with edit.site(old):
        edit.replace(old, change(edit, old))
    return check(program, edit, Exact(), program.example)[0].verdict


def compared(program: Program, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The shape of what is compared first when the result is computed as it was."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr("fxcompress.contract.slice_error", lambda old, new: seen.append(tuple(old.shape)) or slice_error(old, new))
    assert verdict(program, again) == "held"
    return seen[-1]


def first_loudest(x: Tensor) -> Tensor:
    """Its greatest number in the first row, which is looked at anyway."""
    return torch.cat([torch.full((1,), 100.0), x.flatten()[1:]]).reshape(x.shape)


@pytest.mark.parametrize("name", LIKE)
def test_rows_that_are_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, inputs, shape = LIKE[name]
    assert compared(function(body, *map(first_loudest, inputs)), monkeypatch) == shape


@pytest.mark.parametrize("name", UNLIKE)
def test_rows_that_may_not_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = function(UNLIKE[name][0], *UNLIKE[name][1])
    assert compared(program, monkeypatch) == tuple(run(program, program.example)[0].shape)


@pytest.mark.parametrize("name", LIKE)
def test_what_mixes_rows_is_found(name: str) -> None:
    """The last row but one trades places with the one before it, and neither would be among those that are compared."""
    body, inputs, _ = LIKE[name]

    def mixed(edit: Edit, old: fx.Node) -> fx.Node:
        x = old.args[0]
        size = x.meta["val"].shape  # type: ignore[union-attr]
        order = torch.arange(max(size))
        order[[-3, -2]] = order[[-2, -3]]
        axis = len(size) - 1 - list(size)[::-1].index(max(size))
        places = edit.constant("order", order, like=old)
        moved = edit.insert(torch.ops.aten.index_select.default, x, axis, places, like=old)
        return edit.insert(old.target, moved, *old.args[1:], like=old, val=old.meta["val"], **old.kwargs)

    assert verdict(function(body, *inputs), mixed) == "broken"


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_operands_of_attention_that_trade_places_are_found(order: tuple[int, ...]) -> None:
    program = function(attention, *(seeded(1, 1, LONG, 4, seed=s) for s in range(3)))
    swapped = lambda edit, old: edit.insert(old.target, *(old.args[i] for i in order), like=old, val=old.meta["val"], **old.kwargs)  # noqa: E731
    assert verdict(program, swapped) == "broken"


@pytest.mark.parametrize("wrong", [False, True])
def test_a_change_along_the_rows_is_compared_in_all_of_them(wrong: bool) -> None:
    """Every row is carried at another scale; at a wrong one a row that would be left out tells."""
    program = function(lambda x: torch.relu(x) * GAIN, seeded(1, LONG, 4).abs())
    product = program.results()[0]
    relu, numbers = product.args[0], torch.cat([torch.arange(1.0, LONG + 1), torch.ones(1)])
    change = Elementwise((Label(torch.arange(LONG).reshape(1, LONG, 1).numpy()),), Kind.SCALE, numbers)
    edit = Edit(program)
    scales = numbers[:-1].reshape(1, LONG, 1).clone()
    scales[0, -2] *= 2 if wrong else 1
    with edit.site(product):
        edit.carry(relu, change)
        scaled = edit.insert(torch.ops.aten.mul.Tensor, relu.args[0], edit.constant("scales", scales, like=relu), like=relu)
        edit.update(relu, scaled)
        back = edit.insert(torch.ops.aten.div.Tensor, relu, edit.constant("back", numbers[:-1].reshape(1, LONG, 1), like=product), like=product)
        edit.update(product, back, *product.args[1:])
    assert {m.verdict for m in check(program, edit, Exact(), program.example)} == ({"held", "broken"} if wrong else {"held"})


def test_values_without_numbers_prove_nothing() -> None:
    assert verdict(function(lambda x: torch.relu(x[..., :0]), seeded(2, LONG, 4)), again) == "unverified"


def test_the_loudest_row_is_looked_at() -> None:
    """A channel that one token has, a thousand times what others have: its weight may not be divided by what it is multiplied by."""
    x = seeded(1, LONG, 4) * torch.tensor([1.0, 1.0, 1e-6, 1.0])
    x[0, 1, 2] = 1000.0
    built = Builder(x=x)
    weight, gain = built.constant("w", seeded(3, 4)), built.constant("g", torch.ones(4))
    program = built.program(built.op(torch.ops.aten.linear.default, built.op(torch.ops.aten.mul.Tensor, built.x, gain), weight))
    old, edit, vector = program.results()[0], Edit(program), torch.tensor([2.0, 1.0, 4.0, 1.0])
    wrong = vector.clone()
    wrong[2] = 1 / wrong[2]
    with edit.site(old):
        edit.carry(old.args[0], vector.mul)  # type: ignore[arg-type]
        edit.carry(weight, wrong.reciprocal().mul)
        edit.fold(weight, program.constants["w"] / wrong)
        edit.carry(gain, vector.mul)
        edit.fold(gain, vector)
    found = check(program, edit, Exact(), program.example)
    assert {m.value: m.verdict for m in found} == {"g": "held", "w": "held", "mul_tensor": "held", old.name: "broken"}


def test_rows_of_a_mask_are_all_looked_at() -> None:
    mask = torch.zeros(1, LONG, 1, dtype=torch.bool)
    mask[0, 1] = True
    built = Builder(x=seeded(1, LONG, 4), m=mask)
    program = built.program(built.op(torch.ops.aten.masked_fill.Scalar, built.x, built.m, -5.0))
    assert verdict(program, lambda edit, old: edit.insert(old.target, *old.args[:2], 5.0, like=old)) == "broken"
