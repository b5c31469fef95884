"""ONNX Runtime sessions over model files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from fxcompress.backend import Session
from fxcompress.backends.onnx.exported import as_real
from fxcompress.errors import ArtifactError, InputError

_FOLDER = "session.model_external_initializers_file_folder_path"
_NO_SATURATION = "session.x64quantprecision"  # without VNNI the kernels of uint8 and int8 add pairs of products in 16 bits, unless told not to
_OPTIMIZED_WEIGHTS = "session.optimized_model_external_initializers_file_name"
_INLINE_LIMIT = 1 << 30  # of a serialised graph, half of what protobuf takes


class OnnxSession(Session):
    """A model running in ONNX Runtime on CPU; values go in and out by position."""

    def __init__(self, model: onnx.ModelProto, folder: Path, threads: int | None = None, optimized: Path | None = None) -> None:
        """model: a graph whose weights lie in the folder. optimized: where to write the graph ONNX Runtime makes of it."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry(_FOLDER, str(folder))
        if not has_vnni():
            options.add_session_config_entry(_NO_SATURATION, "1")
        if optimized is not None:
            _keep_optimized(options, folder, optimized)
        try:
            self.runtime = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ArtifactError("ONNX Runtime can't load the model", where=str(folder), why=str(error), do="save the model again") from error
        self.names = [value.name for value in self.runtime.get_inputs()]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs in the program's order. InputError for a value that doesn't fit the model."""
        try:
            feed = {name: as_real(value).numpy(force=True) for name, value in zip(self.names, inputs, strict=True)}
            return [torch.from_numpy(value) for value in self.runtime.run(None, feed)]
        except (ValueError, *_REFUSALS) as error:
            raise InputError("the inputs don't fit the model", why=str(error)) from error


@functools.cache
def has_vnni() -> bool:
    """Whether the processor adds products of bytes in 32 bits, as far as the system tells. With it the other kernels are only slower, and
    their preparation fails where two products read one weight (ONNX Runtime 1.32)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _keep_optimized(options: Any, folder: Path, optimized: Path) -> None:
    options.optimized_model_filepath = str(optimized)
    if sum(f.stat().st_size for f in folder.iterdir()) > _INLINE_LIMIT // 8:  # 4-bit weights that fold to float grow eightfold
        options.add_session_config_entry(_OPTIMIZED_WEIGHTS, "optimized.bin")


_REFUSALS = tuple(getattr(onnxruntime.capi.onnxruntime_pybind11_state, name) for name in ("InvalidArgument", "RuntimeException", "Fail"))
