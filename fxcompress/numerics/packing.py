"""Codes packed to their true width: what is on disk and what the kernels of ONNX Runtime read."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.numerics.formats import Format


def pack(codes: Tensor, format: Format) -> Tensor:
    """byte j of a row = Σ_i (code[j * n + i] - qmin) << (i * bits), n = 8 / bits codes a byte, lowest bits first.

    Offset binary: the stored number is unsigned, its zero is -qmin (8 for int4), as MatMulNBits wants it; so int8 is stored plus 128.
    A float format is stored as its bit pattern. codes: [..., K] in format.container; returns uint8 [..., ceil(K / n)], the unused high
    bits of the last byte 0. Raises ValueError for formats wider than a byte, another dtype, no axis, or a code outside qmin..qmax.
    """
    _check(codes, format)
    if format.kind == "float":
        return codes.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    stored = codes.view(torch.uint8) - format.qmin  # modulo 256
    per_byte = 8 // format.bits
    rows = torch.nn.functional.pad(stored, (0, -codes.shape[-1] % per_byte))
    packed = rows[..., ::per_byte].clone()
    for i in range(1, per_byte):
        packed |= rows[..., i::per_byte] << (i * format.bits)
    return packed


def unpack(packed: Tensor, format: Format, size: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., ceil(size / n)] -> codes [..., size] in format.container.

    Raises ValueError for formats wider than a byte, or if the rows don't hold exactly `size` codes.
    """
    per_byte = _codes_per_byte(format)
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-size // per_byte):
        raise ValueError(f"{size} codes of {format} are {-(-size // per_byte)} uint8 a row, not {packed.shape[-1]} {packed.dtype}")
    if format.kind == "float":
        return packed.clone(memory_format=torch.contiguous_format).view(format.container)
    shifts = torch.arange(0, 8, format.bits, dtype=torch.uint8, device=packed.device)
    stored = (packed.unsqueeze(-1) >> shifts).bitwise_and_(2**format.bits - 1).add_(format.qmin)  # modulo 256
    return stored.flatten(-2)[..., :size].contiguous().view(format.container)


def _codes_per_byte(format: Format) -> int:
    if format.bits > 8:
        raise ValueError(f"{format} is wider than a byte: only formats of at most 8 bits are packed")
    return 8 // format.bits


def _check(codes: Tensor, format: Format) -> None:
    _codes_per_byte(format)
    if codes.dtype != format.container or codes.dim() == 0:
        raise ValueError(f"packing {format} needs {format.container} codes with an axis, not {codes.dtype} of shape {tuple(codes.shape)}")
    if format.kind == "int" and codes.numel():
        least, greatest = (int(v) for v in codes.aminmax())
        if least < format.qmin or greatest > format.qmax:
            raise ValueError(f"codes {least}..{greatest} don't fit {format}, {format.qmin}..{format.qmax}")
