import pytest
import torch

from fxcompress.errors import RecipeError
from fxcompress.numerics.formats import FORMATS, format_of


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.kind == "int"], ids=str)
def test_an_integer_format_has_two_to_the_bits_codes_that_fit_its_container(format):
    info = torch.iinfo(format.container)
    assert format.qmax - format.qmin + 1 == 2**format.bits
    assert (format.qmin < 0) == format.signed
    assert info.min <= format.qmin and format.qmax <= info.max


def test_float_formats_end_at_the_greatest_finite_value():
    assert (format_of("float8_e4m3fn").qmin, format_of("float8_e4m3fn").qmax) == (-448, 448)
    assert (format_of("float8_e5m2").qmin, format_of("float8_e5m2").qmax) == (-57344, 57344)


def test_an_unknown_name_says_the_nearest_one():
    with pytest.raises(RecipeError) as error:
        format_of("float8_e4m3")
    assert str(error.value) == "unknown number format 'float8_e4m3'\n  do    did you mean 'float8_e4m3fn'?"
