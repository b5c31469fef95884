"""Whether the shipped model's outputs can be those of the program, where codes that round the other way move everything after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.backends.onnx.outline import QUANTIZE, arguments
from fxcompress.backends.onnx.parity import refusal
from fxcompress.contract import EXACT_LIMIT
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.noise import sqnr
from fxcompress.program import Program

SEED = 0


def check_drift(program: Program, probe: Sequence[Tensor], wanted: Sequence[Any], given: Sequence[Tensor]) -> None:
    """BackendRefusal where an output is farther from the interpreter's than with every code of every quantiser moved by one, up or down, and
    than rounding explains.

    A model that is taken apart to be judged step by step is compiled with other fusions than the one that is shipped; this looks at that one.
    """
    moved = run(program, probe, _mover())
    for value, right, got, limit in zip(program.outputs, wanted, given, moved, strict=True):
        if not right.is_floating_point() or relative_error(right, got) <= EXACT_LIMIT.get(right.dtype, 0.0):
            continue
        if not (figure := sqnr(right, got)) >= (least := sqnr(right, limit)):
            raise refusal(f"output {value.name}", f"SQNR {figure:.1f} dB, with every code off by one it is {least:.1f} dB")


def _mover() -> Any:
    draw = torch.Generator().manual_seed(SEED)

    def visit(node: fx.Node, value: Any) -> Any:
        if node.target is not QUANTIZE:
            return None
        format = format_of(arguments(node)["format"])
        by = torch.randint(0, 2, value.shape, generator=draw).mul_(2).sub_(1)
        return (value.long() + by).clamp(format.qmin, format.qmax).to(value.dtype)

    return visit
