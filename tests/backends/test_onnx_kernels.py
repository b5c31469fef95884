"""Quantised weights in ONNX Runtime: which kernel reads which, with which numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress.backends.onnx.blocks import Blocks, blocks_of, matrix_of
from fxcompress.backends.onnx.outline import outline
from fxcompress.numerics.affine import dequantize
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.packing import unpack
from fxcompress.program import Program
from tests.backends.onnx_helpers import EXACT, LIMIT, changed, error, ops, program_of, quantised


class Columns(nn.Module):
    """x W + b with W [K, N]: summed over the first axis, like the layers of GPT-2."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(k, n)), nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Tied(nn.Module):
    """An embedding whose table is the output head as well."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sin() @ self.table.weight.T


class Experts(nn.Module):
    """Every row of x through the matrix of one expert, picked by index."""

    def __init__(self, experts: int, k: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, n, k))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.weight[e].T for e in range(self.weight.shape[0])])


def linear(
    format: str, block: tuple[int, int], symmetric: bool = True, k: int = 64, n: int = 24, rows: int = 5
) -> tuple[Program, list[Tensor]]:
    """A quantised nn.Linear and inputs for it."""
    torch.manual_seed(1)
    x = torch.randn(2, rows, k)
    return quantised(program_of(nn.Linear(k, n), x), "weight", format, block, symmetric=symmetric), [x]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("block", [(1, 32), (1, -1), (-1, -1), (1, 96), (5, 64)], ids=str)
@pytest.mark.parametrize("format", ["int2", "int4", "int8", "uint4"])
def test_linear_runs_in_the_nbit_kernel(format, block, symmetric):
    program, inputs = linear(format, block, symmetric, k=192)
    assert error(program, inputs) < LIMIT
    assert [op for op in ops(program) if "MatMul" in op] == ["MatMulNBits"]


@pytest.mark.parametrize(("k", "group"), [(36, 16), (40, 32), (37, 16), (576, 128), (33, 64), (192, 80)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_short_last_group_is_exact(k, group, symmetric):
    program, inputs = linear("int4", (1, group), symmetric, k=k)
    assert error(program, inputs) < LIMIT
    assert "MatMulNBits" in ops(program)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [(32, 1), (-1, 1), (-1, -1), (16, 4)], ids=str)
def test_a_matrix_summed_over_its_first_axis(block, symmetric):
    x = torch.randn(7, 64)
    program = quantised(program_of(Columns(64, 23), x), "weight", "int4", block, symmetric=symmetric)
    assert error(program, [x]) < LIMIT
    assert ops(program).count("MatMulNBits") == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("format", "width", "block"), [("int4", 64, (1, 32)), ("int8", 36, (1, 16)), ("int2", 64, (1, -1)), ("int4", 37, (1, -1))]
)
def test_a_tied_table_is_stored_once(format, width, block, symmetric, tmp_path):
    tokens = torch.arange(12).reshape(3, 4)
    program = quantised(program_of(Tied(512, width), tokens), "table.weight", format, block, symmetric=symmetric)
    assert error(program, [tokens]) < LIMIT
    assert [op for op in ops(program) if "Bits" in op or "Block" in op] == ["GatherBlockQuantized", "MatMulNBits"]
    EXACT.write(program, tmp_path)
    (leaf,) = (leaf for leaf in outline(program).leaves if leaf.quantised)
    blocks = blocks_of(matrix_of(leaf, program.constants, (0, 1), {}))
    assert isinstance(blocks, Blocks)
    held = [blocks.codes, blocks.scale, *([] if blocks.zero_point is None else [blocks.zero_point])]
    size = sum(t.nbytes for t in held)
    assert size <= (tmp_path / "weights.bin").stat().st_size < size + blocks.codes.nbytes // 2


def test_packed_bytes_are_viewed_not_copied():
    program, _ = linear("int4", (1, 32))
    (leaf,) = (leaf for leaf in outline(program).leaves if leaf.quantised)
    blocks = blocks_of(matrix_of(leaf, program.constants, (0, 1), {}))
    assert isinstance(blocks, Blocks)
    assert blocks.codes.data_ptr() == program.constants["weight.packed"].data_ptr()


def test_experts_picked_by_index_run_in_the_nbit_kernel():
    x = torch.randn(6, 64)
    program = quantised(program_of(Experts(3, 64, 20), x), "weight", "int4", (1, 1, 32), symmetric=False)
    assert error(program, [x]) < LIMIT
    assert ops(program).count("MatMulNBits") == 1  # they read one input, so they run as one product


REFUSED = {
    "float8_e4m3fn has no n-bit kernel": ("float8_e4m3fn", (1, -1)),
    "groups of 24 have no 4-bit kernel: it takes 16 to 256, powers of two, or multiples of them": ("int4", (1, 24)),
    "zero points -9..8 are no codes of int4": ("int4", (1, 32)),
    "groups of 16 have no 2-bit kernel: it takes 32 to 128, powers of two, or multiples of them": ("int2", (1, 16)),
}


@pytest.mark.parametrize(("reason", "how"), REFUSED.items(), ids=[r.split(":")[0] for r in REFUSED])
def test_what_no_kernel_reads_is_exact_in_float_with_the_reason(reason, how):
    program, inputs = linear(*how, symmetric="zero" not in reason)
    if "zero" in reason:
        program = changed(program, "weight.zero_point", torch.tensor([-9, 8], dtype=torch.int8).repeat(24, 1))
    assert error(program, inputs) < LIMIT
    assert EXACT.lower(program).in_float == {"linear": reason}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int2", "int4", "int8", "uint4"])
@pytest.mark.parametrize("block", [(1, -1, -1, -1), (1, 4, -1, -1), (-1, -1, -1, -1), (2, 3, 2, 2)], ids=str)
def test_a_convolution_computes_in_float_and_says_so(format, block, symmetric):
    x = torch.randn(2, 8, 9, 9)
    program = quantised(program_of(nn.Conv2d(8, 6, 3), x), "weight", format, block, symmetric=symmetric)
    assert error(program, [x]) < LIMIT
    assert EXACT.lower(program).in_float == {"conv2d": "Conv has no n-bit kernel"}


def test_a_weight_on_the_left_computes_in_float_and_says_so():
    class Left(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(self.weight, x)

    x = torch.randn(2, 64, 5)
    program = quantised(program_of(Left(64, 24), x), "weight", "int4", (1, 32))
    assert error(program, [x]) < LIMIT
    assert list(EXACT.lower(program).in_float.values()) == ["MatMul has an n-bit kernel for operand 1 only, the weight is operand 0"]


def _codes(program: Program) -> Tensor:
    return unpack(program.constants["weight.packed"], format_of("int4"), 64)


def _nibbles_swapped(p: Program) -> Program:
    packed = p.constants["weight.packed"]
    return changed(p, "weight.packed", (packed >> 4) | (packed << 4))


def _transposed(p: Program) -> Program:
    from fxcompress.numerics.packing import pack

    return changed(p, "weight.packed", pack(_codes(p).T.contiguous(), format_of("int4")))


@pytest.mark.parametrize(
    "fault",
    [
        lambda p: changed(p, "weight.zero_point", (p.constants["weight.zero_point"] + 9) % 16 - 8),
        lambda p: changed(p, "weight.zero_point", torch.zeros_like(p.constants["weight.zero_point"])),
        lambda p: changed(p, "weight.scale", p.constants["weight.scale"].roll(1, 0)),
        lambda p: changed(p, "weight.scale", p.constants["weight.scale"].roll(1, 1)),
        _nibbles_swapped,
        _transposed,
    ],
    ids=["zero_point+1", "zero_point_lost", "scales_of_other_rows", "scales_of_other_groups", "nibbles", "transposed"],
)
def test_the_comparison_bites(fault):
    program, inputs = linear("int4", (1, 32), symmetric=False, n=64)
    assert error(program, inputs) < LIMIT
    assert error(program, inputs, fault(program)) > 1e3 * LIMIT


@pytest.mark.parametrize("name", ["scale", "zero_point", "codes"])
@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
def test_blocks_hold_the_constants_numbers(name, axes):
    """The layout, read back by its definition, gives each dequantised element; each array matters."""
    torch.manual_seed(0)
    block = (1, 16) if axes == (0, 1) else (16, 1)
    program = quantised(program_of(nn.Linear(36, 34), torch.randn(2, 36)), "weight", "int4", block, symmetric=False)
    (leaf,) = (leaf for leaf in outline(program).leaves if leaf.quantised)
    blocks = blocks_of(matrix_of(leaf, program.constants, axes, {}))
    assert isinstance(blocks, Blocks)
    c, format = program.constants, format_of("int4")
    dense = dequantize(unpack(c["weight.packed"], format, 36), c["weight.scale"], c["weight.zero_point"], format, block)
    wanted = dense if axes == (0, 1) else dense.T
    assert torch.equal(_read(blocks), wanted)
    parts = {"scale": blocks.scale.roll(1, 0), "zero_point": blocks.zero_point.roll(1, 0), "codes": blocks.codes.roll(1, 0)}
    assert not torch.equal(_read(Blocks(**{**vars(blocks), name if name != "codes" else "codes": parts[name]})), wanted)


def _read(blocks: Blocks) -> Tensor:
    """The matrix a kernel sees: element k of row n is (nibble k % g of block k // g - zero point) * scale."""
    out = torch.empty(blocks.rows, blocks.columns)
    for n in range(blocks.rows):
        for k in range(blocks.columns):
            b, i = divmod(k, blocks.group)
            code = int(blocks.codes[n, b, i // 2]) >> 4 * (i % 2) & 15
            zero = int(blocks.zero_point[n, b // 2]) >> 4 * (b % 2) & 15
            out[n, k] = (code - zero) * blocks.scale[n, b]
    return out
