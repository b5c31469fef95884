"""fxcompress: a compiler that makes generative and vision models small and fast, and proves every rewrite on your own model.

model = fxcompress.compile(module, "int4-weight-only", example_inputs=(x,))
"""

from fxcompress import starting  # noqa: F401 - first, since what follows takes seconds

# isort: split
from fxcompress import calibrate, evaluate
from fxcompress.api import CompiledModel, CompiledModule, compile, diff, inspect, load
from fxcompress.capture import capture
from fxcompress.errors import (
    ArtifactError,
    BackendRefusal,
    CalibrationError,
    CaptureError,
    ContractViolation,
    FxcError,
    InputError,
    RecipeError,
)
from fxcompress.program import Program
from fxcompress.recipe import Recipe
from fxcompress.report import Report
from fxcompress.signature import Inputs

__all__ = [
    "ArtifactError",
    "BackendRefusal",
    "CalibrationError",
    "CaptureError",
    "CompiledModel",
    "CompiledModule",
    "ContractViolation",
    "FxcError",
    "InputError",
    "Inputs",
    "Program",
    "Recipe",
    "RecipeError",
    "Report",
    "calibrate",
    "capture",
    "compile",
    "diff",
    "evaluate",
    "inspect",
    "load",
]
