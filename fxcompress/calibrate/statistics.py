"""Statistics of a program's values over a feed: one streamed run for all that is asked, answers kept until the value itself changes.

A question is about one value, or about several of one item together. An answer is filed under the content of these values: the ops, arguments
and constants they are computed from. An edit anywhere upstream makes other values of them, so an old answer can't be given by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from fxcompress.calibrate.observers import Accumulator, JointAccumulator, JointObserver, Observer
from fxcompress.dataflow import ancestors
from fxcompress.errors import CalibrationError
from fxcompress.interpret import constant_value, walk
from fxcompress.program import Program, place_of

MEMORY = 4 << 30  # bytes of accumulators in one run, more is asked for in several; and of values that are the same for all items

Asked = tuple[fx.Node, Observer] | tuple[tuple[fx.Node, ...], JointObserver]
Items = Iterable[Sequence[Tensor]]
_Take = Callable[[fx.Node, Tensor], None]


class Statistics:
    """What passes ask about values. items: flat inputs of the program, which can be read again and again."""

    def __init__(self, items: Items, memory: int = MEMORY, progress: Callable[[int], None] = lambda _: None) -> None:
        self.items, self.memory, self.progress = items, memory, progress
        self.versions = _Versions()
        self.answers: dict[Any, Any] = {}

    def __call__(self, program: Program, asked: Iterable[Asked]) -> dict[tuple[Any, Any], Any]:
        """The answer to every question about the program's values as it is now; what isn't known yet is measured in as few runs as fit.

        CalibrationError for values that aren't finite (item and node), and for one question that needs too much memory.
        """
        version = self.versions.of(program)
        filed = {question: (tuple(version[n] for n in _nodes(question)), question[1]) for question in asked}
        for group in self._groups([question for question, key in filed.items() if key not in self.answers]):
            for question, accumulator in self._measured(program, group).items():
                self.answers[filed[question]] = accumulator.result()
        return {question: self.answers[key] for question, key in filed.items()}

    def _groups(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """The questions, cut so that the accumulators of one run fit into memory, and the values that joint ones hold."""
        group: list[Asked] = []
        held = 0
        for question in asked:
            size, node = _memory(question), _nodes(question)[-1]
            if size > self.memory:
                raise CalibrationError(
                    "a statistic doesn't fit into memory",
                    where=place_of(node),
                    why=f"{type(question[1]).__name__} of {list(node.meta['val'].shape)} takes {size} bytes, the limit is {self.memory}",
                    do="exclude the site in the recipe, or raise compile(memory=...)",
                )
            if group and held + size > self.memory:
                yield group
                group, held = [], 0
            group.append(question)
            held += size
        if group:
            yield group

    def _measured(self, program: Program, asked: Sequence[Asked]) -> dict[Asked, Accumulator | JointAccumulator]:
        found = {question: question[1].start() for question in asked}
        by_node: dict[fx.Node, list[_Take]] = {}
        for question, accumulator in found.items():
            take = _taking(accumulator) if isinstance(accumulator, Accumulator) else _Held(_nodes(question), accumulator)
            for node in dict.fromkeys(_nodes(question)):
                by_node.setdefault(node, []).append(take)
        fixed = self._fixed(program, by_node)
        nodes = _needed(program, by_node, fixed)
        for count, item in enumerate(self.items, 1):
            walk(nodes, program.constants, item, (), partial(_feed, by_node, count - 1), fixed)
            self.progress(count)
        return found

    @torch.no_grad()
    def _fixed(self, program: Program, wanted: Collection[fx.Node]) -> dict[fx.Node, Any]:
        """What ops make of constants alone and others read, such as quantised weights: the same for every item, held as far as memory goes."""
        needed = ancestors(wanted)
        still: dict[fx.Node, None] = {}
        for node in program.graph.nodes:
            if node in needed and node not in wanted and node.op in ("get_attr", "call_function") and still.keys() >= set(node.all_input_nodes):
                still[node] = None
        found: dict[fx.Node, Any] = {}
        held = 0
        for node in (n for n in still if n.op == "call_function" and needed.intersection(n.users) - still.keys()):
            tensors = [v for v in pytree.tree_leaves(node.meta["val"]) if isinstance(v, Tensor)]
            if any(isinstance(n, torch.SymInt) for v in tensors for n in v.shape):  # a size that export didn't see to be fixed
                continue
            size = sum(v.nbytes for v in tensors)
            if held + size <= self.memory:
                found[node] = constant_value(node, program.constants)
                held += size
        return found


def _nodes(question: Asked) -> tuple[fx.Node, ...]:
    return question[0] if isinstance(question[0], tuple) else (question[0],)


def _memory(question: Asked) -> int:
    """Bytes of the accumulator; for a joint question those of the values besides."""
    nodes, observer = _nodes(question), question[1]
    shapes = [[n if isinstance(n, int) else 1 for n in node.meta["val"].shape] for node in nodes]
    if isinstance(observer, Observer):
        return observer.memory(shapes[0])
    values: int = sum(prod(shape) * node.meta["val"].element_size() for node, shape in zip(nodes, shapes, strict=True))
    return observer.memory(shapes) + values


def _taking(accumulator: Accumulator) -> _Take:
    return lambda _, value: accumulator.add(value)


class _Held:
    """The values of one item for a joint question, let go when the last is there."""

    def __init__(self, nodes: tuple[fx.Node, ...], accumulator: JointAccumulator) -> None:
        self.nodes, self.accumulator = nodes, accumulator
        self.values: dict[fx.Node, Tensor] = {}

    def __call__(self, node: fx.Node, value: Tensor) -> None:
        self.values[node] = value
        if self.values.keys() == set(self.nodes):
            self.accumulator.add([self.values[n] for n in self.nodes])
            self.values.clear()


def _feed(by_node: Mapping[fx.Node, Sequence[_Take]], index: int, node: fx.Node, value: Any) -> None:
    if node not in by_node:
        return
    if not bool(torch.isfinite(value.sum())) and (wrong := int((~torch.isfinite(value)).sum())):  # a sum may overflow, and hides nothing
        raise CalibrationError(
            "the model computes values that aren't finite",
            where=f"{place_of(node)}, calibration item {index}",
            why=f"{wrong} of {value.numel()} values are inf or nan",
            do="remove the item, or exclude the place in the recipe",
        )
    for take in by_node[node]:
        take(node, value)


def _needed(program: Program, wanted: Iterable[fx.Node], known: Collection[fx.Node]) -> list[fx.Node]:
    """All inputs, and what the wanted nodes are computed from beside the known ones, in order."""
    needed = ancestors(wanted, lambda n: (i for i in n.all_input_nodes if i not in known))
    return [n for n in program.graph.nodes if n in needed or n.op == "placeholder"]


class _Versions:
    """Numbers for the content of values: equal numbers, equal computations from equal constants."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.tensors: Any = WeakIdKeyDictionary()
        self.seen = 0

    def of(self, program: Program) -> Mapping[fx.Node, int]:
        """The number of every node of a program."""
        found: dict[fx.Node, int] = {}
        for position, node in enumerate(n for n in program.graph.nodes if n.op != "output"):
            found[node] = self._number(self._content(node, position, found, program))
        return found

    def _content(self, node: fx.Node, position: int, found: Mapping[fx.Node, int], program: Program) -> str:
        if node.op == "placeholder":
            return f"input {position}"
        if node.op == "get_attr":
            return f"constant {self._tensor(program.constants[str(node.target)])}"
        return f"{node.target} {fx.node.map_arg((node.args, node.kwargs), lambda n: f'%{found[n]}')}"

    def _tensor(self, tensor: Tensor) -> int:
        if tensor not in self.tensors:
            self.seen += 1
            self.tensors[tensor] = self.seen
        return int(self.tensors[tensor])

    def _number(self, content: str) -> int:
        return self.numbers.setdefault(content, len(self.numbers))
