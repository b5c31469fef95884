"""Which operand a change of a result is given to, by a backward look.

3: a constant that nobody else reads; 2: reaches a weight (linear, convolution, embedding, norm with gain) without meeting another reader;
1: the same, shared; 0: blocked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.dataflow import before_moves
from fxcompress.transport.labels import Kind
from fxcompress.transport.solver import Solver

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default)
DEPTH = 6  # steps from a value to the factor that norms it
LAYERS = ("linear", "addmm", "mm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
NORMS = ("layer_norm", "group_norm", "rms_norm", "batch_norm", "native_layer_norm", "native_group_norm")
ARRANGED = (
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "slice"),
    *("select", "split", "chunk", "unbind", "split_with_sizes", "getitem", "roll", "flip", "repeat", "repeat_interleave", "cat", "stack"),
    *("to", "_to_copy", "clone", "contiguous", "dropout", "neg", "pad", "constant_pad_nd", "index_select", "index", "avg_pool2d"),
)
THROUGH = {Kind.SCALE: ("relu", "leaky_relu", "abs", "max_pool2d", "sqrt"), Kind.SIGN: ("tanh", "erf", "sin"), Kind.SHIFT: ("max_pool2d",)}


def rank(solver: Solver, value: Any) -> int:
    """How well a value can take a change of the solver's kind."""
    if not isinstance(value, fx.Node):
        return 0
    known = solver.facts.ranks
    key = (str(solver.kind), value)
    if key not in known:
        known[key] = 0  # of a value that depends on itself, which there is none
        known[key] = _rank(solver, value)
    return known[key]


def _rank(s: Solver, value: fx.Node) -> int:
    shared = len(value.users) > 1
    if value.op == "get_attr":
        return 1 if shared else 3
    if value.op != "call_function":
        return 0
    schema = getattr(value.target, "_schema", None)
    found = _by_op(s, value, "getitem" if schema is None else schema.name.split("::")[1])
    return min(found, 1) if shared else found


def _by_op(s: Solver, value: fx.Node, name: str) -> int:
    operands = [rank(s, x) for x in value.all_input_nodes if not isinstance(s.facts.value(x), int | torch.SymInt)]
    if name in LAYERS or name == "embedding":
        return 2
    if name in NORMS:
        return _norm(s, value, name)
    if name in ("scaled_dot_product_attention", "matmul", "bmm"):
        return min(rank(s, value.all_input_nodes[-1 if name != "scaled_dot_product_attention" else 2]), 2)
    if name in ("add", "sub"):
        return (max if s.kind == Kind.SHIFT else min)(operands, default=0)
    if name in ("mul", "div"):
        return _product(s, value, operands)
    if name in ARRANGED or name in THROUGH.get(s.kind, ()):
        return min(operands, default=0)
    return 0


def _product(s: Solver, value: fx.Node, operands: list[int]) -> int:
    if s.kind == Kind.SHIFT:
        return operands[0] if len(operands) == 1 and len(value.args) == 2 and value.args[0] is not value.args[1] else 0
    return 0 if _is_normed(s, value) else max(operands, default=0)


def _is_normed(s: Solver, value: fx.Node) -> bool:
    """Whether one factor is a narrower value made of the other, as in a norm that is spelled out: what changes the one would change both."""
    factors = [f for f in value.args[:2] if isinstance(f, fx.Node)]
    if len(factors) < 2:
        return False
    narrow, wide = sorted(factors, key=lambda f: s.shape(f)[-1:] != (1,))
    if s.shape(narrow)[-1:] != (1,) or s.shape(wide)[-1:] == (1,):
        return False
    source, made = before_moves(_uncast(wide)), {narrow}
    for _ in range(DEPTH):
        made |= {x for m in made for x in m.all_input_nodes}
    return source in {before_moves(_uncast(m)) for m in made}


def _uncast(value: fx.Node) -> fx.Node:
    while value.target in CASTS:
        value = value.all_input_nodes[0]
    return value


def _norm(s: Solver, value: fx.Node, name: str) -> int:
    given = s.args(value)
    if s.kind == Kind.SHIFT:
        return 2 if given.get("bias") is not None else 0
    return 2 if given.get("weight") is not None else 0
