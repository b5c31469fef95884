"""OpenVINO sessions over model files. The package is optional: it is imported when a session is opened."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.backend import Session
from fxcompress.backends.onnx.exported import as_real
from fxcompress.errors import ArtifactError, BackendRefusal, InputError

INSTALL = "pip install 'fxcompress[openvino]'"
COMPILE = "import json, sys, openvino as o; c = o.Core(); c.compile_model(c.read_model(sys.argv[1]), 'CPU', json.loads(sys.argv[2]))"


def absent() -> str:
    """The command that installs OpenVINO where it is missing, "" where it isn't."""
    return "" if importlib.util.find_spec("openvino") else INSTALL


def runtime() -> Any:
    """The openvino package. BackendRefusal with the command that installs it."""
    try:
        import openvino
    except ImportError as error:
        raise BackendRefusal("OpenVINO isn't installed", why=f"{type(error).__name__}: {error}", do=INSTALL) from None
    return openvino


def check_it_survives(path: Path, rounding: bool) -> None:
    """BackendRefusal for a model whose compilation ends the process: OpenVINO 2026.4 does for some, with a segmentation fault that nothing can
    catch. Asked of another process; an error is not its business, and comes again with its reason in this one."""
    done = subprocess.run([sys.executable, "-c", COMPILE, str(path), json.dumps(_properties(None, rounding))], capture_output=True, check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        why = f"a process in which it compiles the model ends by {name}"
        raise BackendRefusal("OpenVINO crashes on the model", why=why, do='backend="onnxruntime" or "reference"')


def _properties(threads: int | None, rounding: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}  # bfloat16 on some processors otherwise
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    if not rounding:
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return properties


class OpenVinoSession(Session):
    """A model running in OpenVINO on CPU, in float32 where it isn't integer; values go in and out by position."""

    def __init__(self, path: Path, threads: int | None = None, rounding: bool = False) -> None:
        """path: the ONNX file, its weights beside it. rounding: whether kernels that decompress weights may round activations to int8."""
        core = runtime().Core()
        try:
            self.compiled = core.compile_model(core.read_model(str(path)), "CPU", _properties(threads, rounding))
        except RuntimeError as error:
            raise ArtifactError("OpenVINO can't load the model", where=str(path), why=_said(error), do="save the model again") from error
        self.request = self.compiled.create_infer_request()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs in the program's order. InputError for a value that doesn't fit the model; OpenVINO would convert its type in silence."""
        ports = self.compiled.inputs
        if len(ports) != len(inputs):
            raise InputError("the inputs don't fit the model", why=f"{len(inputs)} values for {len(ports)} inputs")
        feed = {i: _array(value, port) for i, (value, port) in enumerate(zip(inputs, ports, strict=True))}
        try:
            self.request.infer(feed)
        except RuntimeError as error:
            raise InputError("the inputs don't fit the model", why=_said(error)) from error
        return [torch.from_numpy(self.request.get_output_tensor(i).data.copy()) for i in range(len(self.compiled.outputs))]


def _array(value: Tensor, port: Any) -> Any:
    array, wanted = as_real(value).detach().cpu().contiguous().numpy(), port.get_element_type().to_dtype()
    if array.dtype != wanted:
        raise InputError("the inputs don't fit the model", why=f"{port.get_any_name()} is {array.dtype}, the model takes {wanted}")
    return array


def _said(error: Exception) -> str:
    """The last line of a message of OpenVINO's: what comes before are places in its own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
