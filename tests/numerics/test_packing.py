import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.numerics.formats import FORMATS, format_of
from fxcompress.numerics.packing import pack, unpack

PACKED = [f for f in FORMATS.values() if f.bits <= 8]


@st.composite
def codes_and_format(draw):
    format = draw(st.sampled_from(PACKED))
    shape = [*draw(st.lists(st.integers(0, 5), max_size=2)), draw(st.integers(1, 17))]
    count = 2**format.bits if format.kind == "float" else format.qmax - format.qmin + 1
    bits = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 99))).integers(0, count, shape, dtype=np.uint8))
    return (bits.view(format.container) if format.kind == "float" else (bits.int() + format.qmin).to(format.container)), format


@settings(deadline=None)
@given(codes_and_format())
def test_round_trip_at_the_true_width(case):
    codes, format = case
    packed = pack(codes, format)
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] * format.bits // 8))
    back = unpack(packed, format, codes.shape[-1])
    assert back.dtype == format.container and torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(
    ("format", "codes", "stored"),
    [
        ("int4", [-8, 7, 0, 1], [0xF0, 0x98]),
        ("uint4", [1, 2, 15], [0x21, 0x0F]),
        ("int2", [-2, -1, 0, 1, 1], [0b11_10_01_00, 0b11]),
        ("uint2", [0, 1, 2, 3], [0b11_10_01_00]),
        ("uint6", [1, 2, 3, 63, 5], [0b10_000001, 0b0011_0000, 0b111111_00, 5]),
        ("int6", [-32, -31, 31], [0b01_000000, 0b1111_0000, 0b11]),
        ("int8", [-128, 0, 127], [0, 128, 255]),
        ("uint8", [0, 7, 255], [0, 7, 255]),
    ],
)
def test_bytes_are_offset_binary_lowest_bits_first(format, codes, stored):
    f = format_of(format)
    assert pack(torch.tensor(codes).to(f.container), f).tolist() == stored


def test_views_are_packed_along_their_own_last_axis():
    codes = torch.arange(24, dtype=torch.uint8).reshape(6, 4).remainder(16).T
    assert torch.equal(unpack(pack(codes, format_of("uint4")), format_of("uint4"), 6), codes)


@pytest.mark.parametrize(
    ("codes", "format", "message"),
    [
        (torch.tensor([8], dtype=torch.int8), "int4", r"codes 8..8 don't fit int4, -8..7"),
        (torch.tensor([4, 0], dtype=torch.uint8), "uint2", r"codes 0..4 don't fit uint2, 0..3"),
        (torch.tensor([1]), "int4", r"packing int4 needs torch\.int8 codes"),
        (torch.tensor(1, dtype=torch.int8), "int4", "with an axis"),
        (torch.tensor([1], dtype=torch.int16), "int16", "int16 is wider than a byte"),
    ],
)
def test_what_cannot_be_packed_is_refused(codes, format, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, format_of(format))


@pytest.mark.parametrize("packed", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int8)])
def test_rows_of_another_length_or_dtype_are_refused(packed):
    with pytest.raises(ValueError, match="3 codes of int4 are 2 uint8 a row"):
        unpack(packed, format_of("int4"), 3)
