"""Statistics of a program's values over a feed: one streamed run for all that is asked, answers kept until the value itself changes.

An answer is filed under the value's content: the ops, arguments and constants it is computed from. An edit anywhere upstream makes another
value of it, so an old answer can't be given by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from fxcompress.calibrate.observers import Accumulator, Observer
from fxcompress.dataflow import ancestors
from fxcompress.edit import site_name
from fxcompress.errors import CalibrationError
from fxcompress.interpret import walk
from fxcompress.program import Program

MEMORY = 4 << 30  # bytes of accumulators in one run; more is asked for in several runs

Asked = tuple[fx.Node, Observer]
Items = Iterable[Sequence[Tensor]]


class Statistics:
    """What passes ask about values. items: flat inputs of the program, which can be read again and again."""

    def __init__(self, items: Items, memory: int = MEMORY, progress: Callable[[int], None] = lambda _: None) -> None:
        self.items, self.memory, self.progress = items, memory, progress
        self.versions = _Versions()
        self.answers: dict[tuple[int, Observer], Any] = {}

    def __call__(self, program: Program, asked: Iterable[Asked]) -> dict[Asked, Any]:
        """The answer to every question about the program's values as it is now; what isn't known yet is measured in as few runs as fit.

        CalibrationError for values that aren't finite (item and node), and for one question that needs too much memory.
        """
        version = self.versions.of(program)
        wanted = list(dict.fromkeys(asked))
        missing = [(node, observer) for node, observer in wanted if (version[node], observer) not in self.answers]
        for group in self._groups(missing):
            for (node, observer), accumulator in self._measured(program, group).items():
                self.answers[version[node], observer] = accumulator.result()
        return {(node, observer): self.answers[version[node], observer] for node, observer in wanted}

    def _groups(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """The questions, cut so that the accumulators of one run fit into memory."""
        group: list[Asked] = []
        held = 0
        for node, observer in asked:
            size = observer.memory([n if isinstance(n, int) else 1 for n in node.meta["val"].shape])
            if size > self.memory:
                raise CalibrationError(
                    "a statistic doesn't fit into memory",
                    where=site_name(node),
                    why=f"{type(observer).__name__} of {list(node.meta['val'].shape)} takes {size} bytes, the limit is {self.memory}",
                    do="exclude the site in the recipe, or raise compile(memory=...)",
                )
            if group and held + size > self.memory:
                yield group
                group, held = [], 0
            group.append((node, observer))
            held += size
        if group:
            yield group

    def _measured(self, program: Program, asked: Sequence[Asked]) -> dict[Asked, Accumulator]:
        found = {question: question[1].start() for question in asked}
        by_node: dict[fx.Node, list[Accumulator]] = {}
        for (node, _), accumulator in found.items():
            by_node.setdefault(node, []).append(accumulator)
        nodes = _needed(program, by_node)
        for count, item in enumerate(self.items, 1):
            walk(nodes, program.constants, item, (), partial(_feed, by_node, count - 1))
            self.progress(count)
        return found


def _feed(by_node: Mapping[fx.Node, Sequence[Accumulator]], index: int, node: fx.Node, value: Any) -> None:
    if node not in by_node:
        return
    if not bool(torch.isfinite(value).all()):
        wrong = int((~torch.isfinite(value)).sum())
        raise CalibrationError(
            "the model computes values that aren't finite",
            where=f"{site_name(node)}, calibration item {index}",
            why=f"{wrong} of {value.numel()} values are inf or nan",
            do="remove the item, or exclude the place in the recipe",
        )
    for accumulator in by_node[node]:
        accumulator.add(value)


def _needed(program: Program, wanted: Iterable[fx.Node]) -> list[fx.Node]:
    """All inputs, and what the wanted nodes are computed from, in order."""
    needed = ancestors(wanted)
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
