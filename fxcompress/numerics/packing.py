"""Codes packed to their true width: what is on disk and what the kernels of ONNX Runtime read."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.numerics.formats import Format


def pack(codes: Tensor, format: Format) -> Tensor:
    """Bit i of code j of a row, less qmin, is bit j * bits + i of the row's bytes, lowest bits first: 4 codes of 6 bits in 3 bytes.

    Offset binary: the stored number is unsigned, its zero is -qmin (8 for int4), as MatMulNBits wants it; so int8 is stored plus 128.
    A float format is stored as its bit pattern. codes: [..., K] in format.container; returns uint8 [..., ceil(K * bits / 8)], the unused
    high bits of the last byte 0. Raises ValueError for formats wider than a byte, another dtype, no axis, or a code outside qmin..qmax.
    """
    _check(codes, format)
    if format.kind == "float":
        return codes.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    stored = codes.view(torch.uint8) - format.qmin  # modulo 256
    if 8 % format.bits:
        return _regrouped(stored, format.bits, 8)
    per_byte = 8 // format.bits
    rows = torch.nn.functional.pad(stored, (0, -codes.shape[-1] % per_byte))
    packed = rows[..., ::per_byte].clone()
    for i in range(1, per_byte):
        packed |= rows[..., i::per_byte] << (i * format.bits)
    return packed


def unpack(packed: Tensor, format: Format, size: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(size * bits / 8)] -> codes [..., size] in format.container.

    Raises ValueError for formats wider than a byte, or if the rows don't hold exactly `size` codes.
    """
    _require_narrow(format)
    length = -(-size * format.bits // 8)
    if packed.dtype != torch.uint8 or packed.shape[-1] != length:
        raise ValueError(f"{size} codes of {format} are {length} uint8 a row, not {packed.shape[-1]} {packed.dtype}")
    if format.kind == "float":
        return packed.clone(memory_format=torch.contiguous_format).view(format.container)
    if 8 % format.bits:
        stored = _regrouped(packed, 8, format.bits)
    else:
        shifts = torch.arange(0, 8, format.bits, dtype=torch.uint8, device=packed.device)
        stored = (packed.unsqueeze(-1) >> shifts).bitwise_and_(2**format.bits - 1).flatten(-2)
    return stored[..., :size].add(format.qmin).contiguous().view(format.container)


def _regrouped(rows: Tensor, old: int, new: int) -> Tensor:
    """Numbers of `old` bits each as numbers of `new` bits each, the last filled up with zeros: uint8 [..., K] -> [..., ceil(K * old / new)]."""
    bits = (rows.unsqueeze(-1) >> torch.arange(old, dtype=torch.uint8, device=rows.device)).bitwise_and_(1).flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % new))
    groups = bits.view(*rows.shape[:-1], bits.shape[-1] // new, new)
    return torch.sum(groups << torch.arange(new, dtype=torch.uint8, device=rows.device), -1, dtype=torch.uint8)


def _require_narrow(format: Format) -> None:
    if format.bits > 8:
        raise ValueError(f"{format} is wider than a byte: only formats of at most 8 bits are packed")


def _check(codes: Tensor, format: Format) -> None:
    _require_narrow(format)
    if codes.dtype != format.container or codes.dim() == 0:
        raise ValueError(f"packing {format} needs {format.container} codes with an axis, not {codes.dtype} of shape {tuple(codes.shape)}")
    if format.kind != "float" and codes.numel():
        least, greatest = (int(v) for v in codes.aminmax())
        if least < format.qmin or greatest > format.qmax:
            raise ValueError(f"codes {least}..{greatest} don't fit {format}, {format.qmin}..{format.qmax}")
