"""quant.finalize: the same codes bit for bit, at their true width; activations' quantisers stay; what its contract and the audit catch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import ContractViolation, VerifierError
from fxcompress.interpret import run as interpret
from fxcompress.manager import weight_bytes
from fxcompress.numerics.formats import FORMATS, format_of
from fxcompress.numerics.packing import unpack
from fxcompress.passes.quant import finalize
from fxcompress.program import Program
from fxcompress.verify import audit
from tests.passes.helpers import captured, declined, function, lines, planted, run, seeded, text, unchanged_by_second_run, zoo

NAME = "quant.finalize"
PACKED = [f for f in FORMATS.values() if f.bits <= 8 and f.kind != "log"]


class Small(nn.Module):
    """One linear of 6 inputs, so that rows of 2- and 4-bit codes don't fill their last byte."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.fc.weight.data, self.fc.bias.data = seeded(3, 6), seeded(3, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def small(**options: Any) -> Program:
    """The small model, quantised and not finalised. Floats can't be checked pass by pass by their sign, so nothing is checked here."""
    return run(captured(Small(), seeded(2, 6)), "quant.weight_only", check="off", **options)[0]


def test_wiring() -> None:
    after, report = run(small(weights="int4/channel"), NAME)
    assert text(after) == lines("""
        unpack_default = fxc.unpack(%fc.weight.packed, int4, 6)
        dequantize_default = fxc.dequantize(unpack_default, %fc.weight.scale, None, int4, [1, -1])
        linear = linear(x, dequantize_default, %fc.bias)
        return linear""")
    assert list(after.constants) == ["fc.bias", "fc.weight.scale", "fc.weight.packed"], "the float weight is gone"
    assert [c.reason for c in report.changes] == ["18 codes of 4 bits"]
    audit(after)


def test_codes_by_hand() -> None:
    """codes + 8, two a byte, the lower half first: 1 -> 9, -8 -> 0, 7 -> 15."""
    w = torch.tensor([[0.1, -0.8, 0.7]])
    before = function(lambda x, w: x @ w.t(), seeded(2, 3), w=w)
    after, _ = run(run(before, "quant.weight_only", weights="int4/channel", range="minmax")[0], NAME)
    assert after.constants["w.packed"].tolist() == [[9 + 16 * 0, 15]]


@pytest.mark.parametrize("format", PACKED, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:4"])
def test_the_same_numbers_bit_for_bit(format: Any, granularity: str) -> None:
    before = small(weights=f"{format}/{granularity}", symmetric=format.signed)
    after, report = run(before, NAME)
    assert [c.verdict for c in report.checks] == ["held"]
    assert torch.equal(interpret(before, before.example)[0], interpret(after, before.example)[0])
    codes = unpack(after.constants["fc.weight.packed"], format, 6)
    assert codes.shape == (3, 6)
    audit(after)


def test_second_run_changes_nothing() -> None:
    unchanged_by_second_run(small(weights="int4/group:4"), NAME)


def test_an_activations_quantiser_stays() -> None:
    def body(x: Tensor, s: Tensor) -> Tensor:
        grid = (s, None, "int8", [-1, -1])
        return torch.ops.fxc.dequantize(torch.ops.fxc.quantize(x, *grid), *grid)

    before = function(body, seeded(2, 4), s=torch.full((1, 1), 0.1))
    after, report = run(before, NAME)
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (0, [])
    audit(after)


def test_a_scale_that_is_computed_stays() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        grid = (x.abs().amax().reshape(1, 1), None, "int8", [-1, -1])
        return torch.ops.fxc.dequantize(torch.ops.fxc.quantize(w, *grid), *grid)

    before = function(body, seeded(2, 4), w=seeded(3, 4))
    assert text(run(before, NAME)[0]) == text(before)


# bytes


def packed_bytes(shape: torch.Size, bits: int) -> int:
    """Rows are packed along the last axis: ceil(K bits / 8) bytes each."""
    return math.prod(shape[:-1]) * -(-shape[-1] * bits // 8)


def expected_bytes(program: Program, report: fxc.Report | Any, bits: Mapping[str, int], zero_points: bool) -> int:
    """float bytes - weights + codes + scales + zero points, from shapes alone."""
    total = weight_bytes(program)
    for change in report.changes:
        name = next(c for c in change.constants if c.endswith(".scale")).removesuffix(".scale")
        weight, (kind, _, blocks) = program.constants[name], change.reason.partition(" in blocks of ")
        block = [int(b) for b in blocks.strip("[]").split(", ")]
        scales = math.prod(1 if b == -1 else -(-n // b) for n, b in zip(weight.shape, block, strict=True))
        total += packed_bytes(weight.shape, bits[kind]) - weight.numel() * weight.element_size()
        total += scales * (weight.element_size() + zero_points)
    return total


BITS = {f.name: f.bits for f in PACKED}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", ["int2/channel", "int4/group:4", "int8/tensor"])
def test_bytes_are_the_closed_form(weights: str, symmetric: bool) -> None:
    before = captured(Small(), seeded(2, 6))
    quantised, report = run(before, "quant.weight_only", weights=weights, symmetric=symmetric)
    after, finalised = run(quantised, NAME)
    assert weight_bytes(after) == finalised.bytes_after == expected_bytes(before, report, BITS, not symmetric)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet2d_cond", "gpt2", "mixtral"])
def test_bytes_of_real_models(name: str) -> None:
    before = zoo(name)
    quantised, report = run(before, "quant.weight_only", weights="int4/group:32", embeddings="int8/channel")
    after, finalised = run(quantised, NAME)
    assert finalised.fired == report.fired == len(report.changes)
    assert weight_bytes(after) == expected_bytes(before, report, BITS, zero_points=False)
    assert weight_bytes(after) < weight_bytes(before) / 3
    assert all(torch.equal(a, b) for a, b in zip(interpret(quantised, before.example), interpret(after, before.example), strict=True))
    audit(after)


def test_files_are_as_large_as_the_bytes_say(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    recipe = {"passes": [{"quant.weight_only": {"weights": "int4/group:32"}}, NAME]}
    compiled = fxc.compile(model, recipe, (torch.randn(2, 256),), backend="reference")
    compiled.save(tmp_path / "out")
    told = compiled.report.weight_bytes
    assert told == 2 * (256 * 256 // 2 + 256 * 8 * 4 + 256 * 4)
    assert 0 <= (tmp_path / "out/constants.safetensors").stat().st_size - told < 1000, "a header, no padding"


# the contract and the audit


def next_code(format: Any) -> Callable[[Tensor], Tensor]:
    return lambda codes: (codes.int() + 1).clamp(format.qmin, format.qmax).to(codes.dtype)


CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "one code on": next_code(format_of("int8")),
    "negated": lambda c: (-c.int()).clamp(-128, 127).to(torch.int8),
    "other rows": lambda c: c.roll(1, 0),
    "reversed": lambda c: c.flip(1),
    "the last code lost": lambda c: torch.cat([c[:, :-1], torch.zeros_like(c[:, :1])], 1),
}


@pytest.mark.parametrize("fault", CODES.values(), ids=CODES)
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor]) -> None:
    before = small(weights="int8/channel")
    was = text(before)
    right = finalize.pack
    monkeypatch.setattr(finalize, "pack", lambda codes, format: right(fault(codes), format))
    with pytest.raises(ContractViolation) as caught:
        run(before, NAME)
    assert str(caught.value) == (
        "quant.finalize breaks its exact contract at 1 of 1 sites\n"
        "  where fc  (quantize_default)\n"
        "  why   relative error inf at unpack_default on the probe inputs, limit 0\n"
        "  state program as before this pass; 0 finished passes are kept\n"
        '  do    - quant.finalize: {where: {exclude: ["fc"]}}'
    )
    assert text(before) == was


@pytest.mark.parametrize(
    "bytes_of", [lambda p: p ^ 1, lambda p: p ^ 16, lambda p: p.flip(0), torch.zeros_like], ids=["low", "high", "rows", "zeros"]
)
def test_contract_bites_on_bytes(monkeypatch: pytest.MonkeyPatch, bytes_of: Callable[[Tensor], Tensor]) -> None:
    before = small(weights="int4/channel")
    planted(monkeypatch, finalize, "pack", bytes_of)
    with pytest.raises(ContractViolation, match=r"quant.finalize breaks its exact contract at 1 of 1 sites\n  where fc  \(quantize_default\)"):
        run(before, NAME)


def test_a_program_that_is_not_finalised_fails_the_audit() -> None:
    with pytest.raises(VerifierError) as caught:
        audit(small(weights="int4/channel"))
    assert str(caught.value) == (
        "quantize_default quantises a constant at run time\n  why   quant.finalize stores its codes\n  do    - quant.finalize"
    )


def test_order_is_checked_before_anything_runs() -> None:
    with pytest.raises(fxc.RecipeError) as caught:
        fxc.compile(Small().eval(), {"name": "late", "passes": [NAME]}, (seeded(2, 6),), backend="reference")
    assert str(caught.value) == (
        "recipe 'late' can't run in this order\n"
        "  why   pass 1 quant.finalize needs 'quantised' before it, which quant.insert, quant.weight_only, softmax.adaptive gives\n"
        "  do    reorder or add the passes named"
    )
