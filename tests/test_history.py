"""Histories: graphs as plain data, round trips, what is kept of constants, and a run that was stopped in between."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.history import Graph, History, Node, _step, applied, graph_of
from tests.passes.helpers import Builder, aten, captured, function, run, seeded


def nodes(graph: Graph) -> list[tuple[str, str, tuple[str, ...], str, str]]:
    return [(n.name, n.op, n.inputs, n.attributes, n.shape) for n in graph.nodes.values()]


def test_a_graph_is_its_nodes_in_words() -> None:
    program = function(lambda x, w: torch.cat([x @ w, x], dim=1).sum(0, keepdim=True), seeded(3, 2), w=seeded(2, 2))
    assert nodes(graph_of(program)) == [
        ("x", "input", (), "x", "float32[batch, 2]"),
        ("w", "constant", (), "w", "float32[2, 2]"),
        ("matmul", "aten.matmul.default", ("x", "w"), "%, %", "float32[batch, 2]"),
        ("cat", "aten.cat.default", ("matmul", "x"), "[%, %], 1", "float32[batch, 4]"),
        ("sum_1", "aten.sum.dim_IntList", ("cat",), "%, [0], True", "float32[1, 4]"),
        ("output", "output", ("sum_1",), "[%]", ""),
    ]


def test_costs_and_statistics() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 4.0]])
    graph = graph_of(function(lambda x, w: torch.nn.functional.linear(x, w).relu(), seeded(3, 2), w=weight))
    assert graph.nodes["w"].statistics[:4] == (-3.0, 4.0, 0.5, 2.5), "least, greatest, mean, deviation: √(26/4 - 0.25)"
    assert graph.nodes["w"].stored == graph.stored == 16
    assert graph.nodes["linear"].flops == 2 * 3 * 2 * 2
    assert graph.flops == 24 + 3 * 2, "and one a value of relu"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_statistics_that_json_cannot_hold_are_none(value: float) -> None:
    graph = graph_of(function(lambda x, w: x + w, seeded(2, 2), w=torch.tensor([1.0, value])))
    assert None in graph.nodes["w"].statistics
    json.dumps(History([graph]).to_json(), allow_nan=False)


@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_a_step_leads_from_one_order_to_the_other(old: list[int], new: list[int]) -> None:
    assert applied(old, _step(old, new)) == new


def test_a_history_survives_its_file() -> None:
    program = captured(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), seeded(2, 4))
    after, report = run(program, "quant.weight_only", weights="int8/channel", symmetric=True)
    history = History()
    history.record(program)
    history.record(after, {c for change in report.changes for c in change.constants}, ["relu"])
    history.sqnr = {"linear": 40.5, "relu": None}
    assert len(history.graphs[1].nodes) > len(history.graphs[0].nodes)
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history


def test_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 99, this one reads 1"):
        History.from_json({**History().to_json(), "version": 99})


def test_changed_content_is_a_new_revision_and_the_rest_is_shared() -> None:
    program = function(lambda x, w, b: x * w + b, seeded(2, 2), w=seeded(2), b=seeded(2, seed=1))
    first = graph_of(program)
    program.constants["w"] = program.constants["w"].flip(0)
    second = graph_of(program, first, {"w"})
    assert (second.nodes["w"].revision, second.nodes["b"].revision) == (1, 0)
    assert first.nodes["w"].statistics[:4] == second.nodes["w"].statistics[:4], "which can't tell a permutation"
    assert first.nodes["w"].statistics[4] != second.nodes["w"].statistics[4], "as the checksum can"
    assert second.nodes["b"] is first.nodes["b"]


def test_sources_are_the_models_own_lines() -> None:
    program = captured(torch.nn.Linear(2, 2), seeded(2, 2))
    program.graph.find_nodes(op="call_function", target=aten.linear.default)[0].meta["stack_trace"] = (
        'File "/home/me/secret/models/unet.py", line 12, in forward\n    x = self.fc(x)\n'
        'File "/usr/lib/python3/site-packages/torch/nn/modules/linear.py", line 134, in forward\n    return F.linear(x)'
    )
    assert graph_of(program).nodes["linear"].source == "models/unet.py:12  x = self.fc(x)"


def test_a_model_of_torch_s_layers_alone_has_their_lines() -> None:
    """And not ours, though capture is what called it."""
    graph = graph_of(captured(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU()), seeded(2, 2)))
    sources = {n.op: n.source for n in graph.nodes.values() if n.source}
    assert sources["aten.linear.default"].startswith("modules/linear.py:") and "F.linear" in sources["aten.linear.default"]
    assert sources["aten.gelu.default"].startswith("modules/activation.py:")


def test_a_restored_program_knows_its_sources() -> None:
    built = Builder(x=seeded(2, 2))
    program = built.program(built.op(aten.relu.default, built.x, module="act"))
    history = History([Graph({n.name: Node(n.name, "op", (), "", "", "", source=f"of {n.name}") for n in program.graph.nodes}, {"": ""}, {})])
    history.resume(program)
    history.record(program)
    assert history.graphs[-1].nodes["relu_default"].source == "of relu_default"
