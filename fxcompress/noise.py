"""How much the order of floating-point sums can move a program's outputs: the scale that end-to-end agreement is judged on.

Two right implementations differ by rounding in every op, and a deep model amplifies that. A fixed limit is then too strict for one model and
blind for another, so it is measured: the program is run once more with every float result moved by one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.interpret import Visit, run
from fxcompress.program import Program

SEED = 0


def jittered(program: Program, inputs: Sequence[Tensor], then: Visit | None = None) -> list[Any]:
    """The outputs with every op's float result multiplied by 1 ± eps, signs drawn from a fixed seed; weights as they are. then: sees each value
    after that, as in `interpret.run`."""
    draw = torch.Generator().manual_seed(SEED)

    def jitter(node: fx.Node, value: Any) -> Any:
        is_result = node.op == "call_function" and getattr(node.target, "namespace", "") != "fxc"
        if is_result and isinstance(value, Tensor) and value.is_floating_point():
            signs = torch.randint(0, 2, value.shape, generator=draw).mul_(2).sub_(1)
            value = value * (1 + signs * torch.finfo(value.dtype).eps).to(value.dtype)
        seen = then(node, value) if then is not None else None
        return value if seen is None else seen

    return run(program, inputs, jitter)
