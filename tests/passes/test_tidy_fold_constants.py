"""tidy.fold_constants: which cones become constants, which stay and why, and what the contract catches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

import fxcompress.ops  # noqa: F401
from fxcompress.errors import ContractViolation
from fxcompress.manager import weight_bytes
from fxcompress.passes.tidy import fold_constants
from tests.passes.helpers import declined, error, function, lines, mapped, op_name, planted, run, seeded, text, unchanged_by_second_run, zoo

X, W = seeded(2, 4), seeded(4, 4, seed=1)
BIG = 2**19  # floats: 2 MiB


def test_maximal_cones() -> None:
    before = function(lambda x, w: nnf.linear(x + w.sum(0), w.t() * 2) + torch.arange(4) * w[0], X, w=W)
    after, report = run(before, "tidy.fold_constants")
    assert text(after) == lines("""
        add = add.Tensor(x, %sum_1)
        linear = linear(add, %mul)
        add_1 = add.Tensor(linear, %mul_1)
        return add_1""")
    assert report.fired == 3
    assert {n: t.tolist() for n, t in after.constants.items()} == {
        "sum_1": W.sum(0).tolist(),
        "mul": (W.t() * 2).tolist(),
        "mul_1": (torch.arange(4) * W[0]).tolist(),
    }
    assert error(before, after) < 1e-6  # the product with a transposed weight may be rounded otherwise than with a copy of it


def test_values_of_a_tuple() -> None:
    before = function(lambda x, w: [x + part for part in w.split(2)], seeded(2, 4), w=W)
    after, _ = run(before, "tidy.fold_constants")
    assert text(after) == lines("""
        add = add.Tensor(x, %getitem)
        add_1 = add.Tensor(x, %getitem_1)
        return add, add_1""")
    assert torch.equal(after.constants["getitem_1"], W[2:])


def test_a_constant_read_elsewhere_stays() -> None:
    before = function(lambda x, w: nnf.linear(x, w) + w.sum(), X, w=W)
    after, _ = run(before, "tidy.fold_constants")
    assert set(after.constants) == {"w", "sum_1"}


def test_folded_constants_have_memory_of_their_own() -> None:
    after, _ = run(function(lambda x, w: x @ w[1:], seeded(2, 3), w=W), "tidy.fold_constants")
    (folded,) = after.constants.values()
    assert folded.untyped_storage().nbytes() == 12 * 4


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "reads an input": lambda x: x * 2 + 1,
    "dynamic size": lambda x: x + torch.arange(x.shape[0])[:, None],
}


@pytest.mark.parametrize("body", [pytest.param(b, id=i) for i, b in KEPT.items()])
def test_keeps_what_depends_on_the_call(body: Callable[[Tensor], Tensor]) -> None:
    before = function(body, X)
    after, report = run(before, "tidy.fold_constants")
    assert text(after) == text(before)
    assert declined(report) == []


def test_weight_quantisers_stay() -> None:
    def body(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        codes = torch.ops.fxc.quantize(w * 2, s, None, "int8", [1, -1])
        return nnf.linear(x, torch.ops.fxc.dequantize(codes, s, None, "int8", [1, -1]))

    after, _ = run(function(body, X, w=W, s=torch.full((4, 1), 0.01)), "tidy.fold_constants")
    assert text(after) == lines("""
        quantize = fxc.quantize(%mul, %s, None, int8, [1, -1])
        dequantize = fxc.dequantize(quantize, %s, None, int8, [1, -1])
        linear = linear(x, dequantize)
        return linear""")


def test_a_dropout_that_is_off_is_no_random_number() -> None:
    before = function(lambda x, w: x + nnf.dropout(w, 0.5, training=False) * 2, X, w=W[0])
    after, _ = run(before, "tidy.fold_constants")
    assert [v.tolist() for v in after.constants.values()] == [(W[0] * 2).tolist()]


def test_random_numbers_stay() -> None:
    before = function(lambda x, w: x + nnf.dropout(w, 0.5, training=True) * 0, X, w=W[0])
    after, report = run(before, "tidy.fold_constants")
    assert text(after) == text(before)
    assert declined(report) == []


SIZES = {"M": BIG, "K": 2**13}
REFUSED: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "larger": (lambda x, w: x + w[:1].expand(BIG), "expand", "expand would store 2.0 MiB in place of 0.0 MiB"),
    "from literals": (lambda x, w: x + w[0] + torch.arange(BIG), "arange", "arange would store 4.0 MiB in place of 0.0 MiB"),
    "repeated": (
        lambda x, w: x.view(2**12, 2) + w.exp().repeat(2**12, 1).reshape(2**12, 2),
        "reshape",
        "reshape only repeats numbers: it would store 32 KiB in place of 0 KiB",
    ),
    "output": (lambda x, w: [x, w * 2], "mul", "mul is an output: the program would hand out the constant itself"),
}


@pytest.mark.parametrize(("body", "site", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(body: Callable[..., Tensor], site: str, reason: str) -> None:
    before = function(body, seeded(SIZES.get(reason.partition("iB")[0][-1], 2)), w=seeded(2))
    after, report = run(before, "tidy.fold_constants")
    assert (site, reason) in declined(report)
    assert len(declined(report)) == 1
    assert site in text(after)


def test_a_second_copy_of_a_large_weight_is_declined() -> None:
    """Not larger than what it is computed from, but that is read elsewhere and would stay."""
    big = seeded(BIG // 4, 4)
    before = function(lambda x, ids, w: x @ w.t() + nnf.embedding(ids, w).sum(), seeded(2, 4), torch.tensor([0, 1]), w=big)
    after, report = run(before, "tidy.fold_constants")
    assert text(after) == text(before)
    assert [r for _, r in declined(report)] == ["t would store 2.0 MiB in place of 0.0 MiB"]
    once, report = run(function(lambda x, w: x @ w.t(), seeded(2, 4), w=big), "tidy.fold_constants")
    assert report.fired == 1
    assert weight_bytes(once) == weight_bytes(before)


@pytest.mark.parametrize(("times", "fired"), [(4, 1), (5, 0)])
def test_up_to_four_times_what_goes_may_be_stored(times: int, fired: int) -> None:
    before = function(lambda x, w: x + torch.cat([w] * times), seeded(times * BIG), w=seeded(BIG), dynamic=False)
    _, report = run(before, "tidy.fold_constants")
    assert report.fired == fired


def test_inside_a_declined_cone_the_largest_legal_one_is_folded() -> None:
    before = function(lambda x, w: x + (w.exp() + 1).expand(BIG).sin(), seeded(BIG), w=seeded(1))
    after, report = run(before, "tidy.fold_constants")
    assert text(after) == lines(f"""
        expand = expand(%add, [{BIG}])
        sin = sin(expand)
        add_1 = add.Tensor(x, sin)
        return add_1""")
    assert declined(report) == [("sin", "sin would store 2.0 MiB in place of 0.0 MiB")]


def test_second_run_changes_nothing() -> None:
    unchanged_by_second_run(function(lambda x, w: nnf.linear(x + w.sum(0), w.t() * 2), X, w=W), "tidy.fold_constants")


FAULTS = {
    "sign": lambda t: -t,
    "factor": lambda t: t * 1.5,
    "last bit": lambda t: torch.nextafter(t, torch.zeros(())),
    "other axis": lambda t: t.t().contiguous(),
    "off by one": lambda t: t.roll(1, 0),
    "wider": lambda t: t.double(),
    "forgotten": torch.zeros_like,
}


@pytest.mark.parametrize("fault", [pytest.param(f, id=i) for i, f in FAULTS.items()])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor]) -> None:
    planted(monkeypatch, fold_constants, "evaluated", mapped(fault))
    with pytest.raises(ContractViolation, match=r"tidy\.fold_constants breaks its exact contract at 1 of 1 sites"):
        run(function(lambda x, w: nnf.linear(x, w * 2), X, w=W), "tidy.fold_constants")


@pytest.mark.parametrize(("name", "fired"), [("swin", 6), ("detr", 30), ("llama", 1), pytest.param("unet2d_cond", 1, marks=pytest.mark.slow)])
def test_real_models(name: str, fired: int) -> None:
    before = zoo(name)
    after, report = run(before, "tidy.fold_constants")
    assert report.fired == fired
    assert declined(report) == []
    assert error(before, after) == 0
    computed = {n for n in after.graph.nodes if n.op == "call_function"}
    alone = [n for n in computed if not isinstance(n.target, str) and all(a.op == "get_attr" for a in n.all_input_nodes)]
    assert [op_name(n) for n in alone] == []
