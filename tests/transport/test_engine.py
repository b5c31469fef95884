"""The engine on whole graphs: random ones, several seeds, orders of work, kinds that contain each other, planted faults, index maps."""

from __future__ import annotations

import random
from operator import getitem
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import sympy
import torch
from hypothesis import assume, given, note, settings
from torch import Tensor, fx

from fxcompress.checker import check
from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.program import Program
from fxcompress.transport import Kind, Plan, Seed, Transport
from fxcompress.transport.facts import grouped
from fxcompress.transport.labels import UNSET, Classes, canon
from fxcompress.transport.relations.views import reshaped
from fxcompress.transport.solver import Solver
from tests.passes.helpers import Builder, seeded, snapshot
from tests.transport.helpers import LIMIT, error, proved, solve, vector_for

aten = torch.ops.aten
F64 = torch.float64
WIDTH, HEADS = 6, 2
DIAGONAL = (Kind.SCALE, Kind.SIGN, Kind.SHIFT)
KEPT = (*DIAGONAL, Kind.PERMUTE, Kind.ROTATE)


class Net:
    """A random graph over values [2, 3, 6], every op from the table, every constant drawn anew."""

    def __init__(self) -> None:
        self.built = Builder(x=seeded(2, 3, WIDTH, seed=1, dtype=F64))
        self.values = [self.linear(self.built.x)]

    def constant(self, *shape: int) -> fx.Node:
        number = len(self.built.constants)
        return self.built.constant(f"c{number}", seeded(*shape, seed=number + 2, dtype=F64) + 0.1)

    def linear(self, x: fx.Node) -> fx.Node:
        return self.built.op(aten.linear.default, x, self.constant(WIDTH, WIDTH), self.constant(WIDTH))

    def add(self, kind: int, first: int, second: int) -> None:
        op = self.built.op
        a, b = self.values[first % len(self.values)], self.values[second % len(self.values)]
        makers = (
            lambda: self.linear(a),
            lambda: op(aten.add.Tensor, a, b),
            lambda: op(aten.mul.Tensor, a, b),
            lambda: op(aten.relu.default, a),
            lambda: op(aten.neg.default, a),
            lambda: op(aten.layer_norm.default, a, [WIDTH], self.constant(WIDTH), self.constant(WIDTH)),
            lambda: op(aten.mul.Tensor, self.constant(WIDTH), a),
            lambda: op(aten.slice.Tensor, op(aten.cat.default, [a, b], -1), 2, 3, 9),
            lambda: op(aten.reshape.default, op(aten.transpose.int, op(aten.reshape.default, a, [2, 3, HEADS, 3]), 1, 2), [2, 3, WIDTH]),
            lambda: self.attention(a, b),
            lambda: op(aten.rms_norm.default, a, [WIDTH], self.constant(WIDTH), 1e-6),
            lambda: op(aten.gelu.default, a),
            lambda: op(aten.add.Tensor, a, op(aten.mean.dim, a, [-1], True)),
            lambda: op(aten.add.Tensor, a, 1.0),
            lambda: op(aten.mul.Tensor, a, 0.5),
            lambda: op(aten.rsub.Scalar, a, 1.0, 2.0),
            lambda: op(aten.div.Tensor, op(aten.mul.Tensor, a, b), 2.0),
            lambda: op(aten.rsub.Tensor, a, self.constant(WIDTH)),
            lambda: op(aten.matmul.default, a, self.constant(WIDTH, WIDTH)),
        )
        self.values.append(makers[kind % len(makers)]())

    def attention(self, a: fx.Node, b: fx.Node) -> fx.Node:
        op = self.built.op
        q, k, v = (op(aten.transpose.int, op(aten.reshape.default, self.linear(x), [2, 3, HEADS, 3]), 1, 2) for x in (a, b, b))
        out = op(aten.scaled_dot_product_attention.default, q, k, v)
        return op(aten.reshape.default, op(aten.transpose.int, out, 1, 2), [2, 3, WIDTH])

    def program(self) -> Program:
        return self.built.program(self.linear(self.values[-1]))


Ops = list[tuple[int, int, int]]
NETS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=9)


def made(ops: Ops) -> Program:
    """The graph of (op, operand, operand) numbers, without dead code, which pins."""
    net = Net()
    for op in ops:
        net.add(*op)
    program = live(net.program())
    note(str(program.graph))
    return program


def live(program: Program) -> Program:
    """Without dead code, which pins."""
    for node in reversed(list(program.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            program.graph.erase_node(node)
    return program


def inputs_of_layers(program: Program) -> list[fx.Node]:
    return [n.args[0] for n in program.graph.nodes if n.target is aten.linear.default]  # type: ignore[misc]


@settings(max_examples=120, deadline=None)
@given(NETS, st.sampled_from(KEPT), st.integers(0, 99))
def test_random_graphs_keep_their_function(ops: Ops, kind: Kind, where: int) -> None:
    program = made(ops)
    layers = inputs_of_layers(program)
    plan = solve(program, kind, Seed(layers[where % len(layers)], (2,)))
    if plan.count:
        figures = proved(program, plan, vector_for(plan, where))
        assert max(figures["output"], figures["audit"]) < LIMIT
        assert not figures["broken"]


def form(plan: Plan) -> Any:
    """What a plan says, without the order in which it was found."""
    first = np.full(plan.count, len(plan.classes))
    np.minimum.at(first, plan.classes[plan.classes >= 0], np.flatnonzero(plan.classes >= 0))
    labels = {
        n.name: sorted((label.power, canon(np.append(plan.classes, -1)[label.index]).tolist()) for label in labels)
        for n, labels in plan.values.items()
    }
    blocks = [sorted(first[plan.blocks == b].tolist()) for b in set(plan.blocks.tolist())]
    return plan.classes.tolist(), sorted(blocks), labels, {n.name: c for n, c in plan.choices.items()}


@settings(max_examples=60, deadline=None)
@given(NETS, st.sampled_from(KEPT), st.integers(0, 99), st.integers(0, 10**6))
def test_the_order_of_work_changes_nothing(ops: Ops, kind: Kind, where: int, shuffle: int) -> None:
    program = made(ops)
    layers = inputs_of_layers(program)
    engine, seed = Transport(program), Seed(layers[where % len(layers)], (2,))
    one, other = engine.solve(kind, seed), engine.solve(kind, seed, shuffle=shuffle)
    if one.choices == other.choices:  # which of two operands takes a change may depend on which was met first
        assert one.classes.tolist() == other.classes.tolist()
        if not one.pinned and not other.pinned:
            assert form(one) == form(other)


@settings(max_examples=40, deadline=None)
@given(NETS, st.sampled_from(DIAGONAL), st.integers(0, 99))
def test_the_identity_changes_no_byte(ops: Ops, kind: Kind, where: int) -> None:
    program = made(ops)
    layers = inputs_of_layers(program)
    plan = solve(program, kind, Seed(layers[where % len(layers)], (2,)))
    before = snapshot(program)
    plan.apply(Edit(program), torch.full((plan.count,), 0.0 if kind == Kind.SHIFT else 1.0))
    assert snapshot(program) == before


@settings(max_examples=40, deadline=None)
@given(NETS, st.integers(0, 99))
def test_a_scale_and_its_inverse_restore_every_bit(ops: Ops, where: int) -> None:
    program = made(ops)
    layers = inputs_of_layers(program)
    plan = solve(program, Kind.SCALE, Seed(layers[where % len(layers)], (2,)))
    assume(all(float(2 * label.power).is_integer() for labels in plan.values.values() for label in labels))  # 4 ** (1 / 4) is no power of 2
    before = {k: t.clone() for k, t in program.constants.items()}
    v = 4.0 ** torch.randint(-3, 4, (plan.count,))
    for vector in (v, 1 / v):
        edit = Edit(program)
        plan.apply(edit, vector)
    assert all(torch.equal(before[k], program.constants[k]) for k in before)


@settings(max_examples=40, deadline=None)
@given(NETS, st.sampled_from(DIAGONAL))
def test_many_plans_at_once_are_one_after_the_other(ops: Ops, kind: Kind) -> None:
    """Changes of one channel each commute: planned on one graph, all applied in one edit, under one contract."""
    program = made(ops)
    engine = Transport(program)
    plans = [engine.solve(kind, Seed(x, (2,))) for x in dict.fromkeys(inputs_of_layers(program))]
    before, edit = run(program, program.example), Edit(program)
    for number, plan in enumerate(plans):
        plan.apply(edit, vector_for(plan, number))
    assert error(before, run(program, program.example)) < LIMIT
    assert not [m for m in check(program, edit, Exact(limit=1e-9), program.example) if m.verdict == "broken"]


@settings(max_examples=40, deadline=None)
@given(NETS, st.integers(0, 99))
def test_a_rotation_by_a_permutation_is_a_permutation(ops: Ops, where: int) -> None:
    program = made(ops)
    layers = inputs_of_layers(program)
    seed = Seed(layers[where % len(layers)], (2,))
    turn, move = solve(program, Kind.ROTATE, seed), solve(program, Kind.PERMUTE, seed)
    if not turn.count:
        return
    rng = torch.Generator().manual_seed(where)
    matrices, order = {}, torch.arange(move.count)
    position = {int(c): p for p, c in enumerate(move.classes)}
    for block in set(turn.blocks.tolist()):
        members = np.flatnonzero(turn.blocks == block)
        mixed = torch.randperm(len(members), generator=rng)
        matrices[block] = torch.eye(len(members), dtype=F64)[:, :].index_select(0, mixed).T.contiguous()
        params = [int(np.flatnonzero(turn.classes == c)[0]) for c in members]
        for i, j in enumerate(mixed.tolist()):
            order[move.classes[params[i]]] = int(move.classes[params[j]])
    assert len(position) == move.count or -1 in position
    assert torch.equal(constants_after(program, turn, matrices), constants_after(program, move, order))


def constants_after(program: Program, plan: Plan, vector: Any) -> Tensor:
    edit = Edit(program)
    plan.apply(edit, vector)
    flat = torch.cat([t.flatten() for t in program.constants.values()])
    edit.rollback()
    return flat


@settings(max_examples=30, deadline=None)
@given(NETS, st.sampled_from(KEPT), st.integers(0, 99))
def test_a_dropped_leaf_is_seen(ops: Ops, kind: Kind, where: int) -> None:
    """Every constant whose change is left out, one at a time: the contract names it or what reads it."""
    program = made(ops)
    layers = inputs_of_layers(program)
    plan = solve(program, kind, Seed(layers[where % len(layers)], (2,)))
    vector, old = vector_for(plan, where), program.copy()
    for leaf in plan.leaves if plan.count else ():
        edit = Edit(program)
        plan.apply(edit, vector)
        if torch.equal(program.constants[leaf.target], old.constants[leaf.target]):
            edit.rollback()
            continue
        program.constants[leaf.target] = old.constants[leaf.target]
        broken = {m.value for m in check(program, edit, Exact(limit=1e-9), program.example) if m.verdict == "broken"}
        assert broken & {leaf.name, *(u.name for u in leaf.users)}
        edit.rollback()


FACTORS = st.lists(st.sampled_from((1, 2, 3, 5)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(FACTORS, st.randoms(use_true_random=False), st.data())
def test_a_reshape_of_labels_is_the_reshape_of_positions(sizes: list[int], rng: Any, data: st.DataObject) -> None:
    """Shrunk index arrays against the naive way, along every set of axes."""
    before, after = tuple(sizes), merged(sizes, rng)
    axes = data.draw(st.sets(st.integers(0, len(before) - 1)))
    index = np.arange(int(np.prod([n if a in axes else 1 for a, n in enumerate(before)]))).reshape(
        [n if a in axes else 1 for a, n in enumerate(before)]
    )
    solver = Solver(Transport(Builder(x=torch.ones(1)).program()).facts, Kind.SCALE)
    found = reshaped(solver, index, grouped(before, after), before, after)
    naive = np.broadcast_to(index, before).reshape(after)
    assert (np.broadcast_to(found, after) == naive).all()
    back = reshaped(solver, found, [(b, a) for a, b in grouped(before, after)], after, before)
    assert (np.broadcast_to(back, before) == np.broadcast_to(index, before)).all()


@settings(max_examples=300, deadline=None)
@given(FACTORS, st.integers(0, 5), st.integers(0, 9999), st.data())
def test_a_reshape_around_a_dynamic_size_unites_what_it_must(sizes: list[int], place: int, number: int, data: st.DataObject) -> None:
    """For every number of examples the label is that of the positions, and no more parameters are one than those that some number needs."""
    sizes.insert(place, B)
    rng = random.Random(number)
    before, after = merged(sizes, rng), merged(sizes, rng)
    axes = data.draw(st.sets(st.sampled_from([a for a, n in enumerate(before) if isinstance(n, int)] or [0])))
    full = [n if a in axes and isinstance(n, int) else 1 for a, n in enumerate(before)]
    index = np.arange(int(np.prod(full))).reshape(full)
    solver, needed = Solver(Transport(Builder(x=torch.ones(1)).program()).facts, Kind.SCALE), Classes()
    for classes in (solver.classes, needed):
        classes.add(index.size)
    found = reshaped(solver, index, grouped(before, after), before, after)
    dynamic = [a for a, n in enumerate(after) if not isinstance(n, int)]
    for examples in range(1, 8):
        old, new = ([int(sympy.sympify(n).subs(B, examples)) for n in shape] for shape in (before, after))
        naive = np.broadcast_to(index, old).reshape(new)
        needed.coarsen(naive, dynamic)
        assert (solver.classes.find(np.broadcast_to(found, new)) == solver.classes.find(naive)).all()
    assert (solver.classes.parent == needed.parent).all()


B = sympy.Symbol("b", positive=True, integer=True)


def merged(sizes: list[Any], rng: Any) -> tuple[Any, ...]:
    """Another shape of the same number of positions: some neighbours merged, ones put in between."""
    out: list[Any] = []
    for n in sizes:
        if out and rng.random() < 0.5:
            out[-1] *= n
        else:
            out.append(n)
        if rng.random() < 0.2:
            out.append(1)
    return tuple(out)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.lists(st.integers(0, 29), max_size=5))
def test_union_find_against_the_slow_way(pairs: list[tuple[int, int]], pins: list[int]) -> None:
    classes, slow = Classes(), {i: {i} for i in range(30)}
    classes.add(30)
    for a, b in pairs:
        classes.union(np.array([a]), np.array([b]))
        joined = slow[a] | slow[b]
        for i in joined:
            slow[i] = joined
    for number, p in enumerate(pins):
        classes.pin(np.array([p]), number)
    for i in range(30):
        assert set(np.flatnonzero(classes.parent[:-1] == classes.parent[i])) == slow[i]
        mine = [n for n, p in enumerate(pins) if p in slow[i]]
        assert (classes.pinned[classes.parent[i]] < 10**9) == bool(mine)


@pytest.mark.parametrize(
    ("vector", "why"),
    [(torch.ones(5), "wanted 6"), (torch.tensor([1.0, 1, 1, 1, 1, -1]), "positive"), (torch.full((6,), torch.nan), "finite")],
)
def test_an_illegal_vector_is_refused(vector: Tensor, why: str) -> None:
    net = Net()
    plan = solve(net.program(), Kind.SCALE, Seed(net.values[0], (2,)))
    with pytest.raises(ValueError, match=why):
        plan.numbers(vector)


def test_gather_takes_the_worst_of_all_positions_of_a_class() -> None:
    """A class with two members has the greater of their statistics."""
    built = Builder(x=seeded(2, 4, dtype=F64))
    w = built.constant("w", seeded(4, 4, dtype=F64))
    halves = built.op(aten.linear.default, built.x, w)
    out = built.op(aten.add.Tensor, built.op(aten.slice.Tensor, halves, 1, 0, 2), built.op(aten.slice.Tensor, halves, 1, 2, 4))
    program = built.program(built.op(aten.linear.default, out, built.constant("v", seeded(3, 2, dtype=F64))))
    plan = solve(program, Kind.SCALE, Seed(halves, (1,)))
    assert plan.count == 2
    rows = seeded(4, 4, dtype=F64).abs()
    assert torch.equal(plan.gather({w: rows}), torch.maximum(rows[:2], rows[2:]).amax(1))
    assert torch.allclose(plan.gather({w: rows}, "sum"), rows[:2].sum(1) + rows[2:].sum(1))


def test_all_or_nothing() -> None:
    """Half lands by default; required whole, nothing does, for the same reason."""
    built = Builder(x=seeded(2, 4, dtype=F64))
    both = built.op(aten.linear.default, built.x, built.constant("w", seeded(4, 4, dtype=F64)))
    halves = [built.op(aten.slice.Tensor, both, 1, a, a + 2) for a in (0, 2)]
    ends = [built.op(aten.linear.default, y, built.constant(f"v{i}", seeded(3, 2, dtype=F64))) for i, y in enumerate(halves)]
    program = built.program(built.op(aten.silu.default, halves[1]), *ends)
    part, whole = (Transport(program).solve(Kind.SCALE, Seed(both, (1,)), require=r) for r in ("any", "all"))
    assert (part.count, whole.count) == (2, 0)
    assert part.reason() == whole.reason() == "silu_default (silu) doesn't commute with a scale"
    before = snapshot(program)
    whole.apply(Edit(program), torch.ones(0))
    assert snapshot(program) == before


def test_a_shift_that_a_norm_would_see_is_taken_by_the_other_addend() -> None:
    """Norms after the sum, as in BERT: beta moves, the layers that read it take it off, and so does the bias of the layer that is added."""
    built = Builder(x=seeded(2, 3, WIDTH, dtype=F64))
    gain, beta, w, v, c = (
        built.constant(n, seeded(*s, seed=i, dtype=F64))
        for i, (n, s) in enumerate({"g": (WIDTH,), "b": (WIDTH,), "w": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "c": (WIDTH,)}.items(), 1)
    )
    y = built.op(aten.layer_norm.default, built.x, [WIDTH], gain, beta)
    hidden = built.op(aten.linear.default, built.op(aten.gelu.default, built.op(aten.linear.default, y, w)), v, c)
    program = built.program(built.op(aten.layer_norm.default, built.op(aten.add.Tensor, y, hidden), [WIDTH], gain))
    plan = solve(program, Kind.SHIFT, Seed(y))
    assert (plan.count, plan.is_whole) == (WIDTH, True)
    figures = proved(program, plan, vector_for(plan))
    assert (max(figures["output"], figures["audit"]) < LIMIT, figures["broken"]) == (True, 0)


def test_a_label_that_grows_to_one_parameter_everywhere_comes_to_rest() -> None:
    """Halves of a value, each known by its own reader, with one parameter for both."""
    built = Builder(x=seeded(2, 3))
    program = built.program(built.op(aten.relu.default, built.x))
    (value,) = program.results()
    solver = Solver(Transport(program).facts, Kind.SCALE)
    solver.classes.add(1)
    first, second = np.array([[0], [UNSET]]), np.array([[UNSET], [0]])
    for index in (first, second, first, second):
        solver.put(value, index)
    assert len(solver.labels(value)) == 1
    assert [stop.reason for stop in solver.stops] == ["relu_default can't tell these channels apart"]


def test_copies_around_a_value_change_as_it_does() -> None:
    """Reflected rows of an image scale with its channels; reflected channels don't."""
    built = Builder(x=seeded(1, 4, 5, 5, dtype=F64))
    made = built.op(aten.conv2d.default, built.x, built.constant("k", seeded(4, 4, 1, 1, dtype=F64)))
    padded = built.op(aten.pad.default, made, [1, 1, 1, 1], "reflect")
    program = built.program(built.op(aten.conv2d.default, padded, built.constant("w", seeded(2, 4, 3, 3, dtype=F64))))
    for kind in (Kind.SCALE, Kind.SHIFT, Kind.PERMUTE):
        plan = solve(program, kind, Seed(made, (1,)))
        assert (plan.count, plan.is_whole) == (4, True), plan.reason()
        assert proved(program, plan, vector_for(plan))["output"] < LIMIT


UNREAD: dict[str, Any] = {  # a part of a tuple that nobody takes, and that changes like the others
    "unbind": lambda b, x: b.op(getitem, b.op(aten.unbind.int, x, 0), 0),
    "split": lambda b, x: b.op(getitem, b.op(aten.split.Tensor, x, 1, 1), 2),
    "places of the greatest": lambda b, x: b.op(getitem, b.op(aten.topk.default, x, 2, 1), 0),
    "variance": lambda b, x: b.op(getitem, b.op(aten.var_mean.correction, x, [1]), 1),
}


@pytest.mark.parametrize("kind", [k for k in Kind if k != Kind.REMOVE])
@pytest.mark.parametrize("name", UNREAD)
def test_what_nobody_takes_of_a_tuple_is_not_compared(name: str, kind: Kind) -> None:
    built = Builder(x=seeded(2, 3, WIDTH, dtype=F64))
    w, v = (built.constant(n, seeded(WIDTH, WIDTH, seed=i, dtype=F64)) for i, n in enumerate("wv", 1))
    value = built.op(aten.linear.default, built.x, w)
    program = built.program(built.op(aten.linear.default, UNREAD[name](built, value), v))
    plan = solve(program, kind, Seed(value))
    assert plan.count == (0 if "greatest" in name and kind in (Kind.SIGN, Kind.ROTATE) else WIDTH)
    if plan.count:
        figures = proved(program, plan, vector_for(plan))
        assert (figures["broken"], figures["unverified"]) == (0, 0)
        assert max(figures["output"], figures["audit"]) < LIMIT
