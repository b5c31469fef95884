"""The outline as a torch.export.ExportedProgram, made without tracing anything.

Leaves are buffers of one element seen at full size. The program hands itself out when it is asked to decompose: its ops are already those
torch.onnx translates, and tracing them again is most of an export's time (22 s against 4 s for a 30-layer Llama).

The runtimes have no bfloat16 kernels on CPU. Where a float32 model takes a step in it, the step is float32 rounded to bfloat16, as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
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

from fxcompress.backends.onnx.grouped import before_groups
from fxcompress.backends.onnx.outline import SAME_OP, Leaf, Outline
from fxcompress.dataflow import is_move

FX_INDEX = "fxc.node"  # under which a node's number in the outline travels, in meta["custom"] and in ONNX metadata

aten = torch.ops.aten
_COPIES = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other)
_RESHAPES = (aten.unsqueeze.default, aten.flatten.using_ints)  # of complex numbers torch.onnx knows but view


def leaf_name(index: int) -> str:
    """The name of a leaf's buffer, and of its initializer in a skeleton."""
    return f"fxc_leaf_{index}"


def as_real(value: Tensor) -> Tensor:
    """As torch.onnx writes complex numbers: their two parts on an axis more, the last."""
    return torch.view_as_real(value) if value.is_complex() else value


class Exported(ExportedProgram):
    """Decomposes itself only if told so. `translated`: what it handed out for translation."""

    is_decomposed = False

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        self.translated = super().run_decompositions(*args, **kwargs) if self.is_decomposed else self
        return self.translated


def exported_program(outlined: Outline, decomposed: bool = False) -> Exported:
    """The outline as an ExportedProgram whose leaves are buffers nobody touches, so they take no memory: nothing is copied or traced."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    mode = next(n.meta["val"].fake_mode for n in (*outlined.inputs, *outlined.nodes) if hasattr(n.meta["val"], "fake_mode"))
    buffers = [_buffer(graph, i, leaf, mode) for i, leaf in enumerate(outlined.leaves)]
    env.update({node: buffers[i] for node, i in outlined.places.items()})
    for node in outlined.inputs:
        env[node] = _copied(graph, graph.placeholder(node.name), node)
    for index, node in enumerate(outlined.nodes):
        if _does_nothing(node):
            env[node] = env[node.all_input_nodes[0]]
            continue
        env[node] = _in_bfloat16(graph, node, env) if is_narrow(node) else _copied(graph, _respelled(graph, node, env), node)
        env[node].meta["custom"] = {FX_INDEX: index}
    graph.output(tuple(env[r] for r in outlined.results))
    inputs = [InputSpec(InputKind.BUFFER, TensorArgument(b.name), b.name, persistent=True) for b in buffers]
    inputs += [InputSpec(InputKind.USER_INPUT, TensorArgument(env[n].name), None) for n in outlined.inputs]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(env[n].name), None) for n in outlined.results]
    values = {b.name: torch.empty(leaf.shape, dtype=leaf.dtype) for b, leaf in zip(buffers, outlined.leaves, strict=True)}
    signature = ExportGraphSignature(inputs, outputs)
    calls = [_calls(inputs[len(buffers) :], outputs)]
    exported = Exported(torch.nn.Module(), graph, signature, values, _ranges(outlined), calls, constants={})
    exported.is_decomposed, exported.translated = decomposed, exported
    return exported


def _does_nothing(node: fx.Node) -> bool:
    """A squeeze of an axis longer than 1, which ONNX refuses; a cast to the type it has, behind which no kernel sees what was dequantised."""
    if node.target is not aten.squeeze.dim and node.target not in _COPIES:
        return False
    old, new = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return bool(new.dtype == old.dtype if node.target in _COPIES else new.dim() == old.dim() > 0)


def _respelled(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    if node.target in _COPIES:
        return graph.call_function(aten._to_copy.default, (env[node.all_input_nodes[0]],), {"dtype": node.meta["val"].dtype})
    if node.target in _RESHAPES and node.meta["val"].is_complex():
        sizes = [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]
        if sizes.count(-1) <= 1:
            return graph.call_function(aten.view.default, (env[node.all_input_nodes[0]], sizes))
    new = graph.node_copy(node, env.__getitem__)
    new.target = SAME_OP.get(node.target, node.target)
    if grouped := before_groups(node):
        new.args = (new.args[0], *(env[n] for n in grouped), *new.args[3:])
        new.kwargs = {**new.kwargs, "enable_gqa": True}
    return new


def is_narrow(node: fx.Node) -> bool:
    """Whether a value is of bfloat16."""
    return getattr(node.meta.get("val"), "dtype", None) == torch.bfloat16


def can_be_widened(node: fx.Node) -> bool:
    """Whether a bfloat16 result is that of the same op in float32, rounded: one number from one of each operand, moved or cast numbers."""
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (torch.Tag.pointwise in tags or node.target in _COPIES or is_move(node))


def _in_bfloat16(graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node's bfloat16 numbers as float32. torch casts other operands to the result's type before it computes."""
    given = {n: _wide(graph, env[n]) for n in node.all_input_nodes}
    if node.target in _COPIES:
        return _named(_rounded(graph, given[node.all_input_nodes[0]]), node.name)
    for n in () if is_move(node) else given:
        if getattr(n.meta["val"], "dtype", torch.bool) not in (torch.bfloat16, torch.bool):  # sizes are no tensors
            given[n] = _rounded(graph, given[n])
    wide = _copied(graph, graph.node_copy(node, given.__getitem__), node)
    wide.meta["val"] = wide.meta["val"].to(torch.float32)
    return wide if is_move(node) else _named(_rounded(graph, _named(wide, f"{node.name}_wide")), node.name)


def _named(node: fx.Node, name: str) -> fx.Node:
    node.name = name
    return node


def _wide(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """A constant as float32 if it is of bfloat16; all else is by now."""
    return _cast(graph, value, torch.float32) if is_narrow(value) else value


def _cast(graph: fx.Graph, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    new = graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
    new.meta = {**value.meta, "val": value.meta["val"].to(dtype)}
    return new


def _rounded(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """A value through bfloat16, as float32."""
    return _cast(graph, _cast(graph, value, torch.bfloat16), torch.float32)


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
