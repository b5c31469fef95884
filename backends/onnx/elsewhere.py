"""Parity at other sizes than those of the example, where a form may be right by chance: a batch of one, two sizes that happen to be equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from fxcompress.backends.onnx.drift import check_drift
from fxcompress.backends.onnx.outline import QUANTIZE
from fxcompress.backends.onnx.parity import end_to_end, refusal
from fxcompress.cost import example_sizes
from fxcompress.dynamic import at_sizes, other_size
from fxcompress.errors import BackendRefusal, InputError
from fxcompress.interpret import run
from fxcompress.program import Program


def check_other_sizes(program: Program, run_model: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
    """BackendRefusal where the model fails, or gives other numbers than the program: each size one greater, and a prompt without a past."""
    has_codes = any(n.target is QUANTIZE for n in program.graph.nodes)
    for sizes in _other_sizes(program):
        inputs = at_sizes(program.example, [v.shape for v in program.inputs], sizes)
        wanted = run(program, inputs)
        told = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        try:
            given = run_model(inputs)
            if has_codes:
                check_drift(program, inputs, wanted, given)
            else:
                end_to_end(program, inputs, wanted, given)
        except InputError as error:
            raise refusal(f"the program's inputs at {told}", f"the runtime fails there: {error.why}") from error
        except BackendRefusal as error:
            raise refusal(f"{error.where}, at {told}", error.why) from error


def _other_sizes(program: Program) -> Iterator[dict[str, int]]:
    example = {str(symbol): size for symbol, size in example_sizes(program).items()}
    if not example:
        return
    yield {name: other_size(size, *program.symbols[name]) for name, size in example.items()}
    if program.states:
        yield {**example, "past": 0}
