"""Real architectures in float64: at how many layers' inputs a change lands, each exact, and what the published tables fold is found."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import fx

from fxcompress.edit import Edit
from fxcompress.passes.tidy.fold_constants import FoldConstants
from fxcompress.program import Program
from fxcompress.transport import Kind, Seed, Transport
from tests.passes.helpers import run, zoo
from tests.transport.helpers import LIMIT, doubled, proved, vector_for

aten = torch.ops.aten
LAYERS = {
    aten.linear.default: (0, -1),
    aten.mm.default: (0, -1),
    aten.addmm.default: (1, -1),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), (0, 1)),
}
KINDS = (Kind.SCALE, Kind.SIGN, Kind.SHIFT, Kind.PERMUTE, Kind.ROTATE)

LANDED: dict[str, tuple[int, ...]] = {  # model: layers, and at how many of them each of KINDS lands
    "llama": (15, 15, 15, 0, 15, 2),
    "qwen2": (15, 15, 15, 0, 15, 2),
    "mixtral": (27, 27, 27, 0, 27, 2),
    "gpt2": (9, 6, 6, 5, 9, 2),
    "bert": (13, 2, 2, 0, 4, 2),
    "t5_encoder": (12, 12, 10, 0, 4, 2),
    "vit": (14, 11, 11, 11, 13, 2),
    "swin": (27, 22, 22, 8, 26, 4),
    "dit": (23, 11, 14, 11, 22, 2),
    "sd3": (37, 23, 24, 23, 34, 4),
    "flux": (36, 21, 23, 21, 33, 4),
    "unet2d_cond": (83, 37, 38, 36, 74, 9),
}
QUICK = ("llama", "vit")


@functools.cache
def prepared(name: str) -> Program:
    program, _ = run(zoo(name), FoldConstants(), check="off")
    return doubled(program)


def layers(program: Program) -> Iterator[tuple[fx.Node, Seed]]:
    for node in program.graph.nodes:
        if node.target in LAYERS:
            place, axis = LAYERS[node.target]
            yield node, Seed(node.args[place], (axis,))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LANDED])
def test_layers(name: str) -> None:
    program = prepared(name)
    engine, landed = Transport(program), dict.fromkeys(KINDS, 0)
    seeds = list(layers(program))
    for kind in KINDS:
        for _, seed in seeds:
            plan = engine.solve(kind, seed)
            if plan.count:
                landed[kind] += 1
                figures = proved(program, plan, vector_for(plan))
                assert max(figures["output"], figures["audit"]) < LIMIT
                assert not figures["broken"]
    assert (len(seeds), *landed.values()) == LANDED[name]


def test_what_the_published_tables_fold_in_llama() -> None:
    """AWQ and SmoothQuant: norm -> q k v, v -> o (one class a key/value head's channel), norm -> gate up, up -> down."""
    program = prepared("llama")
    engine = Transport(program)
    wanted = {"q_proj": 64, "k_proj": 64, "v_proj": 64, "o_proj": 32, "gate_proj": 64, "up_proj": 64, "down_proj": 128}
    for node, seed in layers(program):
        role = str(node.args[1].target).split(".")[-2]  # type: ignore[union-attr]
        plan = engine.solve(Kind.SCALE, seed)
        assert plan.is_whole
        assert plan.count == wanted.get(role, plan.count)


def test_the_residual_stream_turns_once_gains_are_one() -> None:
    """R1: every norm's gain goes into its readers as a scale, then the whole stream is one block of free classes."""
    program = prepared("llama").copy()
    engine = Transport(program)
    embedded = next(n for n in program.graph.nodes if n.target is aten.embedding.default)
    assert engine.solve(Kind.ROTATE, Seed(embedded)).count == 0
    edit = Edit(program)
    for leaf in [n for n in program.graph.nodes if n.op == "get_attr" and "norm" in str(n.target)]:
        plan, gain = engine.solve(Kind.SCALE, Seed(leaf, (0,), power=-1)), program.constants[str(leaf.target)]
        plan.apply(edit, plan.gather({leaf: gain}))
        with edit.site(leaf):
            edit.fold(leaf, torch.ones_like(gain))
    edit.commit()
    plan = Transport(program).solve(Kind.ROTATE, Seed(embedded))
    assert (plan.count, plan.blocks.max(), plan.is_whole) == (64, 0, True)
    figures = proved(program, plan, vector_for(plan))
    assert max(figures["output"], figures["audit"]) < LIMIT


def test_values_turn_within_heads_only() -> None:
    """R2: the blocks of a rotation of the values are the key/value heads."""
    program = prepared("llama")
    attention = next(n for n in program.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    plan = Transport(program).solve(Kind.ROTATE, Seed(attention.args[2], (1, 3)))  # type: ignore[arg-type]
    assert sorted(torch.bincount(torch.from_numpy(plan.blocks)).tolist()) == [16, 16]
