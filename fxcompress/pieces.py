"""Where a program can be cut: runs of consecutive nodes with few values going in and out, which are trained or replaced one by one.

The cuts follow from what is alive. Between a layer and the addition around it two values are alive, behind the addition one: a place where
fewer values are alive than on both sides is the end of a block, whatever the model calls it. Skip connections of a UNet keep more values
alive further in, so its ends are cut off first, then what is left inside, down to pieces of a few layers.
Source: the unit of reconstruction in BRECQ (arXiv 2102.05426), section 3.2, is such a block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, fx

from fxcompress.dataflow import before_moves, decided_by_inputs
from fxcompress.program import Program, module_path

Granularity = Literal["layer", "block", "stage", "whole"]
CHAIN = 3  # layers without a way around them that one block holds


@dataclass(frozen=True)
class Piece:
    """Nodes in the order of the graph, all that lie between two cuts. inputs: what they read that is made before; outputs: what is read
    behind, or returned. Constants are neither. layers: the sites it was cut around. name: the module path that all of these share."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The deepest module path around all layers; "" for the root."""
        paths = [module_path(n).split(".") for n in self.layers or self.nodes]
        shared = paths[0]
        for path in paths[1:]:
            shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, path, strict=False)) if a != b), min(len(shared), len(path)))]
        return ".".join(shared)


def pieces(program: Program, layers: Collection[fx.Node], granularity: Granularity = "block", most: int = 12) -> list[Piece]:
    """The program cut into pieces around these layers, in order; together they hold every node but inputs, constants and the output.

    layer: one each. block: between places where nothing but the block's result is alive; cut further inside while it has more than `most`
    layers and can be. stage: blocks in a row whose results have one shape. whole: no cut.
    """
    cutter = _Cutter(program, layers)
    if granularity == "whole":
        return cutter.between([])
    return cutter.between(cutter.every() if granularity == "layer" else cutter.blocks(most) if granularity == "block" else cutter.stages(most))


class _Cutter:
    def __init__(self, program: Program, layers: Collection[fx.Node]) -> None:
        self.nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.layers = sorted(self.position[n] for n in layers)
        self.last = {n: max((self._reader(u) for u in n.users), default=-1) for n in program.graph.nodes}
        self.decided = decided_by_inputs(program)
        self.alive = self._alive()

    def _reader(self, user: fx.Node) -> int:
        return self.position.get(user, len(self.nodes))

    def _alive(self) -> list[list[fx.Node]]:
        """Per node the values that inputs decide and that are read behind it; those that only inputs hold count as well."""
        found: list[list[fx.Node]] = []
        alive = [n for n in self.last if n.op == "placeholder"]
        for i, node in enumerate(self.nodes):
            if node in self.decided and isinstance(node.meta.get("val"), Tensor):
                alive = [*alive, node]
            alive = [n for n in alive if self.last[n] > i]
            found.append(alive)
        return found

    def _cost(self, i: int) -> float:
        """How many values are alive behind node i; no cut where codes, or dequantised values that were only moved since, are among them."""
        fxc = torch.ops.fxc
        quantised = any(before_moves(n).target in (fxc.quantize.default, fxc.dequantize.default) for n in self.alive[i])
        return float("inf") if quantised else sum(n.meta["val"].is_floating_point() for n in self.alive[i])

    def _between(self, a: int, b: int) -> list[int]:
        """The cheapest place between two layers, the last of equals, in a list; empty if there is none."""
        places = [(self._cost(i), -i) for i in range(a, b) if self._cost(i) < float("inf")]
        return [-min(places)[1]] if places else []

    def every(self) -> list[int]:
        """A cut between any two layers."""
        return [i for a, b in pairwise(self.layers) for i in self._between(a, b)]

    def blocks(self, most: int) -> list[int]:
        """Cuts where fewest are alive, then within what has more than `most` layers."""
        return self._joined(sorted(self._split(self.every(), most)))

    def _split(self, places: Sequence[int], most: int) -> Iterator[int]:
        least = min(map(self._cost, places), default=0)
        chosen = [i for i in places if self._cost(i) == least]
        yield from chosen
        for a, b in pairwise([-1, *chosen, len(self.nodes)]):
            inner = [i for i in places if a < i < b]
            if len(inner) >= most:
                yield from self._split(inner, most)

    def _joined(self, cuts: list[int]) -> list[int]:
        """Without the cuts inside chains: single layers in a row, up to CHAIN of them, stay together."""
        kept: list[int] = []
        run = 0
        for a, cut, b in zip([-1, *cuts], cuts, [*cuts[1:], len(self.nodes)], strict=False):
            single = all(sum(x < i <= y for i in self.layers) <= 1 for x, y in ((a, cut), (cut, b)))
            run = run + 1 if single and run < CHAIN - 1 else 0
            if not run:
                kept.append(cut)
        return kept

    def stages(self, most: int) -> list[int]:
        """The ends of blocks behind which values of other shapes are alive than behind the one before."""
        cuts = self.blocks(most)
        shapes = [sorted(str(tuple(n.meta["val"].shape)) for n in self.alive[i] if n.op != "placeholder") for i in cuts]
        return [cut for cut, here, after in zip(cuts, shapes, [*shapes[1:], []], strict=False) if here != after]

    def between(self, cuts: Sequence[int]) -> list[Piece]:
        """The pieces that these cuts make."""
        bounds = pairwise([-1, *cuts, len(self.nodes) - 1])
        return [self._piece(a + 1, b + 1) for a, b in bounds if b > a]

    def _piece(self, start: int, stop: int) -> Piece:
        nodes = tuple(self.nodes[start:stop])
        own = set(nodes)
        inputs = dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in own and x.op != "get_attr")
        outputs = tuple(n for n in nodes if self.last[n] >= stop)
        return Piece(nodes, tuple(inputs), outputs, tuple(self.nodes[i] for i in self.layers if start <= i < stop))
