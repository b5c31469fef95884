"""What the tests of passes share: run one pass under its contract, print graphs, plant faults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from fxcompress import registry
from fxcompress.capture import capture
from fxcompress.interpret import run as interpret
from fxcompress.manager import CheckMode, Manager
from fxcompress.measure import relative_error
from fxcompress.program import Program, Value
from fxcompress.recipe import Step, Where
from fxcompress.report import PassReport
from fxcompress.rewrite import Pass
from fxcompress.target import Target
from tests.zoo import ZOO

aten = torch.ops.aten


def run(
    program: Program, which: str | Pass, *, where: Where | None = None, check: CheckMode = "each", probe: Sequence[Tensor] = (), **options: Any
) -> tuple[Program, PassReport]:
    """(a copy of the program after one pass, its report). which: a pass, or its name with its options. probe: else the example."""
    item = which if isinstance(which, Pass) else named(which, **options)
    manager = Manager(program.copy(), Target(name="test"), probe or program.example, check)
    reports = manager.run([(Step(use=item.name, where=where or Where()), item)])
    return manager.program, reports[-1]


def named(name: str, **options: Any) -> Pass:
    """The pass of that name with its options."""
    kind = registry.find_pass(name)
    item: Pass = kind(kind.Options(**options))
    return item


def declined(report: PassReport) -> list[tuple[str, str]]:
    """(node, reason) per declined site."""
    return [(d.site, d.reason) for d in report.declined]


def text(program: Program) -> str:
    """The graph, one line a node: `name = op(arguments)`; inputs and constants appear where they are read."""
    lines = [f"{n.name} = {op_name(n)}({', '.join(_arguments(n))})" for n in program.graph.nodes if n.op == "call_function"]
    return "\n".join([*lines, f"return {', '.join(_written(r) for r in program.results())}"])


def op_name(node: fx.Node) -> str:
    """The op without namespace and without a default overload."""
    return str(node.target).removeprefix("aten.").removesuffix(".default") if "." in str(node.target) else node.target.__name__  # type: ignore[union-attr]


def _arguments(node: fx.Node) -> Iterator[str]:
    yield from (_written(a) for a in node.args)
    yield from (f"{k}={_written(v)}" for k, v in node.kwargs.items())


def _written(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(_written(v) for v in value)}]"
    return str(value).removeprefix("torch.")


def lines(expected: str) -> str:
    """A graph written in a test, without its indentation."""
    return "\n".join(line.strip() for line in expected.strip().splitlines())


def error(before: Program, after: Program, inputs: Sequence[Tensor] = ()) -> float:
    """The greatest relative error over the outputs, on the captured example if no inputs are given."""
    given = inputs or before.example
    return max(relative_error(a, b) for a, b in zip(interpret(before, given), interpret(after, given), strict=True))


def captured(model: nn.Module, *inputs: Any, dynamic: Any = None) -> Program:
    """The model in eval mode as a program, captured on these inputs."""
    return capture(model.eval(), inputs, dynamic=dynamic)


def function(body: Callable[..., Any], *inputs: Any, dynamic: Any = None, **parameters: Tensor) -> Program:
    """A function of tensors as a program; `parameters` become constants, passed to it by name."""
    return captured(_Function(body, parameters), *inputs, dynamic=dynamic)


@functools.cache
def zoo(name: str) -> Program:
    """A small real model by its name in tests/zoo.py, captured once; passes run on copies."""
    model, inputs = ZOO[name]()
    return capture(model, inputs)


class _Function(nn.Module):
    def __init__(self, body: Callable[..., Any], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_buffer(name, value)
        taken = [p for name, p in inspect.signature(body).parameters.items() if name not in parameters]

        def forward(*inputs: Tensor, **named: Tensor) -> Any:
            return body(*inputs, **named, **{n: getattr(self, n) for n in parameters})

        forward.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        self.forward = forward


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def node(program: Program, name: str) -> fx.Node:
    """The node of that name."""
    return next(n for n in program.graph.nodes if n.name == name)


def ops(program: Program) -> list[str]:
    """The ops in order."""
    return [op_name(n) for n in program.graph.nodes if n.op == "call_function"]


def unchanged_by_second_run(program: Program, name: str, **options: Any) -> None:
    """Fails unless the pass finds nothing more in what it left, and leaves that as it was."""
    once, _ = run(program, name, **options)
    twice, report = run(once, name, **options)
    assert report.fired == 0
    assert text(twice) == text(once)
    assert twice.constants.keys() == once.constants.keys()


def planted(monkeypatch: pytest.MonkeyPatch, module: Any, helper: str, fault: Callable[[Any], Any]) -> None:
    """From now on the module's helper returns what `fault` makes of its result."""
    right = getattr(module, helper)
    monkeypatch.setattr(module, helper, lambda *args, **kwargs: fault(right(*args, **kwargs)))


def mapped(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """The change applied to every tensor of a result."""
    return lambda result: pytree.tree_map_only(Tensor, change, result)


class Builder:
    """A program built node by node, without capture. Values are fake, as capture leaves them."""

    def __init__(self, **inputs: Tensor) -> None:
        self.graph, self.constants, self.mode = fx.Graph(), dict[str, Tensor](), FakeTensorMode()
        self.nodes: dict[str, fx.Node] = {}
        self.inputs, self.example = tuple(inputs), tuple(inputs.values())
        for name, value in inputs.items():
            node = self.graph.placeholder(name)
            node.meta = {"val": self.mode.from_tensor(value), "module": ("",)}
            self.nodes[name] = node

    def __getattr__(self, name: str) -> fx.Node:
        """An input's node."""
        return self.nodes[name]

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A node reading a constant."""
        self.constants[name] = value
        node = self.graph.create_node("get_attr", name)
        node.meta = {"val": self.mode.from_tensor(value), "module": ("",)}
        return node

    def op(self, target: Any, *args: Any, module: str = "", kwargs: dict[str, Any] | None = None) -> fx.Node:
        """An op node in a module."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        with self.mode:
            node.meta = {"val": target(*values, **(kwargs or {})), "module": (module,)}
        return node

    def program(self, *results: fx.Node) -> Program:
        """The program that returns these nodes."""
        self.graph.output(results)
        inputs = tuple(Value(n, tuple(v.shape), v.dtype) for n, v in zip(self.inputs, self.example, strict=True))
        outputs = tuple(Value(f"out_{i}", tuple(r.meta["val"].shape), r.meta["val"].dtype, "output") for i, r in enumerate(results))
        return Program(self.graph, self.constants, inputs, outputs, None, example=self.example)


def chain(layers: int, width: int = 8) -> Program:
    """layers of x + relu(W x), 4 nodes each, every layer in a module of its own."""
    built = Builder(x=seeded(4, width))
    value = built.x
    for i in range(layers):
        weight = built.constant(f"layer.{i}.weight", seeded(width, width, seed=i) / width**0.5)
        hidden = built.op(aten.linear.default, value, weight, module=f"layer.{i}")
        value = built.op(aten.add.Tensor, value, built.op(aten.relu.default, hidden, module=f"layer.{i}"), module=f"layer.{i}")
    return built.program(value)


def snapshot(program: Program) -> list[Any]:
    """Everything an edit may change: nodes with name, op, arguments, readers and value; constants by name, order and identity."""
    nodes = [(n, n.name, n.op, n.target, n.args, dict(n.kwargs), set(n.users), id(n.meta.get("val"))) for n in program.graph.nodes]
    return [nodes, [(name, id(t)) for name, t in program.constants.items()]]
