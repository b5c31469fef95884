"""torch's table of ONNX forms, built once a process: the exporter parses the source of every form anew, half a second for each export."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry


@contextmanager
def kept() -> Iterator[None]:
    """Exports inside get a copy of the table as it was built first, which they may add to."""
    own = ONNXRegistry.__dict__["from_torchlib"]

    @functools.wraps(own.__func__)
    def copied(_: Any, *args: Any, **options: Any) -> ONNXRegistry:
        table, fresh = _built(own, *args, **options), ONNXRegistry()
        fresh._opset_version = table._opset_version
        fresh.functions = {op: [*forms] for op, forms in table.functions.items()}
        return fresh

    ONNXRegistry.from_torchlib = classmethod(copied)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own  # type: ignore[method-assign]


@functools.cache
def _built(own: Any, *args: Any, **options: Any) -> ONNXRegistry:
    return own.__func__(ONNXRegistry, *args, **options)  # type: ignore[no-any-return]
