"""Plan: what a change may be, and where it lands. Symbolic until `apply` gets numbers: one entry per class, so that no illegal change can be
written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.edit import Edit, Site
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.rotation import Rotation
from fxcompress.program import Program
from fxcompress.transport.change import Change, Elementwise, permuted, removed, rotated
from fxcompress.transport.facts import Facts
from fxcompress.transport.labels import FREE, UNSET, Index, Kind, Label, Stop, as_tensor
from fxcompress.transport.relations import relate
from fxcompress.transport.solver import Extra, Seed, Solver

IDENTITY = {Kind.SCALE: 1.0, Kind.SIGN: 1.0, Kind.SHIFT: 0.0}


@dataclass(frozen=True, eq=False)
class Plan:
    """classes: parameter -> class, UNSET where pinned. blocks: class -> block, for kinds that mix. pinned: per reason the parameters.

    steady: blocks whose rotation must keep the mean of its channels, R 1 = 1, since some op adds one number to all or sees their mean.
    values: every labelled value with its labels; leaves: the constants among them. loose: values that change in a way no label says, until an
    op swallows it. choices: the route taken where there was one.
    """

    facts: Facts
    kind: Kind
    seeds: tuple[tuple[Seed, Index], ...]
    classes: Index
    blocks: Index
    steady: frozenset[int]
    pinned: Mapping[Stop, Index]
    values: Mapping[fx.Node, tuple[Label, ...]]
    loose: tuple[fx.Node, ...]
    extras: tuple[Extra, ...]
    choices: Mapping[fx.Node, str]

    @property
    def leaves(self) -> dict[fx.Node, tuple[Label, ...]]:
        """The constants that absorb the change."""
        return {n: labels for n, labels in self.values.items() if n.op == "get_attr"}

    @property
    def count(self) -> int:
        """How many free classes there are: the length of the vector."""
        return int(self.classes.max(initial=UNSET)) + 1

    @property
    def is_whole(self) -> bool:
        """Whether nothing is pinned."""
        return not self.pinned

    def reason(self) -> str:
        """The first stop as a sentence; "" if nothing is pinned."""
        return next((stop.reason for stop in self.pinned), "")

    def nothing(self) -> Plan:
        """The same reasons, and no class free."""
        none = np.empty(0, np.int64)
        return replace(self, classes=np.full_like(self.classes, UNSET), blocks=none, steady=frozenset())

    def gather(self, statistics: Mapping[fx.Node, Tensor], reduce: str = "amax") -> Tensor:
        """A statistic per class, [classes], float64, over every position that carries it. statistics: per labelled node a tensor of the node's
        rank, whose size along unlabelled axes is reduced first. reduce: amax, amin or sum. Classes met nowhere get the neutral element."""
        start = {"amax": -torch.inf, "amin": torch.inf, "sum": 0.0}[reduce]
        result = torch.full((self.count,), start, dtype=torch.float64)
        for node, tensor in statistics.items():
            for label in self.values.get(node, ()):
                index = as_tensor(self.class_of(label.index))
                axes = [a for a in range(tensor.dim()) if a not in label.slot]
                found = getattr(torch, reduce)(tensor.double(), dim=axes, keepdim=True) if axes else tensor.double()
                known = index != UNSET
                result.scatter_reduce_(0, index[known], found.expand(index.shape)[known], reduce)
        return result

    def apply(
        self, edit: Edit, vector: Any, reason: str = "", leaves: Mapping[fx.Node, Tensor] | None = None, at: fx.Node | None = None
    ) -> Site:
        """Change the program: constants folded, operands added, and on every labelled value the change it now carries is recorded.

        vector: [classes], by kind: positive scales; signs; shifts; permute: the class whose content each class gets; remove: whether each
        class stays; rotate: {block: orthogonal matrix [n, n]}, new = old @ matrix. One site.
        """
        from fxcompress.transport.apply import Applied

        return Applied(self, edit, vector, leaves or {}).run(reason, at or self.seeds[0][0].node)

    def changes(self, vector: Any) -> dict[fx.Node, Change]:
        """What every labelled value becomes, where it changes."""
        numbers = self.numbers(vector)
        found = {node: self._change(labels, numbers) for node, labels in self.values.items()}
        return {node: change for node, change in found.items() if not change.is_identity()}

    def numbers(self, vector: Any) -> Any:
        """Per parameter what acts there, UNSET at the end. ValueError for a vector that is none of the kind."""
        if self.kind in IDENTITY:
            return self._elementwise(torch.as_tensor(vector, dtype=torch.float64))
        if self.kind == Kind.PERMUTE:
            return self._permutation(np.asarray(vector, dtype=np.int64))
        if self.kind == Kind.REMOVE:
            return np.append(np.append(np.asarray(vector, bool), True)[self.classes], True)
        return self._rotation(vector)

    def audit(self, before: Program, after: Program, vector: Any, inputs: Sequence[Tensor]) -> dict[str, float]:
        """Per labelled value that is read, but constants: max |d| / rms between it in `after` and its change of what it was before."""
        changes = self.changes(vector)
        replaced = {n.name for n in after.graph.nodes if not n.users}
        names = {n.name: changes.get(n, _same) for n in self.values if n.op != "get_attr" and n.name not in replaced}
        old = _kept(before, inputs, names)
        new = _kept(after, inputs, names)
        return {name: relative_error(names[name](old[name]), new[name]) for name in names if name in old and name in new}

    def _change(self, labels: tuple[Label, ...], numbers: Any) -> Any:
        if self.kind in IDENTITY:
            return Elementwise(labels, self.kind, numbers)
        if self.kind == Kind.PERMUTE:
            return permuted(labels, numbers)
        if self.kind == Kind.REMOVE:
            return removed(labels, numbers)
        return rotated(labels, self.classes, self.blocks, numbers)

    def class_of(self, index: Index) -> Index:
        """The class of each parameter in a label's index; UNSET where pinned or not known."""
        return np.append(self.classes, UNSET)[index]

    def _elementwise(self, vector: Tensor) -> Tensor:
        identity = IDENTITY[self.kind]
        self._check(
            vector.shape == (self.count,) and bool(vector.isfinite().all()), f"{list(vector.shape)}, wanted {self.count} finite numbers"
        )
        self._check(self.kind != Kind.SCALE or bool((vector > 0).all()), "a scale must be positive")
        self._check(self.kind != Kind.SIGN or bool((vector.abs() == 1).all()), "a sign is 1 or -1")
        rest = torch.full((1,), identity, dtype=torch.float64)
        return torch.cat([torch.cat([vector, rest])[as_tensor(self.classes)], rest])

    def _permutation(self, order: Index) -> Index:
        self._check(order.shape == (self.count,) and (np.sort(order) == np.arange(self.count)).all(), "no permutation of the classes")
        self._check((self.blocks[order] == self.blocks).all(), "it moves classes across blocks")
        source = np.arange(len(self.classes))
        members = np.argsort(self.classes, kind="stable")
        members = members[np.count_nonzero(self.classes == UNSET) :]
        start = np.searchsorted(self.classes[members], np.arange(self.count))
        own = self.classes[members]
        offset = np.arange(len(members)) - start[own]
        source[members] = members[start[order[own]] + offset]
        return source

    def _rotation(self, matrices: Mapping[int, Tensor]) -> Mapping[int, Rotation]:
        rotations = {block: Rotation(matrix) for block, matrix in matrices.items()}
        for block, matrix in matrices.items():
            n = int((self.blocks == block).sum())
            self._check(n > 0 and tuple(matrix.shape) == (n, n), f"block {block} has {n} classes, its matrix is {list(matrix.shape)}")
            off = (rotations[block](matrix.double().T) - torch.eye(n, dtype=torch.float64)).abs().max()
            self._check(bool(off < 1e-9), f"the matrix of block {block} is off orthogonal by {float(off):.1e}")
            tilt = (matrix.double().sum(1) - 1).abs().max()
            self._check(block not in self.steady or bool(tilt < 1e-9), f"block {block} must keep its mean, a row is off by {float(tilt):.1e}")
        return rotations

    def _check(self, holds: bool, why: str) -> None:
        if not holds:
            raise ValueError(f"not a vector for this {self.kind}: {why}")


def _same(x: Tensor) -> Tensor:
    return x


def _kept(program: Program, inputs: Sequence[Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    run(program, inputs, lambda node, value: kept.__setitem__(node.name, value) if node.name in names else None)
    return kept


def _steady(solver: Solver, classes: Index, blocks: Index) -> frozenset[int]:
    """The blocks of the classes whose mean is to be kept."""
    met = np.unique(np.append(classes, UNSET)[np.concatenate([np.ravel(i) for i in solver.means.values()])]) if solver.means else np.array([])
    return frozenset(blocks[met[met != UNSET].astype(np.int64)].tolist()) if solver.kind == Kind.ROTATE else frozenset()


def solved(solver: Solver) -> Plan:
    """Run the worklist to its fixed point and read the result off."""
    for node in solver.pending():
        relate(solver, node)
    classes = solver.classes
    values = {n: tuple(labels) for n, labels in solver.values.items() if labels and isinstance(n, fx.Node)}
    roots = classes.parent[:-1]
    is_pinned = classes.pinned[roots] != FREE
    raw = classes.blocks([label.index for labels in solver.values.values() for label in labels]) if solver.kind.is_mixing else roots
    if solver.kind == Kind.ROTATE:
        is_pinned = np.isin(raw, raw[is_pinned])
    free, number = np.unique(np.where(is_pinned, UNSET, roots), return_inverse=True)
    numbered = number.ravel() - (1 if free.size and free[0] == UNSET else 0)
    free = free[free != UNSET]
    blocks = np.unique(raw[free], return_inverse=True)[1].ravel()
    pinned: dict[Stop, Index] = {}
    for stop in np.unique(classes.pinned[roots]):
        if stop != FREE:
            pinned[solver.stops[stop]] = np.flatnonzero(classes.pinned[roots] == stop)
    return Plan(
        solver.facts,
        solver.kind,
        tuple(solver.seeds),
        numbered,
        blocks,
        _steady(solver, numbered, blocks),
        pinned,
        values,
        tuple(solver.loose),
        tuple(solver.extras.values()),
        dict(solver.choices),
    )
