"""A captured program as something to call: metrics take it where they take a model or an artifact."""

from __future__ import annotations

from typing import Any

from fxcompress import cached
from fxcompress.devices import beside
from fxcompress.interpret import run
from fxcompress.program import Program
from fxcompress.signature import Inputs, Signature


class Running:
    """A program, called as its model was: run node by node in torch, quantised or not. Returns the model's own output class."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.signature: Signature = program.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result on the device of what is given. InputError for what the model wasn't captured with."""
        tensors = cached.flat_inputs(self.signature, self.program.inputs, Inputs(*args, **kwargs))
        return self.signature.unflatten(beside(run(self.program, tensors), (args, kwargs)))
