"""Statistics: one streamed run for all questions, answers filed under what a value is computed from."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxcompress.calibrate import statistics
from fxcompress.calibrate.observers import Accumulator, Distribution, Gram, JointAccumulator, JointObserver, Moments, Observer, Range
from fxcompress.calibrate.statistics import Statistics
from fxcompress.edit import Edit
from fxcompress.errors import CalibrationError
from fxcompress.interpret import run as interpret
from fxcompress.program import Program
from tests.passes.helpers import Builder, chain, node, seeded

aten = torch.ops.aten


class Items:
    """Flat inputs that count how often they are read."""

    def __init__(self, *values: Tensor) -> None:
        self.values, self.runs = values, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self.runs += 1
        return iter([(v,) for v in self.values])


def three() -> Items:
    return Items(*(seeded(n, 8, seed=n) for n in (4, 1, 6)))


def seen(program: Program, items: Items, name: str) -> Tensor:
    """What the interpreter computes at a node, over all items."""
    found: list[Tensor] = []
    for item in items.values:
        interpret(program, [item], lambda n, v: found.append(v) if n.name == name else None)
    return torch.cat(found)


def asked(program: Program, names: str, *observers: Observer) -> list[tuple[fx.Node, Observer]]:
    return [(node(program, n), o) for n in names.split() for o in observers or (Range(),)]


# answers


def test_answers_are_those_on_all_items_at_once() -> None:
    program, items = chain(3), three()
    questions = asked(
        program, "x linear_default relu_default_1 add_tensor_2", Range(), Range((-1,)), Moments((-1,)), Gram(-1), Distribution(64)
    )
    answers = Statistics(items)(program, questions)
    assert list(answers) == questions
    for value, observer in questions:
        accumulator = observer.start()
        accumulator.add(seen(program, items, value.name))
        for name, wanted in vars(accumulator.result()).items():
            got = torch.as_tensor(getattr(answers[value, observer], name))
            assert torch.allclose(got.double(), torch.as_tensor(wanted).double(), rtol=1e-6, atol=1e-6), (value, observer, name)
    assert answers[questions[0]].hi == seen(program, items, "x").max(), "an input can be asked about too"


def test_one_run_for_all_questions() -> None:
    program, items = chain(3), three()
    told: list[int] = []
    observe = Statistics(items, progress=told.append)
    questions = asked(program, "linear_default relu_default_1 add_tensor_2", Range(), Moments((-1,)), Distribution(8))
    observe(program, questions)
    assert (items.runs, told) == (1, [1, 2, 3])
    assert observe(program, [*questions, *questions]).keys() == set(questions)
    assert items.runs == 1, "known"
    observe(program, [*questions, (node(program, "add_tensor"), Range())])
    assert items.runs == 2, "one run for what is new"
    assert observe(program, []) == {}
    assert items.runs == 2


def test_only_what_is_needed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    program, items = chain(3), three()
    walked: list[str] = []
    right = statistics.walk
    monkeypatch.setattr(statistics, "walk", lambda nodes, *rest: walked.extend(n.name for n in nodes) or right(nodes, *rest))
    Statistics(items)(program, asked(program, "linear_default_1"))
    assert walked == ["x", "layer_0_weight", "linear_default", "relu_default", "add_tensor", "layer_1_weight", "linear_default_1"] * 3


def test_an_input_nobody_asks_about_is_skipped_in_place() -> None:
    built = Builder(unused=seeded(2), x=seeded(2, 3))
    program = built.program(built.op(aten.relu.default, built.x), built.op(aten.neg.default, built.unused))
    answer = Statistics([(torch.ones(2), torch.full((2, 3), 7.0))])(program, asked(program, "relu_default"))
    assert answer[node(program, "relu_default"), Range()].hi == 7


# memory


@dataclass(frozen=True)
class Large(Observer):
    """A question that says it takes 100 bytes."""

    number: int = 0

    def start(self) -> Accumulator:
        return Range().start()

    def memory(self, shape: Any) -> int:
        return 100


def test_questions_are_cut_into_runs_that_fit() -> None:
    program, items = chain(3), three()
    questions = asked(program, "linear_default relu_default_1 add_tensor_2", Large(0), Large(1))
    whole = Statistics(Items(*items.values))(program, questions)
    for memory, runs in ((100, 6), (199, 6), (200, 3), (250, 3), (600, 1)):
        items.runs = 0
        answers = Statistics(items, memory=memory)(program, questions)
        assert items.runs == runs
        assert {q: (a.lo, a.hi) for q, a in answers.items()} == {q: (a.lo, a.hi) for q, a in whole.items()}


def test_one_question_that_does_not_fit() -> None:
    program, items = chain(2), three()
    with pytest.raises(CalibrationError) as refused:
        Statistics(items, memory=511)(program, asked(program, "relu_default linear_default_1", Gram(-1)))
    assert str(refused.value) == (
        "a statistic doesn't fit into memory\n"
        "  where layer.0  (relu_default)\n"
        "  why   Gram of [4, 8] takes 512 bytes, the limit is 511\n"
        "  do    exclude the site in the recipe, or raise compile(memory=...)"
    )
    assert items.runs == 0, "said before anything runs"


def test_no_value_outlives_its_last_reader() -> None:
    """While an item runs, only what is still to be read is held, however long the chain."""
    program = chain(20)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    @dataclass(frozen=True)
    class Watching(Observer):
        def start(self) -> Accumulator:
            return Watch()

        def memory(self, shape: Any) -> int:
            return 1

    class Watch(Accumulator):
        def add(self, value: Tensor) -> None:
            nonlocal most
            alive.append(weakref.ref(value))
            most = max(most, sum(r() is not None for r in alive))

        def result(self) -> None:
            return None

    questions = [(n, Watching()) for n in program.graph.nodes if n.op == "call_function"]
    Statistics(three())(program, questions)
    gc.collect()
    assert len(alive) == 3 * 60
    assert most <= 3
    assert sum(r() is not None for r in alive) == 0


# content


def edited(program: Program, name: str, change: Any) -> Edit:
    edit = Edit(program)
    with edit.site(node(program, name)):
        change(edit, node(program, name))
    return edit


def fold(edit: Edit, linear: fx.Node) -> None:
    weight = linear.args[1]
    edit.fold(weight, 2 * edit.program.constants[str(weight.target)])


CHANGES: dict[str, tuple[str, Any]] = {
    "a constant": ("linear_default_1", fold),
    "an equal constant": ("linear_default_1", lambda e, n: e.fold(n.args[1], e.program.constants[str(n.args[1].target)].clone())),
    "another op": ("relu_default_1", lambda e, n: e.replace(n, e.insert(aten.neg.default, n.args[0], like=n))),
    "another argument": ("add_tensor_1", lambda e, n: e.update(n, *n.args, alpha=3)),
    "another operand": ("add_tensor_1", lambda e, n: e.update(n, n.args[0], n.args[0])),
}


@pytest.mark.parametrize(("place", "change"), CHANGES.values(), ids=CHANGES)
def test_an_edit_makes_new_values_behind_it_and_nowhere_else(place: str, change: Any) -> None:
    program, items = chain(3), three()
    observe = Statistics(items)
    before, behind = "relu_default add_tensor", "add_tensor_1 linear_default_2 add_tensor_2"
    old = observe(program, asked(program, f"{before} {behind}"))
    edit = edited(program, place, change)
    observe(program, asked(program, before))
    assert items.runs == 1, "in front of the edit nothing changed"
    for runs, name in enumerate(behind.split(), 2):
        new = observe(program, asked(program, name))[node(program, name), Range()]
        assert items.runs == runs, name
        assert new.hi == seen(program, items, name).max()
    edit.rollback()
    again = observe(program, asked(program, f"{before} {behind}"))
    assert items.runs == runs, "known from before"
    assert {q: (a.lo, a.hi) for q, a in again.items()} == {q: (a.lo, a.hi) for q, a in old.items()}


def test_a_copy_of_the_program_has_the_same_values() -> None:
    program, items = chain(2), three()
    observe = Statistics(items)
    observe(program, asked(program, "add_tensor_1"))
    other = program.copy()
    observe(other, asked(other, "add_tensor_1"))
    assert items.runs == 1


def test_an_inserted_reader_changes_no_value() -> None:
    program, items = chain(2), three()
    observe = Statistics(items)
    observe(program, asked(program, "relu_default add_tensor_1"))
    edited(program, "relu_default", lambda e, n: e.insert(aten.neg.default, n, like=n, before=n.next))
    observe(program, asked(program, "relu_default add_tensor_1"))
    assert items.runs == 1


LOOKALIKES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "an axis": ((aten.sum.dim_IntList, [0], True), (aten.sum.dim_IntList, [1], True)),
    "a flag": ((aten.sum.dim_IntList, [0], True), (aten.sum.dim_IntList, [0], False)),
    "int and float": ((aten.mul.Tensor, 2), (aten.mul.Tensor, 2.5)),
    "sign": ((aten.mul.Tensor, 2), (aten.mul.Tensor, -2)),
    "an overload": ((aten.add.Tensor, 1), (aten.sub.Tensor, 1)),
    "a dtype": ((aten.to.dtype, torch.float16), (aten.to.dtype, torch.float64)),
}


@pytest.mark.parametrize(("one", "two"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_differs_is_told_apart(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    """In one program and in two."""
    built = Builder(x=seeded(2, 3))
    first, second = (built.op(target, built.x, *rest) for target, *rest in (one, two))
    same = built.op(one[0], built.x, *one[1:])
    program = built.program(first, second, same)
    version = Statistics(three()).versions.of(program)
    assert version[first] == version[same] != version[second]


def test_a_constant_in_the_place_of_a_dead_one_is_another() -> None:
    """The new tensor may get the address of the one that is gone."""
    observe = Statistics(three())
    versions = set()
    for n in range(20):
        built = Builder(x=seeded(2, 3))
        program = built.program(built.op(aten.mul.Tensor, built.x, built.constant("w", torch.full((3,), float(n)))))
        versions.add(observe.versions.of(program)[node(program, "mul_tensor")])
        last = weakref.ref(program.constants["w"])
        del built, program
        gc.collect(1)
        assert last() is None
    assert len(versions) == 20


# what no input decides


@pytest.mark.parametrize(("memory", "times"), [(1 << 20, 1), (8 * 8 * 4 - 1, 3)])
def test_what_no_input_decides_is_computed_once_as_far_as_memory_goes(memory: int, times: int) -> None:
    calls: list[Tensor] = []

    def doubled(w: Tensor) -> Tensor:
        calls.append(w)
        return 2 * w

    built = Builder(x=seeded(2, 8))
    weight = built.op(doubled, built.op(aten.neg.default, built.constant("w", seeded(8, 8))))
    program = built.program(built.op(aten.linear.default, built.x, weight))
    calls.clear()
    question = asked(program, "linear_default", Moments((-1,)))
    answer = Statistics(three(), memory)(program, question)[question[0]]
    assert len(calls) == times
    assert torch.allclose(answer.mean.float(), seen(program, three(), "linear_default").mean(0))


def test_a_constant_that_is_asked_about_is_seen_with_every_item() -> None:
    built = Builder(x=seeded(2, 8))
    weight = built.op(aten.neg.default, built.constant("w", seeded(8, 8)))
    program = built.program(built.op(aten.linear.default, built.x, weight))
    question = asked(program, "neg_default", Moments((-1,)))
    assert Statistics(three())(program, question)[question[0]].count == 3 * 8


# what isn't finite


def test_values_that_are_not_finite() -> None:
    program = chain(2)
    items = Items(seeded(4, 8), 1e30 * seeded(1, 8), 1e38 * seeded(2, 8).sign())
    weight = program.constants["layer.1.weight"]
    program.constants["layer.1.weight"] = weight.sign() * 1e3
    with pytest.raises(CalibrationError) as refused:
        Statistics(items)(program, asked(program, "linear_default add_tensor_1"))
    wrong = seen(program, Items(items.values[2]), "add_tensor_1")
    assert str(refused.value) == (
        "the model computes values that aren't finite\n"
        "  where layer.1  (add_tensor_1), calibration item 2\n"
        f"  why   {int((~wrong.isfinite()).sum())} of 16 values are inf or nan\n"
        "  do    remove the item, or exclude the place in the recipe"
    )


def test_what_nobody_asks_about_may_be_infinite() -> None:
    """As a mask inside attention is."""
    built = Builder(x=seeded(2, 3))
    masked = built.op(aten.masked_fill.Scalar, built.x, built.op(aten.gt.Scalar, built.x, 0.0), -torch.inf)
    program = built.program(built.op(aten.softmax.int, masked, -1))
    items = [(torch.tensor([[1.0, -1.0, -2.0]]),)]
    assert Statistics(items)(program, asked(program, "softmax_int"))[node(program, "softmax_int"), Range()].lo == 0
    with pytest.raises(CalibrationError, match="aren't finite"):
        Statistics(items)(program, asked(program, "masked_fill_scalar"))


def test_an_answer_that_failed_is_not_kept() -> None:
    program, items = chain(1), Items(torch.full((1, 8), torch.nan))
    observe = Statistics(items)
    for runs in (1, 2):
        with pytest.raises(CalibrationError):
            observe(program, asked(program, "add_tensor"))
        assert items.runs == runs


# questions about several values


@dataclass(frozen=True)
class Together(JointObserver):
    """All values, item by item, as they came."""

    def start(self) -> JointAccumulator:
        return _Together()

    def memory(self, shapes: Any) -> int:
        return 100 * len(shapes)


class _Together(JointAccumulator):
    def __init__(self) -> None:
        self.items: list[list[Tensor]] = []

    def add(self, values: Any) -> None:
        self.items.append(list(values))

    def result(self) -> list[list[Tensor]]:
        return self.items


def test_values_of_one_item_come_together_in_the_order_asked() -> None:
    program, items = chain(3), three()
    nodes = tuple(node(program, n) for n in ("add_tensor_2", "x", "linear_default", "x"))
    observe = Statistics(items)
    answers = observe(program, [(nodes, Together()), (nodes[0], Range()), (nodes[:2], Together())])
    assert items.runs == 1
    assert [len(values) for values in answers[nodes, Together()]] == [4, 4, 4]
    for i, values in enumerate(answers[nodes, Together()]):
        for value, asked_node in zip(values, nodes, strict=True):
            assert torch.equal(value, seen(program, Items(items.values[i]), asked_node.name))
    assert answers[nodes[0], Range()].hi == max(values[0].max() for values in answers[nodes, Together()])
    assert observe(program, [(nodes, Together())])[nodes, Together()] is answers[nodes, Together()]
    assert items.runs == 1, "kept, like any answer"


def test_an_edit_of_one_of_them_asks_again() -> None:
    program, items = chain(2), three()
    observe, nodes = Statistics(items), (node(program, "linear_default"), node(program, "add_tensor_1"))
    before = observe(program, [(nodes, Together())])[nodes, Together()]
    edit = Edit(program)
    with edit.site(nodes[1]):
        edit.fold(node(program, "layer_1_weight"), torch.zeros(8, 8))
    after = observe(program, [(nodes, Together())])[nodes, Together()]
    assert torch.equal(before[0][0], after[0][0]) and not torch.equal(before[0][1], after[0][1])


def test_joint_questions_count_the_values_they_hold() -> None:
    program, items = chain(2), three()
    pairs = [(node(program, f"linear_default{i}"), node(program, f"add_tensor{i}")) for i in ("", "_1")]
    size = 2 * 100 + 2 * 4 * 4 * 8  # two shapes, two values [4, 8] of float32
    Statistics(items, memory=2 * size)(program, [(p, Together()) for p in pairs])
    assert items.runs == 1
    Statistics(items, memory=2 * size - 1)(program, [(p, Together()) for p in pairs])
    assert items.runs == 3
    with pytest.raises(CalibrationError, match=f"Together of .* takes {size} bytes, the limit is {size - 1}"):
        Statistics(items, memory=size - 1)(program, [(pairs[0], Together())])
