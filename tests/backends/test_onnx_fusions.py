"""What the lowering puts together: groups of query heads, rotary embeddings, products of one input. Near misses stay as they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from fxcompress.backends.onnx.files import read_graph
from fxcompress.backends.onnx.session import OnnxSession
from fxcompress.program import Program
from tests.backends.onnx_helpers import EXACT, LIMIT, error, ops, program_of, quantised


class Grouped(nn.Module):
    """Attention over keys and values [B, 2, S, 8] repeated for 6 query heads, head h from head h // 3 as models do it, or from h % 2."""

    def __init__(self, interleaved: bool = True, only_keys: bool = False) -> None:
        super().__init__()
        self.interleaved, self.only_keys = interleaved, only_keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        v = v.repeat(1, 3, 1, 1) if self.only_keys else self.repeated(v)
        return nn.functional.scaled_dot_product_attention(q, self.repeated(k), v, mask)

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        if self.interleaved:
            return x[:, :, None].expand(batch, heads, 3, length, width).reshape(batch, heads * 3, length, width)
        return x[:, None].expand(batch, 3, heads, length, width).reshape(batch, heads * 3, length, width)


def _inputs(masked: bool) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 4)
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[0, 0, 1] = False
    return [q, k, v, mask] if masked else [q, k, v]


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_keys_and_values_are_read_once_per_group(masked):
    inputs = _inputs(masked)
    program = program_of(Grouped(), *inputs)
    assert "Expand" not in ops(program)
    assert error(program, inputs) < LIMIT


@pytest.mark.parametrize("model", [Grouped(interleaved=False), Grouped(only_keys=True)], ids=["other order", "values in another order"])
def test_heads_repeated_in_another_order_stay_repeated(model):
    inputs = _inputs(False)
    program = program_of(model, *inputs)
    assert "Expand" in ops(program) or "Tile" in ops(program)
    assert error(program, inputs) < LIMIT


class Rotated(nn.Module):
    """Two values of one batch turned by the angles of their positions; `fault` departs from the rotary embedding in one place."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.register_buffer("speed", 10 ** -torch.linspace(0, 2, 4))

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, :, None].float() * self.speed
        both = torch.cat((angles, 2 * angles if self.fault == "other angles" else angles), -1)
        cos, sin = both.cos()[:, None], both.sin()[:, None]
        return self.turned(q, cos, sin), self.turned(k, cos, sin)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., :4], x[..., 4:]
        half = torch.cat((second, -first) if self.fault == "other sign" else (-second, first), -1)
        if self.fault == "other halves":
            half = torch.cat((-x[..., 3:7], x[..., :4]), -1)
        return x * cos + half * sin


def _positions(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.randint(0, 90, (rows, 5))


@pytest.mark.parametrize("rows", [2, 1], ids=["positions of each row", "positions of all rows"])
def test_rotary_embeddings_run_as_one_node(rows):
    inputs = _positions(rows)
    program = program_of(Rotated(), *inputs)
    found = ops(program)
    assert found.count("RotaryEmbedding") == 2
    assert not {"Neg", "Add"} & set(found)
    assert error(program, inputs) < LIMIT


@pytest.mark.parametrize("fault", ["other angles", "other sign", "other halves"])
def test_what_only_looks_like_a_rotary_embedding_is_left(fault):
    inputs = _positions(2)
    program = program_of(Rotated(fault), *inputs)
    assert "RotaryEmbedding" not in ops(program)
    assert error(program, inputs) < LIMIT


class Products(nn.Module):
    """Three products, two of one input; the second has another width, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(64, 32, bias=False), nn.Linear(64, 48), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x).relu(), self.b(x).relu(), self.c(2 * x).relu()


def _coded(program, formats: dict[str, str], symmetric: bool = True):
    for seed, (name, format) in enumerate(formats.items()):
        program = quantised(program, f"{name}.weight", format, (1, 32), symmetric=symmetric, seed=seed)
    return program


@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_one_input_run_as_one(symmetric, tmp_path):
    inputs = (torch.randn(3, 64),)
    program = _coded(program_of(Products(), *inputs), dict.fromkeys("abc", "uint4"), symmetric)
    assert ops(program).count("MatMulNBits") == 2
    assert error(program, inputs) < LIMIT
    EXACT.write(program, tmp_path)
    report = EXACT.report(program, tmp_path, inputs)
    assert report.quantised_share == 1.0
    assert not report.in_float
    assert report.site_parity < LIMIT


def test_products_of_other_formats_or_tied_weights_stay_alone():
    inputs = (torch.randn(3, 64),)
    program = _coded(program_of(Products(), *inputs), {"a": "uint4", "b": "uint8", "c": "uint4"})
    assert ops(program).count("MatMulNBits") == 3
    model = Products()
    model.c.weight = model.a.weight
    assert ops(_coded(program_of(model, *inputs), {"a": "uint4", "b": "uint4"})).count("MatMulNBits") == 3


class Block(nn.Module):
    """A residual sum under a norm, before (pre) or after the sum is read again, and a gelu."""

    def __init__(self, approximate: str = "none", reads_again: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16).to(dtype), nn.Linear(16, 16).to(dtype)
        self.gelu, self.reads_again = nn.GELU(approximate), reads_again

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = x + self.layer(y)
        return self.gelu(self.norm(both)) + (both if self.reads_again else x)


def _run_as(program: Program, folder: Path) -> Counter[str]:
    """Ops of the graph that ONNX Runtime makes of the program."""
    EXACT.write(program, folder)
    OnnxSession(read_graph(folder), folder, optimized=folder / "optimized.onnx")
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("reads_again", [False, True])
@pytest.mark.parametrize(("approximate", "kernel"), [("none", "Gelu"), ("tanh", "FastGelu")])
def test_a_gelu_is_one_kernel_and_a_norm_stays_apart_from_the_sum_before_it(approximate, kernel, reads_again, tmp_path):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 16), torch.randn(2, 5, 16)]
    program = program_of(Block(approximate, reads_again), *inputs)
    found = _run_as(program, tmp_path)
    assert (found[kernel], found["LayerNormalization"], found["SkipLayerNormalization"]) == (1, 1, 0)
    assert found.keys().isdisjoint({"Erf", "Tanh", "Pow"})
    assert error(program, inputs) < LIMIT


def test_a_gelu_of_doubles_has_no_kernel_and_the_same_numbers():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)]
    program = program_of(Block("tanh", dtype=torch.float64), *inputs)
    assert error(program, inputs) < LIMIT


def test_a_bias_in_front_of_a_norm_stays_with_its_product(tmp_path):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 16)]
    program = program_of(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), *inputs)
    assert _run_as(program, tmp_path).keys().isdisjoint({"Sum", "SkipLayerNormalization"})
    assert error(program, inputs) < LIMIT
