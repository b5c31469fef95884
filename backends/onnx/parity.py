"""Parity of a model in ONNX Runtime with its program: site by site on identical inputs, and end to end.

Each quantised site gets, in torch, the input that ONNX Runtime itself computed there, and the two results are compared: errors can't add up
and the guilty site is named. End to end rounding adds up, so there the limit is a multiple of what rounding alone does to this program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from fxcompress.backends.onnx.siblings import AND
from fxcompress.contract import EXACT_LIMIT
from fxcompress.errors import BackendRefusal
from fxcompress.interpret import constant_value, evaluate
from fxcompress.measure import relative_error
from fxcompress.noise import jittered
from fxcompress.program import Program, place_of

NOISE_TIMES = 8  # measured: ONNX Runtime and torch differ by 0.2 to 3 times the jitter of a program
SUM_EPS = 32  # two orders of one sum, the zero points taken out of it in one of them
CEILING = 1e-2
KERNEL_INPUT = {"MatMulNBits": 0, "GatherBlockQuantized": 1}

Run = Callable[[onnx.ModelProto, Sequence[Tensor]], list[Tensor]]


def end_to_end(program: Program, probe: Sequence[Tensor], wanted: Sequence[Any], given: Sequence[Tensor]) -> float:
    """Worst relative error over the outputs. BackendRefusal above the limit: 8 times the program's own rounding noise, but at least that of
    exact rewrites and at most CEILING, so that outputs which rounding alone decides (ties of a router) are refused, not waved through.
    """
    worst = 0.0
    for value, a, b, c in zip(program.outputs, wanted, given, jittered(program, probe), strict=True):
        error, limit = relative_error(a, b), limit_of(a, c)
        if not error <= limit:
            raise refusal(f"output {value.name}", _too_far(error, limit))
        worst = max(worst, error)
    return worst


def limit_of(value: Tensor, noisy: Tensor) -> float:
    """What a value may differ by, from the same value with rounding noise."""
    return max(EXACT_LIMIT.get(value.dtype, 0.0), min(NOISE_TIMES * relative_error(value, noisy), CEILING))


def site_by_site(program: Program, sites: Sequence[fx.Node], model: onnx.ModelProto, run: Run, probe: Sequence[Tensor]) -> dict[str, float]:
    """Relative error of each quantised site that has a kernel, by node name. BackendRefusal naming the first above the limit."""
    kernels = {name: n for n in model.graph.node if n.op_type in KERNEL_INPUT for name in n.name.split(AND)}
    made = {name for n in model.graph.node for name in n.output}
    compared = [s for s in sites if s.name in kernels and s.name in made]
    if not compared:
        return {}
    read = {s: kernels[s.name].input[KERNEL_INPUT[kernels[s.name].op_type]] for s in compared}
    seen = dict(zip((v.name for v in model.graph.input), probe, strict=True))
    names = [n for n in dict.fromkeys([*read.values(), *(s.name for s in compared)]) if n not in seen]
    seen.update(zip(names, run(exposing(model, names), probe), strict=True))
    constant = _constants(program)
    errors = {}
    for site in compared:
        given, got = seen[read[site]], seen[site.name]
        wanted = _in_torch(program, site, given, constant)
        errors[site.name] = error = relative_error(wanted, got)
        limit = EXACT_LIMIT.get(got.dtype, 0.0)
        if error <= limit:
            continue
        size = _in_torch(program, site, given, constant, magnitude=True)
        if not relative_error(wanted, _less_rounding(got, wanted, size)) <= limit:
            raise refusal(place_of(site), _too_far(error, limit))
    return errors


def rounding_excused(program: Program, node: fx.Node, held: Mapping[fx.Node, Any], wanted: Tensor, given: Tensor) -> bool:
    """Whether the order of the op's sum explains the difference. held: what it reads."""
    if not wanted.is_floating_point() or any(n not in held for n in node.all_input_nodes):
        return False
    env = {n: held[n].abs() if isinstance(held[n], Tensor) else held[n] for n in node.all_input_nodes}
    size: Tensor = evaluate(node, env, program.constants)
    return relative_error(wanted, _less_rounding(given, wanted, size)) <= EXACT_LIMIT.get(wanted.dtype, 0.0)


def _less_rounding(got: Tensor, wanted: Tensor, size: Tensor) -> Tensor:
    """The result moved towards the wanted one by what the order of its sum can explain: SUM_EPS units of the summands' total magnitude."""
    slack = SUM_EPS * torch.finfo(got.dtype).eps * size
    return wanted + torch.sign(got - wanted) * ((got - wanted).abs() - slack).clamp(min=0)


def _in_torch(program: Program, site: fx.Node, value: Tensor, constant: set[fx.Node], magnitude: bool = False) -> Tensor:
    """The site's result on this input, its other operands being constants; or that of all their absolute values, summands without signs."""
    env = {n: constant_value(n, program.constants) if n in constant else value for n in site.all_input_nodes}
    if magnitude:
        env = {n: v.abs() if isinstance(v, Tensor) else v for n, v in env.items()}
    result: Tensor = evaluate(site, env, program.constants)
    return result


def _constants(program: Program) -> set[fx.Node]:
    """What no input decides."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and found.issuperset(sources)):
            found.add(node)
    return found


def exposing(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with these values as its only outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return changed


def refusal(where: str, why: str) -> BackendRefusal:
    """Other numbers than the program's."""
    what, do = "the backend gives other numbers than the program", 'backend="reference" runs it; please report the model'
    return BackendRefusal(what, where=where, why=why, do=do)


def _too_far(error: float, limit: float) -> str:
    return f"relative error {error:.1e} on the probe inputs, limit {limit:.1e}"
