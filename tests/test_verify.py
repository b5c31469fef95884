"""verify and audit: each rule of the table broken once, by one node, which is named."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from fxcompress.errors import VerifierError
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.packing import pack
from fxcompress.program import Program
from fxcompress.verify import RULES, audit, verify
from tests.passes.helpers import Builder, chain, node, seeded

aten = torch.ops.aten


def before_output(program: Program, target: object, *args: object, op: str = "call_function") -> fx.Node:
    with program.graph.inserting_before(program.output_node):
        return program.graph.create_node(op, target, args)  # type: ignore[arg-type]


def unknown_kind(program: Program) -> None:
    before_output(program, "layer", program.placeholders()[0], op="call_module")


def mutation(program: Program) -> None:
    before_output(program, aten.add_.Tensor, program.placeholders()[0], 1)


def python_function(program: Program) -> None:
    before_output(program, mutation, program.placeholders()[0])


def packet_in_place_of_an_op(program: Program) -> None:
    before_output(program, aten.add, program.placeholders()[0], 1)


def missing_constant(program: Program) -> None:
    del program.constants["layer.1.weight"]


def nested_output(program: Program) -> None:
    program.output_node.args = ((program.results(),),)


def one_output_too_many(program: Program) -> None:
    program.output_node.args = ((*program.results(), program.placeholders()[0]),)


def literal_output(program: Program) -> None:
    program.output_node.args = ((1.0,),)


def undeclared_input(program: Program) -> None:
    with program.graph.inserting_before(program.placeholders()[0]):
        program.graph.placeholder("z")


def wrong_order(program: Program) -> None:
    late = before_output(program, aten.neg.default, program.placeholders()[0])
    node(program, "linear_default").update_arg(0, late)


def turned_over_grid(program: Program) -> None:
    program.constants["layer.0.weight"] = torch.tensor([[0.1], [-0.1]])
    before_output(program, torch.ops.fxc.quantize.default, program.placeholders()[0], node(program, "layer_0_weight"), None, "int8", [2, -1])


def two_grids(program: Program) -> None:
    program.constants.update({"layer.0.weight": torch.tensor([0.1]), "layer.1.weight": torch.tensor([0.2])})
    x, one, other = program.placeholders()[0], node(program, "layer_0_weight"), node(program, "layer_1_weight")
    codes = before_output(program, torch.ops.fxc.quantize.default, x, one, None, "int8", [-1, -1])
    before_output(program, torch.ops.fxc.dequantize.default, codes, other, None, "int8", [-1, -1])


BROKEN: dict[str, tuple[Callable[[Program], None], str, str]] = {
    "unknown kind": (unknown_kind, "layer (call_module layer)", "nodes are inputs, constants, functions and one output"),
    "mutation": (mutation, "add__tensor (call_function aten.add_.Tensor)", "no op may write its arguments"),
    "python function": (python_function, "mutation (call_function <function mutation", "functions are torch ops, getitem and size arithmetic"),
    "op packet": (packet_in_place_of_an_op, "add (call_function aten.add)", "functions are torch ops, getitem and size arithmetic"),
    "missing constant": (missing_constant, "layer_1_weight (get_attr layer.1.weight)", "a constant node names an entry of constants"),
    "nested output": (nested_output, "output (output output)", "the output is the flat tuple of the declared outputs"),
    "one output too many": (one_output_too_many, "output (output output)", "the output is the flat tuple of the declared outputs"),
    "literal output": (literal_output, "output (output output)", "the output is the flat tuple of the declared outputs"),
    "turned over grid": (turned_over_grid, "quantize_default (call_function fxc.quantize.default)", "the scale of a quantiser is positive"),
    "two grids": (
        two_grids,
        "dequantize_default (call_function fxc.dequantize.default)",
        "what quantises and what dequantises its codes have one grid",
    ),
    "undeclared input": (undeclared_input, "z (placeholder z)", "every placeholder is a declared input"),
    "wrong order": (wrong_order, "linear_default reads neg_default before it is computed", "nodes are in topological order"),
}


@pytest.mark.parametrize(("breaks", "what", "why"), [pytest.param(*b, id=i) for i, b in BROKEN.items()])
def test_each_rule(breaks: Callable[[Program], None], what: str, why: str) -> None:
    program = chain(2)
    verify(program)
    breaks(program)
    with pytest.raises(VerifierError) as caught:
        verify(program)
    assert caught.value.what.startswith(what)
    assert caught.value.why == why


def test_every_rule_of_the_table_is_broken_above() -> None:
    assert {sentence for _, sentence in RULES} < {why for _, _, why in BROKEN.values()}


def test_size_arithmetic_is_legal() -> None:
    program = chain(1)
    size = before_output(program, aten.sym_size.int, program.placeholders()[0], 0)
    doubled = before_output(program, operator.mul, size, 2)
    before_output(program, torch.sym_max, doubled, size)
    before_output(program, operator.getitem, before_output(program, aten.split.Tensor, program.placeholders()[0], 2), 0)
    verify(program)


def quantised(codes: torch.Tensor, format: str = "int4") -> Program:
    built = Builder(x=seeded(2, 3))
    packed = built.constant("packed", pack(codes, format_of(format)))
    unpacked = built.op(torch.ops.fxc.unpack.default, packed, format, codes.shape[-1])
    return built.program(built.op(aten.add.Tensor, built.x, unpacked))


def test_audit_passes_legal_codes() -> None:
    audit(quantised(torch.tensor([[-8, 7, 0]], dtype=torch.int8)))


def test_audit_finds_a_quantiser_of_a_constant() -> None:
    built = Builder(x=seeded(2, 3))
    w, s = built.constant("w", seeded(2, 3)), built.constant("s", torch.ones(1, 1))
    program = built.program(built.op(torch.ops.fxc.quantize.default, w, s, None, "int8", [-1, -1]))
    with pytest.raises(VerifierError, match="quantises a constant at run time"):
        audit(program)
    live = Builder(x=seeded(2, 3))
    audit(live.program(live.op(torch.ops.fxc.quantize.default, live.x, live.constant("s", torch.ones(1, 1)), None, "int8", [-1, -1])))


def test_audit_finds_codes_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantised(torch.tensor([[-8, 7, 0]], dtype=torch.int8))
    monkeypatch.setattr("fxcompress.verify.unpack", lambda packed, format, size: torch.tensor([[-9, 7, 0]], dtype=torch.int8))
    with pytest.raises(VerifierError, match=r"unpack_default holds codes outside -8\.\.7"):
        audit(program)


def test_audit_finds_codes_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantised(torch.tensor([[-8, 7, 0]], dtype=torch.int8))
    answers = iter((torch.zeros(1, 3, dtype=torch.int8), torch.ones(1, 3, dtype=torch.int8)))
    monkeypatch.setattr("fxcompress.verify.unpack", lambda packed, format, size: next(answers))
    with pytest.raises(VerifierError, match="unpack_default gives other codes the second time"):
        audit(program)
