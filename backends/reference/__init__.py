"""The reference backend: the interpreter over the stored program. Slow, exact, and what every other backend is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fxcompress.backend import Backend, Session
from fxcompress.interpret import run
from fxcompress.program import Program
from fxcompress.report import BackendReport
from fxcompress.store import load_program, save_program
from fxcompress.target import Target

__all__ = ["ReferenceBackend"]


class ReferenceSession(Session):
    """A loaded program."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The interpreter's outputs."""
        return run(self.program, inputs)


class ReferenceBackend(Backend):
    """Runs every program: all formats, all granularities, in torch."""

    name = "reference"
    target = Target(name="reference")

    def write(self, program: Program, folder: Path) -> None:
        """The program as JSON and safetensors."""
        save_program(program, folder)

    def open(self, folder: Path, threads: int | None = None) -> Session:
        """The stored program; torch's own thread setting applies."""
        return ReferenceSession(load_program(folder))

    def report(self, program: Program, folder: Path, probe: Sequence[Tensor]) -> BackendReport:
        """No kernels to read back: everything runs in float after dequantising."""
        size = sum(f.stat().st_size for f in folder.iterdir())
        return BackendReport(name=self.name, options={}, integer_share=0.0, file_bytes=size)
