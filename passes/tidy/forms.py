"""Whether two fake values have one form or one layout, at every size of the dynamic axes, and who would notice another layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
STRIDED = (aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default)  # their meaning, or whether they run, hangs on strides

FRESH = (aten.linear.default, aten.layer_norm.default, aten.contiguous.default)  # these lay their results out alike for all strides


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal at every legal size of the dynamic axes."""
    return bool(statically_known_true(a == b)) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else a == b


def same_form(a: Any, b: Any) -> bool:
    """Whether two fake values are tensors of one dtype, device and shape."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or (a.dtype, a.device, a.dim()) != (b.dtype, b.device, b.dim()):
        return False
    return all(same_size(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def same_layout(a: Any, b: Any) -> bool:
    """Whether two fake values of one form lie in memory alike; the stride of an axis of size 1 says nothing."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True
    return all(same_size(s, t) for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True) if not same_size(n, 1))


def reader_of_layout(node: fx.Node) -> fx.Node | None:
    """An op after the node that asks for strides and may see those of the node's value."""
    if not any(node.graph.find_nodes(op="call_function", target=t, sort=False) for t in STRIDED):
        return None
    seen, stack = set[fx.Node](), [node]
    while stack:
        for user in stack.pop().users:
            if user.target in STRIDED:
                return user
            if user not in seen and user.target not in FRESH:
                seen.add(user)
                stack.append(user)
    return None
