"""The committed table of architectures against engine, passes and oracle; and the function kept in float32 wherever something lands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from torch import fx

from fxcompress.interpret import run as interpret
from fxcompress.program import Program
from fxcompress.transport import Kind, Plan, Seed, Transport
from fxcompress.transport.relations import TABLE as RELATIONS
from tests.passes.helpers import error
from tests.transport.architectures import LAYERS, LIMIT, TABLE, entry, landed, moved, pass_runs, program_of, seeds

QUICK = ("llama", "vit")
LONG = ("sam", "unet2d_cond", "unet3d_cond")  # the oracle takes minutes for them: `python -m tests.transport.architectures NAME` judges again
COMMITTED: dict[str, Any] = json.loads(TABLE.read_text())
each = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in COMMITTED])


def without_missed(table: Any) -> Any:
    return {k: without_missed(v) for k, v in table.items() if k != "missed"} if isinstance(table, dict) else table


@each
def test_what_lands_and_what_is_declined(name: str) -> None:
    assert entry(name, judged=False) == without_missed(COMMITTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in COMMITTED if n not in LONG])
def test_what_is_missed(name: str) -> None:
    assert entry(name) == COMMITTED[name]


def test_nothing_is_missed() -> None:
    rows = {(name, site, which): row for name, part in COMMITTED.items() for site, kinds in part.items() for which, row in kinds.items()}
    assert [place for place, row in rows.items() if row["missed"]] == []


@each
def test_the_function_is_kept(name: str) -> None:
    program = program_of(name)
    before = interpret(program, program.example)
    worst = {f"{plan.kind} at {seed.node.name}": moved(program, plan, before) for _, seed, plan in landed(name)}
    assert {place: figure for place, figure in worst.items() if not figure < LIMIT} == {}


@each
def test_passes_keep_the_function(name: str) -> None:
    for _, before, after, report in pass_runs(name):
        assert not [c for c in report.checks if c.verdict != "held"]
        assert error(before, after) < LIMIT


# the folds of the published per-architecture tables, in the models' own words: what scales, and the layers that read it
DECODER = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
PUBLISHED: dict[str, tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "llama": ("model.layers", DECODER),  # AWQ; SmoothQuant has the two norms
    "qwen2": ("model.layers", DECODER),
    "opt": (
        "model.decoder.layers",
        (
            ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("self_attn.v_proj", ("self_attn.out_proj",)),
            ("final_layer_norm", ("fc1",)),
            ("fc1", ("fc2",)),
        ),
    ),
    "mixtral": (
        "model.layers",
        (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("self_attn.v_proj", ("self_attn.o_proj",)),
            ("post_attention_layernorm", ("mlp.gate", "mlp.experts")),
        ),
    ),
    "vit": (
        "vit.layers",
        (
            ("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
            ("attention.v_proj", ("attention.o_proj",)),
            ("layernorm_after", ("mlp.fc1",)),
        ),
    ),
    "gpt2": ("transformer.h", (("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",)))),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folds_are_found(name: str) -> None:
    """From the input of any of the readers, the producer and all readers are found, with a class for every channel of the producer."""
    program = program_of(name)
    stack, folds = PUBLISHED[name]
    for layer in range(2):
        for producer, readers in folds:
            for reader in readers:
                count, found = scaled_together(program, f"{stack}.{layer}.{reader}")
                assert count == len(program.constants[f"{stack}.{layer}.{producer}.weight"])
                assert {f"{stack}.{layer}.{m}" for m in (producer, *readers)} <= {leaf.rpartition(".")[0] for leaf in found}, (layer, reader)


def scaled_together(program: Program, reader: str) -> tuple[int, set[str]]:
    """In how many channels the input of the layer may be scaled, and the constants where that lands; fails if it lands in part only."""
    engine = Transport(program)
    for node in program.graph.nodes:
        if node.target in LAYERS and any(_constant_of(a).rpartition(".")[0] == reader for a in node.args if isinstance(a, fx.Node)):
            place, axis, _ = LAYERS[node.target]
            plan = engine.solve(Kind.SCALE, Seed(node.args[place], (axis,)))  # type: ignore[arg-type]
            assert plan.is_whole
            return plan.count, {str(leaf.target) for leaf in plan.leaves}
    raise AssertionError(f"no layer reads {reader}")


def _constant_of(node: fx.Node) -> str:
    """The name of the constant that a value is a view of."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else ""


def test_a_row_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the relation of relu, the oracle counts what the engine no longer finds."""
    from tests.transport.architectures import site_row, with_missed
    from tests.transport.oracle import Oracle

    program = program_of("opt")
    found = [s for s in seeds(program, "layers") if str(s.node.target) == "aten.relu.default"]
    oracle = Oracle(program)
    assert with_missed(site_row(program, Kind.SCALE, found, solved(program, found)), oracle, Kind.SCALE)["missed"] == 0
    monkeypatch.delitem(RELATIONS, found[0].node.target)
    row = with_missed(site_row(program, Kind.SCALE, found, solved(program, found)), oracle, Kind.SCALE)
    assert (row["whole"], row["missed"]) == (0, len(found))


def solved(program: Program, found: Sequence[Seed]) -> dict[Seed, Plan]:
    engine = Transport(program)
    return {seed: engine.solve(Kind.SCALE, seed) for seed in found}
