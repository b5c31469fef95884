"""Quantised matrices in the layout of ONNX Runtime's n-bit kernels (MatMulNBits, GatherBlockQuantized).

Both read codes [N, blocks, g * bits / 8], lowest bits first, offset binary; scales [N, blocks]; zero points packed like codes, 2^(bits-1)
where there are none. Packed constants [N, K * bits / 8] are these bytes already where g divides K, so they are viewed, not copied. A short
last block is stored full; the kernel reads K codes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.backends.onnx.outline import Leaf
from fxcompress.numerics.formats import Format
from fxcompress.numerics.packing import pack, unpack

GROUPS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}  # measured: 2 bits at 16 and 256 run 30 x slower
WASTE = 1.05


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] as arrays of the kernels' layout. scale: [N, blocks], or with axes of 1 to be expanded to it."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    rows: int
    columns: int
    group: int
    bits: int

    @property
    def count(self) -> int:
        """Blocks a row."""
        return -(-self.columns // self.group)


@dataclass(frozen=True)
class Matrix:
    """A quantised constant seen as [rows, columns], columns summed over (or gathered along). is_packed: codes are packed along columns."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    rows: int
    columns: int
    block: tuple[int, int]
    format: Format
    is_packed: bool


def matrix_of(leaf: Leaf, constants: Mapping[str, Tensor], axes: tuple[int, int], picked: Mapping[int, int]) -> Matrix | str:
    """The leaf with rows and columns along `axes` (rows first) and one index picked on every other axis, or why it is no such matrix."""
    quantised = leaf.quantised
    assert quantised is not None
    last = len(leaf.shape) - 1
    if quantised.format.kind == "float" or quantised.format.bits not in GROUPS:
        return f"{quantised.format} has no n-bit kernel"
    if leaf.dtype != torch.float32:
        return f"the n-bit kernels compute in float32, the weight's scale is {leaf.dtype}"
    if last in picked:
        return "one index is picked on the packed axis"
    zero = None if quantised.zero_point is None else constants[quantised.zero_point]
    scale, zero_point = (
        None if v is None else _turned(_blocks_picked(v, quantised.block, picked), axes) for v in (constants[quantised.scale], zero)
    )
    assert scale is not None
    if zero_point is None and not quantised.format.signed:
        zero_point = torch.zeros_like(scale, dtype=quantised.format.container)  # the kernels' default is the middle code
    codes = _picked(constants[leaf.name], picked)
    packed = quantised.packed and axes[1] == last
    if not packed:
        codes = _turned(unpack(codes, quantised.format, leaf.shape[-1]) if quantised.packed else codes, axes)
    rows, columns = (leaf.shape[a] for a in axes)
    return Matrix(codes, scale, zero_point, rows, columns, (quantised.block[axes[0]], quantised.block[axes[1]]), quantised.format, packed)


def blocks_of(matrix: Matrix) -> Blocks | str:
    """The matrix in the kernels' layout, or the reason why no kernel reads it."""
    along, bits = matrix.block[1], matrix.format.bits
    whole = along == -1 or along >= matrix.columns
    group = _best_group(matrix.columns, bits) if whole else _divisor(along, bits)
    if group is None:
        least, greatest = min(GROUPS[bits]), max(GROUPS[bits])
        return f"groups of {along} have no {bits}-bit kernel: it takes {least} to {greatest}, powers of two, or multiples of them"
    if matrix.zero_point is not None and (reason := _out_of_range(matrix.zero_point, matrix.format)):
        return reason
    count, repeats = -(-matrix.columns // group), 1 if whole else along // group
    zero_point = None
    if matrix.zero_point is not None:
        wide = _per_block(matrix.zero_point, matrix, repeats, count).expand(matrix.rows, count)
        zero_point = pack(wide.to(matrix.format.container), matrix.format)
    codes = _bytes(matrix, group).view(matrix.rows, count, -1)
    return Blocks(codes, _per_block(matrix.scale, matrix, repeats, count), zero_point, matrix.rows, matrix.columns, group, bits)


def _out_of_range(zero_point: Tensor, format: Format) -> str | None:
    least, greatest = (int(v) for v in zero_point.aminmax())
    return None if format.qmin <= least and greatest <= format.qmax else f"zero points {least}..{greatest} are no codes of {format}"


def _best_group(columns: int, bits: int) -> int:
    """For one scale a row: the widest kernel block that stores at most 5 % of padding, else the one with least."""
    padded = {g: -(-columns // g) * g for g in GROUPS[bits] if g <= 128}
    tight = [g for g, size in padded.items() if size <= WASTE * columns]
    return max(tight) if tight else min(padded, key=lambda g: (padded[g], -g))


def _divisor(along: int, bits: int) -> int | None:
    fitting = [g for g in GROUPS[bits] if along % g == 0]
    return max(fitting) if fitting else None


def _per_block(values: Tensor, matrix: Matrix, repeats: int, count: int) -> Tensor:
    """Scales or zero points as [rows or 1, count or 1]: rows that share one are repeated, wider blocks are cut into the kernel's."""
    if values.shape[0] not in (1, matrix.rows):
        values = values.repeat_interleave(matrix.block[0], dim=0)[: matrix.rows]
    if repeats > 1:
        values = values.repeat_interleave(repeats, dim=1)[:, :count]
    return values.contiguous()


def _bytes(matrix: Matrix, group: int) -> Tensor:
    stored = matrix.codes if matrix.is_packed else pack(matrix.codes, matrix.format)
    missing = -(-matrix.columns // group) * group * matrix.format.bits // 8 - stored.shape[1]
    return torch.nn.functional.pad(stored, (0, missing)) if missing else stored.contiguous()


def _picked(tensor: Tensor, picked: Mapping[int, int]) -> Tensor:
    for axis in sorted(picked, reverse=True):
        tensor = tensor.select(axis, picked[axis])
    return tensor


def _blocks_picked(tensor: Tensor, block: tuple[int, ...], picked: Mapping[int, int]) -> Tensor:
    return _picked(tensor, {a: 0 if block[a] == -1 else i // block[a] for a, i in picked.items()})


def _turned(tensor: Tensor, axes: tuple[int, int]) -> Tensor:
    return tensor if axes[0] < axes[1] else tensor.T.contiguous()
