"""What a backend is: a Target, files a program is written to, and a session that runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fxcompress.program import Program
from fxcompress.report import BackendReport
from fxcompress.rewrite import Options
from fxcompress.target import Target


class Session(ABC):
    """A program ready to run."""

    @abstractmethod
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Flat outputs of flat inputs."""


class Backend(ABC):
    """One way to run programs. A program goes through files always: what is measured is what is shipped."""

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    target: ClassVar[Target]

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options

    @classmethod
    def absent(cls) -> str:
        """The command that installs what this backend needs beside the package, "" where all is there."""
        return ""

    @abstractmethod
    def write(self, program: Program, folder: Path) -> None:
        """Lower the program into files in the folder. BackendRefusal for what can't be run; nothing is silently lowered to something else."""

    @abstractmethod
    def open(self, folder: Path, threads: int | None = None) -> Session:
        """A session over the files. threads: None leaves the choice to the runtime. ArtifactError for files that can't be run."""

    @abstractmethod
    def report(self, program: Program, folder: Path, probe: Sequence[Tensor]) -> BackendReport:
        """What the runtime makes of the files: shares of MACs in integer kernels and parity with the interpreter on the probe.

        Raises BackendRefusal where the runtime's numbers are not the program's.
        """
