from itertools import product
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import RecipeError
from fxcompress.numerics.blocks import block_of, block_sizes, scale_shape, tiles


@st.composite
def shapes_and_blocks(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    return shape, tuple(draw(st.sampled_from([-1, *range(1, 11)])) for _ in shape)


def owner(position, shape, block):
    return tuple(0 if b == -1 else p // b for p, b in zip(position, block, strict=True))


@pytest.mark.parametrize(
    ("granularity", "axes", "block", "scales"),
    [
        ("tensor", {}, (-1, -1), (1, 1)),
        ("channel", {}, (1, -1), (6, 1)),
        ("channel", {"channel_axis": -1}, (-1, 1), (1, 576)),
        ("token", {}, (1, -1), (6, 1)),
        ("group:128", {}, (1, 128), (6, 5)),
        ("group:4", {"group_axis": 0}, (4, 1), (2, 576)),
        ("group:600", {}, (1, -1), (6, 1)),
    ],
)
def test_a_granularity_is_a_block_and_a_block_a_shape_of_scales(granularity, axes, block, scales):
    assert block_of(granularity, (6, 576), **axes) == block
    assert scale_shape((6, 576), block) == scales


@pytest.mark.parametrize("name", ["group", "group:0", "group:-1", "group:4x", "row", ""])
def test_an_unknown_granularity_is_refused(name):
    with pytest.raises(RecipeError) as error:
        block_of(name, (6, 576))
    assert str(error.value) == (f"unknown granularity {name!r}\n  do    one of tensor, channel, token, group:64 (any positive group size)")


def test_an_axis_the_tensor_lacks_is_refused():
    with pytest.raises(RecipeError, match="no axis 2 in a tensor of 2 axes"):
        block_of("channel", (6, 576), channel_axis=2)


@pytest.mark.parametrize(("block", "message"), [((1,), "1 entries"), ((1, 0), "-1 or positive"), ((-2, 1), "-1 or positive")])
def test_an_illegal_block_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        scale_shape((6, 576), block)


@settings(deadline=None)
@given(shapes_and_blocks(), st.integers(0, 50))
def test_tiles_cover_every_element_once_in_equal_blocks_under_the_right_scale(case, limit):
    shape, block = case
    seen = torch.zeros(shape, dtype=torch.int64)
    for index, scales in tiles(shape, block, limit):
        seen[index] += 1
        tile, of_scale = seen[index].shape, torch.empty(scale_shape(shape, block))[scales].shape
        assert all(size % count == 0 for size, count in zip(tile, of_scale, strict=True))
        for offset in product(*(range(size) for size in tile)):
            position = tuple(i.start + o for i, o in zip(index, offset, strict=True))
            local = tuple(o // (size // count) for o, size, count in zip(offset, tile, of_scale, strict=True))
            assert tuple(i.start + o for i, o in zip(scales, local, strict=True)) == owner(position, shape, block)
    assert (seen == 1).all()


@settings(deadline=None)
@given(shapes_and_blocks())
def test_block_sizes_count_the_elements_of_each_block(case):
    shape, block = case
    expected = torch.zeros([1 if b == -1 else ceil(n / b) for n, b in zip(shape, block, strict=True)], dtype=torch.int64)
    for position in product(*(range(n) for n in shape)):
        expected[owner(position, shape, block)] += 1
    assert torch.equal(block_sizes(shape, block), expected)


def test_tiles_keep_to_the_limit():
    sizes = [torch.empty(4096, 576, device="meta")[index].numel() for index, _ in tiles((4096, 576), (1, 32), 1 << 17)]
    assert max(sizes) <= 1 << 17 and len(sizes) <= 20
