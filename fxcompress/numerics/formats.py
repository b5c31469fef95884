"""The number formats a quantizer can name: one line of a table each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxcompress.errors import RecipeError, nearest


@dataclass(frozen=True)
class Format:
    """The set of codes of a quantizer: the integers qmin..qmax, or the finite values of a float type, of which qmin and qmax are the ends; or
    exponents 0..qmax of which the last means 0, for numbers that aren't negative (`affine`).

    bits: width of one code once packed. container: dtype of a tensor of unpacked codes, one element a code (int2 to int6 sit in int8).
    tau: of a log format, how many codes halve the value; 0 for others.
    """

    name: str
    bits: int
    kind: Literal["int", "float", "log"]
    signed: bool
    qmin: int
    qmax: int
    container: torch.dtype
    tau: int = 0

    def __str__(self) -> str:
        return self.name


def _integer(name: str, bits: int, signed: bool, container: torch.dtype) -> Format:
    least = -(2 ** (bits - 1)) if signed else 0
    return Format(name, bits, "int", signed, least, least + 2**bits - 1, container)


def _float8(name: str, container: torch.dtype) -> Format:
    greatest = int(torch.finfo(container).max)
    return Format(name, 8, "float", True, -greatest, greatest, container)


def _log(bits: int, tau: int) -> Format:
    """At most 2^bits values. None of them is below 2^-63 of the greatest: what is smaller may be 0 in float32."""
    return Format(f"log{bits}:{tau}", bits, "log", False, 0, min(2**bits - 1, 64 * tau), torch.uint8, tau)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _integer("int2", 2, True, torch.int8),
        _integer("int4", 4, True, torch.int8),
        _integer("int6", 6, True, torch.int8),
        _integer("int8", 8, True, torch.int8),
        _integer("uint2", 2, False, torch.uint8),
        _integer("uint3", 3, False, torch.uint8),
        _integer("uint4", 4, False, torch.uint8),
        _integer("uint5", 5, False, torch.uint8),
        _integer("uint6", 6, False, torch.uint8),
        _integer("uint7", 7, False, torch.uint8),
        _integer("uint8", 8, False, torch.uint8),
        _integer("int16", 16, True, torch.int16),
        _integer("int32", 32, True, torch.int32),
        _float8("float8_e4m3fn", torch.float8_e4m3fn),
        _float8("float8_e5m2", torch.float8_e5m2),
        *(_log(bits, tau) for bits in range(2, 9) for tau in (1, 2, 4, 8)),
    )
}


def format_of(name: str) -> Format:
    """The format of that name in FORMATS. Raises RecipeError with the nearest known name."""
    try:
        return FORMATS[name]
    except KeyError:
        raise RecipeError(f"unknown number format {name!r}", do=nearest(name, FORMATS)) from None
