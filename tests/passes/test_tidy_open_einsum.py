"""tidy.open_einsum: every two-operand equation as a matrix product; refusals; faults; and what quantises it afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import ContractViolation
from fxcompress.passes.tidy import open_einsum
from fxcompress.program import Program
from tests.passes.helpers import declined, error, function, lines, run, seeded, text, unchanged_by_second_run

NAME = "tidy.open_einsum"
EQUATIONS = [
    ("bqd,bkd->bqk", (2, 5, 8), (2, 7, 8)),
    ("bqk,bkd->bqd", (2, 5, 7), (2, 7, 8)),
    ("bhqd,bhkd->bhqk", (2, 3, 5, 8), (2, 3, 7, 8)),
    ("bqhd,bkhd->bhqk", (2, 5, 3, 8), (2, 7, 3, 8)),
    ("btd,dhk->bthk", (2, 5, 8), (8, 3, 4)),
    ("bthk,hkd->btd", (2, 5, 3, 4), (3, 4, 8)),
    ("bhqc,rkc->bhqkr", (2, 3, 5, 4), (6, 7, 4)),
    ("bxyd,bzd->bxyz", (2, 3, 4, 8), (2, 5, 8)),
    ("...ij,...jk->...ik", (2, 4, 5, 3), (4, 3, 7)),
    ("ij,jk", (2, 3), (3, 5)),
    ("bi,bi->b", (4, 6), (4, 6)),
    ("i,j->ij", (4,), (5,)),
    ("bi,bj->bij", (4, 6), (4, 5)),
    ("ij,kj->ki", (2, 3), (5, 3)),
    ("i,i->", (4,), (4,)),
    ("bnchw,bncm->bnhwm", (2, 2, 3, 4, 5), (2, 2, 3, 6)),
]


def summed(equation: str, *inputs: Tensor, dynamic: Any = False) -> Program:
    return function(lambda *x: torch.einsum(equation, *x), *inputs, dynamic=dynamic)


@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_equations(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    before = summed(equation, seeded(*left, seed=1), seeded(*right, seed=2))
    after, report = run(before, NAME)
    assert (report.fired, declined(report)) == (1, [])
    assert error(before, after) < 1e-5
    assert "einsum" not in text(after)
    unchanged_by_second_run(after, NAME)


def test_before_and_after() -> None:
    after, _ = run(summed("bqhd,bkhd->bhqk", seeded(2, 5, 3, 8), seeded(2, 7, 3, 8)), NAME)
    assert text(after) == lines("""
        permute_default = permute(x_0, [0, 2, 1, 3])
        permute_default_1 = permute(x_1, [0, 2, 3, 1])
        matmul_default = matmul(permute_default, permute_default_1)
        return matmul_default""")


def test_dynamic_sizes() -> None:
    before = summed("bqhd,bkhd->bhqk", seeded(2, 5, 3, 8), seeded(2, 5, 3, 8, seed=1), dynamic={"x_0": [0, 1], "x_1": [0, 1]})
    after, report = run(before, NAME)
    assert report.fired == 1
    wide = [seeded(3, 9, 3, 8), seeded(3, 9, 3, 8, seed=1)]
    assert torch.allclose(fxc.evaluate.Running(after)(*wide), torch.einsum("bqhd,bkhd->bhqk", *wide), atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], "einsum has 3 operands, not two"),
        ("ij->ji", [(2, 3)], "einsum has 1 operands, not two"),
        ("ii,ij->ij", [(3, 3), (3, 4)], "einsum takes a diagonal"),
        ("ij,k->ik", [(2, 3), (4,)], "einsum sums j over one operand alone"),
        ("ij,jk->ik", [(2, 1), (3, 4)], "einsum repeats j along one operand"),
    ],
)
def test_refusals(equation: str, shapes: list[tuple[int, ...]], reason: str) -> None:
    after, report = run(summed(equation, *(seeded(*shape) for shape in shapes)), NAME)
    assert (report.fired, declined(report)) == (0, [("einsum", reason)])
    assert "einsum" in text(after)


def swapped(x: Any, letters: Any, wanted: Any, op: Any) -> Any:
    """The last two letters the other way round."""
    order = [list(letters).index(letter) for letter in wanted]
    return op(torch.ops.aten.permute.default, x, [*order[:-2], order[-1], order[-2]])


def negated(x: Any, axis: int, sizes: Any, op: Any) -> Any:
    return op(torch.ops.aten.neg.default, x)


@pytest.mark.parametrize(("helper", "fault"), [("_ordered", swapped), ("_parted", negated)])
def test_faults_are_named(helper: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_einsum, helper, fault)
    with pytest.raises(ContractViolation, match="breaks its exact contract at 1 of 1 sites"):
        run(summed("qc,kc->qk", seeded(4, 4), seeded(4, 4, seed=1)), NAME)


class Attention(nn.Module):
    """Self-attention spelled in einsums, its layers too."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Parameter(seeded(3, 32, 4, 8, seed=1) / 32**0.5)
        self.out = nn.Parameter(seeded(4, 8, 32, seed=2) / 32**0.5)

    def forward(self, x: Any) -> Any:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, w) for w in self.inside)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
        return torch.einsum("bthk,hkd->btd", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), self.out)


@pytest.mark.parametrize(("backend", "least"), [("onnxruntime", 1), ("openvino", 0.8)])
def test_einsums_become_integer_products(backend: str, least: float) -> None:
    """OpenVINO multiplies two activations in float where they have zero points."""
    items = [(seeded(2, 12, 32, seed=i),) for i in range(4)]
    made = fxc.compile(Attention().eval(), "int8", items[0], calibration=items, backend=backend)
    assert made.report.backend is not None and (made.report.backend.integer_share or 0) >= least
    assert made.report.output_sqnr is not None and made.report.output_sqnr > 25
