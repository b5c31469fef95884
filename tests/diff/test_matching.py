"""Matching and states: two captures of one model match fully, whatever they are called; what differs is named, and only that."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.diff import Run, Step, between, of_run
from fxcompress.diff.matching import aligned, match_regions
from fxcompress.diff.read import run_of
from fxcompress.diff.states import alike, states
from fxcompress.history import Graph, History, Node, graph_of
from tests.passes.helpers import captured, run, seeded, zoo
from tests.zoo import ZOO


class Block(nn.Module):
    def __init__(self, name: str = "fc2") -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.add_module(name, nn.Linear(8, 4))
        self.name = name

    def forward(self, x):
        return x + getattr(self, self.name)(self.fc1(x).relu())


class Net(nn.Module):
    """Three blocks; `blocks` and `inner`: what the modules are called."""

    def __init__(self, blocks: str = "blocks", inner: str = "fc2", extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(blocks, nn.ModuleList([Block(inner) for _ in range(3)]))
        self.blocks_name, self.extra = blocks, extra

    def forward(self, x):
        for i, block in enumerate(getattr(self, self.blocks_name)):
            x = block(x)
            if self.extra and i == 1:
                x = x.tanh()
        return x


def graph(**names: object) -> Graph:
    return graph_of(captured(Net(**names), seeded(2, 4)))  # type: ignore[arg-type]


def differences(first: Graph, second: Graph) -> dict[str, str]:
    found = aligned(first, second)
    return dict(states(first, found.graph, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet2d_cond", "llama", "sam"])
def test_two_captures_of_one_model_match_fully(name: str) -> None:
    from fxcompress.capture import capture

    model, inputs = ZOO[name]()
    first, second = graph_of(zoo(name)), graph_of(capture(model, inputs))
    assert first is not second
    assert len(first.nodes) > 100
    assert differences(first, second) == {}


@pytest.mark.parametrize("names", [{"blocks": "layers"}, {"inner": "out"}, {"blocks": "stages", "inner": "project"}], ids=str)
def test_a_renamed_module_is_the_same_place(names: dict[str, str]) -> None:
    first, second = graph(), graph(**names)
    assert differences(first, second) == {}
    regions = match_regions(first, second)
    blocks, inner = names.get("blocks", "blocks"), names.get("inner", "fc2")
    assert regions[f"{blocks}.2.{inner}"] == "blocks.2.fc2"
    assert set(aligned(first, second).regions.values()) <= set(second.kinds)


class Attention(nn.Module):
    """Three layers of one shape and a fourth. names: what they are called; order: in which they are registered."""

    def __init__(self, names: str = "qkvo", order: str = "qkvo", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        made = {role: nn.Linear(8, 8) for role in "qkvo"}
        self.names = dict(zip("qkvo", names, strict=True))
        for role in order:
            self.add_module(self.names[role], made[role])

    def forward(self, x):
        q, k, v = (getattr(self, self.names[role])(x) for role in "qkv")
        return getattr(self, self.names["o"])(nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("order", ["vkqo", "okvq"])
@pytest.mark.parametrize("names", ["qkvo", "abcd", "dcba"])
def test_siblings_registered_in_another_order(names: str, order: str, seed: int) -> None:
    """By name, else by weights, else (seed 1: other weights) by what they read and what reads them."""
    sides = [graph_of(captured(Attention(*given), seeded(2, 3, 8))) for given in (("qkvo", "qkvo", 0), (names, order, seed))]
    assert match_regions(*sides) == {"": "", **dict(zip(names, "qkvo", strict=True))}
    found = differences(*sides)
    assert set(found.values()) == ({"changed"} if seed else set())
    assert all(sides[0].nodes[n].op == "constant" for n in found)


def test_names_go_before_weights() -> None:
    """Two layers that were given each other's weights are still themselves."""
    model, other = Attention(), Attention()
    other.q.weight, other.k.weight = other.k.weight, other.q.weight  # type: ignore[union-attr]
    found = differences(*(graph_of(captured(m, seeded(2, 3, 8))) for m in (model, other)))
    assert found == {"q_weight": "changed", "k_weight": "changed"}


def test_layers_that_exchanged_their_names_are_what_they_hold_where_they_stand() -> None:
    """k is called q now and q v, each with its weights and its place."""
    sides = [graph_of(captured(Attention(names), seeded(2, 3, 8))) for names in ("qkvo", "vqko")]
    assert match_regions(*sides) == {"": "", "v": "q", "q": "k", "k": "v", "o": "o"}
    assert differences(*sides) == {}


INNER = ("conv", "norm", "act")


def test_equal_layers_that_exchanged_their_names_are_what_stands_there() -> None:
    """Nothing but the place tells them apart, so nothing has changed but the names."""

    class Pair(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            self.names = names
            for name in "ab":
                self.add_module(name, nn.LayerNorm(4))

        def forward(self, x):
            return getattr(self, self.names[1])(getattr(self, self.names[0])(x).relu())

    sides = [graph_of(captured(Pair(names), seeded(2, 4))) for names in ("ab", "ba")]
    assert match_regions(*sides) == {"": "", "a": "b", "b": "a"}
    assert differences(*sides) == {}


class Folded(nn.Module):
    """Two branches of a convolution, its norm and an activation. Of the norm a compiled program keeps nothing."""

    def __init__(self, names: str = "ab", inner: tuple[str, str, str] = INNER) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            layers = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU()
            self.add_module(name, nn.Sequential(OrderedDict(zip(inner, layers, strict=True))))
        self.names = names

    def forward(self, x):
        one, other = (getattr(self, name)(x) for name in self.names)
        return one * other + x


def finished(program: fxc.Program) -> Run:
    """Norms folded, weights quantised and packed."""
    history, reports = History(), []
    history.record(program)
    passes: list[tuple[str, dict[str, Any]]] = [
        ("tidy.fold_batch_norm", {}),
        ("quant.weight_only", {"weights": "int8/channel"}),
        ("quant.finalize", {}),
    ]
    for name, options in passes:
        program, report = run(program, name, **options)
        history.record(program)
        reports.append(report)
    return Run("finished", history, reports)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("given", [("cd",), ("ab", ("filter", "scale", "curve")), ("ba",), ("xy", ("norm", "conv", "out"))], ids=str)
def test_renamed_modules_are_matched_with_those_of_a_finished_run(given: Any, is_first: bool) -> None:
    """By the graphs that both began with: the finished one has neither norms nor weights that could tell modules apart."""
    done = finished(captured(Folded(), seeded(2, 2, 4, 4)))
    renamed, plain = (run_of(captured(Folded(*names), seeded(2, 2, 4, 4))) for names in (given, ()))
    found, expected = (between(done, other) if is_first else between(other, done) for other in (renamed, plain))
    assert sorted(found.whole.states.values()) == sorted(expected.whole.states.values())
    names, inner = given if len(given) > 1 else (given[0], INNER)
    pairs = {a + i: b + j for a, b in zip("ab", names, strict=True) for i, j in (("", ""), *zip(dotted(INNER), dotted(inner), strict=True))}
    shown = {path: found.was.get(path, path) for path in found.whole.parents}
    assert shown == (pairs if is_first else {there: here for here, there in pairs.items()})


def dotted(names: Iterable[str]) -> list[str]:
    return [f".{name}" for name in names]


def listed(*layers: nn.Module) -> Graph:
    return graph_of(captured(nn.Sequential(*layers), seeded(2, 4)))


def test_a_layer_put_in_front_leaves_the_others_what_they_were() -> None:
    """The numbers of a list are places: 1 is now what 0 was."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
    first, second = listed(*layers), listed(nn.Linear(4, 4), nn.Tanh(), *layers)
    assert match_regions(first, second) == {"": "", **{str(i + 2): str(i) for i in range(5)}}
    found = differences(first, second)
    assert sorted(found.values()) == ["added"] * 4 + ["changed"], "a layer and a tanh more, and what reads them"
    diff = between(Run("a", History([first])), Run("b", History([second])))
    assert diff.renamed == {str(i): str(i + 2) for i in range(5)}


def test_one_more_op_leaves_the_rest_matched() -> None:
    """What reads the new value says so: the third block's first linear, and its addition."""
    found = differences(graph(), graph(extra=True))
    assert found == {"tanh": "added", "linear_4": "changed", "add_2": "changed"}
    assert differences(graph(extra=True), graph()) == {"tanh": "removed", "linear_4": "changed", "add_2": "changed"}


def test_other_weights_are_a_change_of_those_alone() -> None:
    model = Net()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].fc1.weight.mul_(2)  # type: ignore[index, union-attr]
    found = differences(graph_of(captured(model, seeded(2, 4))), graph_of(captured(other, seeded(2, 4))))
    assert found == {"blocks_1_fc1_weight": "changed"}


def test_an_op_in_another_module_has_moved() -> None:
    class Outside(nn.Module):
        def __init__(self, inside: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.act = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()) if inside else nn.Sequential(nn.Linear(4, 4))
            self.inside = inside

        def forward(self, x):
            x = self.act(x)
            return x * 2 if self.inside else x.sigmoid() * 2

    first, second = (graph_of(captured(Outside(inside), seeded(2, 4))) for inside in (True, False))
    assert differences(first, second) == {"sigmoid": "moved"}


def test_unrelated_programs_share_nothing_but_their_ends() -> None:
    first = graph_of(captured(nn.Conv2d(1, 2, 3), seeded(1, 1, 8, 8), dynamic=False))
    second = graph_of(captured(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), seeded(2, 4), dynamic=False))
    found = differences(first, second)
    assert {"conv2d", "weight"} <= {n for n, s in found.items() if s == "removed"}
    assert {n for n, s in found.items() if s == "added"} >= {"linear", "tanh"}


def test_a_pass_is_followed_by_names_and_its_journal() -> None:
    """A reader of a replaced value reads what stands for it: it hasn't changed."""
    program = captured(Net(), seeded(2, 4))
    after, report = run(program, "quant.weight_only", weights="int8/channel", symmetric=True)
    history = History()
    history.record(program)
    history.record(after, {c for change in report.changes for c in change.constants})
    step = of_run(Run("net", history, [report])).steps[0]
    assert set(step.states.values()) == {"added"}
    assert sorted({n.partition("_default")[0] for n in step.states if "weight" not in n}) == ["dequantize", "quantize"]
    found = states(history.graphs[0], history.graphs[1], {})
    assert found["linear"] == "changed", "without the journal it reads another value"


def test_blocks_in_which_the_same_changed_are_folded() -> None:
    program = captured(Net(), seeded(2, 4))
    after, _ = run(program, "quant.weight_only", weights="int8/channel", symmetric=True)
    first, second = graph_of(program), graph_of(after)
    step = Step("", first, second, states(first, second, {}))
    assert step.changed_alike == {"blocks.1": "blocks.0", "blocks.2": "blocks.0"}
    assert step.folded == {"blocks.1": "blocks.0", "blocks.2": "blocks.0"}


def test_a_block_with_one_more_change_isn_t_folded() -> None:
    first = graph()
    found = {"blocks_1_fc1_weight": "changed"}
    assert alike(first, first, found, changes_only=False) == {"blocks.2": "blocks.0"}  # type: ignore[arg-type]


def test_blocks_of_a_static_run_are_folded() -> None:
    """Scales are named after the values of each block: what they are called makes no difference."""
    program = captured(Net(), seeded(2, 4))
    feed = [tuple(seeded(2, 4, seed=i) for _ in range(1)) for i in range(3)]
    history = fxc.compile(program, {"passes": ["quant.insert", "quant.finalize"]}, calibration=feed, backend="reference").diff()
    names = {n for n in history.whole.after.nodes if n.endswith("_scale")}
    assert {"relu_scale", "relu_1_scale", "relu_2_scale"} <= names
    for step in (*history.steps, history.whole):
        assert step.changed_alike == step.folded == {"blocks.1": "blocks.0", "blocks.2": "blocks.0"}, step.name


def swapped(nodes: dict[str, Node], name: str) -> None:
    nodes[name] = replace(nodes[name], inputs=nodes[name].inputs[::-1])


def reshaped(nodes: dict[str, Node], name: str) -> None:
    nodes[name] = replace(nodes[name], shape="float16[batch, 4]")


def rewired(nodes: dict[str, Node], name: str) -> None:
    nodes[name] = replace(nodes[name], inputs=(nodes[name].inputs[1],) * 2)


@pytest.mark.parametrize("change", [swapped, reshaped, rewired])
def test_a_block_of_another_structure_isn_t_folded(change: Callable[[dict[str, Node], str], None]) -> None:
    """The same ops, one of which reads or makes something else."""
    first = graph()
    nodes = dict(first.nodes)
    change(nodes, "add_1")
    second = Graph(nodes, first.kinds, first.parents)
    assert alike(first, first, {}, changes_only=False) == {"blocks.1": "blocks.0", "blocks.2": "blocks.0"}
    assert alike(second, second, {}, changes_only=False) == {"blocks.2": "blocks.0"}


def test_what_changed_alike_came_from_the_same() -> None:
    """add -> mul in the first block, sub -> mul in the second."""
    before, after = dict(graph().nodes), dict(graph().nodes)
    for name, op in (("add", "aten.add.Tensor"), ("add_1", "aten.sub.Tensor"), ("add_2", "aten.add.Tensor")):
        before[name] = replace(before[name], op=op)
        after[name] = replace(after[name], op="aten.mul.Tensor")
    sides = [Graph(nodes, graph().kinds, graph().parents) for nodes in (before, after)]
    found = states(*sides, {})
    assert set(found.values()) == {"changed"}
    assert alike(*sides, found, changes_only=True) == {"blocks.2": "blocks.0"}


def test_two_layers_in_a_row_are_no_repeated_blocks() -> None:
    """conv1 and conv2 are told apart by more than a place in a list."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc2(self.fc1(x))

    first = graph_of(captured(Two(), seeded(2, 4)))
    assert alike(first, first, {}, changes_only=False) == {}


def test_two_results_of_one_run_are_matched_by_name() -> None:
    program = captured(Net(), seeded(2, 4))
    sides = []
    for bits in ("int8/channel", "int4/channel"):
        after, report = run(program, "quant.weight_only", weights=bits, symmetric=True)
        history = History()
        history.record(program)
        history.record(after)
        sides.append(Run(bits, history, [report]))
    found = between(*sides)
    assert found.was == {}
    changed = {found.whole.nodes[n].op for n in found.whole.states}
    assert changed == {"fxc.quantize.default", "fxc.dequantize.default", "constant"}, "formats and scales"
    assert set(found.whole.states.values()) == {"changed"}
    assert between(sides[0], sides[0]).whole.states == {}


def test_what_a_pass_replaced_is_matched_with_what_it_was() -> None:
    """A convolution with its norm folded in is the convolution, on other weights: one of the two has a name that the other run never had."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.uniform_(0.1, 1)  # type: ignore[union-attr]
    program = captured(nn.Sequential(nn.Conv2d(2, 3, 1), norm).eval(), seeded(2, 2, 4, 4))
    history = History()
    history.record(program)
    after, report = run(program, "tidy.fold_batch_norm")
    folded = History([*history.graphs])
    folded.record(after)
    for sides in ((Run("a", history), Run("b", folded, [report])), (Run("b", folded, [report]), Run("a", history))):
        found = between(*sides).whole
        assert [(found.nodes[n].op, s) for n, s in found.states.items() if "conv" in found.nodes[n].op] == [("aten.conv2d.default", "changed")]


def test_a_weight_s_quantiser_is_not_taken_for_an_activation_s() -> None:
    """Both are dequantize nodes of one module; what tells them apart is the shape."""
    program = captured(Net(), seeded(2, 4))
    passes = [("quant.weight_only", {"weights": "int8/channel"}), ("quant.insert", {"weights": "int4/channel", "activations": "int8/token"})]
    first, second = (graph_of(run(program, name, **options)[0]) for name, options in passes)
    found = aligned(first, second, (graph_of(program), graph_of(program))).graph
    pairs = [(n, found.nodes[n.name]) for n in first.nodes.values() if n.op == "fxc.dequantize.default"]
    assert len(pairs) == 6
    assert all(a.shape == b.shape and b.op == a.op for a, b in pairs)


def test_programs_are_runs_without_passes() -> None:
    found = between(run_of(captured(Net(), seeded(2, 4))), run_of(captured(Net(blocks="layers"), seeded(2, 4))))
    assert found.whole.states == {}
    assert found.was["blocks.0"] == "layers.0"
    assert found.renamed == {f"blocks.{i}": f"layers.{i}" for i in range(3)}, "and not what is inside"
    assert "renamed blocks.0 -> layers.0  (and 2 alike)\n" in found.text()
