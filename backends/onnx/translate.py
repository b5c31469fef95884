"""Program -> ONNX skeleton: the graph in standard ops, every constant an initializer without values.

The translation itself is `torch.onnx.export`. It is made without decomposing anything; only where an op turns out to have no translation the
real decomposition is run. Names in a skeleton are those of the program it is for, whichever program it was first made for.
"""

from __future__ import annotations

import gc
import logging
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as cleanup
import torch
from torch import fx

from fxcompress.backends.onnx import torchlib
from fxcompress.backends.onnx.exported import FX_INDEX, Exported, can_be_widened, exported_program, is_narrow
from fxcompress.backends.onnx.forms import FORMS, SHORTCUTS
from fxcompress.backends.onnx.outline import QUANTIZE, Leaf, Outline, fingerprint, outline
from fxcompress.backends.onnx.views import tensor_of
from fxcompress.errors import BackendRefusal
from fxcompress.program import Program, place_of

LOWEST_OPSET, GREATEST_OPSET = 18, 20  # torch.onnx's lowest; from 21 on GroupNormalization has no CPU kernel
FLOAT8_OPSET = 19
_IS_RESULT = "fxc.result"
_KEPT = 4
_SKELETONS: OrderedDict[tuple[str, int], ir.Model] = OrderedDict()


_CLEANUP = (
    cleanup.IdentityEliminationPass(),
    cleanup.CommonSubexpressionEliminationPass(),
    cleanup.RemoveUnusedNodesPass(),
    cleanup.OutputFixPass(),
)


@dataclass(frozen=True)
class Skeleton:
    """model: initializer i of the outline's leaves is named `leaf_name(i)` and has no value. Nodes carry the index of their fx node."""

    model: ir.Model
    outline: Outline


def translate(program: Program) -> Skeleton:
    """The program's skeleton, a fresh copy that may be edited; translated once for all programs of one structure.

    Raises BackendRefusal naming node, module and remedy for what ONNX can't say.
    """
    outlined = outline(program)
    _refuse_types(program, outlined)
    opset = FLOAT8_OPSET if any(_is_float8(leaf) for leaf in outlined.leaves) else LOWEST_OPSET
    key = fingerprint(outlined), opset
    if key not in _SKELETONS:
        _SKELETONS[key] = _translated(outlined, opset)
    _SKELETONS.move_to_end(key)
    while len(_SKELETONS) > _KEPT:
        _SKELETONS.popitem(last=False)
    model = _SKELETONS[key].clone()
    _name_values(model, program, outlined)
    return Skeleton(model, outlined)


def _is_float8(leaf: Leaf) -> bool:
    return leaf.quantised is not None and leaf.quantised.format.kind == "float"


def _refuse_types(program: Program, outlined: Outline) -> None:
    for node, value in zip(outlined.results, program.outputs, strict=True):
        if node in outlined.places:
            raise BackendRefusal(
                f"output {value.name!r} is a constant of the model",
                where=place_of(node),
                why="no input decides it",
                do='leave it out, or backend="reference"',
            )
    for node in outlined.nodes:
        if node.target is QUANTIZE and all(n in outlined.places for n in node.all_input_nodes):
            raise BackendRefusal(
                f"{node.all_input_nodes[0].name} is quantised but not finalised",
                where=place_of(node),
                why="its codes would be computed at every call, from the float weight",
                do="- quant.finalize",
            )
    for node in (*outlined.inputs, *outlined.nodes, *outlined.results):
        if is_narrow(node) and (node in outlined.results or not can_be_widened(node)):
            raise BackendRefusal(
                "ONNX runtimes have no bfloat16 kernels on CPU",
                where=place_of(node),
                why=f"{node.name} computes in bfloat16",
                do="model.float() before compile",
            )


def _translated(outlined: Outline, opset: int) -> ir.Model:
    attempts = [(opset, False), (opset, True), (GREATEST_OPSET, True)]
    for version, decomposed in attempts:
        exported = exported_program(outlined, decomposed)
        try:
            return _clean(_exported(exported, version))
        except torch.onnx.OnnxExporterError as failure:
            error, graph = failure, exported.translated.graph
        finally:
            del exported
            gc.collect()  # an export leaves a few times the graph's size in cycles
    raise _refusal(error, graph, outlined) from error


def _exported(exported: Exported, opset: int) -> ir.Model:
    forms = {**FORMS, **({} if exported.is_decomposed else SHORTCUTS)}
    with _quiet(), torchlib.kept():
        result = torch.onnx.export(exported, dynamo=True, optimize=False, opset_version=opset, verbose=False, custom_translation_table=forms)
    assert result is not None
    return result.model


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _clean(model: ir.Model) -> ir.Model:
    """Merge equal nodes (two thirds of an export are repeated constants and shape sums), drop dead ones and all text but where from."""
    origins = {node: _origin(node) for node in model.graph}
    cleanup.ClearMetadataAndDocStringPass()(model)
    for node, origin in origins.items():
        node.metadata_props.update(origin)
    for value in model.graph.initializers.values():
        value.const_value = None
    _divide_by_roots(model.graph)
    _pad_in_convolutions(model.graph)
    for step in _CLEANUP:
        step(model)
    return model


def _divide_by_roots(graph: ir.Graph) -> None:
    """x * (1 / sqrt(v)) as x / sqrt(v): that is how ONNX Runtime recognises an RMS norm, which it then runs as one node instead of seven."""
    for node in [n for n in graph if n.op_type == "Reciprocal"]:
        inverse, root = node.outputs[0], node.inputs[0]
        producer = None if root is None else root.producer()
        if producer is None or producer.op_type != "Sqrt":
            continue
        for user in [u for u, _ in inverse.uses() if u.op_type == "Mul" and u.inputs[0] is not u.inputs[1]]:
            other = user.inputs[1] if user.inputs[0] is inverse else user.inputs[0]
            user.op_type = "Div"
            user.replace_input_with(0, other)
            user.replace_input_with(1, root)


def _pad_in_convolutions(graph: ir.Graph) -> None:
    """conv(pad(x)) with zeros around the windows as one convolution: no float copy of x, and codes of x can be convolved as they are."""
    for conv in [n for n in graph if n.op_type == "Conv"]:
        kind, own = conv.attributes.get("auto_pad"), conv.attributes.get("pads")
        pad = conv.inputs[0].producer() if conv.inputs[0] is not None else None
        sizes = _zeros_around(pad) if pad is not None and pad.op_type == "Pad" else None
        rank = 0 if sizes is None else len(sizes) // 2
        if sizes is None or pad is None or min(sizes) < 0 or any(sizes[i] for i in (0, 1, rank, rank + 1)):
            continue
        if kind is not None and kind.as_string() != "NOTSET":
            continue
        before = own.as_ints() if own is not None else [0] * (len(sizes) - 4)
        more = [*sizes[2:rank], *sizes[rank + 2 :]]
        conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(before, more, strict=True)])
        conv.replace_input_with(0, pad.inputs[0])


def _zeros_around(pad: ir.Node) -> list[int] | None:
    """The sizes of a Pad of all axes with constant zeros."""
    mode = pad.attributes.get("mode")
    value = tensor_of(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else None
    if (mode is not None and mode.as_string() != "constant") or (value is not None and value.any()) or len(pad.inputs) > 3:
        return None
    if value is None and len(pad.inputs) > 2 and pad.inputs[2] is not None:
        return None
    sizes = tensor_of(pad.inputs[1])
    return None if sizes is None else [int(n) for n in sizes]


def _origin(node: ir.Node) -> dict[str, str]:
    """The number of the fx node it comes from, and whether it makes that node's own value."""
    source = node.meta.get("node")
    index = None if source is None else source.meta.get("custom", {}).get(FX_INDEX)
    if source is None or index is None:
        return {}
    return {FX_INDEX: str(index), **({_IS_RESULT: ""} if node.outputs[0].name == source.name else {})}


def _name_values(model: ir.Model, program: Program, outlined: Outline) -> None:
    """Symbols, inputs and outputs by their names in the program; an fx node's result by its name, what leads there by name and number."""
    symbols = _symbols(program)
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(d, symbols) for d in value.shape])
    results = {node.metadata_props[FX_INDEX]: node for node in model.graph if _IS_RESULT in node.metadata_props}
    counts: Counter[str] = Counter()
    for node in model.graph:
        index = node.metadata_props.get(FX_INDEX)
        origin = outlined.nodes[int(index)].name if index else "node"
        for value in node.outputs:
            node.name = f"{origin}.{counts[origin]}"
            value.name = origin if index and results.get(index) is node else node.name
            counts[origin] += 1
    ports = (*model.graph.inputs, *model.graph.outputs)
    taken = {value.name for value in _values(model.graph) if value not in ports}
    for port, declared in zip(ports, (*program.inputs, *program.outputs), strict=True):
        port.name = _free(declared.name, taken)
        taken.add(port.name)


def _free(name: str, taken: set[str | None]) -> str:
    """ONNX has one namespace for all values: an output named like an input becomes "out_" + name."""
    while name in taken:
        name = f"out_{name}"
    return name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _symbols(program: Program) -> dict[str, str]:
    pairs = [
        (size, name)
        for node, value in zip(program.placeholders(), program.inputs, strict=True)
        for size, name in zip(node.meta["val"].shape, value.shape, strict=True)
    ]
    return {str(size): str(name) for size, name in pairs if isinstance(size, torch.SymInt) and str(name).isidentifier()}


def _renamed(dim: Any, symbols: Mapping[str, str]) -> int | str | None:
    text = str(dim) if isinstance(dim, int) else dim.value
    if text is None:
        return None
    return int(text) if text.isdigit() else re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m[0], m[0]), text)


def _refusal(error: Exception, graph: fx.Graph, outlined: Outline) -> BackendRefusal:
    text = _chain(error)
    named = re.search(r"translating node %(\w+)", text)
    culprit = next((n for n in graph.nodes if named and n.name == named[1]), None)
    if culprit is None:
        why = next((line for line in reversed(text.splitlines()) if line.strip() and "stack trace" not in line), "")
        return BackendRefusal("torch.onnx can't translate the program", why=why[:300], do='backend="reference" runs it')
    node = outlined.nodes[culprit.meta["custom"][FX_INDEX]]
    subject = "it" if culprit.target == node.target else f"it decomposes into {culprit.target}, which"
    failure = "has no translation in torch.onnx" if "No ONNX function" in text else f"fails in translation with {_cause(error)}"
    return BackendRefusal(
        f"{node.target} has no ONNX form",
        where=place_of(node),
        why=f"{subject} {failure}",
        do='backend="reference" runs it; or replace the op in the model',
    )


def _cause(error: BaseException) -> str:
    return _cause(error.__cause__) if error.__cause__ else f"{type(error).__name__}: {error}"[:200]


def _chain(error: BaseException | None) -> str:
    return f"{_chain(error.__cause__)}\n{error}" if error else ""
