"""Program -> ONNX skeleton: the graph in standard ops, every constant an initializer without values.

The translation itself is `torch.onnx.export` on an ExportedProgram made of the outline. That program hands itself out when asked to
decompose: its ops are already those torch.onnx translates, and tracing them again is most of an export's time (22 s against 4 s for a
30-layer Llama). Only where an op turns out to have no translation is the real decomposition run.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as cleanup
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ArgumentSpec,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from fxcompress.backends.onnx.forms import forms
from fxcompress.backends.onnx.outline import Leaf, Outline, fingerprint, outline
from fxcompress.errors import BackendRefusal
from fxcompress.program import Program, module_path

LOWEST_OPSET, GREATEST_OPSET = 18, 20  # torch.onnx's lowest; from 21 on GroupNormalization has no CPU kernel
FLOAT8_OPSET = 19
FX_INDEX = "fxc.node"
_KEPT = 4
_SKELETONS: OrderedDict[tuple[str, int], ir.Model] = OrderedDict()

_ATEN = torch.ops.aten
_SAME_OP = {  # the first has no translation, or asks for strides that a leaf doesn't have
    _ATEN.__and__.Tensor: _ATEN.bitwise_and.Tensor,
    _ATEN.__or__.Tensor: _ATEN.bitwise_or.Tensor,
    _ATEN.__xor__.Tensor: _ATEN.bitwise_xor.Tensor,
    _ATEN.min.other: _ATEN.minimum.default,
    _ATEN.max.other: _ATEN.maximum.default,
    _ATEN.view.default: _ATEN.reshape.default,
}
_COPIES = (_ATEN.to.dtype, _ATEN.to.device, _ATEN.to.dtype_layout, _ATEN.to.other)


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


def leaf_name(index: int) -> str:
    """The name of a leaf's initializer in a skeleton."""
    return f"leaf_{index}"


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
    _name_values(model, program)
    return Skeleton(model, outlined)


def _is_float8(leaf: Leaf) -> bool:
    return leaf.quantised is not None and leaf.quantised.format.kind == "float"


def _refuse_types(program: Program, outlined: Outline) -> None:
    for node in (*outlined.inputs, *outlined.nodes):
        if getattr(node.meta.get("val"), "dtype", None) == torch.bfloat16:
            raise BackendRefusal(
                "onnxruntime has no bfloat16 kernels on CPU",
                where=_place(node),
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
    raise _refusal(error, graph, outlined) from error


def _exported(exported: ExportedProgram, opset: int) -> ir.Model:
    with _quiet():
        result = torch.onnx.export(exported, dynamo=True, optimize=False, opset_version=opset, verbose=False, custom_translation_table=forms())
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


class _Exported(ExportedProgram):
    """Decomposes itself only if told so. `translated`: what it handed out for translation."""

    is_decomposed = False

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        self.translated = super().run_decompositions(*args, **kwargs) if self.is_decomposed else self
        return self.translated


def exported_program(outlined: Outline, decomposed: bool = False) -> _Exported:
    """The outline as an ExportedProgram whose leaves are buffers of one element seen at full size: nothing is copied or traced."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    mode = outlined.inputs[0].meta["val"].fake_mode
    buffers = [_buffer(graph, i, leaf, mode) for i, leaf in enumerate(outlined.leaves)]
    env.update({node: buffers[i] for node, i in outlined.places.items()})
    for node in outlined.inputs:
        env[node] = _copied(graph, graph.placeholder(node.name), node)
    for index, node in enumerate(outlined.nodes):
        if _does_nothing(node):
            env[node] = env[node.args[0]]  # type: ignore[index]
            continue
        env[node] = _copied(graph, _respelled(graph, node, env), node)
        env[node].meta["custom"] = {FX_INDEX: index}
    graph.output(tuple(env[r] for r in outlined.results))
    inputs = [InputSpec(InputKind.BUFFER, TensorArgument(b.name), b.name, persistent=True) for b in buffers]
    inputs += [InputSpec(InputKind.USER_INPUT, TensorArgument(env[n].name), None) for n in outlined.inputs]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(env[n].name), None) for n in outlined.results]
    values = {b.name: torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) for b, leaf in zip(buffers, outlined.leaves, strict=True)}
    signature = ExportGraphSignature(inputs, outputs)
    calls = [_calls(inputs[len(buffers) :], outputs)]
    exported = _Exported(torch.nn.Module(), graph, signature, values, _ranges(outlined), calls, constants={})
    exported.is_decomposed, exported.translated = decomposed, exported
    return exported


def _does_nothing(node: fx.Node) -> bool:
    """A squeeze of an axis longer than 1, which ONNX refuses."""
    return node.target is _ATEN.squeeze.dim and node.meta["val"].dim() == node.args[0].meta["val"].dim() > 0  # type: ignore[union-attr]


def _respelled(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    if node.target in _COPIES:
        return graph.call_function(_ATEN._to_copy.default, (env[node.args[0]],), {"dtype": node.meta["val"].dtype})  # type: ignore[index]
    new = graph.node_copy(node, env.__getitem__)
    new.target = _SAME_OP.get(node.target, node.target)  # type: ignore[call-overload]
    return new


def _buffer(graph: fx.Graph, index: int, leaf: Leaf, mode: Any) -> fx.Node:
    node = graph.placeholder(leaf_name(index))
    with mode:
        node.meta["val"] = torch.empty(leaf.shape, dtype=leaf.dtype)
    return node


def _copied(graph: fx.Graph, new: fx.Node, old: fx.Node) -> fx.Node:
    new.name = old.name
    new.meta = {"val": old.meta["val"], "nn_module_stack": {"": ("", "")}}
    return new


def _ranges(outlined: Outline) -> dict[Any, Any]:
    sizes = [size for node in outlined.inputs for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
    return {s: size.node.shape_env.var_to_range[s] for size in sizes for s in size.node.expr.free_symbols}


def _calls(inputs: list[InputSpec], outputs: list[OutputSpec]) -> ModuleCallEntry:
    takes: list[ArgumentSpec] = [spec.arg for spec in inputs]
    gives: list[ArgumentSpec] = [spec.arg for spec in outputs]
    in_spec = pytree.tree_structure((tuple(0 for _ in takes), {}))
    return ModuleCallEntry("", ModuleCallSignature(takes, gives, in_spec, pytree.tree_structure(tuple(0 for _ in gives))))


def _clean(model: ir.Model) -> ir.Model:
    """Merge equal nodes (two thirds of an export are repeated constants and shape sums), drop dead ones and all text but the fx index."""
    indices = {node: _fx_index(node) for node in model.graph}
    cleanup.ClearMetadataAndDocStringPass()(model)
    for node, index in indices.items():
        node.metadata_props[FX_INDEX] = index
    for value in model.graph.initializers.values():
        value.const_value = None
    for step in _CLEANUP:
        step(model)
    return model


def _fx_index(node: ir.Node) -> str:
    origin = node.meta.get("node")
    return str(origin.meta.get("custom", {}).get(FX_INDEX, "")) if origin is not None else ""


def _name_values(model: ir.Model, program: Program) -> None:
    symbols = _symbols(program)
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(d, symbols) for d in value.shape])
    ports = (*model.graph.inputs, *model.graph.outputs)
    taken = {value.name for value in _values(model.graph)} - {value.name for value in ports}
    for value, declared in zip(ports, (*program.inputs, *program.outputs), strict=True):
        value.name = _free(declared.name, taken)
        taken.add(value.name)


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
        where=_place(node),
        why=f"{subject} {failure}",
        do="- quant.finalize" if str(node.target) == "fxc.quantize.default" else 'backend="reference" runs it; or replace the op in the model',
    )


def _cause(error: BaseException) -> str:
    return _cause(error.__cause__) if error.__cause__ else f"{type(error).__name__}: {error}"[:200]


def _chain(error: BaseException | None) -> str:
    return f"{_chain(error.__cause__)}\n{error}" if error else ""


def _place(node: fx.Node) -> str:
    return f"{module_path(node) or 'the root module'}  ({node.name})"
