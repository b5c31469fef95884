"""Model files: model.onnx and weights.bin beside it. Every tensor of some size lies in weights.bin, equal memory once, so 2 GB is no limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
import torch

from fxcompress.errors import ArtifactError

MODEL, WEIGHTS = "model.onnx", "weights.bin"
INLINE = 256  # bytes; shape constants must stay in the graph for shape inference
PAGE, LINE = 4096, 64  # alignment of large tensors, which are memory-mapped, and of small ones


@dataclass
class _Place:
    offset: int
    length: int


def write_model(model: ir.Model, folder: Path) -> None:
    """model.onnx and weights.bin in the folder, which must exist. The model is not changed.

    Tensors that share memory share bytes, whatever their shape. Raises ArtifactError if the folder can't be written.
    """
    shipped = model.clone()
    try:
        with (folder / WEIGHTS).open("wb") as file:
            _move_out(shipped, file)
        (folder / MODEL).write_bytes(ir.serde.serialize_model(shipped).SerializeToString())
    except OSError as error:
        raise ArtifactError(
            "the model files can't be written", where=str(folder), why=str(error), do="free space or choose another folder"
        ) from error


def read_graph(folder: Path) -> onnx.ModelProto:
    """The graph without its weights, after a check that every tensor it names lies inside weights.bin. ArtifactError otherwise."""
    path = folder / MODEL
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise ArtifactError("no ONNX model there", where=str(path), why="the file is missing", do="copy the whole folder again") from None
    except Exception as error:
        raise ArtifactError("not an ONNX model", where=str(path), why=f"{type(error).__name__}: {error}", do="save the model again") from None
    _check_external(model, folder)
    return model


def _move_out(model: ir.Model, file: BinaryIO) -> None:
    places: dict[tuple[int, int], _Place] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None and value.shape is not None
        if tensor.nbytes < INLINE:
            continue
        key = _memory(tensor)
        if key not in places:
            places[key] = _append(file, tensor)
        place = places[key]
        value.const_value = ir.ExternalTensor(WEIGHTS, place.offset, place.length, tensor.dtype, shape=value.shape, name=name, base_dir="")


def _memory(tensor: Any) -> tuple[int, int]:
    if isinstance(tensor, ir.LazyTensor):
        return id(tensor), tensor.nbytes
    raw: torch.Tensor = tensor.raw
    return (raw.data_ptr() if raw.is_contiguous() else id(raw)), tensor.nbytes


def _append(file: BinaryIO, tensor: ir.TensorProtocol) -> _Place:
    step = PAGE if tensor.nbytes >= 16 * PAGE else LINE
    offset = -(-file.tell() // step) * step
    file.seek(offset)
    file.write(tensor.tobytes())
    return _Place(offset, tensor.nbytes)


def _check_external(model: onnx.ModelProto, folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).is_file() else 0
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry: Mapping[str, str] = {e.key: e.value for e in tensor.external_data}
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if entry.get("location") != WEIGHTS or end > size:
            raise ArtifactError(
                "the model's weights are missing or truncated",
                where=f"{folder / WEIGHTS}",
                why=f"{tensor.name} ends at byte {end} of {entry.get('location')!r}, {WEIGHTS} has {size}",
                do="copy the whole folder again",
            )
