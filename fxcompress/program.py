"""Program: a captured model as a flat functional ATen graph, with its constants, inputs, outputs and states.

The graph is a plain `torch.fx.Graph`:
- placeholders are the inputs, in order, named as in `inputs`;
- `get_attr` nodes read `constants[node.target]`: parameters, buffers and constants under their names in the model. Tied weights are one
  constant. Tensors are shared with the model and never written: an edit stores a new tensor under the name, or a new name;
- every other node is `call_function` on an op without mutation, or on `operator.*` over sizes and tuples;
- the output node's single argument is the flat tuple of outputs, in the order of `outputs`.
`node.meta`: "val" (fake tensor, symbolic sizes), "module" (module paths, outermost first), "stack_trace" (the user's source).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

Dim = int | str


@dataclass(frozen=True)
class Value:
    """A named input or output. shape: sizes, a symbol's name or an expression in symbols ("2*s0") where dynamic; () and None mean scalar.

    role: "input", "timestep" or "state"; it comes from the source or the user, never from a guessed name.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    role: str = "input"
    below: int | None = None  # for indices into a table: the number of its rows


@dataclass(frozen=True)
class State:
    """A value one call leaves for the next: the input `input`, the output `output`, by name, and the first value `initial`, a constant's name.

    initial "": the first value has size 0 on the axes that may have it, as the key/value cache of a language model.
    """

    input: str
    output: str
    initial: str = ""


@dataclass(frozen=True)
class Program:
    """A captured model. Frozen: passes get at the graph through `Edit` only. See the module's docstring for the graph's rules."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    signature: Any  # capture.Signature: how user arguments become inputs and flat outputs become the model's output class
    symbols: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # dynamic size -> (least, greatest) legal value
    classes: Mapping[str, str] = field(default_factory=dict)  # module path -> class name
    states: tuple[State, ...] = ()
    notes: tuple[str, ...] = ()  # what capture had to fix or leave out, for the report
    example: tuple[Tensor, ...] = ()  # the flat example inputs
    origin: str = ""
    config: Any = None  # the model's own, which a compiled module shows again
    generation_config: Any = None

    def placeholders(self) -> list[fx.Node]:
        """The input nodes in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output_node(self) -> fx.Node:
        """The graph's output node."""
        node: fx.Node = next(iter(reversed(self.graph.nodes)))
        return node

    def results(self) -> tuple[fx.Node, ...]:
        """The nodes returned, in the order of `outputs`."""
        return tuple(self.output_node.args[0])  # type: ignore[arg-type]

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor a `get_attr` node reads; None for any other node."""
        return self.constants[str(node.target)] if node.op == "get_attr" else None

    def copy(self) -> Program:
        """An independent program: graph copied node by node under the same names, tensors shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].name = node.name
        return replace(self, graph=graph, constants=dict(self.constants))


ROOT = "<root>"  # in words, the module around all others, whose path is ""


def module_path(node: fx.Node) -> str:
    """The innermost module path the node came from; "" for the root."""
    path = node.meta.get("module") or ("",)
    return str(path[-1])


def place_of(node: fx.Node) -> str:
    """Module path and node, as reports and errors name a place."""
    return place_name(module_path(node), node.name)


def place_name(module: str, name: str) -> str:
    """ "blocks.0.fc  (linear)"."""
    return f"{module or ROOT}  ({name})"


def users_of(node: fx.Node) -> Iterator[fx.Node]:
    """Every consumer of the node's value, through `getitem` of a tuple."""
    for user in node.users:
        if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem":
            yield from users_of(user)
        else:
            yield user
