"""How many independent changes of a value's channels constants can absorb, found from numbers alone: no rule of any op is known here.

Around the value a region of the graph is cut out; what comes in from outside is free, what goes out must stay. Unknown are the change u of the
value and changes d of the region's constants along each of their axes. To first order the outputs J_out d must be 0 and the value's own change
J_x d must be u x, for every input. So what constants can absorb are the u for which M_u u lies in the range of M_d, where the rows of
M = [M_d, M_u] are gradients at random inputs under random cotangents; their number is the dimension of a kernel.

    scale    constants c exp(d), the value x exp(u); a norm without gain and a number that is added have a vector to change
    shift    constants c + d, the value x + u; a layer or norm without bias has one to change
    rotate   x + x A with A in planes of neighbouring channels, constants alike; layer norms without their mean, as centred writers leave them;
             functions with a kink bend everywhere

Channels change in a few sets at a time: four of the value's for all but rotations. The other kinds are scales in disguise, of a region whose
ops are replaced by ops that a scale passes where the change passes the true one:

    sign     odd functions become the identity, even ones a fixed value, others no longer pass a scale
    permute  functions of one value and norms become the identity; products of two values sums, where all must change together
    remove   as permute, but nothing passes a norm

Blind spots: what is absorbed farther away than the region reaches; what the disguise gets wrong; changes that don't respect the sets.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxcompress.interpret import run
from fxcompress.program import Program
from fxcompress.transport import Kind, Seed
from tests.transport.helpers import doubled

aten = torch.ops.aten
LIMIT = 60
SOME = 32  # rows whose gradients are held at once
SPARE = 24  # rows beyond the number of unknowns
INPUTS = 7  # the rows are spread over as many and one more
ZERO = 1e-9  # a singular value this small, relative to the greatest, is none: an eps in a norm gives 1e-6, rounding 1e-13
NORMS: dict[Any, tuple[str, int]] = {  # per norm op its input's name and its channel axis
    aten.layer_norm.default: ("input", -1),
    aten.rms_norm.default: ("input", -1),
    aten.group_norm.default: ("input", 1),
}
ADDS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
FIRST = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)  # layers whose weight has its outputs first
LAST = (aten.mm.default, aten.addmm.default, aten.conv_transpose2d.input)  # or after its inputs
EXTREMES = (aten.maximum.default, aten.minimum.default, aten.clamp.default)
KINKED = (aten.relu.default, aten.leaky_relu.default, aten.abs.default)
Op = Callable[..., Any]


class Oracle:
    """A program in float64 with every value on its example, and on one where masks among the inputs hide a whole entry of the batch. varying:
    the nodes that the inputs' numbers decide, not only their sizes."""

    def __init__(self, program: Program, limit: int = LIMIT) -> None:
        self.program, self.limit = doubled(program), limit
        self.nodes = {n.name: n for n in self.program.graph.nodes}
        self.values: dict[fx.Node, Any] = {}
        self.hidden: dict[fx.Node, Any] = {}
        self.varying: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()  # made from the inputs' sizes, and from constants at most
        self._known: dict[str, int] = {}
        run(self.program, self.program.example, self._note)
        masked = [_hidden(x) for x in self.program.example]
        if any(a is not b for a, b in zip(masked, self.program.example, strict=True)):
            run(self.program, masked, self.hidden.__setitem__)

    def _note(self, node: fx.Node, value: Any) -> None:
        self.values[node] = value
        is_size = node.target is aten.sym_size.int or "arange" in str(node.target)
        if node.op == "placeholder" or (not is_size and self.varying.intersection(node.all_input_nodes)):
            self.varying.add(node)
        elif is_size or self.sized.intersection(node.all_input_nodes):
            self.sized.add(node)

    def freedom(self, kind: Kind, seed: Seed) -> int:
        """The number of independent changes of the kind, at the seed, that constants can absorb; for a rotation 1 if a plane can turn."""
        if seed.node.op != "call_function":
            return 0
        region = Region(kind, Seed(self.nodes[seed.node.name], seed.axes), self, self._around(seed.node.name))
        if region.text not in self._known:
            self._known[region.text] = region.freedom() if region.leaves else 0
        return self._known[region.text]

    def _around(self, name: str) -> list[fx.Node]:
        """The LIMIT nodes nearest to one, by steps from value to value, in order."""
        start = self.nodes[name]
        found, queue = {start}, deque([start])
        while queue and len(found) < self.limit:
            node = queue.popleft()
            for near in (*node.users, *node.all_input_nodes):
                if near not in found and near not in self.sized and near.op == "call_function" and _is_numeric(self.values[near]):
                    found.add(near)
                    queue.append(near)
        return [n for n in self.program.graph.nodes if n in found]


def _hidden(x: Tensor) -> Tensor:
    """A mask of ones and zeros with none but zeros in the last entry of the batch; anything else as it is."""
    if x.is_floating_point() or not x.numel() or x.dim() < 2 or int(x.min()) < 0 or int(x.max()) != 1:
        return x
    masked = x.clone()
    masked[-1] = 0
    return masked


def _is_numeric(value: Any) -> bool:
    return _is_float(value) or isinstance(value, tuple | list)


@dataclass
class Region:
    """nodes: in order; leaves: constants that nobody outside reads; outside: values that come in; results: values that go out."""

    kind: Kind
    seed: Seed
    known: Oracle
    nodes: list[fx.Node]
    leaves: list[fx.Node] = field(default_factory=list)
    outside: list[fx.Node] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)
    virtual: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)  # op: axes along which it has a vector more to change
    draws: int = 0

    def __post_init__(self) -> None:
        self.values, inside = self.known.values, set(self.nodes)
        read = dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes if n not in inside)
        constants = [n for n in read if n.op == "get_attr" and self.values[n].is_floating_point()]
        self.leaves = [n for n in constants if inside.issuperset(n.users)]
        self.outside = [n for n in read if n.op != "get_attr" and n in self.known.varying]
        self.results = [n for n in self.nodes if not inside.issuperset(n.users)]
        self.ops = {n: _disguised(self, n) for n in self.nodes}
        self.virtual = {n: axes for n in self.nodes if (axes := self._missing(n))}
        self.generator = torch.Generator().manual_seed(0)

    @functools.cached_property
    def text(self) -> str:
        """The region without names: equal for equal parts of a model."""
        number = {n: f"%{i}" for i, n in enumerate([*self.leaves, *self.outside, *self.nodes])}
        shape = [(str(n.target) if n.op == "call_function" else n.op, _form(self.values[n])) for n in number]
        calls = [str(fx.node.map_arg((n.args, n.kwargs), lambda x: number.get(x) or _form(self.values[x]))) for n in self.nodes]
        ends = [number[n] for n in self.results]
        return str((self.kind, self.seed.axes, number[self.seed.node], shape, calls, ends))

    def freedom(self) -> int:
        """The dimension of {u: M_u u in range M_d}. Fewer outputs leave no less: none under the value alone, or under what follows
        from it, is none."""
        for some in ([], self._after()):
            if len(some) < len(self.results) and not self._bound_by(some).dimension():
                return 0
        return self.dimension()

    def _after(self) -> list[fx.Node]:
        """The outputs that depend on the value."""
        found = {self.seed.node}
        found.update(n for n in self.nodes if found.intersection(n.all_input_nodes))
        return [n for n in self.results if n in found]

    def _bound_by(self, results: list[fx.Node]) -> Region:
        """The region with these outputs only, without what they and the value don't depend on."""
        needed = {self.seed.node, *results}
        for node in reversed(self.nodes):
            needed.update(node.all_input_nodes if node in needed else ())
        part = copy.copy(self)
        part.nodes, part.leaves, part.outside = ([n for n in nodes if n in needed] for nodes in (self.nodes, self.leaves, self.outside))
        part.virtual = {n: axes for n, axes in self.virtual.items() if n in needed}
        part.results = results
        return part

    def dimension(self) -> int:
        """Of {u: M_u u in range M_d}, for the outputs as they are."""
        first = self._rows(SPARE)
        if not first[1].any():
            return 0
        unknowns = sum(p.shape[1] for p in first)
        d, u = (torch.cat(p) for p in zip(first, *(self._rows(unknowns // INPUTS + 1) for _ in range(INPUTS)), strict=True))
        r = torch.linalg.qr(_scaled(torch.cat([d, u], 1)), mode="r")[1][d.shape[1] :, d.shape[1] :]
        if self.kind == Kind.SHIFT:
            r = torch.cat([r, *_evenly(u.norm(dim=0))])
        return int((torch.linalg.svdvals(r) < ZERO).sum())

    def _rows(self, count: int) -> tuple[Tensor, Tensor]:
        """[count, unknowns]: gradients for the changes of constants and of the value, at one input, under random cotangents."""
        leaves = {n: self.values[n].clone().requires_grad_() for n in self.leaves}
        vectors = {(n, a): torch.zeros(self.values[n].shape[a], dtype=torch.float64, requires_grad=True) for n, a in self._places()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batched gradient
            env = self._evaluated({**self.values, **leaves, **self._input()}, vectors)
        x = env[self.seed.node]
        ends = [v for n in (self.seed.node, *self.results) for v in pytree.tree_leaves(env[n]) if v.requires_grad]
        if not x.requires_grad:
            return torch.zeros(count, 1), torch.zeros(count, 1)
        sources = [*leaves.values(), *vectors.values()]
        parts = [self._some_rows(min(SOME, count - i), x, ends, list(leaves.values()), sources) for i in range(0, count, SOME)]
        d, u = (torch.cat(p) for p in zip(*parts, strict=True))
        return d, u

    def _some_rows(self, count: int, x: Tensor, ends: list[Tensor], leaves: list[Tensor], sources: list[Tensor]) -> tuple[Tensor, Tensor]:
        cotangents = [(torch.rand(count, *v.shape, generator=self.generator, dtype=torch.float64) - 0.5) / v.numel() ** 0.5 for v in ends]
        found = self._gradients(ends, sources, cotangents)
        grads = [torch.zeros(count, *s.shape, dtype=torch.float64) if g is None else g for g, s in zip(found, sources, strict=True)]
        return self._columns(leaves, grads), -self._moved(x, cotangents[0])

    def _gradients(self, ends: list[Tensor], sources: list[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor | None]:
        """Per source [rows, ...], or None if it doesn't matter."""
        try:
            return torch.autograd.grad(ends, sources, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True)
        except RuntimeError:  # torch 2.13 has no batched gradient of some convolutions
            rows = list(zip(*cotangents, strict=True))
        alone = [torch.autograd.grad(ends, sources, row, retain_graph=True, allow_unused=True) for row in rows]
        return [None if g[0] is None else torch.stack(g) for g in zip(*alone, strict=True)]

    def _columns(self, leaves: list[Tensor], grads: list[Tensor]) -> Tensor:
        own, extra = grads[: len(leaves)], grads[len(leaves) :]
        if self.kind == Kind.ROTATE:
            turns = [_turns(x.detach(), g, a) for x, g in zip(leaves, own, strict=True) for a in range(x.dim())]
            return torch.cat([torch.zeros(len(grads[0]), 1, dtype=torch.float64), *turns], 1)
        if self.kind != Kind.SHIFT:
            own = [g * leaf.detach() for g, leaf in zip(own, leaves, strict=True)]
        else:  # a bias may have to take off W z
            extra = [*extra, *(g @ w for (n, _), g in zip(self._places(), extra, strict=True) if (w := self._weight(n)) is not None)]
        return torch.cat([*(self._parts(c) for g in own for c in _along_axes(g)), *map(self._parts, extra)], 1)

    def _places(self) -> list[tuple[fx.Node, int]]:
        return [(node, axis) for node, axes in self.virtual.items() for axis in axes]

    def _weight(self, node: fx.Node) -> Tensor | None:
        """[out, in] of a layer, summed over a kernel; None for other ops, and for layers of several groups."""
        place = {aten.addmm.default: 2}.get(node.target, 1)
        weight = self.values[node.args[place]] if node.target in (*FIRST, *LAST) else None  # type: ignore[index]
        if weight is None or (len(node.args) > 6 and node.args[6] != 1):
            return None
        weight = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
        return weight.T if node.target in LAST else weight

    def _moved(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """[rows, channels]: what the change of each channel does to the value, seen by the cotangents."""
        x, axes = x.detach(), [a % x.dim() for a in self.seed.axes]
        if self.kind == Kind.ROTATE:
            return _turns(x, cotangent, axes[-1])
        product = cotangent if self.kind == Kind.SHIFT else cotangent * x
        rest = [a + 1 for a in range(x.dim()) if a not in axes]
        return self._parts((product.sum(rest) if rest else product).flatten(1))

    def _parts(self, columns: Tensor) -> Tensor:
        """Sums over sets of channels: 0, 1, 4, 5, ... and 2, 3, 6, 7, ..., which heads, pairs and copies of channels leave together; for every
        half of the value's length on its own where an axis is so long."""
        size = max(self.width // 2, 1)
        halves = columns.unflatten(1, (-1, size)) if columns.shape[1] % size == 0 else columns[:, None]
        odd = (torch.arange(halves.shape[-1]) // 2) % 2 == 1
        return torch.cat([halves[..., ~odd].sum(-1), halves[..., odd].sum(-1)], 1)

    @property
    def width(self) -> int:
        """How many channels the value has."""
        shape = self.values[self.seed.node].shape
        return math.prod(shape[a] for a in self.seed.axes)

    def _input(self) -> dict[fx.Node, Any]:
        """Values from outside, drawn anew around those on the example, and around those under masks in turn."""
        self.draws += 1
        around = self.known.hidden if self.draws % 2 else {}
        return {n: pytree.tree_map(self._redrawn, around.get(n, self.values[n])) for n in self.outside}

    def _redrawn(self, value: Any) -> Any:
        if not _is_float(value) or not value.isfinite().all():
            return value
        if (value > 0).all():  # it may be under a root
            return value * torch.exp(0.3 * torch.randn(value.shape, generator=self.generator, dtype=torch.float64))
        return value + value.std(correction=0).clamp(min=0.1) * torch.randn(value.shape, generator=self.generator, dtype=torch.float64)

    def _evaluated(self, env: dict[fx.Node, Any], vectors: dict[tuple[fx.Node, int], Tensor]) -> dict[fx.Node, Any]:
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            value = self.ops[node](*args, **kwargs)
            for axis in self.virtual.get(node, ()):
                vector = vectors[node, axis].reshape(-1, *(1,) * (-axis % value.dim() and value.dim() - 1 - axis % value.dim()))
                value = value * (1 + vector) if node.target in NORMS and self.kind != Kind.SHIFT else value + vector
            env[node] = value
        return env

    def _missing(self, node: fx.Node) -> tuple[int, ...]:
        """The axes along which an op has a vector that it was not given: gain or bias, or a number that is added."""
        given = _arguments(node)
        if node.target in ADDS and self.kind == Kind.SCALE:
            numbers = [a for a in node.args[:2] if not isinstance(a, fx.Node)]
            return tuple({1, node.meta["val"].dim() - 1} - {0}) if numbers and numbers[0] else ()
        if node.target in NORMS:
            name = "bias" if self.kind == Kind.SHIFT else "weight"
            can = name in given and given[name] is None and self.kind in (Kind.SCALE, Kind.SIGN, Kind.SHIFT)
            return (NORMS[node.target][1],) if can else ()
        is_layer = self.kind == Kind.SHIFT and node.target in (*FIRST, *LAST) and not self.known.varying.intersection(node.args[1:3])
        return (1 if "conv" in str(node.target) else -1,) if is_layer or (self.kind == Kind.SHIFT and node.target is aten.addmm.default) else ()


def _disguised(region: Region, node: fx.Node) -> Op:
    """The op that stands for a node's under the region's kind of change."""
    if region.kind == Kind.ROTATE and node.target is aten.layer_norm.default:
        return _centred
    if region.kind == Kind.ROTATE and node.target in KINKED:  # on one side of the kink, where a channel may always be, it is linear
        return lambda x, *_: x + x.tanh()
    if region.kind == Kind.SIGN:
        return _under_signs(region, node)
    if region.kind in (Kind.PERMUTE, Kind.REMOVE):
        return _under_moves(region, node)
    return _op(node)


def _op(node: fx.Node) -> Op:
    """The op itself; a norm with an eps that can't be overlooked, since what holds but for a tiny one doesn't hold."""
    assert callable(node.target)
    if node.target is aten.copy.default:  # it has no derivative
        return lambda into, value, *_: value.to(into.dtype).expand(into.shape)
    if node.target not in NORMS:
        return node.target
    names = list(_arguments(node))

    def coarse(*args: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        given["input"] = given["input"].contiguous()  # torch 2.13 crashes in the gradient of a group norm over five axes, channels last
        return node.target(**{**given, "eps": 0.1})  # type: ignore[operator]

    return coarse


def _under_signs(region: Region, node: fx.Node) -> Op:
    if node.target is aten.rms_norm.default:
        return lambda x, shape, weight=None, eps=None: x if weight is None else x * weight
    f, values = _op(node), region.values
    if len(node.all_input_nodes) > 1 or node.target in (*ADDS, *NORMS) or not isinstance(values[node], Tensor):
        return _refused(f) if node.target in EXTREMES else f
    x, y = values[node.all_input_nodes[0]], values[node]
    call = functools.partial(_called, node)
    if not isinstance(x, Tensor) or not _is_float(y):
        return f
    signs = (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5).double() * 2 - 1
    if x.shape == y.shape and _same(call(signs * x), y):
        return _fixed(y)
    if _same(call(2 * x), 2 * y):
        return f if _same(call(-x), -y) else _refused(f)
    return (lambda a, *_, **__: a) if x.shape == y.shape and _same(call(signs * x), signs * y) else _refused(f)


def _under_moves(region: Region, node: fx.Node) -> Op:
    f, values, tensors = _op(node), region.values, [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if node.target in NORMS or (node.target is aten.mean.dim and node.args[1] == [-1]):
        if region.kind == Kind.REMOVE:
            return _refused(f)
        return functools.partial(_unnormed, NORMS[node.target][1]) if node.target in NORMS else _fixed(values[node])
    if node.target in (*ADDS, *PRODUCTS) and len(set(tensors)) == 1:
        return lambda a, b, **_: a if isinstance(a, Tensor) else b
    if node.target in PRODUCTS and _move_together(*(values[t].shape for t in tensors)):
        return lambda a, b, **_: a + b
    x, y = values[node.all_input_nodes[0]], values[node]
    if len(node.all_input_nodes) > 1 or not _is_float(x) or not _is_float(y) or x.shape != y.shape:
        return f
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    moved = _called(node, x.flatten()[order].view_as(x))
    return (lambda a, *_, **__: a) if _same(moved, y.flatten()[order].view_as(y)) else f


def _move_together(a: torch.Size, b: torch.Size) -> bool:
    """Whether two factors have the same channels, along the last axis or along axis 1."""
    rank = max(len(a), len(b))
    a, b = ((1,) * (rank - len(s)) + tuple(s) for s in (a, b))
    return a[-1] == b[-1] != 1 or (rank > 3 and a[1] == b[1] != 1)


def _unnormed(axis: int, x: Tensor, _: Any, weight: Tensor | None = None, bias: Tensor | None = None, *__: Any) -> Tensor:
    for vector in (weight, bias):
        if isinstance(vector, Tensor):
            x = x + vector.reshape(-1, *(1,) * (x.dim() - 2 if axis == 1 else 0))
    return x


def _centred(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    """A layer norm as it is once the mean has been taken off all that writes its input."""
    y = torch.nn.functional.rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias


def _fixed(y: Tensor) -> Op:
    return lambda *_, **__: y


def _called(node: fx.Node, x: Tensor) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: x)
    return _op(node)(*args, **kwargs)


def _refused(f: Op) -> Op:
    """An op that no scale passes."""

    def bent(*args: Any, **kwargs: Any) -> Any:
        y = f(*args, **kwargs)
        return y + y.tanh()

    return bent


def _same(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _along_axes(grads: Tensor) -> Iterator[Tensor]:
    """[rows, size] per axis of [rows, ...]."""
    for axis in range(1, grads.dim()):
        rest = [a for a in range(1, grads.dim()) if a != axis]
        yield grads.sum(rest) if rest else grads


def _turns(x: Tensor, cotangent: Tensor, axis: int) -> Tensor:
    """[rows, planes]: what turns in the planes of channels (0, 1), (8, 9), ... of an axis do, seen by the cotangents."""
    x, g = x.movedim(axis, -1), cotangent.movedim(axis + 1, -1)
    p = torch.arange(0, x.shape[-1] - 1, 8)
    turned = g[..., p + 1] * x[..., p] - g[..., p] * x[..., p + 1]
    return turned.sum(list(range(1, turned.dim() - 1))) if turned.dim() > 2 else turned


def _evenly(norms: Tensor) -> Iterator[Tensor]:
    """Rows that rule out one number for all channels of a half: norms take that off again, and no change of this kind is worth finding."""
    halves = len(norms) // 2
    for half in range(halves):
        yield _scaled(torch.where(torch.arange(len(norms)) % halves == half, norms, 0)[:, None]).T


def _scaled(columns: Tensor) -> Tensor:
    norms = columns.norm(dim=0)
    return columns.double() / torch.where(norms > 0, norms, 1)


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else []
    return {**dict.fromkeys(names), **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _form(value: Any) -> Any:
    return (
        (tuple(value.shape), str(value.dtype))
        if isinstance(value, Tensor)
        else value
        if isinstance(value, int | float)
        else type(value).__name__
    )
