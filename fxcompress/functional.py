"""ExportedProgram -> one flat graph without mutation: parameters read by name, wrapped bodies inlined, asserts and in-place ops gone.

In-place ops become their functional forms (`inplace`). Where that can't be done here, `NotFunctional` says so and the caller lets torch
functionalise the whole program, which costs a second trace.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from fxcompress.composites import open_composites
from fxcompress.errors import CaptureError
from fxcompress.experts import open_experts
from fxcompress.inplace import NotFunctional, functionalise
from fxcompress.layouts import keep_apart
from fxcompress.program import place_name

ASSERTS = ("_assert", "sym_constrain", "_check")
SPELLINGS = {  # a view refuses operands that lie in memory otherwise than at capture, as a rewrite may make them
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.view_as.default: torch.ops.aten.reshape_as.default,
    torch.ops.aten.concatenate.default: torch.ops.aten.cat.default,
    # memory that is written later has other numbers each time, which nobody reads and no check should compare
    torch.ops.aten.empty.memory_format: torch.ops.aten.zeros.default,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
}
IDENTITIES = ("detach_", "detach", "alias", "lift", "lift_fresh", "lift_fresh_copy", "lift_fresh_copy_", "requires_grad_")


def flat_graph(exported: ExportedProgram, strip: str = "") -> tuple[fx.Graph, dict[str, Tensor], tuple[Any, ...]]:
    """Graph, constants by name (prefix `strip` removed, tied tensors once), and per flat output INPUT-like node or captured constant.

    Returns (graph, constants, results): results holds a node of the graph or a plain constant. Raises NotFunctional, CaptureError.
    """
    flattener = _Flattener(exported, strip)
    flattener.run()
    functionalise(flattener.graph)
    write_fixed_sizes(flattener.graph)
    for node in flattener.graph.nodes:
        if node.target is torch.ops.aten.empty.memory_format:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "memory_format"}
        node.target = SPELLINGS.get(node.target, node.target)
    open_composites(flattener.graph)
    keep_apart(flattener.graph)
    merge_splits(flattener.graph)
    open_experts(flattener.graph, flattener.constants)
    drop_dead(flattener.graph)
    return flattener.graph, _used(flattener.graph, flattener.constants), flattener.results


class _Flattener:
    def __init__(self, exported: ExportedProgram, strip: str) -> None:
        self.exported, self.strip = exported, strip
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.results: tuple[Any, ...] = ()
        self.names: dict[tuple[Any, ...], str] = {}  # storage, offset, shape, stride -> constant name: ties
        self.attributes: dict[str, fx.Node] = {}

    def run(self) -> None:
        specs = {s.arg.name: s for s in self.exported.graph_signature.input_specs if hasattr(s.arg, "name")}
        places = [n for n in self.exported.graph.nodes if n.op == "placeholder"]
        inputs = {n for n in places if specs[n.name].kind is InputKind.USER_INPUT}
        env: dict[fx.Node, Any] = {n: self._placeholder(n, specs[n.name]) for n in places if n in inputs}
        for node in (n for n in places if n not in inputs):
            env[node] = self._constant(node, self._tensor(specs[node.name]), specs[node.name].target)
        self._body(self.exported.graph_module, env)
        self._output(env)

    def _placeholder(self, node: fx.Node, spec: Any) -> Any:
        if isinstance(spec.arg, ConstantArgument):
            return spec.arg.value
        new = self.graph.placeholder(node.name)
        new.meta = _meta(node, self.strip)
        return new

    def _tensor(self, spec: Any) -> Tensor:
        if spec.kind is InputKind.CONSTANT_TENSOR or spec.target not in self.exported.state_dict:
            value = self.exported.constants[spec.target]
        else:
            value = self.exported.state_dict[spec.target]
        if not isinstance(value, Tensor):
            raise CaptureError("the model reads a constant that is not a tensor", where=str(spec.target), why=f"it is a {type(value).__name__}")
        if value.layout is not torch.strided:
            raise CaptureError(
                "the model has a sparse weight",
                where=str(spec.target).removeprefix(self.strip),
                why=f"its layout is {value.layout}",
                do="weight.to_dense()",
            )
        return value.detach()

    def _constant(self, node: fx.Node, tensor: Tensor, name: str) -> fx.Node:
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        name = self.names.setdefault(key, name.removeprefix(self.strip)) if tensor.numel() else name.removeprefix(self.strip)
        self.constants[name] = tensor
        if name not in self.attributes:
            new = self.graph.create_node("get_attr", name, name="".join(c if c.isalnum() else "_" for c in name))
            new.meta = {"val": node.meta.get("val", tensor), "module": ("",)}
            self.attributes[name] = new
        return self.attributes[name]

    def _body(self, module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            if node.op == "get_attr":
                env[node] = self._attribute(module, node)
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            elif node not in env:
                raise NotFunctional(f"{node.op} {node.target}")
        return None

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value if isinstance(value, fx.GraphModule) else self._constant(node, value.detach(), str(node.target))

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        name = getattr(node.target, "__name__", str(node.target))
        args: Any = fx.node.map_arg(node.args, lambda n: env[n])
        if name.startswith(ASSERTS):
            return None
        if name.split(".")[0] in IDENTITIES:
            return args[0]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._inline(node, name, args)
        if node.target is operator.getitem and isinstance(args[0], tuple | list):
            return args[0][args[1]]  # of an inlined body
        kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        new.meta = _meta(node, self.strip)
        return new

    def _inline(self, node: fx.Node, name: str, args: tuple[Any, ...]) -> Any:
        if name == "wrap_with_set_grad_enabled":
            body, inner = args[1], args[2:]
        elif name == "wrap_with_autocast":
            if args[2] and args[0] == "cpu":
                raise NotFunctional("autocast is on inside forward")
            body, inner = args[4], args[5:]
        else:
            raise CaptureError(
                "the model has control flow that depends on data",
                where=_place(node),
                why=f"torch.export captured it as the higher-order op {name}, which has no flat graph",
                do="rewrite that branch or loop with tensor ops (torch.where, masks), or capture the part of the model around it",
            )
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        return self._body(body, dict(zip(places, inner, strict=True)))

    def _output(self, env: dict[fx.Node, Any]) -> None:
        out = next(n for n in reversed(self.exported.graph.nodes) if n.op == "output")
        results = []
        for spec, arg in zip(self.exported.graph_signature.output_specs, out.args[0], strict=True):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                raise CaptureError(
                    "the model's forward writes to its own buffers or to its inputs",
                    where=str(spec.target),
                    why="a captured program is a function of its inputs; what forward leaves behind for the next call would be lost",
                    do="return the new value as an output and pass it back as an input, or remove the write",
                )
            results.append(env[arg] if isinstance(arg, fx.Node) else arg)
        self.results = tuple(results)
        self.graph.output(tuple(r for r in results if isinstance(r, fx.Node)))


def write_fixed_sizes(graph: fx.Graph) -> None:
    """A size that export fixed, and what is computed of it, is the number itself in every op: what is made of it alone is a constant then."""
    for node in graph.nodes:
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt) or (number := size.node.maybe_as_int()) is None:
            continue

        def written(a: fx.Node, node: fx.Node = node, number: int = number) -> Any:
            return number if a is node else a

        for user in [u for u in node.users if u.op == "call_function"]:
            user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), written)


def merge_splits(graph: fx.Graph) -> None:
    """Tuples made twice of one value, and what is taken out of them, become one: a change of it is then recorded in all its parts."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), tuple | list) or node.target is operator.getitem:
            same = first.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if same is not node:
                node.replace_all_uses_with(same)


def drop_dead(graph: fx.Graph) -> list[str]:
    """Erase nodes nobody reads; in a functional graph every op is pure. Inputs stay. Returns the erased names."""
    dead = []
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            dead.append(node.name)
            graph.erase_node(node)
    return dead


def _used(graph: fx.Graph, constants: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return {name: tensor for name, tensor in constants.items() if name in names}


def _meta(node: fx.Node, strip: str) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    known = [(path, cls) for path, cls in stack.values() if not path.startswith("_")]
    pairs = [(path.removeprefix(strip.rstrip(".")).removeprefix("."), cls) for path, cls in known if path or not strip]
    meta = {"module": tuple(p for p, _ in pairs) or ("",), "classes": tuple(str(c).rsplit(".", 1)[-1] for _, c in pairs)}
    for key in ("val", "stack_trace"):
        if key in node.meta:
            meta[key] = node.meta[key]
    return meta


def _place(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return place_name(path, node.name)
