"""A model may be on any device. It is captured from a copy on the CPU, where passes compute and backends run.

On a GPU kernels are less exact, models take code of their own, and the first index out of range, which capture meets when it tries other
sizes, ends CUDA for the whole process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.overrides import TorchFunctionMode

from fxcompress.errors import CaptureError, raised_at
from fxcompress.signature import Inputs

CPU = torch.device("cpu")
LIMIT, MOST = 5e-2, 0.5  # |d| / rms of a number on two devices, in bfloat16 too, and how many may be farther apart


def elsewhere(model: nn.Module | ExportedProgram) -> list[str]:
    """The devices other than the CPU that a model's parameters and buffers are on."""
    tensors = model.parameters(), model.buffers()
    return list(dict.fromkeys(str(t.device) for part in tensors for t in part if t.device != CPU))


def beside(tensors: Sequence[Tensor], values: Any) -> list[Tensor]:
    """The tensors on the device of the first one of a tree; the CPU if it has none."""
    device = next((leaf.device for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)), CPU)
    return [t.to(device) for t in tensors]


def on_cpu(thing: Any) -> Any:
    """A copy of a model or of inputs with all tensors on the CPU; those that are there are shared. CaptureError if it can't be copied."""
    if isinstance(thing, ExportedProgram):
        return move_to_device_pass(thing, "cpu")
    try:
        parameters = thing.parameters() if isinstance(thing, nn.Module) else ()
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().cpu(), p.requires_grad) for p in parameters}
        with _Moving():
            return copy.deepcopy(thing, memo)
    except Exception as error:
        why = f"to be captured it is copied there: {type(error).__name__}: {error}"
        raise CaptureError("the model can't be brought to the CPU", where=raised_at(error), why=why, do="model.cpu()") from error


class _Moving(TorchFunctionMode):
    """Copies of tensors are on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().cpu())


def compared(model: Any, item: Inputs, moved: Any, moved_item: Inputs) -> Iterator[str]:
    """What a model makes otherwise on the CPU, result by result, as in rows that a mask hides, of which every kernel makes something else;
    CaptureError where that is most of a result."""
    module, other = (m.module() if isinstance(m, ExportedProgram) else m for m in (model, moved))
    given, got = module(*item.args, **item.kwargs), other(*moved_item.args, **moved_item.kwargs)
    pairs = zip(*([t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)] for x in (given, got)), strict=True)
    for number, (a, b) in enumerate(pairs):
        apart = _share_apart(a.cpu(), b) if a.is_floating_point() else 0.0  # integers may be picks between near equals
        told = f"{apart:.1%} of the numbers of result {number} differ by more than {LIMIT:.0%} of their rms"
        if apart > MOST:
            raise CaptureError(f"the model gives other numbers on the CPU than on {a.device}", why=told, do="model.cpu() shows which are right")
        if apart:
            yield f"on the CPU and on {a.device} {told}"


def _share_apart(a: Tensor, b: Tensor) -> float:
    """How many numbers of two values differ; infinities of one sign and NaN in one place don't."""
    a, b = a.double(), b.double()
    finite = a[a.isfinite()]
    rms = finite.square().mean().sqrt() if finite.numel() else torch.zeros(())
    same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= LIMIT * rms)
    return 1 - float(same.double().mean())
