"""The number formats a quantizer can name: one line of a table each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxcompress.errors import RecipeError, nearest


@dataclass(frozen=True)
class Format:
    """The set of codes of a quantizer: the integers qmin..qmax, or the finite values of a float type, of which qmin and qmax are the ends.

    bits: width of one code once packed. container: dtype of a tensor of unpacked codes, one element a code (int2 to int6 sit in int8).
    """

    name: str
    bits: int
    kind: Literal["int", "float"]
    signed: bool
    qmin: int
    qmax: int
    container: torch.dtype

    def __str__(self) -> str:
        return self.name


def _integer(name: str, bits: int, signed: bool, container: torch.dtype) -> Format:
    least = -(2 ** (bits - 1)) if signed else 0
    return Format(name, bits, "int", signed, least, least + 2**bits - 1, container)


def _float8(name: str, container: torch.dtype) -> Format:
    greatest = int(torch.finfo(container).max)
    return Format(name, 8, "float", True, -greatest, greatest, container)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _integer("int2", 2, True, torch.int8),
        _integer("int4", 4, True, torch.int8),
        _integer("int6", 6, True, torch.int8),
        _integer("int8", 8, True, torch.int8),
        _integer("uint2", 2, False, torch.uint8),
        _integer("uint4", 4, False, torch.uint8),
        _integer("uint6", 6, False, torch.uint8),
        _integer("uint8", 8, False, torch.uint8),
        _integer("int16", 16, True, torch.int16),
        _integer("int32", 32, True, torch.int32),
        _float8("float8_e4m3fn", torch.float8_e4m3fn),
        _float8("float8_e5m2", torch.float8_e5m2),
    )
}


def format_of(name: str) -> Format:
    """The format of that name in FORMATS. Raises RecipeError with the nearest known name."""
    try:
        return FORMATS[name]
    except KeyError:
        raise RecipeError(f"unknown number format {name!r}", do=nearest(name, FORMATS)) from None
