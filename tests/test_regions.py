"""Regions: every node in exactly one, boundaries as the edges say, constants and sizes where their readers are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from fxcompress.program import Program
from fxcompress.regions import Region, regions
from tests.passes.helpers import captured, function, seeded, zoo
from tests.zoo import ZOO


class Block(nn.Module):
    """x + fc2(relu(fc1(x))), with a gain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x + self.fc2(self.fc1(x).relu()) * self.gain


class Stack(nn.Module):
    """Two blocks and a head whose weight is the first block's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 8)
        self.head.weight = self.blocks[0].fc1.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) * x.shape[0]


def tree(region: Region, depth: int = 0) -> str:
    """One line a region: path, class, the nodes traced in it."""
    own = f"{'  ' * depth}{region.path or '<root>'} {region.kind}: {' '.join(n.name for n in region.nodes)}".rstrip()
    return "\n".join([own, *(tree(c, depth + 1) for c in region.children)])


def at(program: Program, path: str) -> Region:
    return next(r for r in regions(program).walk() if r.path == path)


def names(nodes: Sequence[object]) -> list[str]:
    return [n.name for n in nodes]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return captured(Stack(), seeded(2, 4))


def test_the_tree_is_the_modules(program: Program) -> None:
    expected = """
<root> Stack: blocks_0_fc1_weight x sym_size_int_1 mul_2
  blocks.0 Block: blocks_0_gain relu mul add
    blocks.0.fc1 Linear: blocks_0_fc1_bias linear
    blocks.0.fc2 Linear: blocks_0_fc2_weight blocks_0_fc2_bias linear_1
  blocks.1 Block: blocks_1_gain relu_1 mul_1 add_1
    blocks.1.fc1 Linear: blocks_1_fc1_weight blocks_1_fc1_bias linear_2
    blocks.1.fc2 Linear: blocks_1_fc2_weight blocks_1_fc2_bias linear_3
  head Linear: head_bias linear_4
"""
    lines = {line.partition(": ")[0]: set(line.partition(": ")[2].split()) for line in expected.strip().splitlines()}
    assert {line.partition(": ")[0]: set(line.partition(": ")[2].split()) for line in tree(regions(program)).splitlines()} == lines


def test_boundaries(program: Program) -> None:
    block = at(program, "blocks.1")
    assert names(block.inputs) == ["add"]
    assert names(block.outputs) == ["add_1"]
    assert names(at(program, "blocks.0").inputs) == ["x", "blocks_0_fc1_weight"], "the tied weight belongs to nobody below the root"
    assert names(at(program, "blocks.1.fc2").inputs) == ["relu_1"]
    assert names(at(program, "").outputs) == ["mul_2"], "the output node is outside every region"


def test_what_only_the_output_reads_lies_at_the_root() -> None:
    program = function(lambda x, w: (x + 1, w), seeded(2, 4), w=seeded(3))
    root = regions(program)
    assert {n.name for n in root.nodes} == {n.name for n in program.graph.nodes} - {"output"}
    assert root.children == []


def test_a_module_called_twice_is_one_region() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    program = captured(Twice(), seeded(2, 4))
    region = at(program, "fc")
    assert {n.name for n in region.nodes} == {"fc_weight", "fc_bias", "linear", "linear_1"}
    assert {n.name for n in at(program, "").nodes} == {"x", "relu"}, "traced at the root, though only fc reads it"
    assert names(region.inputs) == ["x", "relu"]
    assert names(region.outputs) == ["linear", "linear_1"]


def test_a_value_read_inside_and_outside_is_an_output_once() -> None:
    class Both(nn.Module):
        def forward(self, x):
            y = x.exp()
            return y, y.sin()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = Both()

        def forward(self, x):
            y, z = self.both(x)
            return y.tanh() + z

    region = at(captured(Outer(), seeded(2, 4)), "both")
    assert names(region.nodes) == ["exp", "sin"]
    assert (names(region.inputs), names(region.outputs)) == (["x"], ["exp", "sin"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet2d_cond", "dit", "mixtral", "gpt2", "detr"])
def test_real_models(name: str) -> None:
    """Every node once; boundaries recomputed from the edges; classes and paths are the model's own."""
    model, program = ZOO[name]()[0], zoo(name)
    root = regions(program)
    nodes = root.all_nodes()
    assert len(nodes) == len(set(nodes)) == len(program.graph.nodes) - 1
    modules = dict(model.named_modules())
    for region in root.walk():
        assert region.kind == type(modules[region.path]).__name__
        inside = set(region.all_nodes())
        assert set(region.inputs) == {a for n in inside for a in n.all_input_nodes} - inside
        assert set(region.outputs) == {n for n in inside if set(n.users) - inside}
        assert all(region.path == "" or child.path.startswith(f"{region.path}.") for child in region.children)
