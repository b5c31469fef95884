"""checker.check: what is held, broken and unverified, which site is blamed, and what the walk costs."""

from __future__ import annotations

import gc
import math
import operator
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from fxcompress import checker, values
from fxcompress.checker import check
from fxcompress.contract import Bounded, Contract, Exact, Lossy, Measured
from fxcompress.edit import Edit, Step
from fxcompress.interpret import evaluate
from fxcompress.measure import TILE, error_along, is_beyond, relative_error, rounded, slice_error
from fxcompress.numerics import formats, noise
from fxcompress.numerics.hadamard import randomised_hadamard
from fxcompress.numerics.rotation import Rotation
from fxcompress.program import Program
from fxcompress.rows import ROWS
from fxcompress.transport.change import Elementwise, permuted, rotated
from fxcompress.transport.labels import Kind, Label
from tests.passes.helpers import Builder, chain, function, node, seeded

aten = torch.ops.aten
Change = Callable[[Edit, fx.Node], fx.Node]  # makes the node that takes the place of one


def one_op(target: Any, x: Tensor, *args: Any) -> Program:
    """One op on the input."""
    built = Builder(x=x)
    return built.program(built.op(target, built.x, *args))


def measured(program: Program, change: Change, contract: Contract, at: str | None = None) -> Measured:
    """The one measurement of a change to the result, or to another node."""
    old = program.results()[0] if at is None else node(program, at)
    edit = Edit(program)
    with edit.site(old):
        edit.replace(old, change(edit, old))
    (result,) = check(program, edit, contract, program.example)
    return result


def other(target: Any, *args: Any) -> Change:
    """Another op on the first operand."""
    return lambda edit, old: edit.insert(target, old.args[0], *args, like=old)


X = seeded(4, 8)
RMS = X.square().mean().sqrt().item()


def test_held() -> None:
    result = measured(one_op(aten.mul.Tensor, X, 2), lambda e, n: e.insert(aten.add.Tensor, n.args[0], n.args[0], like=n), Exact())
    assert result == Measured("<root>  (mul_tensor)", "add_tensor", 0.0, 1e-4, "held")


def test_broken_by_the_figure_of_its_definition() -> None:
    result = measured(one_op(aten.mul.Tensor, X, 2), other(aten.mul.Tensor, 2.001), Exact())
    assert result.verdict == "broken"
    assert result.figure == pytest.approx(0.001 * X.abs().max().item() / (2 * RMS), rel=1e-3)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_the_limit_follows_the_precision(dtype: torch.dtype, limit: float) -> None:
    program = one_op(aten.mul.Tensor, X.to(dtype), 2)
    assert measured(program, other(aten.mul.Tensor, 2), Exact()).limit == limit


FORMS: dict[str, tuple[Any, tuple[Any, ...], Any, tuple[Any, ...]]] = {
    "other shape": (aten.mul.Tensor, (2,), aten.sum.default, ()),
    "other dtype": (aten.to.dtype, (torch.float32,), aten.to.dtype, (torch.float64,)),
    "tuple in place of a tensor": (aten.mul.Tensor, (2,), aten.split.Tensor, (2,)),
    "not a number": (aten.mul.Tensor, (2,), aten.mul.Tensor, (math.nan,)),
    "infinite": (aten.mul.Tensor, (2,), aten.mul.Tensor, (math.inf,)),
    "integers off by one": (aten.argmax.default, (1,), aten.argmin.default, (1,)),
    "booleans": (aten.gt.Scalar, (0.0,), aten.ge.Scalar, (X.max().item(),)),
}


@pytest.mark.parametrize("contract", [Exact(), Exact(limit=1e9), Bounded(limit=0.0), Bounded(limit=-1e9)], ids=repr)
@pytest.mark.parametrize(("old", "args", "new", "new_args"), [pytest.param(*f, id=i) for i, f in FORMS.items()])
def test_another_form_is_always_broken(contract: Contract, old: Any, args: Any, new: Any, new_args: Any) -> None:
    assert measured(one_op(old, X, *args), other(new, *new_args), contract).verdict == "broken"


@pytest.mark.parametrize("part", [0, 1])
def test_a_tuple_is_as_good_as_its_worst_part(part: int) -> None:
    fault = torch.ones(8)
    fault[4 * part] = 1.5
    built = Builder(x=X)
    parts = built.op(aten.split.Tensor, built.x, 4, 1)
    program = built.program(built.op(operator.getitem, parts, 0), built.op(operator.getitem, parts, 1))

    def change(edit: Edit, old: fx.Node) -> fx.Node:
        product = edit.insert(aten.mul.Tensor, old.args[0], edit.constant("fault", fault, like=old), like=old)
        return edit.insert(aten.split.Tensor, product, 4, 1, like=old)

    for contract in (Exact(), Bounded(limit=30.0)):
        assert measured(program, change, contract, at="split_tensor").verdict == "broken"


def test_infinities_that_stay_count_nothing() -> None:
    """Masked scores: -inf in the same places, the rest off by a thousandth."""
    x = X.masked_fill(X > 0, -math.inf)
    for contract, figure in ((Exact(), 0.001 * 3), (Bounded(limit=20.0), 60.0)):
        result = measured(one_op(aten.mul.Tensor, x, 1.0), other(aten.mul.Tensor, 1.001), contract)
        assert result.figure == pytest.approx(figure, rel=0.3)


UNSEEN: dict[str, tuple[Program, Change, str]] = {
    "all zero": (one_op(aten.mul.Tensor, X, 0), other(aten.mul.Tensor, 0), "x could change sign unseen"),
    "zero operand": (
        one_op(aten.relu.default, torch.zeros(4, 8)),
        lambda e, n: n.args[0],  # type: ignore[return-value]
        "the value could change sign unseen",
    ),
    "even": (one_op(aten.abs.default, X), other(aten.abs.default), "x could change sign unseen"),
}


@pytest.mark.parametrize(("program", "change", "why"), [pytest.param(*u, id=i) for i, u in UNSEEN.items()])
def test_unverified_where_a_sign_is_not_seen(program: Program, change: Change, why: str) -> None:
    result = measured(program, change, Exact())
    assert (result.verdict, result.why, result.figure) == ("unverified", why, 0.0)


def test_unverified_where_one_operand_is_too_small_to_see() -> None:
    built = Builder(x=X)
    tiny = built.constant("tiny", torch.full((8,), 1e-7))
    program = built.program(built.op(aten.add.Tensor, built.x, tiny))
    copied = lambda e, n: e.insert(aten.add.Tensor, n.args[0], e.constant("copy", torch.full((8,), 1e-7), like=n), like=n)  # noqa: E731
    result = measured(program, copied, Exact())
    assert (result.verdict, result.why) == ("unverified", "copy could change sign unseen")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda e, n: e.insert(aten.add.Tensor, *n.args, like=n), "held"),
        (lambda e, n: e.insert(aten.sub.Tensor, *n.args, like=n), "unverified"),
        (lambda e, n: e.insert(aten.add.Tensor, *n.args[::-1], like=n), "unverified"),
    ],
)
def test_a_constant_that_is_read_as_before_keeps_its_sign(change: Callable[[Edit, fx.Node], fx.Node], verdict: str) -> None:
    """However quiet it is beside the other operand."""
    built = Builder(x=X)
    program = built.program(built.op(aten.add.Tensor, built.x, built.constant("tiny", torch.full((8,), 1e-7))))
    assert measured(program, change, Exact()).verdict == verdict


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "held"), (-1.0, "broken"), (1.01, "broken")])
def test_what_the_probe_makes_zero_is_seen_with_other_numbers(factor: float, verdict: str) -> None:
    """Attention over values that are all 0, as those of a decoder's first layer before training: its scores are seen all the same."""
    built = Builder(x=X, y=torch.zeros(8, 5))
    program = built.program(built.op(aten.matmul.default, built.op(aten.mul.Tensor, built.x, 2.0), built.y))

    def change(edit: Edit, old: fx.Node) -> fx.Node:
        scores, values = old.args
        other = edit.insert(aten.mul.Tensor, scores.args[0], 2.0 * factor, like=scores)  # type: ignore[union-attr]
        return edit.insert(aten.matmul.default, other, values, like=old)

    assert measured(program, change, Exact()).verdict == verdict


FAULTS_AT_ZERO = [("bias", 1.0, "broken"), ("weight", 1.0, "unverified"), ("neither", 1.0, "broken")]


@pytest.mark.parametrize(("zero", "sign", "verdict"), [(z, -1.0, "held") for z in ("bias", "weight", "neither")] + FAULTS_AT_ZERO)
def test_constants_that_are_zero_before_training(zero: str, sign: float, verdict: str) -> None:
    """x and the weight that it meets change sign; a bias of zeros has none, and with a weight of zeros others tell."""
    built = Builder(x=X)
    first = built.op(aten.mul.Tensor, built.x, 2.0)
    numbers = {"w": seeded(3, 8) * (zero != "weight"), "b": seeded(3) * (zero == "neither")}
    program = built.program(built.op(aten.linear.default, first, *(built.constant(n, t) for n, t in numbers.items())))
    product, edit = program.results()[0], Edit(program)
    x, weight, _ = product.args
    with edit.site(product):
        edit.carry(x, lambda v: -v)
        edit.update(x, x.args[0], -2.0)
        edit.carry(weight, lambda v: -v)
        edit.fold(weight, numbers["w"] * -1)
        edit.update(product, edit.insert(aten.mul.Tensor, x, -sign, like=product), *product.args[1:])
    assert next(m.verdict for m in check(program, edit, Exact(), program.example) if m.value == product.name) == verdict


@pytest.mark.parametrize("x", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool)])
def test_integers_are_seen_even_as_zeros(x: Tensor) -> None:
    result = measured(one_op(aten.clone.default, x), lambda e, n: n.args[0], Exact(limit=0.0))  # type: ignore[arg-type, return-value]
    assert result.verdict == "held"


def quantised_pair(scale: Tensor, format: str = "int8") -> Change:
    """The value through a quantiser of one scale a row."""

    def change(edit: Edit, old: fx.Node) -> fx.Node:
        at: dict[str, Any] = {"like": old, "before": old.next}
        grid = (edit.constant("s", scale, **at), None, format, [1, -1])
        codes = edit.insert(torch.ops.fxc.quantize.default, old, *grid, **at)
        return edit.insert(torch.ops.fxc.dequantize.default, codes, *grid, **at)

    return change


def weight_program() -> Program:
    built = Builder(x=X)
    return built.program(built.op(aten.linear.default, built.x, built.constant("w", seeded(5, 8))))


def row_scale(bits: int) -> Tensor:
    return seeded(5, 8).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)


def test_bounded_holds_what_its_format_can() -> None:
    result = measured(weight_program(), quantised_pair(row_scale(8)), Bounded(), at="w")
    assert result.verdict == "held"
    assert result.limit == pytest.approx(noise.ideal_sqnr(seeded(5, 8), formats.format_of("int8"), (1, -1), symmetric=True) - 3, abs=1e-6)
    assert result.limit < result.figure < result.limit + 12


BAD_SCALES: dict[str, Tensor] = {
    "twice too coarse": row_scale(8) * 2,
    "clipping": row_scale(8) / 1.5,
    "rows swapped": row_scale(8).roll(1, 0),
    "one scale off": row_scale(8) * torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0]).view(5, 1),
}


@pytest.mark.parametrize("scale", [pytest.param(s, id=i) for i, s in BAD_SCALES.items()])
def test_bounded_is_broken_by_a_worse_scale(scale: Tensor) -> None:
    assert measured(weight_program(), quantised_pair(scale), Bounded(), at="w").verdict == "broken"


def test_bounded_needs_a_limit_for_other_ops() -> None:
    program = one_op(aten.mul.Tensor, X, 2)
    with pytest.raises(ValueError, match="mul_tensor_1 is no dequantize"):
        measured(program, other(aten.mul.Tensor, 2.1), Bounded())
    result = measured(one_op(aten.mul.Tensor, X, 2), other(aten.mul.Tensor, 2.1), Bounded(limit=20.0))
    assert (result.verdict, result.figure) == ("held", pytest.approx(20 * math.log10(20), abs=1e-3))


def test_lossy_is_measured_and_not_limited() -> None:
    result = measured(one_op(aten.mul.Tensor, X, 2), other(aten.mul.Tensor, 1), Lossy())
    assert (result.verdict, result.figure) == ("held", pytest.approx(20 * math.log10(2), abs=1e-3))
    assert measured(one_op(aten.mul.Tensor, X, 2), other(aten.mul.Tensor, math.nan), Lossy()).verdict == "broken"


def three_scales(first: float, second: float) -> list[Measured]:
    """x 2 3 5 with the product of two neighbours put in place twice, the second over the first: each site's own fault."""
    built = Builder(x=X)
    a = built.op(aten.mul.Tensor, built.x, 2.0)
    b = built.op(aten.mul.Tensor, a, 3.0)
    program = built.program(built.op(aten.mul.Tensor, b, 5.0))
    edit = Edit(program)
    with edit.site(b):
        edit.replace(b, edit.insert(aten.mul.Tensor, built.x, 6.0 * first, like=b))
    c = program.results()[0]
    merged = c.args[0]
    with edit.site(c):
        edit.replace(c, edit.insert(aten.mul.Tensor, merged, 5.0 * second, like=c))
    return check(program, edit, Exact(), program.example)


@pytest.mark.parametrize(
    ("first", "second", "verdicts"),
    [(1, 1, ["held", "held"]), (1.5, 1, ["broken", "held"]), (1, 1.5, ["held", "broken"]), (1.5, 1 / 1.5, ["broken", "broken"])],
)
def test_overlapping_sites_are_each_measured_from_old_values(first: float, second: float, verdicts: list[str]) -> None:
    """Two faults that cancel are two faults; one fault is one site's, whoever reads it."""
    assert [m.verdict for m in three_scales(first, second)] == verdicts


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_later_site_replaces_a_helper_node_of_an_earlier_one(factor: float) -> None:
    """The helper stands for no old value; a fault in it shows where the earlier site ends."""
    program = one_op(aten.mul.Tensor, X, 6.0)
    old, x = program.results()[0], program.placeholders()[0]
    edit = Edit(program)
    with edit.site(old):
        helper = edit.insert(aten.mul.Tensor, x, 2.0, like=old)
        edit.replace(old, edit.insert(aten.mul.Tensor, helper, 3.0, like=old))
    with edit.site(old):
        edit.replace(helper, edit.insert(aten.mul.Tensor, x, 2.0 * factor, like=helper))
    (result,) = check(program, edit, Exact(), program.example)
    assert (result.value, result.verdict) == ("mul_tensor_2", "held" if factor == 1 else "broken")


def test_a_chain_of_replacements_of_one_value() -> None:
    program = one_op(aten.mul.Tensor, X, 6.0)
    old, x = program.results()[0], program.placeholders()[0]
    edit = Edit(program)
    current = old
    for factor in (6.0, 9.0, 6.0):
        with edit.site(old):
            new = edit.insert(aten.mul.Tensor, x, factor, like=old)
            edit.replace(current, new)
            current = new
    assert [m.verdict for m in check(program, edit, Exact(), program.example)] == ["held", "broken", "held"]


def test_a_value_replaced_by_another_old_value() -> None:
    built = Builder(x=X)
    a, b = built.op(aten.mul.Tensor, built.x, 2.0), built.op(aten.mul.Tensor, built.x, 2.0)
    program = built.program(a, b)
    assert measured(program, lambda e, n: b, Exact()).verdict == "held"


def folded(tensor: Tensor, which: str = "layer.1.weight") -> list[Measured]:
    """A chain of three layers with another weight in one."""
    program = chain(3)
    edit = Edit(program)
    constant = node(program, which.replace(".", "_"))
    with edit.site(constant):
        edit.fold(constant, tensor)
    return check(program, edit, Exact(), program.example)


def test_a_folded_constant_is_measured_at_its_readers() -> None:
    weight = chain(3).constants["layer.1.weight"]
    assert [(m.value, m.verdict) for m in folded(weight.clone())] == [("linear_default_1", "held")]
    for fault in (-weight, weight * 1.5, weight.t().contiguous(), weight.roll(1, 0)):
        assert [(m.value, m.verdict) for m in folded(fault)] == [("linear_default_1", "broken")]


def test_changed_arguments_are_measured() -> None:
    program = one_op(aten.mul.Tensor, X, 2.0)
    op, x = program.results()[0], program.placeholders()[0]
    edit = Edit(program)
    with edit.site(op):
        edit.update(op, x, -2.0)
    assert [m.verdict for m in check(program, edit, Exact(), program.example)] == ["broken"]


def remade(program: Program, fault: Callable[[int, Edit, fx.Node], fx.Node]) -> Edit:
    """Every linear layer replaced by one that `fault` makes from its number."""
    edit = Edit(program)
    layers = [n for n in program.graph.nodes if n.target is aten.linear.default]
    for number, old in enumerate(layers):
        with edit.site(old):
            edit.replace(old, fault(number, edit, old))
    return edit


def anew(edit: Edit, old: fx.Node) -> fx.Node:
    return edit.insert(aten.linear.default, *old.args, like=old, val=old.meta["val"])


@pytest.mark.parametrize("guilty", [0, 117, 199])
@pytest.mark.parametrize("factor", [-1.0, 1.5, 1.001])
def test_one_fault_among_two_hundred_is_named(guilty: int, factor: float) -> None:
    def change(number: int, edit: Edit, old: fx.Node) -> fx.Node:
        new = anew(edit, old)
        return edit.insert(aten.mul.Tensor, new, factor, like=old, val=old.meta["val"]) if number == guilty else new

    program = chain(200)
    result = check(program, remade(program, change), Exact(), program.example)
    name = f"linear_default_{guilty}" if guilty else "linear_default"
    assert len(result) == 200
    assert [m.site for m in result if m.verdict != "held"] == [f"layer.{guilty}  ({name})"]


def test_memory_of_the_walk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old values are freed, without the garbage collector, once everything that compares with them has: a layer's worth is alive."""
    made: list[weakref.ref[Tensor]] = []
    most = 0
    evaluate = values._evaluate

    def counting(step: Step, *rest: Any) -> Tensor:
        nonlocal most
        value: Tensor = evaluate(step, *rest)
        if step.node.op == "call_function":
            made.append(weakref.ref(value))
            most = max(most, sum(r() is not None for r in made))
        return value

    program = chain(100)
    monkeypatch.setattr(values, "_evaluate", counting)
    gc.disable()
    try:
        result = check(program, remade(program, lambda number, e, n: anew(e, n)), Exact(), program.example)
    finally:
        gc.enable()
    assert len(result) == 100
    assert len(made) == 298  # all but the last relu and sum, which nothing reads
    assert most <= 4


def test_only_what_the_sites_need_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    evaluate = values._evaluate
    monkeypatch.setattr(values, "_evaluate", lambda step, *rest: seen.append(step.node.name) or evaluate(step, *rest))
    program = chain(50)
    edit = remade(program, lambda number, e, n: anew(e, n) if number < 2 else n)
    edit.sites[2:] = []
    check(program, edit, Exact(), program.example)
    assert [n for n in seen if "weight" not in n] == ["linear_default", "relu_default", "add_tensor", "linear_default_1"]


def test_sites_on_constants_run_no_forward() -> None:
    program = weight_program()
    program.graph.inserting_before(program.output_node)
    edit, w = Edit(program), node(program, "w")
    with edit.site(w):
        edit.replace(w, edit.constant("copy", program.constants["w"].clone(), like=w, before=w.next))
    (result,) = check(program, edit, Exact(limit=0.0), ())
    assert result.verdict == "held"


def test_deep_diamonds_are_measured_in_linear_time() -> None:
    """Sixty levels of y/4 + 3y/4 made at one site: a walk that revisits would take 2^60 steps."""

    def doubled(edit: Edit, old: fx.Node) -> fx.Node:
        value = old.args[0]
        for _ in range(60):
            quarter = edit.insert(aten.mul.Tensor, value, 0.25, like=old)
            value = edit.insert(aten.add.Tensor, quarter, edit.insert(aten.mul.Tensor, value, 0.75, like=old), like=old)
        return value  # type: ignore[return-value]

    assert measured(one_op(aten.mul.Tensor, X, 1.0), doubled, Exact()).verdict == "held"


# who reads what, and what goes in and out


def two_layers() -> tuple[Program, Edit]:
    """A chain of two layers, both made anew."""
    program = chain(2)
    return program, remade(program, lambda number, e, n: anew(e, n))


def the_broken(program: Program, edit: Edit) -> list[tuple[str, str, str]]:
    return [(m.site, m.value, m.why) for m in check(program, edit, Exact(), program.example) if m.verdict == "broken"]


def test_a_reader_that_keeps_the_old_value_is_named() -> None:
    program, edit = two_layers()
    reader = node(program, "relu_default")
    reader.args = (node(program, "linear_default"),)
    assert the_broken(program, edit) == [
        ("layer.0  (linear_default)", "relu_default", "relu_default reads linear_default where linear_default_2 belongs")
    ]


def test_a_reader_of_the_neighbours_value_is_named() -> None:
    program, edit = two_layers()
    node(program, "relu_default_1").args = (node(program, "linear_default_2"),)
    assert the_broken(program, edit) == [
        ("layer.1  (linear_default_1)", "relu_default_1", "relu_default_1 reads linear_default_2 where linear_default_3 belongs")
    ]


def test_arguments_that_change_beside_the_edit_are_named() -> None:
    program, edit = two_layers()
    add = node(program, "add_tensor")
    add.args = (*add.args[::-1],)
    add.kwargs = {"alpha": 2}
    assert the_broken(program, edit) == [
        ("layer.0  (add_tensor)", "add_tensor", "the arguments of add_tensor are others than before, and no site says so")
    ]


def test_an_op_that_changes_beside_the_edit_is_named() -> None:
    program, edit = two_layers()
    node(program, "add_tensor").target = aten.sub.Tensor
    why = "add_tensor is another op than before, and no site says so"
    assert the_broken(program, edit) == [("layer.0  (add_tensor)", "add_tensor", why)]


def test_a_constant_that_changes_beside_the_edit_is_named() -> None:
    program, edit = two_layers()
    program.constants["layer.0.weight"] = program.constants["layer.0.weight"] * 1.01
    assert [why for *_, why in the_broken(program, edit)][:1] == ["layer.0.weight has other numbers than before, and no site says so"]


def test_a_reader_of_a_folded_constant_that_reads_another_is_named() -> None:
    """Its site says that the constant is another, not that it reads another constant. Under any contract, since it is no matter of numbers."""
    program = chain(2)
    edit, leaf, reader = Edit(program), node(program, "layer_0_weight"), node(program, "linear_default")
    with edit.site(leaf):
        edit.fold(leaf, program.constants["layer.0.weight"].clone())
    reader.args = (reader.args[0], node(program, "layer_1_weight"))
    (broken,) = [m for m in check(program, edit, Lossy(), program.example) if m.verdict == "broken"]
    assert (broken.value, broken.why) == ("linear_default", "linear_default reads layer_1_weight where layer_0_weight belongs")


def test_an_eps_is_seen_where_operands_are_small() -> None:
    """On the probe it is a millionth of the variance; of a thousandth of the probe it is as much."""
    gain = torch.ones(8)

    def normed(eps: float) -> Measured:
        built = Builder(x=X)
        program = built.program(built.op(aten.layer_norm.default, built.x, [8], built.constant("gain", gain), None, 1e-6))
        (norm,) = program.results()
        edit = Edit(program)
        with edit.site(norm):
            edit.update(norm, *norm.args[:4], eps)
        (result,) = check(program, edit, Exact(), program.example)
        return result

    assert normed(1e-6).verdict == "held"
    for fault in (-1e-6, 2e-6, 0.0):
        assert normed(fault).figure < 1e-4
        assert (normed(fault).verdict, normed(fault).why.partition("where")[2]) == (
            "broken",
            " its operands are 0.001 of what they are on the probe",
        )


def test_noise_is_no_excuse_where_the_old_way_has_none() -> None:
    """A mask with the wrong sign makes rows that rounding alone decides; of those that it should make rounding decides nothing."""
    hidden = torch.tensor([0.0, 0, 0, 0, -3e38, -3e38, -3e38, -3e38])

    def masked(sign: float) -> Measured:
        built = Builder(x=X)
        mask = built.constant("mask", hidden)
        program = built.program(built.op(aten.softmax.int, built.op(aten.add.Tensor, built.x, mask), -1))
        (old,) = program.results()
        edit = Edit(program)
        with edit.site(old):
            scores = edit.insert(aten.add.Tensor, built.x, edit.insert(aten.mul.Tensor, mask, sign, like=old), like=old)
            edit.replace(old, edit.insert(aten.softmax.int, scores, -1, like=old))
        (result,) = check(program, edit, Exact(), program.example)
        return result

    assert masked(-1.0).verdict == "broken"
    assert masked(1.0).verdict != "broken"


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "held"), (1 + 1e-5, "broken")])
def test_a_change_is_as_exact_as_it_must_be(factor: float, verdict: str) -> None:
    """What float32 can't tell is computed in float64."""
    program = chain(2)
    edit, leaf = Edit(program), node(program, "layer_0_weight")
    with edit.site(leaf):
        edit.carry(leaf, lambda w: (w + 1e4) - 1e4)
        edit.fold(leaf, program.constants["layer.0.weight"] * factor)
    assert next(m.verdict for m in check(program, edit, Lossy(), program.example) if m.value == leaf.name) == verdict


def test_a_value_of_two_sites_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And told of both."""
    seen: list[str] = []
    monkeypatch.setattr(checker, "evaluate", lambda node, *rest: seen.append(node.name) or evaluate(node, *rest))

    def updated(*names: str) -> list[Measured]:
        seen.clear()
        program = one_op(aten.mul.Tensor, X, 2.0)
        edit = Edit(program)
        for name in names:
            with edit.site(node(program, name)):
                edit.update(program.results()[0], program.placeholders()[0], -2.0)
        return check(program, edit, Exact(), program.example)

    (alone,) = updated("mul_tensor")
    once = len(seen)
    first, second = updated("x", "mul_tensor")
    assert alone == second and (first.value, first.verdict) == ("mul_tensor", "broken") and first.site != second.site
    assert len(seen) == once > 0


def test_a_stored_constant_is_known_to_a_few_roundings() -> None:
    """Its readers may take it for the old one: the record says what it should be."""
    for factor, verdict in ((1.0, "held"), (1 + 1e-7, "held"), (1 + 1e-5, "broken")):
        program = chain(2)
        edit, leaf = Edit(program), node(program, "layer_0_weight")
        with edit.site(leaf):
            edit.carry(leaf, lambda w: w * 1.5)
            edit.fold(leaf, program.constants["layer.0.weight"] * 1.5 * factor)
        assert next(m.verdict for m in check(program, edit, Lossy(), program.example) if m.value == leaf.name) == verdict


HADAMARD = Rotation(randomised_hadamard(8, 0))
LINEAR_CHANGES: dict[str, tuple[Callable[[Label], Callable[[Tensor], Tensor]], bool]] = {  # the change, and whether sums of rows tell of it
    "rotation": (lambda label: rotated((label,), np.arange(8), np.zeros(8), {0: HADAMARD}), True),
    "scale": (lambda label: Elementwise((label,), Kind.SCALE, torch.linspace(0.5, 2, 9).double()), False),
    "order": (lambda label: permuted((label,), np.roll(np.arange(8), 3)), False),
    "shift": (lambda label: Elementwise((label,), Kind.SHIFT, torch.linspace(0.5, 2, 9).double()), False),
}


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("name", LINEAR_CHANGES)
def test_a_wrong_number_shows_in_sums_of_rows(name: str, across: bool) -> None:
    """Of a weight that changes along one axis. Where the sums are as they should be, nobody looks at each number."""
    make, is_summed = LINEAR_CHANGES[name]
    shape = (64, 8) if across else (8, 64)
    label = Label(np.arange(8).reshape((1, 8) if across else (8, 1)), 1)
    change, weight = make(label), seeded(*shape)
    for wrong, verdict in ((0.0, "held"), (1e-3, "broken")):
        built = Builder(x=seeded(4, shape[1]))
        program = built.program(built.op(aten.linear.default, built.x, built.constant("w", weight)))
        edit, leaf, new = Edit(program), node(program, "w"), change(weight).contiguous()
        new[3, 5] += wrong
        with edit.site(leaf):
            edit.carry(leaf, change)
            edit.fold(leaf, new)
        with mock.patch.object(checker, "error_along", wraps=error_along) as looks:
            (found,) = [m for m in check(program, edit, Lossy(), program.example) if m.value == leaf.name]
        assert found.verdict == verdict
        assert (weight.shape not in [look.args[0].shape for look in looks.call_args_list]) == (is_summed and not wrong)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("fault", ["none", "row", "column", "number"])
@pytest.mark.parametrize("name", LINEAR_CHANGES)
def test_nothing_quiet_hides_in_a_stored_weight(name: str, fault: str, across: bool) -> None:
    """A row and a column a million times quieter than the rest, negated; a number of nothing beside them where nothing is summed."""
    make, is_summed = LINEAR_CHANGES[name]
    shape, quiet = ((64, 8) if across else (8, 64)), 1e-6
    label = Label(np.arange(8).reshape((1, 8) if across else (8, 1)), 1)
    change, weight = make(label), seeded(*shape)
    weight[:, 2] *= quiet if not across or name != "rotation" else 1  # what is rotated isn't quiet behind it
    weight[3] *= quiet if across or name != "rotation" else 1
    weight[5, 4] *= 1 if is_summed else 1e-12
    stored = change(weight.double()).float()
    where: Any = {"none": ..., "row": 3, "column": (slice(None), 2), "number": (5, 4)}[fault]
    if fault != "none":
        stored[where] = -stored[where]
    built = Builder(x=seeded(4, shape[1]))
    program = built.program(built.op(aten.linear.default, built.x, built.constant("w", weight)))
    edit, leaf = Edit(program), node(program, "w")
    with edit.site(leaf):
        edit.carry(leaf, change)
        edit.fold(leaf, stored)
    assert next(m.verdict for m in check(program, edit, Lossy(), program.example) if m.value == leaf.name) == (
        "held" if fault == "none" else "broken"
    )


@pytest.mark.parametrize("odd", [1e20, 1e-30, math.inf, math.nan])
def test_a_row_beyond_float32_hides_no_other(odd: float) -> None:
    """Squares of its numbers leave the range: sums of rows would tell nothing."""
    label = Label(np.arange(8).reshape(1, 8), 1)
    change, weight = LINEAR_CHANGES["rotation"][0](label), seeded(64, 8)
    weight[7] *= odd
    stored = change(weight.double()).float()
    stored[3] = -stored[3]
    if odd < 1:
        stored[7] = -stored[7]
    built = Builder(i=torch.tensor([1, 5]))
    program = built.program(built.op(aten.embedding.default, built.constant("w", weight), built.i))
    edit, leaf = Edit(program), node(program, "w")
    with edit.site(leaf):
        edit.carry(leaf, change)
        edit.fold(leaf, stored)
    assert next(m.verdict for m in check(program, edit, Lossy(), program.example) if m.value == leaf.name) == "broken"


def test_rounding_moves_what_has_digits() -> None:
    """Numbers below the least normal one by a step of theirs."""
    x = torch.tensor([0.0, math.inf, -math.inf, 1.0, -3.0, 2e-7], dtype=torch.float16)
    moved = rounded(x, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:3], x[:3])
    assert ((moved[3:] - x[3:]).abs() > 0).all() and ((moved[3:-1] / x[3:-1] - 1).abs() < 2e-3).all()
    assert (moved[-1] - x[-1]).abs() < 1e-7
    assert rounded(torch.arange(3), torch.Generator()).tolist() == [0, 1, 2]


def test_errors_are_beside_what_numbers_are_summed_with() -> None:
    old = torch.tensor([[1.0, 1e-6, 0.0], [100.0, 1e-4, 0.0]])
    new = old * torch.tensor([1.0, 1.5, 1.0])
    assert error_along(old, new, ()) == pytest.approx(0.5)
    assert error_along(old, new, (-1,)) == pytest.approx(0.5e-6 * 3**0.5)
    assert error_along(old, new, (0,)) == pytest.approx(0.5e-4 / (0.5e-8 + 0.5e-12) ** 0.5)
    assert error_along(old, old, ()) == 0 and error_along(old.int(), old.int() + 1, ()) == math.inf
    assert error_along(old, old[:1], ()) == math.inf and error_along(old, old * math.nan, ()) == math.inf
    assert error_along(-1 / torch.zeros(2), -1 / torch.zeros(2), ()) == 0


@pytest.mark.parametrize("contract", [Exact(), Bounded()])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 0.7, 1.5, 3.0])
def test_a_negated_value_is_as_far_as_the_figure_says(contract: Contract, size: float) -> None:
    old, new = seeded(200), seeded(200) + size * seeded(200, seed=1)
    known, real = contract.negated(contract.figure(old, new)), contract.figure(old, -new)
    assert known <= real if isinstance(contract, Exact) else known >= real


def test_what_lends_its_form_may_change_sign() -> None:
    program = one_op(aten.zeros_like.default, X)
    assert measured(program, lambda e, n: e.insert(aten.full_like.default, n.args[0], 0.0, like=n), Exact()).verdict == "held"


@pytest.mark.parametrize("made", [aten.zeros_like.default, aten.relu.default])
def test_zeros_have_no_sign(made: Any) -> None:
    """A layer of zeros, and of what is 0 on the probe alone, scaled against it: its weight is seen in its own record."""
    built = Builder(x=-X.abs())
    zeros = built.op(made, built.x)
    program = built.program(built.op(aten.linear.default, zeros, weight := built.constant("w", seeded(5, 8)), built.constant("b", seeded(5))))
    edit = Edit(program)
    with edit.site(weight):
        edit.carry(zeros, lambda z: z / 1.5)
        edit.carry(weight, lambda w: w * 1.5)
        edit.fold(weight, program.constants["w"] * 1.5)
    assert {m.value: m.verdict for m in check(program, edit, Exact(), program.example)} == {
        zeros.name: "held",
        "w": "held",
        "linear_default": "held",
    }


def test_nobody_looks_at_dead_readers() -> None:
    program, edit = two_layers()
    with program.graph.inserting_before(program.output_node):
        program.graph.call_function(aten.neg.default, (node(program, "linear_default"),))
    assert the_broken(program, edit) == []


@pytest.mark.parametrize("which", ["x", "mul_tensor"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_inputs_and_outputs_carry_no_change(which: str, factor: float) -> None:
    """2 x with the input or the output said to be doubled, and the op made to agree."""
    program = one_op(aten.mul.Tensor, X, 2.0)
    op, x = program.results()[0], program.placeholders()[0]
    edit = Edit(program)
    with edit.site(op):
        edit.carry(node(program, which), lambda v: v * factor)
        edit.update(op, x, 2.0 * factor if which == "mul_tensor" else 2.0 / factor)
    wrong = [(which, "an input or output carries a change")] if factor == 2 else []
    assert [(m.value, m.why) for m in check(program, edit, Exact(), program.example) if m.verdict != "held"] == wrong


def test_an_output_is_never_loose() -> None:
    program = chain(2)
    edit, last = Edit(program), program.results()[0]
    with edit.site(last):
        edit.loosen([last, node(program, "relu_default_1")])
        edit.update(last, last.args[0], last.args[0])
    assert [(v, w) for _, v, w in the_broken(program, edit)] == [("add_tensor_1", "an input or output carries a change")]


# values that are rounding noise themselves


def centred_sum(offset: float = 0.0) -> Measured:
    """sum(x - mean(x)) of each row, its channels in the opposite order; an offset where the row is centred."""
    built = Builder(x=seeded(4, 96))
    centred = built.op(aten.sub.Tensor, built.x, built.op(aten.mean.dim, built.x, [1], True))
    total = built.op(aten.sum.dim_IntList, centred, [1])
    program = built.program(total)
    edit = Edit(program)
    with edit.site(total):
        edit.carry(centred, lambda v: v.flip(1) + offset)
    return next(m for m in check(program, edit, Exact(), program.example) if m.value == total.name)


def test_noise_in_place_of_noise_is_held() -> None:
    old = seeded(4, 96) - seeded(4, 96).mean(1, keepdim=True)
    assert relative_error(old.sum(1), old.flip(1).sum(1)) > 0.01, "far beyond the limit"
    assert centred_sum().verdict == "held"


@pytest.mark.parametrize("offset", [1e-5, 1e-3])
def test_what_is_more_than_noise_is_broken(offset: float) -> None:
    """A hundred-thousandth of the summed values' own size."""
    assert centred_sum(offset=offset).verdict == "broken"


def test_where_only_noise_is_compared_nothing_is_proved() -> None:
    """The same value made anew: whatever the row's sign, the sum is noise."""
    built = Builder(x=seeded(4, 96))
    centred = built.op(aten.sub.Tensor, built.x, built.op(aten.mean.dim, built.x, [1], True))
    program = built.program(built.op(aten.sum.dim_IntList, centred, [1]))

    def change(edit: Edit, old: fx.Node) -> fx.Node:
        return edit.insert(aten.sum.dim_IntList, edit.insert(aten.flip.default, centred, [1], like=old), [1], like=old)

    result = measured(program, change, Exact())
    assert (result.verdict, result.why) == ("unverified", "flip_default could change sign unseen")


# blocks


def test_one_bad_block_of_many_is_broken_and_named() -> None:
    """One scale of 512 halved: 40 dB over the whole weight, within what int4 may lose."""
    built = Builder(x=seeded(2, 64))
    weight = seeded(512, 64)
    program = built.program(built.op(aten.linear.default, built.x, built.constant("w", weight)))
    scale = weight.abs().amax(1, keepdim=True) / 7
    assert measured(program.copy(), quantised_pair(scale, "int4"), Bounded(), at="w").verdict == "held"
    scale[300] /= 2
    result = measured(program.copy(), quantised_pair(scale, "int4"), Bounded(), at="w")
    assert (result.verdict, result.figure > result.limit) == ("broken", True)
    assert result.why.startswith("block [300, 0] of dequantize_default loses ")
    assert measured(program.copy(), quantised_pair(scale, "int4"), Bounded(limit=15.0), at="w").verdict == "held"


# what the probe doesn't reach


def behind_relu(weight: Tensor) -> list[Measured]:
    """A weight behind a relu that leaves channel 3 dead on the probe, made anew beside a new layer."""
    x = seeded(4, 8)
    x[:, 3] = -1
    built = Builder(x=x)
    hidden = built.op(aten.relu.default, built.x)
    program = built.program(built.op(aten.linear.default, hidden, built.constant("w", seeded(5, 8))))
    old, edit = program.results()[0], Edit(program)
    with edit.site(old):
        edit.replace(old, edit.insert(aten.linear.default, old.args[0], edit.constant("w", weight, like=old), like=old))
    return check(program, edit, Exact(), program.example)


def test_a_fault_behind_a_dead_channel_is_broken() -> None:
    assert [m.verdict for m in behind_relu(seeded(5, 8))] == ["held"]
    (result,) = behind_relu(seeded(5, 8) * (1 - 0.5 * (torch.arange(8) == 3)))
    assert (result.verdict, result.figure) == ("broken", 0.0)
    assert result.why.endswith("at linear_default_1 where its operands aren't 0, as they are on the probe")


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("is_carried", [True, False])
def test_a_weight_is_measured_in_what_few_rows_of_a_long_probe_use(row: int, is_carried: bool) -> None:
    """Two channels trade their sizes; one of them is seen in one row only, which needn't be among those that are compared."""
    x = seeded(2 * ROWS, 4) * torch.tensor([1.0, 1.0, 1.0, 1e-9])
    x[row, 3] = 1.0
    built = Builder(x=x)
    weight = built.constant("w", seeded(3, 4))
    first = built.op(aten.mul.Tensor, built.x, 1.0)
    program = built.program(built.op(aten.linear.default, first, weight))
    for column, verdicts in ((None, {"held"}), (3, {"broken", "held"})):
        fault = 2.0 if column is None else torch.where(torch.arange(4) == column, 1.0, 2.0)
        copy = program.copy()
        edit, old = Edit(copy), copy.results()[0]
        with edit.site(old):
            product, leaf = old.args
            edit.carry(product, lambda v: v * 0.5)
            edit.update(product, product.args[0], 0.5)
            if is_carried:
                edit.carry(leaf, lambda v: v * 2)
                edit.fold(leaf, copy.constants["w"] * fault)
            else:
                edit.update(old, product, edit.constant("new", copy.constants["w"] * fault, like=old))
        assert {m.verdict for m in check(copy, edit, Exact(), copy.example)} == verdicts


@pytest.mark.parametrize("row", [1, 5])
def test_a_table_is_measured_in_rows_that_the_probe_does_not_read(row: int) -> None:
    built = Builder(x=torch.tensor([1, 2]))
    table = built.constant("w", seeded(6, 4))
    program = built.program(built.op(aten.mul.Tensor, built.op(aten.embedding.default, table, built.x), 2.0))
    wrong = seeded(6, 4) * 2
    wrong[row] /= 2
    edit = Edit(program)
    with edit.site(program.results()[0]):
        for carrier in (table, table.users.copy().popitem()[0]):
            edit.carry(carrier, lambda v: v * 2)
        edit.fold(table, wrong)
        edit.update(program.results()[0], program.results()[0].args[0], 1.0)
    broken = [m.value for m in check(program, edit, Exact(), program.example) if m.verdict == "broken"]
    assert broken == (["w", "embedding_default"] if row == 1 else ["w"])


F = torch.nn.functional
PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {  # body, operands, how many flips need no second product
    "linear": (F.linear, (seeded(2, 3, 5), seeded(4, 5, seed=1)), 2),
    "linear with bias": (F.linear, (seeded(2, 3, 5), seeded(4, 5, seed=1), seeded(4, seed=2)), 2),
    "conv1d": (F.conv1d, (seeded(2, 3, 9), seeded(4, 3, 3, seed=1), seeded(4, seed=2)), 2),
    "conv2d": (F.conv2d, (seeded(2, 3, 5, 5), seeded(4, 3, 3, 3, seed=1), seeded(4, seed=2)), 2),
    "conv2d of one image": (F.conv2d, (seeded(3, 5, 5), seeded(4, 3, 3, 3, seed=1), seeded(4, seed=2)), 2),
    "matmul": (torch.matmul, (seeded(2, 3, 5), seeded(2, 5, 4, seed=1)), 2),
    "mul": (torch.mul, (seeded(2, 3, 5), seeded(3, 1, seed=1)), 2),
    "a square": (lambda x: x * x, (seeded(2, 3, 5),), 0),
    "a product with itself": (lambda x: x @ x, (seeded(3, 3),), 0),
}


@pytest.mark.parametrize(("body", "operands", "shortcuts"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_flipped_product_is_that_of_the_flipped_operand(body: Callable[..., Tensor], operands: tuple[Tensor, ...], shortcuts: int) -> None:
    names = "xyz"[: len(operands)]
    program = function(eval(f"lambda {', '.join(names)}: body({', '.join(names)})", {"body": body}), *operands)  # builtins have no signature
    new = next(n for n in program.graph.nodes if n.target in checker.PRODUCTS)
    env = dict(zip(program.placeholders(), operands, strict=True))
    product, found = evaluate(new, env, {}), 0
    for operand in new.all_input_nodes:
        added = checker._added(new, operand, env)
        if added is not None:
            found += 1
            torch.testing.assert_close(2 * added - product, evaluate(new, {**env, operand: -env[operand]}, {}))
    assert found == shortcuts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_are_those_of_the_definition(dtype: torch.dtype) -> None:
    a = seeded(64, 9).to(dtype)
    b = a + 1e-4 * seeded(64, 9, seed=1).to(dtype)
    wanted = (b.double() - a.double()).abs().max() / a.double().square().mean().sqrt()
    assert relative_error(a, b) == pytest.approx(float(wanted), rel=1e-6)
    a[3, 3] = b[3, 3] = math.inf
    finite = a[a.isfinite()].double()
    wanted = (b.double() - a.double()).nan_to_num(0).abs().max() / finite.square().mean().sqrt()
    assert relative_error(a, b) == pytest.approx(float(wanted), rel=1e-6)
    assert relative_error(a, b.clone().fill_(math.nan)) == math.inf
    assert relative_error(torch.zeros(3, dtype=dtype), torch.tensor([0.0, 2.0, 0.0], dtype=dtype), 4.0) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_slices_are_measured_beside_their_own_rms(dtype: torch.dtype) -> None:
    a = seeded(6, 8).to(dtype)
    a[:, 3] *= 1e-7
    b = a.clone()
    b[2, 3] = -b[2, 3]
    assert relative_error(a, b) < 1e-5, "the value hides it"
    wanted = float(2 * a[2, 3].abs() / a[:, 3].abs().double().square().mean().sqrt())
    assert slice_error(a, b) == pytest.approx(wanted, rel=1e-5)
    assert slice_error(a, b, torch.full(a.shape, 9.0)) == pytest.approx(float((a - b).abs().max() / 9), rel=1e-5)
    assert slice_error(a, a.clone()) == 0


def test_slices_too_quiet_for_squares_in_float32_and_masks_too_loud_for_them() -> None:
    a = seeded(6, 8)
    a[0], a[1, 2] = a[0] * 1e-25, torch.finfo(torch.float32).min
    b = a.clone()
    b[0, 1] *= 1.01
    assert slice_error(a, b) == pytest.approx(float(0.01 * a[0, 1].double().abs() / a[0].double().square().mean().sqrt()), rel=1e-3)
    a[1, 2] = b[1, 2] = -math.inf
    assert slice_error(a, b) == pytest.approx(float(0.01 * a[0, 1].double().abs() / a[0].double().square().mean().sqrt()), rel=1e-3)


def test_an_error_in_a_quiet_channel_is_seen() -> None:
    """The gain of one channel is 1e-6 of the others'; what reads it may make it loud again."""
    gain = torch.ones(8)
    gain[3] = 1e-6
    wrong = gain.clone()
    wrong[3] *= -1
    built = Builder(x=seeded(16, 8), gain=gain)
    program = built.program(built.op(aten.mul.Tensor, built.x, built.gain))

    def change(given: Tensor) -> Change:
        return lambda edit, old: edit.insert(aten.mul.Tensor, old.args[0], edit.constant("new", given, like=old), like=old)

    assert measured(program, change(wrong), Exact()).verdict == "broken"


def test_a_constant_written_in_place_is_broken() -> None:
    built = Builder(x=X)
    kept, written = built.constant("kept", torch.ones(8)), built.constant("written", torch.ones(8))
    program = built.program(built.op(aten.mul.Tensor, built.op(aten.mul.Tensor, built.x, kept), written))
    (old,), edit = program.results(), Edit(program)
    with edit.site(old):
        edit.replace(old, edit.insert(aten.mul.Tensor, *old.args, like=old))
        program.constants["written"][3] = 2
    (found,) = (m for m in check(program, edit, Exact(), program.example) if m.verdict == "broken")
    assert "written was written in place" in found.why


@pytest.mark.parametrize(("row", "verdict"), [(2, "broken"), (7, "broken"), (None, "held")])
def test_rows_of_a_table_that_the_probe_does_not_read_are_compared(row: int | None, verdict: str) -> None:
    built = Builder(ids=torch.tensor([[1, 2], [3, 1]]))
    program = built.program(built.op(aten.embedding.default, built.constant("table", seeded(9, 4)), built.ids))

    def change(edit: Edit, old: fx.Node) -> fx.Node:
        table = seeded(9, 4)
        if row is not None:
            table[row] *= -1
        return edit.insert(aten.embedding.default, edit.constant("new", table, like=old), old.args[1], like=old)

    found = measured(program, change, Exact())
    assert (found.verdict, "doesn't read" in found.why) == (verdict, row == 7)


def test_a_quiet_channel_of_rounding_noise_is_none() -> None:
    """What is left of numbers that cancel differs with the order of the sums, and says nothing."""
    weight = seeded(8, 64)
    weight[3, 32:] = -weight[3, :32]
    x = seeded(16, 32).repeat(1, 2)
    built = Builder(x=x, w=weight)
    program = built.program(built.op(aten.linear.default, built.x, built.w))

    def halves(edit: Edit, old: fx.Node) -> fx.Node:
        parts = [edit.insert(aten.slice.Tensor, n, 1, lo, lo + 16, like=old) for lo in (0, 16, 32, 48) for n in old.args]
        sums = [edit.insert(aten.linear.default, a, w, like=old) for a, w in zip(parts[::2], parts[1::2], strict=True)]
        first, second = (edit.insert(aten.add.Tensor, a, b, like=old) for a, b in (sums[:2], sums[2:]))
        return edit.insert(aten.add.Tensor, first, second, like=old)

    before = x @ weight.T
    assert before[:, 3].abs().max() < 1e-4 * before.abs().max()
    assert measured(program, halves, Exact()).verdict == "held"


@pytest.mark.parametrize("at", [3, -1])  # in the part that is looked at first, and beyond it
@pytest.mark.parametrize("found", [0.0, 1e-6, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e-30, math.inf])
@pytest.mark.parametrize("floor", [0.0, 1e3])
@pytest.mark.parametrize("rows", [1, 3])
def test_beyond_is_what_has_a_greater_error(at: int, found: float, size: float, floor: float, rows: int) -> None:
    a = seeded(rows, TILE + 5)
    a[0, 7] = size
    a *= 0 if size == 0.0 else 1
    b = a.clone()
    b[-1, at] += found
    noise = torch.full(a.shape, floor) if floor else None
    for limit in (0.0, 1e-4, 0.5):
        assert is_beyond(a, b, limit, noise) == (not slice_error(a, b, noise) <= limit)


@pytest.mark.parametrize(("sign", "verdict"), [(1.0, "held"), (-1.0, "broken")])
def test_what_equal_values_hide_in_front_of_a_recorded_pair_is_seen(sign: float, verdict: str) -> None:
    """All tokens have the same value, so that attention gives it back whatever its scores are."""
    built = Builder(q=seeded(1, 2, 5, 4), k=seeded(1, 2, 5, 4, seed=1), v=seeded(1, 2, 1, 4, seed=2).repeat(1, 1, 5, 1))
    program = built.program(built.op(aten.scaled_dot_product_attention.default, built.q, built.k, built.v))
    (old,), edit, block = program.results(), Edit(program), [-1] * 4
    q, k, v = program.placeholders()

    def rounded(x: Tensor) -> Tensor:
        scale = torch.full((1, 1, 1, 1), 1 / 255)
        return torch.ops.fxc.dequantize(torch.ops.fxc.quantize(x, scale, None, "uint8", block), scale, None, "uint8", block)

    with edit.site(old):
        like = {"like": old}
        scores = edit.insert(aten.matmul.default, q, edit.insert(aten.transpose.int, k, -2, -1, **like), **like)
        weights = edit.insert(aten.softmax.int, edit.insert(aten.mul.Tensor, scores, sign / 2, **like), -1, **like)
        scale = edit.constant("scale", torch.full((1, 1, 1, 1), 1 / 255), **like)
        codes = edit.insert(torch.ops.fxc.quantize.default, weights, scale, None, "uint8", block, **like)
        pair = edit.insert(torch.ops.fxc.dequantize.default, codes, scale, None, "uint8", block, **like)
        edit.makes(pair, rounded)
        edit.replace(old, edit.insert(aten.matmul.default, pair, v, **like))
    (result,) = check(program, edit, Lossy(), program.example)
    assert result.verdict == verdict
