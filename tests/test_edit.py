"""Edit: rollback is the identity, commit sweeps what became unread and nothing else, misuse is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import fx

from fxcompress.edit import Edit
from fxcompress.interpret import run as interpret
from fxcompress.program import Program, State
from fxcompress.verify import verify
from tests.passes.helpers import Builder, chain, lines, node, seeded, snapshot, text

aten = torch.ops.aten
UNARY = (aten.relu.default, aten.neg.default, aten.sin.default)
BINARY = (aten.add.Tensor, aten.mul.Tensor)
Choice = tuple[int, int, int]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Up to a dozen ops over two inputs and three constants of one shape, one to three of them returned."""
    built = Builder(x=seeded(2, 3), y=seeded(2, 3, seed=1))
    values = [built.x, built.y, *(built.constant(f"c.{i}", seeded(2, 3, seed=2 + i)) for i in range(3))]
    for _ in range(draw(st.integers(1, 12))):
        target = draw(st.sampled_from((*UNARY, *BINARY)))
        operands = [draw(st.sampled_from(values)) for _ in range(1 if target in UNARY else 2)]
        values.append(built.op(target, *operands))
    return built.program(*(draw(st.sampled_from(values)) for _ in range(draw(st.integers(1, 3)))))


EDITS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=10)


def change(edit: Edit, kind: int, first: int, second: int) -> None:
    """One random change at one site; kinds 0 to 2 keep the function."""
    ops = [n for n in edit.graph.nodes if n.op == "call_function"]
    at = ops[first % len(ops)]
    with edit.site(at):
        if kind == 0:  # an op twice undone, before its readers
            after = at.next
            once = edit.insert(aten.neg.default, at, like=at, before=after)
            edit.replace(at, edit.insert(aten.neg.default, once, like=at, before=after))
        elif kind == 1:  # the same op anew
            edit.replace(at, edit.insert(at.target, *at.args, like=at))  # type: ignore[arg-type]
        elif kind == 2:  # through a constant of zeros
            zero = edit.constant("zero", torch.zeros(2, 3), like=at, before=at.next)
            edit.replace(at, edit.insert(aten.add.Tensor, at, zero, like=at, before=zero.next))
        elif kind == 3:
            constants = [n for n in edit.graph.nodes if n.op == "get_attr"]
            edit.fold(constants[second % len(constants)], seeded(2, 3, seed=second))
        elif kind == 4:
            edit.update(at, *(edit.program.placeholders()[second % 2] for _ in at.args))
        elif not at.users:
            edit.erase(at)


def apply(edit: Edit, choices: list[Choice], kinds: int) -> None:
    for kind, first, second in choices:
        change(edit, kind % kinds, first, second)


@settings(max_examples=80, deadline=None)
@given(programs(), EDITS)
def test_rollback_is_the_identity(program: Program, choices: list[Choice]) -> None:
    before, printed = snapshot(program), text(program)
    edit = Edit(program)
    apply(edit, choices, 6)
    edit.rollback()
    assert snapshot(program) == before
    assert text(program) == printed
    assert edit.sites == []


@settings(max_examples=80, deadline=None)
@given(programs(), EDITS)
def test_commit_of_changes_that_keep_the_function_keeps_it(program: Program, choices: list[Choice]) -> None:
    before = interpret(program, program.example)
    edit = Edit(program)
    apply(edit, choices, 3)
    edit.commit()
    verify(program)
    assert all(torch.equal(a, b) for a, b in zip(before, interpret(program, program.example), strict=True))


@settings(max_examples=40, deadline=None)
@given(programs(), EDITS)
def test_commit_leaves_nothing_unread_behind(program: Program, choices: list[Choice]) -> None:
    edit = Edit(program)
    dead_before = {n for n in program.graph.nodes if not n.users}
    apply(edit, choices, 3)
    edit.commit()
    assert {n for n in program.graph.nodes if not n.users and n.op == "call_function"} <= dead_before
    assert set(program.constants) == {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}


def linear_relu() -> Program:
    """relu(linear(x, w, b)) + x, in module "layer"."""
    built = Builder(x=seeded(2, 3))
    w, b = built.constant("layer.weight", seeded(3, 3)), built.constant("layer.bias", seeded(3))
    linear = built.op(aten.linear.default, built.x, w, b, module="layer")
    return built.program(built.op(aten.add.Tensor, built.op(aten.relu.default, linear, module="layer"), built.x))


def test_commit_sweeps_what_only_the_replaced_node_read() -> None:
    program = linear_relu()
    edit = Edit(program)
    with edit.site(node(program, "relu_default"), "why"):
        edit.replace(
            node(program, "relu_default"), edit.insert(aten.sin.default, program.placeholders()[0], like=node(program, "relu_default"))
        )
    assert sorted(edit.commit()) == ["layer_bias", "layer_weight", "linear_default", "relu_default"]
    assert text(program) == lines("""
        sin_default = sin(x)
        add_tensor = add.Tensor(sin_default, x)
        return add_tensor""")
    assert program.constants == {}


def test_commit_sweeps_what_an_update_no_longer_reads() -> None:
    program = linear_relu()
    edit = Edit(program)
    linear = node(program, "linear_default")
    with edit.site(linear):
        edit.update(linear, *linear.args[:2])
    assert edit.commit() == ["layer_bias"]
    assert set(program.constants) == {"layer.weight"}


def test_commit_keeps_the_first_value_of_a_state() -> None:
    program = replace(linear_relu(), states=(State("x", "add_tensor", "first"),))
    program.constants["first"] = seeded(2, 3)
    Edit(program).commit()
    assert "first" in program.constants


def test_commit_leaves_dead_code_that_it_did_not_make() -> None:
    program = linear_relu()
    with program.graph.inserting_before(program.output_node):
        program.graph.call_function(aten.exp.default, (program.placeholders()[0],))
    assert Edit(program).commit() == []
    assert "exp_default" in text(program)


def test_a_site_records_what_was_done() -> None:
    program = linear_relu()
    edit = Edit(program)
    linear = node(program, "linear_default")
    with edit.site(linear, "because") as site:
        zero = edit.constant("layer.bias", torch.zeros(3), like=linear)
        new = edit.insert(aten.linear.default, *linear.args[:2], zero, like=linear)
        edit.replace(linear, new)
    assert (site.name, site.node, site.module, site.reason) == ("layer  (linear_default)", "linear_default", "layer", "because")
    assert (site.inserted, site.replaced, site.constants) == ([zero, new], {linear: new}, ["layer.bias_1"])
    assert (new.meta["module"], tuple(new.meta["val"].shape)) == (("layer",), (2, 3))


def test_replace_spares_the_readers_inserted_at_the_site() -> None:
    program = linear_relu()
    edit = Edit(program)
    relu = node(program, "relu_default")
    with edit.site(relu):
        edit.replace(relu, edit.insert(aten.neg.default, relu, like=relu, before=relu.next))
    edit.commit()
    assert lines("""
        relu_default = relu(linear_default)
        neg_default = neg(relu_default)
        add_tensor = add.Tensor(neg_default, x)""") in text(program)


def test_outputs_are_readers() -> None:
    program = linear_relu()
    edit = Edit(program)
    add = node(program, "add_tensor")
    with edit.site(add):
        edit.replace(add, edit.insert(aten.sub.Tensor, *add.args, like=add))
    edit.commit()
    assert [r.name for r in program.results()] == ["sub_tensor"]


def test_fold_touches_every_reader() -> None:
    built = Builder(x=seeded(2, 3))
    w = built.constant("w", seeded(3, 3))
    first, second = built.op(aten.linear.default, built.x, w), built.op(aten.mm.default, built.x, w)
    program = built.program(first, second, w)
    edit = Edit(program)
    with edit.site(first) as site:
        edit.fold(w, torch.ones(3, 3))
    assert site.touched == [first, second, w]


MISUSE: dict[str, tuple[Any, str]] = {
    "outside a site": (lambda e, p: e.replace(node(p, "relu_default"), node(p, "x")), "only inside `with edit.site"),
    "fold of another shape": (
        lambda e, p: at_site(e, p, lambda: e.fold(node(p, "layer_bias"), torch.ones(1))),
        r"fold of layer.bias: torch.float32\[1\] in place of torch.float32\[3\]",
    ),
    "fold of another dtype": (lambda e, p: at_site(e, p, lambda: e.fold(node(p, "layer_bias"), torch.ones(3).double())), "torch.float64"),
    "erase of what is read": (lambda e, p: at_site(e, p, lambda: e.erase(node(p, "linear_default"))), "still read by relu_default"),
}


def at_site(edit: Edit, program: Program, act: Any) -> None:
    with edit.site(node(program, "linear_default")):
        act()


@pytest.mark.parametrize(("act", "message"), [pytest.param(*m, id=i) for i, m in MISUSE.items()])
def test_misuse(act: Any, message: str) -> None:
    program = linear_relu()
    before = snapshot(program)
    edit = Edit(program)
    with pytest.raises(ValueError, match=message):
        act(edit, program)
    edit.rollback()
    assert snapshot(program) == before


def test_an_erased_chain_goes_from_its_end() -> None:
    program = linear_relu()
    with program.graph.inserting_before(program.output_node):
        first = program.graph.call_function(aten.exp.default, (program.placeholders()[0],))
        last = program.graph.call_function(aten.neg.default, (first,))
    edit = Edit(program)
    with edit.site(last):
        with pytest.raises(ValueError, match="exp_default is still read by neg_default"):
            edit.erase(first)
        edit.erase(last)
        edit.erase(first)
    assert sorted(edit.commit()) == ["exp_default", "neg_default"]
    assert "exp" not in text(program)


def test_a_long_chain_is_swept_whole() -> None:
    program = chain(300)
    edit = Edit(program)
    result = program.results()[0]
    with edit.site(result):
        edit.replace(result, edit.insert(aten.neg.default, program.placeholders()[0], like=result))
    assert len(edit.commit()) == 4 * 300
    assert len(program.graph.nodes) == 3


def test_fake_values_of_ops_without_tensor_arguments() -> None:
    program = linear_relu()
    edit = Edit(program)
    with edit.site(node(program, "relu_default")):
        made = edit.insert(aten.ones.default, [2, 3], like=node(program, "relu_default"))
    assert isinstance(made, fx.Node)
    assert tuple(made.meta["val"].shape) == (2, 3)
    assert type(made.meta["val"]) is type(node(program, "x").meta["val"])
