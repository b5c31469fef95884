"""tidy.dead_code: what no output depends on goes, inputs stay."""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.program import Program
from tests.passes.helpers import declined, function, lines, run, seeded, text, unchanged_by_second_run


def with_dead_code() -> Program:
    """y = exp(x) with a dead chain of three ops that reads a constant, an input nobody else reads and a live value."""
    program = function(lambda x, unread, w: x.exp() + w, seeded(2, 3), seeded(2, 3), w=seeded(3))
    graph, unread = program.graph, program.placeholders()[1]
    exp = next(n for n in graph.nodes if n.name == "exp")
    program.constants["scale"] = seeded(3)
    with graph.inserting_before(program.output_node):
        scale = graph.create_node("get_attr", "scale")
        first = graph.call_function(torch.ops.aten.mul.Tensor, (unread, scale))
        second = graph.call_function(torch.ops.aten.add.Tensor, (first, exp))
        graph.call_function(torch.ops.aten.split.Tensor, (second, 1))
    return program


def test_erases_what_no_output_depends_on() -> None:
    before = with_dead_code()
    after, report = run(before, "tidy.dead_code")
    assert text(after) == lines("""
        exp = exp(x)
        add = add.Tensor(exp, %w)
        return add""")
    assert set(after.constants) == {"w"}
    assert [n.name for n in after.placeholders()] == ["x", "unread"]
    assert [c.erased for c in report.changes] == [("split_tensor",), ("add_tensor",), ("mul_tensor",), ("scale",)]
    assert declined(report) == []


def test_a_live_program_stays() -> None:
    before = function(lambda x, unread, w: x.exp() + w, seeded(2, 3), seeded(2, 3), w=seeded(3))
    after, report = run(before, "tidy.dead_code")
    assert text(after) == text(before)
    assert report.fired == 0


def test_second_run_changes_nothing() -> None:
    unchanged_by_second_run(with_dead_code(), "tidy.dead_code")


def test_a_dead_node_read_by_a_dead_node_only_is_dead() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.aten.neg.default, (graph.call_function(torch.ops.aten.exp.default, (x,)),))
    graph.output((x,))
    program = Program(graph, {}, (), (), None)
    from fxcompress.passes.tidy.dead_code import dead

    assert [n.name for n in dead(program)] == ["neg_default", "exp_default"]
