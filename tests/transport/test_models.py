"""Real architectures in float64: what lands at layers is exact, value by value; the residual stream and the values of attention turn."""

from __future__ import annotations

import functools

import pytest
import torch

from fxcompress.edit import Edit
from fxcompress.program import Program
from fxcompress.transport import Kind, Seed, Transport
from tests.transport.architectures import program_of, seeds
from tests.transport.helpers import LIMIT, doubled, proved, vector_for

aten = torch.ops.aten
KINDS = (Kind.SCALE, Kind.SIGN, Kind.SHIFT, Kind.PERMUTE, Kind.ROTATE)
PROVED = ("llama", "vit", "qwen2", "mixtral", "gpt2", "bert", "t5", "swin", "dit", "sd3", "flux", "unet2d_cond")
QUICK = ("llama", "vit")


@functools.cache
def prepared(name: str) -> Program:
    return doubled(program_of(name))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PROVED])
def test_what_lands_at_layers_is_exact(name: str) -> None:
    """How many land is in architectures.json."""
    program = prepared(name)
    engine = Transport(program)
    for kind in KINDS:
        for seed in dict.fromkeys(seeds(program, "layers")):
            plan = engine.solve(kind, seed)
            if plan.count:
                figures = proved(program, plan, vector_for(plan))
                assert max(figures["output"], figures["audit"]) < LIMIT
                assert not figures["broken"]


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
