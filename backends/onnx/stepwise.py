"""Parity of a program with quantised activations: every step from the codes that ONNX Runtime itself computed before it.

End to end one code that rounds the other way moves every value after it, so two right programs drift apart and the figure proves nothing.
Here the interpreter walks the program and, wherever the model names a value (codes of a quantiser, the result of a product, an output), its own
value is compared with the model's and then replaced by it. So errors never add up, the guilty step is named, and every op lies before some
comparison. Codes may differ by one, and only where the number before rounding lies on the edge between both: an error in a scale, zero point,
axis or bias moves numbers that don't.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from fxcompress.backends.onnx.codes import SIGNED
from fxcompress.backends.onnx.outline import QUANTIZE, arguments
from fxcompress.backends.onnx.parity import CEILING, NOISE_TIMES, Run, exposing, limit_of, refusal, rounding_excused
from fxcompress.contract import EXACT_LIMIT
from fxcompress.dataflow import is_move, pads_with_zeros
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.noise import jittered
from fxcompress.numerics.formats import format_of
from fxcompress.program import Program, place_of

ORDERS = (torch.ops.aten.sort.default, torch.ops.aten.topk.default)
ARGSORT = torch.ops.aten.argsort.default


@dataclass(frozen=True)
class Steps:
    """errors: relative error of each product and output by node name. flips: share of codes that differ by one, by quantiser."""

    errors: dict[str, float] = field(default_factory=dict)
    flips: dict[str, float] = field(default_factory=dict)


def step_by_step(program: Program, products: Collection[fx.Node], model: onnx.ModelProto, run_model: Run, probe: Sequence[Tensor]) -> Steps:
    """Compare at every quantiser, at these products and at the outputs. BackendRefusal naming the first step beyond its limit."""
    seen = _seen(program, products, model, run_model, probe)
    held: dict[fx.Node, Any] = {}
    read = {operand for node in seen for operand in node.all_input_nodes}
    read |= {_sorted(node) for node in seen if _is_order(node)}
    steps, loose, edges = Steps(), list[tuple[fx.Node, Tensor, float]](), dict[fx.Node, _Edges]()

    def visit(node: fx.Node, value: Any) -> Any:
        """The model's value for the interpreter's, once both are compared."""
        given = seen.get(node, value)
        if node in read:
            held[node] = given
        if node in seen and node.target is QUANTIZE:
            steps.flips[node.name], far = _judged_codes(node, value, given, held)
            edges.update({node: far} if far else {})
        elif node in seen and _is_order(node):
            _judge_order(node, value, given, held[_sorted(node)])
        elif node in seen:
            steps.errors[node.name] = error = relative_error(value, given)
            if not error <= EXACT_LIMIT.get(value.dtype, 0.0) and not rounding_excused(program, node, held, value, given):
                loose.append((node, value, error))
        return given

    run(program, probe, visit)
    if loose or edges:
        _refuse_beyond_noise(program, probe, seen, loose, edges)
    return steps


def _seen(
    program: Program, products: Collection[fx.Node], model: onnx.ModelProto, run_model: Run, probe: Sequence[Tensor]
) -> dict[fx.Node, Tensor]:
    """What the model computes, by the program's node, codes in their format's own type."""
    made = {name for n in model.graph.node for name in n.output}
    names: dict[fx.Node, str] = {}
    orders = {n.output[0].rsplit(".", 1)[0]: n.output[1] for n in model.graph.node if n.op_type == "TopK"}
    for node in program.graph.nodes:
        if _is_order(node) and _sort(node).name in orders:
            names[node] = orders[_sort(node).name]
        if node.target is QUANTIZE or (node in products and not _becomes_codes(node, program)):
            found = next((n for n in (node.name, f"{node.name}{SIGNED}") if n in made), None)
            names.update({node: found} if found else {})
    outputs = {n: v.name for n, v in zip(program.results(), model.graph.output, strict=True) if n.op != "placeholder"}
    names = outputs | names
    values = dict(zip(dict.fromkeys(names.values()), run_model(exposing(model, list(dict.fromkeys(names.values()))), probe), strict=True))
    return {node: _in_format(values[name], node.meta["val"].dtype) for node, name in names.items()}


def _becomes_codes(node: fx.Node, program: Program) -> bool:
    """Whether a value is quantised, maybe after moves: its codes are compared then. ONNX Runtime 1.32 moves such a quantiser up to the
    value, past additions of zeros too, and would show it rounded if it were made an output."""
    hands_on = (r for r in node.users if is_move(r) or pads_with_zeros(r) or _adds_zeros(r, program))
    return any(r.target is QUANTIZE for r in node.users) or any(_becomes_codes(r, program) for r in hands_on)


def _adds_zeros(node: fx.Node, program: Program) -> bool:
    """Whether one summand is a constant of zeros, as sums in loops start from."""
    constants = (program.constant(a) for a in node.all_input_nodes) if node.target is torch.ops.aten.add.Tensor else ()
    return any(c is not None and not c.any() for c in constants)


def _in_format(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes stored 128 away from where the program has them."""
    if {value.dtype, dtype} != {torch.int8, torch.uint8}:
        return value
    return (value.to(torch.int16) + (128 if dtype == torch.uint8 else -128)).to(dtype)


@dataclass(frozen=True)
class _Edges:
    """numbers: what was rounded to codes. away: from the edge between both codes, in codes, where the model has the other one and rounding
    before it doesn't explain that; 0 elsewhere."""

    numbers: Tensor
    away: Tensor


def _judged_codes(node: fx.Node, wanted: Tensor, given: Tensor, held: Mapping[fx.Node, Any]) -> tuple[float, _Edges | None]:
    """The share of codes that differ, and what of them an exact rewrite's rounding doesn't explain."""
    difference = (given.to(torch.int32) - wanted.to(torch.int32)).abs() if given.shape == wanted.shape else torch.tensor([2])
    differs = difference > 0
    if not differs.any():
        return 0.0, None
    share = float(differs.double().mean())
    if difference.max() > 1:
        raise refusal(place_of(node), f"codes differ by up to {int(difference.max())}, in {share:.1%} of all values, on the same inputs")
    ratio, slack = _before_rounding(node, held)
    away = (ratio - ratio.floor() - 0.5).abs().nan_to_num(nan=math.inf)
    far = differs & (away > slack)
    return share, _Edges(ratio, torch.where(far, away, 0.0)) if far.any() else None


def _before_rounding(node: fx.Node, held: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor]:
    """The numbers that a quantiser rounds, and how far rounding before it may move them: x by a share of all of it or by its last places,
    which in halves is a good part of a code; each x by a share of it where its logarithm is rounded."""
    eps = torch.finfo(held[arguments(node)["x"]].dtype).eps
    x, scale = (held[arguments(node)[name]].double() for name in ("x", "scale"))
    limit, format = EXACT_LIMIT[torch.float32], format_of(arguments(node)["format"])
    if format.kind == "log":
        return -format.tau * torch.log2(x / scale), torch.tensor(limit * format.tau / math.log(2))
    return x / scale, torch.maximum(limit * (x.square().mean().sqrt() / scale).clamp(min=1), 2 * eps * (x / scale).abs())


def _is_order(node: fx.Node) -> bool:
    """Whether a value is the order that a sort brings its numbers into."""
    sort: Any = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return node.target is ARGSORT or (isinstance(sort, fx.Node) and sort.target in ORDERS)


def _sort(order: fx.Node) -> fx.Node:
    return order if order.target is ARGSORT else order.all_input_nodes[0]


def _sorted(order: fx.Node) -> fx.Node:
    """What the order is the order of."""
    return _sort(order).all_input_nodes[0]


def _judge_order(node: fx.Node, wanted: Tensor, given: Tensor, values: Tensor) -> None:
    """Equal values may come in any order, and all of them where none is asked for, so the model's is taken where it sorts as well."""
    sort = _sort(node)
    dim = arguments(sort).get("dim", -1)
    ours, theirs = (values.gather(dim, order) for order in (wanted, given))
    if not arguments(sort).get("sorted", True):
        ours, theirs = ours.sort(dim).values, theirs.sort(dim).values
    error = relative_error(ours, theirs)
    if not error <= EXACT_LIMIT.get(values.dtype, 0.0):
        raise refusal(place_of(sort), f"another order, whose values differ by {error:.1e}")


def _refuse_beyond_noise(
    program: Program,
    probe: Sequence[Tensor],
    seen: Mapping[fx.Node, Tensor],
    loose: Sequence[tuple[fx.Node, Tensor, float]],
    edges: Mapping[fx.Node, _Edges],
) -> None:
    """The limit of a long float part is what rounding alone does to it, whether its numbers are read or the codes they become."""
    noisy: dict[fx.Node, Any] = {}
    read = {operand for node in edges for operand in node.all_input_nodes}

    def visit(node: fx.Node, value: Any) -> Any:
        """The model's value again, so that only the part since the last one is noisy."""
        noisy[node] = value if node in seen or node in read else None
        if node in edges:
            _refuse_off_edge(node, edges[node], _before_rounding(node, noisy)[0])
        return seen.get(node)

    jittered(program, probe, visit)
    for node, value, error in loose:
        if not error <= (limit := limit_of(value, noisy[node])):
            raise refusal(place_of(node), f"relative error {error:.1e} on the probe inputs, limit {limit:.1e}")


def _refuse_off_edge(node: fx.Node, edges: _Edges, noisy: Tensor) -> None:
    """A limit that isn't known is none that is kept."""
    noise = torch.minimum(NOISE_TIMES * _usual(noisy - edges.numbers), CEILING * _usual(edges.numbers))
    if (off := ~(edges.away <= noise)).any():
        raise refusal(place_of(node), f"{float(off.double().mean()):.1%} of the codes differ by one though nothing is near a rounding edge")


def _usual(x: Tensor) -> Tensor:
    return x[x.isfinite()].square().mean().sqrt()
