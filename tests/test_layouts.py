"""Axes that are merged, moved and parted again, where their product is dynamic, stay apart; other chains are left as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxcompress.interpret import run
from tests.passes.helpers import function, ops, seeded

X = seeded(5, 2, 6)
CHAINS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "heads of a batch": (
        lambda x: x.reshape(x.shape[0], x.shape[1] * 3, 2).transpose(0, 1).reshape(x.shape[1], 3, x.shape[0], 2) + 1,
        "reshape permute",
    ),
    "moved twice": (
        lambda x: x.reshape(x.shape[0], x.shape[1] * 3, 2).transpose(0, 1).permute(2, 0, 1).reshape(2, x.shape[1], 3, x.shape[0]) + 1,
        "reshape permute",
    ),
    "a size left open": (
        lambda x: x.reshape(x.shape[0], x.shape[1] * 3, 2).transpose(0, 1).reshape(-1, 3, x.shape[0], 2) + 1,
        "reshape permute",
    ),
    "parted otherwise": (
        lambda x: x.reshape(x.shape[0], x.shape[1] * 6).transpose(0, 1).reshape(x.shape[1] * 2, 3, x.shape[0]) + 1,
        "reshape permute",
    ),
    "merged once more": (
        lambda x: x.reshape(x.shape[0], x.shape[1] * 3, 2).transpose(0, 1).reshape(x.shape[1] * 3, x.shape[0] * 2) + 1,
        "reshape transpose.int reshape",
    ),
    "of known sizes": (lambda x: x.reshape(x.shape[0], x.shape[1], 2, 3).transpose(2, 3).reshape(x.shape[0], x.shape[1], 6) + 1, ""),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    body, wanted = CHAINS[name]
    program = function(body, X, dynamic={"x": [0, 1]})
    found = [op for op in ops(program) if op in ("reshape", "permute", "transpose.int")]
    assert found == (wanted.split() or ["reshape", "transpose.int", "reshape"])
    for x in (X, seeded(3, 4, 6)):
        assert torch.equal(run(program, [x])[0], body(x))


def test_what_others_read_of_the_merged_value_stays() -> None:
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        merged = x.reshape(x.shape[0], x.shape[1] * 3, 2)
        return merged.transpose(0, 1).reshape(x.shape[1], 3, x.shape[0], 2) + 1, merged.sum(1)

    program = function(twice, X, dynamic={"x": [0, 1]})
    for x in (X, seeded(3, 4, 6)):
        assert all(map(torch.equal, run(program, [x]), twice(x)))
