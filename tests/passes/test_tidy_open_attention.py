"""tidy.open_attention: masks, causal order, shared heads and scales opened as torch defines them; refusals; faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, fx

from fxcompress.errors import ContractViolation
from fxcompress.passes.tidy import open_attention
from fxcompress.program import Program
from tests.passes.helpers import declined, error, function, lines, ops, planted, run, seeded, text, unchanged_by_second_run, zoo

aten = torch.ops.aten
slow = pytest.mark.slow
NAME = "tidy.open_attention"
Q, K, V = seeded(2, 4, 5, 8, seed=1), seeded(2, 4, 7, 8, seed=2), seeded(2, 4, 7, 6, seed=3)
FEW = seeded(2, 2, 7, 8, seed=4)  # two heads
MASK = (torch.arange(35).view(1, 1, 5, 7) % 3 > 0).expand(2, 1, -1, -1).contiguous()
EMPTY_ROW = MASK & (torch.arange(5).view(1, 1, 5, 1) != 2)
FLOATS = torch.where(EMPTY_ROW, seeded(2, 1, 5, 7, seed=5), -math.inf)


def attention(*inputs: Tensor, dynamic: Any = None, **options: Any) -> Program:
    """softmax(q k) v, or with a mask as the fourth input."""
    if len(inputs) == 4:
        return function(lambda q, k, v, mask: nnf.scaled_dot_product_attention(q, k, v, mask, **options), *inputs, dynamic=dynamic)
    return function(lambda q, k, v: nnf.scaled_dot_product_attention(q, k, v, **options), *inputs, dynamic=dynamic)


def test_before_and_after() -> None:
    before = attention(Q, K, V)
    assert ops(before) == ["scaled_dot_product_attention"]
    after, report = run(before, NAME)
    assert text(after) == lines(f"""
        transpose_int = transpose.int(k, -2, -1)
        matmul_default = matmul(q, transpose_int)
        mul_tensor = mul.Tensor(matmul_default, {1 / math.sqrt(8)})
        softmax_int = softmax.int(mul_tensor, -1)
        matmul_default_1 = matmul(softmax_int, v)
        return matmul_default_1""")
    assert (report.fired, declined(report)) == (1, [])
    assert error(before, after) < 1e-5


def test_boolean_mask() -> None:
    after, _ = run(attention(Q, K, V, MASK), NAME)
    assert lines("""
        where_scalar_other = where.ScalarOther(mask, mul_tensor, -inf)
        softmax_int = softmax.int(where_scalar_other, -1)
        where_scalar_other_1 = where.ScalarOther(mask, softmax_int, 0.0)
        matmul_default_1 = matmul(where_scalar_other_1, v)""") in text(after)


def test_float_mask() -> None:
    after, _ = run(attention(Q, K, V, FLOATS), NAME)
    assert lines("""
        add_tensor = add.Tensor(mul_tensor, mask)
        gt_scalar = gt.Scalar(mask, -inf)
        softmax_int = softmax.int(add_tensor, -1)
        where_scalar_other = where.ScalarOther(gt_scalar, softmax_int, 0.0)
        matmul_default_1 = matmul(where_scalar_other, v)""") in text(after)


def test_causal_with_dynamic_lengths() -> None:
    after, _ = run(attention(Q, K, V, is_causal=True, dynamic={"q": [0, 2], "k": [0, 2], "v": [0, 2]}), NAME)
    assert lines("""
        sym_size_int = sym_size.int(q, 2)
        sym_size_int_1 = sym_size.int(k, 2)
        ones_default = ones([sym_size_int, sym_size_int_1], dtype=bool, device=cpu)
        tril_default = tril(ones_default)
        where_scalar_other = where.ScalarOther(tril_default, mul_tensor, -inf)
        softmax_int = softmax.int(where_scalar_other, -1)
        matmul_default_1 = matmul(softmax_int, v)""") in text(after)


CASES: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": ((Q, K, V), {}),
    "no batch": ((Q[0], K[0], V[0]), {}),
    "one head, no batch": ((Q[0, 0], K[0, 0], V[0, 0]), {}),
    "scale": ((Q, K, V), {"scale": 0.7}),
    "scale 1": ((Q, K, V), {"scale": 1.0}),
    "mask": ((Q, K, V, MASK), {}),
    "mask with an empty row": ((Q, K, V, EMPTY_ROW), {}),
    "float mask with an empty row": ((Q, K, V, FLOATS), {}),
    "causal": ((Q, Q + 0, V[:, :, :5] + 0), {"is_causal": True}),
    "causal, fewer queries": ((Q, K, V), {"is_causal": True}),
    "causal, more queries": ((K, Q, V[:, :, :5] + 0), {"is_causal": True}),
    "shared heads": ((Q, FEW, FEW + 1), {"enable_gqa": True}),
    "shared heads, causal": ((Q, FEW, FEW + 1), {"enable_gqa": True, "is_causal": True}),
}


@pytest.mark.parametrize(("inputs", "options"), [pytest.param(*c, id=i) for i, c in CASES.items()])
def test_same_function(inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    before = attention(*inputs, **options, dynamic=None if inputs[0].dim() == 4 else False)
    after, report = run(before, NAME)
    assert (report.fired, declined(report)) == (1, [])
    assert "scaled_dot_product_attention" not in ops(after)
    assert error(before, after) < 1e-5
    longer = [torch.cat([t, t]) for t in inputs] if inputs[0].dim() == 4 else inputs
    assert error(before, after, longer) < 1e-5


def test_causal_at_other_lengths() -> None:
    before = attention(Q, K, V, is_causal=True, dynamic={"q": [0, 2], "k": [0, 2], "v": [0, 2]})
    after, _ = run(before, NAME)
    for queries, keys in ((1, 7), (9, 3), (4, 4)):
        inputs = (seeded(3, 4, queries, 8), seeded(3, 4, keys, 8, seed=1), seeded(3, 4, keys, 6, seed=2))
        assert error(before, after, inputs) < 1e-5


def test_a_scale_of_1_is_no_product() -> None:
    after, _ = run(attention(Q, K, V, scale=1.0), NAME)
    assert ops(after) == ["transpose.int", "matmul", "softmax.int", "matmul"]


def test_keys_of_shared_heads_are_repeated_in_blocks() -> None:
    after, _ = run(attention(Q, FEW, FEW + 1, enable_gqa=True), NAME)
    assert "repeat_interleave_self_int = repeat_interleave.self_int(k, 2, 1)" in text(after)
    assert "repeat_interleave_self_int_1 = repeat_interleave.self_int(v, 2, 1)" in text(after)


def test_the_result_may_lie_in_memory_otherwise() -> None:
    """torch's kernel leaves its result as the view after it wants; the opened one doesn't."""

    def body(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = x.unflatten(2, (4, 8)).transpose(1, 2)
        return nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(2, 5, 32)

    before = function(body, seeded(2, 5, 32), K, K + 1)
    after, _ = run(before, NAME)
    assert ops(before)[-1] == "reshape"
    assert error(before, after) < 1e-5


REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Any, str]] = {
    "dropout": (
        lambda q, k, v: nnf.scaled_dot_product_attention(q, k, v, dropout_p=0.25) * 0 + v.mean(),
        (Q, K, V),
        None,
        "scaled_dot_product_attention drops at random in every call, with p = 0.25",
    ),
    "dynamic head size": (
        lambda q, k, v: nnf.scaled_dot_product_attention(q, k, v) + 0,
        (Q, K, V),
        {"q": [3], "k": [3]},
        "scaled_dot_product_attention scales by a head size that is dynamic",
    ),
    "causal and masked": (
        lambda q, k, v, mask: aten.scaled_dot_product_attention(q, k, v, mask, 0.0, True),
        (Q, K, K + 1, MASK),
        None,
        "scaled_dot_product_attention is causal and has the mask mask, which its definition excludes",
    ),
    "strides read": (
        lambda q, k, v: torch.view_as_complex(nnf.scaled_dot_product_attention(q, k, v).unflatten(-1, (3, 2))).real,
        (Q, K, V),
        None,
        "scaled_dot_product_attention lays its result out otherwise in memory, and view_as_complex may depend on that",
    ),
}


@pytest.mark.parametrize(("body", "inputs", "dynamic", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(body: Callable[..., Tensor], inputs: tuple[Tensor, ...], dynamic: Any, reason: str) -> None:
    before = function(body, *inputs, dynamic=dynamic)
    after, report = run(before, NAME)
    assert text(after) == text(before)
    assert declined(report) == [("scaled_dot_product_attention", reason)]


def sdpa(program: Program) -> fx.Node:
    return next(n for n in program.graph.nodes if n.target is aten.scaled_dot_product_attention.default)


def test_refuses_dynamic_shared_heads() -> None:
    """torch.export fixes head counts, so the fake value is made by hand."""
    before = attention(Q, FEW, FEW + 1, enable_gqa=True)
    node = sdpa(before)
    batch = node.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
    node.args[1].meta["val"] = node.args[1].meta["val"].new_empty(2, batch, 7, 8)  # type: ignore[union-attr]
    _, report = run(before, NAME)
    assert declined(report) == [("scaled_dot_product_attention", "scaled_dot_product_attention shares a number of heads that is dynamic")]


def test_refuses_a_mask_of_another_precision() -> None:
    before = attention(Q, K, V, FLOATS)
    mask = sdpa(before).args[3]
    mask.meta["val"] = mask.meta["val"].double()  # type: ignore[union-attr]
    _, report = run(before, NAME)
    reason = "scaled_dot_product_attention adds a mask of torch.float64 to scores of torch.float32"
    assert declined(report) == [("scaled_dot_product_attention", reason)]


def test_second_run_changes_nothing() -> None:
    unchanged_by_second_run(attention(Q, K, V, MASK), NAME)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    _, report = run(attention(Q.to(dtype), K.to(dtype), V.to(dtype), EMPTY_ROW), NAME)
    assert report.worst is not None
    assert report.worst.verdict == "held"


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "sign of the scale": ("scale_of", lambda c: -c),
    "factor on the scale": ("scale_of", lambda c: c * 1.5),
    "scale squared": ("scale_of", lambda c: c * c),
}


@pytest.mark.parametrize(("helper", "fault"), [pytest.param(*f, id=i) for i, f in FAULTS.items()])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, helper: str, fault: Callable[[Any], Any]) -> None:
    planted(monkeypatch, open_attention, helper, fault)
    with pytest.raises(ContractViolation, match=r"tidy\.open_attention breaks its exact contract at 1 of 1 sites"):
        run(attention(Q, K, V), NAME)


def other_mask(change: Callable[[Any, fx.Node], fx.Node]) -> Callable[..., fx.Node]:
    right = open_attention.causal_mask
    return lambda query, key, op: change(op, right(query, key, op))


MASK_FAULTS: dict[str, Callable[[Any, fx.Node], fx.Node]] = {
    "aligned at the last key": lambda op, mask: op(aten.tril.default, op(aten.ones_like.default, mask), 2),
    "off by one": lambda op, mask: op(aten.tril.default, op(aten.ones_like.default, mask), 1),
    "upside down": lambda op, mask: op(aten.logical_not.default, mask),
    "dropped": lambda op, mask: op(aten.ones_like.default, mask),
}


@pytest.mark.parametrize("change", [pytest.param(f, id=i) for i, f in MASK_FAULTS.items()])
def test_contract_bites_on_a_wrong_mask(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, fx.Node], fx.Node]) -> None:
    monkeypatch.setattr(open_attention, "causal_mask", other_mask(change))
    with pytest.raises(ContractViolation):
        run(attention(Q, K, V, is_causal=True), NAME)


def test_contract_bites_on_wrongly_repeated_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads repeated one after the other (0 1 0 1) in place of in blocks (0 0 1 1)."""
    monkeypatch.setattr(open_attention, "_repeated", lambda node, times, op: op(aten.repeat.default, node, [1, times, 1, 1]))
    with pytest.raises(ContractViolation):
        run(attention(Q, FEW, FEW + 1, enable_gqa=True), NAME)


def test_contract_bites_on_the_wrong_softmax_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_attention, "_softmax", lambda scores, given, op: op(aten.softmax.int, scores, -2))
    with pytest.raises(ContractViolation):
        run(attention(Q, K, V), NAME)


@pytest.mark.parametrize(
    ("name", "fired"), [("llama", 2), ("vit", 2), pytest.param("unet2d_cond", 8, marks=slow), pytest.param("sam", 9, marks=slow)]
)
def test_real_models(name: str, fired: int) -> None:
    before = zoo(name)
    after, report = run(before, NAME)
    assert (report.fired, declined(report)) == (fired, [])
    assert error(before, after) < 1e-4
