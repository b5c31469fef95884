"""What the tests of passes share: run one pass under its contract, print graphs, plant faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxcompress import registry
from fxcompress.capture import capture
from fxcompress.interpret import run as interpret
from fxcompress.manager import CheckMode, Manager
from fxcompress.measure import relative_error
from fxcompress.program import Program
from fxcompress.recipe import Step, Where
from fxcompress.report import PassReport
from fxcompress.rewrite import Pass
from fxcompress.target import Target


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


class _Function(nn.Module):
    def __init__(self, body: Callable[..., Any], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.body, self.names = body, tuple(parameters)
        for name, value in parameters.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        """The body on the inputs and the constants."""
        return self.body(*inputs, **{n: getattr(self, n) for n in self.names})


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


Fault = Callable[..., Any]


def planted(monkeypatch: pytest.MonkeyPatch, module: Any, helper: str, fault: Callable[[Any], Any]) -> None:
    """From now on the module's helper returns what `fault` makes of its result."""
    right = getattr(module, helper)
    monkeypatch.setattr(module, helper, lambda *args, **kwargs: fault(right(*args, **kwargs)))


def mapped(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """The change applied to every tensor of a result."""
    return lambda result: pytree.tree_map_only(Tensor, change, result)
