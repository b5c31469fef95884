"""Products summed over axes: linear layers, matrix products, convolutions, attention, einsum.

All are einsums of two operands, or several of them one after the other: every axis has a letter. Letters of both operands that the result
lacks are summed over; of both and the result, batch; of one operand and the result, free; of one value alone, windows (a kernel's extent, an
image's), along which nothing can vary.
A change of a summed letter is undone by the other operand; one of a free letter is the result's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.dataflow import spelled
from fxcompress.transport.facts import KEEPING, Facts
from fxcompress.transport.labels import Index, Kind, Label, canon
from fxcompress.transport.ranges import COMPUTED, range_of
from fxcompress.transport.relations.pointwise import is_flat, spread_over, triple
from fxcompress.transport.relations.views import parted
from fxcompress.transport.solver import Inner, Solver

aten = torch.ops.aten


@dataclass(frozen=True)
class Port:
    """A value with a letter per axis. split: (axis, groups): that axis is seen as two, groups first. repeat: (axis, times): seen repeated."""

    node: Any
    letters: tuple[str, ...]
    split: tuple[int, int] | None = None
    repeat: tuple[int, int] | None = None

    def sizes(self, s: Solver) -> tuple[Any, ...]:
        """The size of every letter."""
        shape = s.shape(self.node)
        if self.split is None:
            return shape
        axis, groups = self.split
        return (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])

    def read(self, s: Solver) -> list[Label]:
        """Labels with one axis per letter."""
        return [Label(self._forth(label.index), label.power) for label in s.labels(self.node)]

    def put(self, s: Solver, index: Index, power: float) -> None:
        """A label with one axis per letter."""
        s.put(self.node, self._back(s, index), power)

    def _forth(self, index: Index) -> Index:
        if self.split:
            axis, groups = self.split
            size = index.shape[axis]
            index = index.reshape(*index.shape[:axis], *((groups, size // groups) if size > 1 else (1, 1)), *index.shape[axis + 1 :])
        if self.repeat and index.shape[self.repeat[0]] > 1:
            index = index.repeat(self.repeat[1], self.repeat[0])
        return canon(index)

    def _back(self, s: Solver, index: Index) -> Index:
        if self.repeat and index.shape[self.repeat[0]] > 1:
            axis, times = self.repeat
            parted = index.reshape(*index.shape[:axis], -1, times, *index.shape[axis + 1 :])
            index = s.coarsen(parted, [axis + 1]).squeeze(axis + 1)
        if self.split:
            axis, groups = self.split
            pair = index.shape[axis : axis + 2]
            if max(pair) > 1:
                full = (*index.shape[:axis], groups, self._inner(s, axis, groups), *index.shape[axis + 2 :])
                index = np.broadcast_to(index, full)
            index = index.reshape(*index.shape[:axis], -1, *index.shape[axis + 2 :])
        return index

    def _inner(self, s: Solver, axis: int, groups: int) -> int:
        return int(s.shape(self.node)[axis]) // groups


@dataclass(frozen=True)
class Product:
    """out[lo] = sum over letters of a[la] b[lb] + bias. no_shift: why a shift of an input can't become a bias. is_result: whether what the op
    hands out is the product, or the product with something added."""

    node: fx.Node
    a: Port
    b: Port
    out: Port
    bias: Any = None
    bias_letters: tuple[str, ...] = ()
    bias_split: int | None = None
    no_shift: str = ""
    is_result: bool = True
    roles: dict[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        la, lb, lo = (frozenset(p.letters) for p in (self.a, self.b, self.out))
        self.roles.update(summed=(la & lb) - lo, batch=la & lb & lo, a=(la & lo) - lb, b=(lb & lo) - la)

    def free(self, port: Port) -> frozenset[str]:
        """The letters of an operand that go on to the result."""
        return self.roles["a" if port is self.a else "b"]


def contract(s: Solver, product: Product) -> None:
    """Push labels between the operands and the result of a product."""
    for port, partner in ((product.a, product.b), (product.b, product.a)):
        for label in port.read(s):
            _operand(s, product, port, partner, label)
    for label in product.out.read(s):
        _result(s, product, label)
    if product.bias is not None:
        port = _bias_port(product)
        for label in port.read(s):
            product.out.put(s, _moved(label.index, port, product.out), label.power)


def _operand(s: Solver, product: Product, port: Port, partner: Port, label: Label) -> None:
    letters = _letters(port, label.index)
    summed, free, batch = product.roles["summed"], product.free(port), product.roles["batch"]
    if s.kind == Kind.REMOVE and letters & batch and not _each_apart(s, product.node):
        if _by_entry(s, product.node, letters - batch):
            return _whole_entries(s, product, port, partner, label)
        letters, batch = letters - batch, frozenset()
    if letters & summed:
        index = _only(s, port, label.index, summed | batch)
        port.put(s, index, label.power)
        _undone(s, product, port, partner, Label(index, label.power))
    elif letters & free:
        index = _only(s, port, label.index, free | batch)
        port.put(s, index, label.power)
        if s.kind == Kind.SHIFT:
            return _averaged(s, product, port, partner, Label(index, label.power))
        product.out.put(s, _moved(index, port, product.out), label.power)
        _refine(s, product, port, index)
    elif letters & batch:
        _batched(s, product, port, partner, label)
    else:
        port.put(s, _only(s, port, label.index, ()), label.power)


def _undone(s: Solver, product: Product, port: Port, partner: Port, label: Label) -> None:
    """A change of a summed letter, by the other operand."""
    index = _moved(label.index, port, partner)
    if s.kind == Kind.SHIFT:
        return _shifted_input(s, product, port, partner, label)
    partner.put(s, index, label.power if s.kind.is_mixing else -label.power)
    _refine(s, product, port, label.index)


def _shifted_input(s: Solver, product: Product, port: Port, partner: Port, label: Label) -> None:
    """(x + z) W = x W + z W: a bias if W is constant; nothing if all scores of a row move alike before a softmax."""
    node = product.node
    fixed = product.bias is None or product.bias.op == "get_attr"
    if s.facts.is_constant(partner.node) and product.bias_letters and fixed and not product.no_shift:
        return s.extra(node, "input", _moved(label.index, port, partner), label.power, partner)
    if port is product.b and product.is_result and product.out.letters[-1:] == ("out",):
        scores, between = _until_softmax(s, node)
        if between is None:
            return s.loosen(scores)
        if any(_is_over_rows(s, n) for n in _behind(between)):
            why = f"{between.name} lies between {node.name} and a softmax, which then can't take off a shift of {port.node.name}"
            return s.stop(between, label.index, why)
    return s.stop(node, label.index, product.no_shift or f"{node.name}: a shift of {port.node.name} times {partner.node.name} varies with it")


def _averaged(s: Solver, product: Product, port: Port, partner: Port, label: Label) -> None:
    """A shift of the values of attention is one of the result, since the weights of a row sum to one."""
    if port is product.b and _is_softmax(s, partner.node):
        return product.out.put(s, _moved(label.index, port, product.out), label.power)
    return s.stop(product.node, label.index, f"{product.node.name}: rows of {partner.node.name} aren't known to sum to one")


def _result(s: Solver, product: Product, label: Label) -> None:
    out, batch = product.out, product.roles["batch"]
    letters = _letters(out, label.index)
    if s.kind == Kind.REMOVE and letters & batch and not _each_apart(s, product.node):
        if _by_entry(s, product.node, letters - batch):
            _put_bias(s, product, label)
            return _whole_entries(s, product, out, out, label)
        letters, batch = letters - batch, frozenset()
    side = _side(s, product, letters)
    if side is None and letters & (product.roles["a"] | product.roles["b"]):
        return s.stop(product.node, label.index, f"{product.node.name} can't give a change of rows and columns at once to its operands")
    if side is None and letters & batch:
        _put_bias(s, product, label)
        return _batched(s, product, out, out, label)
    index = _only(s, out, label.index, (product.free(side) if side else frozenset()) | batch)
    out.put(s, index, label.power)
    if side is None:
        return None
    if s.kind == Kind.SHIFT:
        return _shifted_result(s, product, side, Label(index, label.power))
    side.put(s, _moved(index, out, side), label.power)
    _refine(s, product, out, index)
    return _put_bias(s, product, Label(index, label.power))


def _side(s: Solver, product: Product, letters: frozenset[str]) -> Port | None:
    """The operand a label of the result belongs to; the constant one if it varies along letters of both."""
    mine, theirs = letters & product.roles["a"], letters & product.roles["b"]
    if mine and theirs:
        return next((p for p in (product.b, product.a) if s.facts.is_constant(p.node)), None)
    return product.a if mine else product.b if theirs else None


def _shifted_result(s: Solver, product: Product, side: Port, label: Label) -> None:
    other = product.a if side is product.b else product.b
    if product.bias is not None:
        return _put_bias(s, product, label)
    if product.bias_letters and side is product.b and s.facts.is_constant(side.node):
        return _new_bias(s, product, label)
    if side is product.b and _is_softmax(s, other.node):
        return side.put(s, _moved(label.index, product.out, side), label.power)
    return s.stop(product.node, label.index, f"{product.node.name} has no bias, and rows of {other.node.name} aren't known to sum to one")


def _put_bias(s: Solver, product: Product, label: Label) -> None:
    if product.bias is None or (s.kind in (Kind.PERMUTE, Kind.REMOVE) and not _letters(product.out, label.index) & set(product.bias_letters)):
        return
    index = _only(s, product.out, label.index, product.bias_letters)
    if (index != label.index).any() if index.shape == label.index.shape else True:
        product.out.put(s, index, label.power)
    port = _bias_port(product)
    port.put(s, _moved(index, product.out, port), label.power)


def _bias_port(product: Product) -> Port:
    return Port(product.bias, product.bias_letters, None if product.bias_split is None else (0, product.bias_split))


def _new_bias(s: Solver, product: Product, label: Label) -> None:
    """The op gains a bias."""
    port = _bias_port(product)
    index = _moved(_only(s, product.out, label.index, product.bias_letters), product.out, port)
    weight = product.b
    sizes = weight.sizes(s)
    full = [sizes[weight.letters.index(x)] for x in product.bias_letters]
    s.extra(product.node, "bias", np.broadcast_to(index, full).reshape(-1), label.power)


def _batched(s: Solver, product: Product, port: Port, partner: Port, label: Label) -> None:
    """A label on batch letters alone: a product of entries, as in `products`."""
    if s.kind == Kind.ROTATE:
        return s.stop(product.node, label.index, f"{product.node.name} would mix batch entries")
    label = Label(_only(s, port, label.index, product.roles["batch"]), label.power)
    port.put(s, label.index, label.power)
    if s.kind.is_mixing:
        for other in (product.a, product.b, product.out):
            if other is not port and not _is_flat(s, other, port, label.index):
                other.put(s, _moved(_only(s, port, label.index, other.letters), port, other), label.power)
        return None
    if s.kind == Kind.SHIFT:
        return _batched_shift(s, product, port, partner, label)
    constant = next((p for p in (product.b, product.a) if s.facts.is_constant(p.node)), None)
    if constant is None or port is constant:
        target = product.out if port is not product.out else None
        if target is None or (port is constant and not _came_from_elsewhere(s, product, port)):
            return None if port is constant else s.stop(product.node, label.index, f"{product.node.name}: a {s.kind} per batch entry")
        return target.put(s, _moved(label.index, port, target), label.power)
    return constant.put(s, _moved(label.index, port, constant), label.power if port is product.out else -label.power)


def _whole_entries(s: Solver, product: Product, port: Port, partner: Port, label: Label) -> None:
    """A batch entry (a head, a group) goes from all three or from none."""
    index = _only(s, port, label.index, product.roles["batch"])
    shared = [x for p in (product.a, product.b) for x, n in zip(p.letters, p.sizes(s), strict=True) if n == 1 and x in product.roles["batch"]]
    copied = [a for a, x in enumerate(port.letters) if x in shared and index.shape[a] > 1]
    of_copies = parted(s, product.node, index, copied)
    index = s.coarsen(index, copied) if of_copies is None else of_copies
    port.put(s, index, label.power)
    _batched(s, product, port, partner, Label(index, label.power))


def _by_entry(s: Solver, node: fx.Node, others: frozenset[str]) -> bool:
    """Whether batch entries (heads, groups) go as a whole: else the same channels go from each."""
    return not others or s.choices.setdefault(node, "entries") != "channels"


def _each_apart(s: Solver, node: fx.Node) -> bool:
    """Whether every batch entry may lose channels of its own, if each loses equally many."""
    return s.choices.get(node) == "each"


def _batched_shift(s: Solver, product: Product, port: Port, partner: Port, label: Label) -> None:
    if port is product.out:
        if product.bias is None and product.bias_letters:
            _new_bias(s, product, label)
        elif product.bias is None:
            s.stop(product.node, label.index, f"{product.node.name} has no bias")
        return None
    return _shifted_input(s, product, port, partner, label)


def _came_from_elsewhere(s: Solver, product: Product, port: Port) -> bool:
    """Whether a weight is labelled while neither the input nor the result is: another reader of it is."""
    return not any(s.labels(p.node) for p in (product.a, product.b, product.out) if p is not port)


def _refine(s: Solver, product: Product, port: Port, index: Index) -> None:
    """Channels of different batch entries may not mix."""
    if not s.kind.is_mixing:
        return
    sizes = [n if letter in product.roles["batch"] else 1 for letter, n in zip(port.letters, index.shape, strict=True)]
    if max(sizes) > 1:
        s.classes.refine((product.node, port.letters), index, np.arange(int(np.prod(sizes))).reshape(sizes))


def _is_flat(s: Solver, other: Port, port: Port, index: Index) -> bool:
    """Whether the other value has one position along all letters the label varies on."""
    shape = s.shape(other.node)
    if other.split is not None:
        return False
    varying = _letters(port, index)
    return all(letter not in varying or shape[a] == 1 for a, letter in enumerate(other.letters))


def _letters(port: Port, index: Index) -> frozenset[str]:
    return frozenset(letter for letter, n in zip(port.letters, index.shape, strict=True) if n > 1)


def _only(s: Solver, port: Port, index: Index, letters: Iterable[str]) -> Index:
    """One parameter along every other letter."""
    return s.coarsen(index, [a for a, letter in enumerate(port.letters) if letter not in set(letters)])


def _moved(index: Index, source: Port, target: Port) -> Index:
    """The index with the target's axes; letters that only the source has are of size 1."""
    shared = [x for x in target.letters if x in source.letters]
    dropped = [a for a, x in enumerate(source.letters) if x not in target.letters]
    assert all(index.shape[a] == 1 for a in dropped)
    index = index.squeeze(tuple(dropped))
    kept = [x for x in source.letters if x in target.letters]
    index = index.transpose([kept.index(x) for x in shared])
    sizes = dict(zip(shared, index.shape, strict=True))
    return index.reshape([sizes.get(x, 1) for x in target.letters])


def _lead(count: int) -> tuple[str, ...]:
    """Batch letters of the last `count` axes before the matrix."""
    return tuple(f"batch{i}" for i in range(count - 1, -1, -1))


def linear_product(s: Solver, node: fx.Node) -> Product:
    """x W^T + b; W is [out, in]."""
    given = s.args(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    rows = tuple(f"row{i}" for i in range(len(s.shape(x)) - 1))
    return Product(node, Port(x, (*rows, "in")), Port(weight, ("out", "in")), Port(node, (*rows, "out")), bias, ("out",))


def matmul_product(s: Solver, node: fx.Node) -> Product:
    """a b over the last two axes, the others broadcast. A vector operand has one letter."""
    given = s.args(node)
    a, b = given["self"], given.get("other", given.get("mat2"))
    ranks = [len(s.shape(x)) for x in (a, b)]
    left = ("in",) if ranks[0] == 1 else (*_lead(ranks[0] - 2), "row", "in")
    right = ("in",) if ranks[1] == 1 else (*_lead(ranks[1] - 2), "in", "out")
    result = (*_lead(max(*ranks, 2) - 2), *(["row"] if ranks[0] > 1 else []), *(["out"] if ranks[1] > 1 else []))
    return Product(node, Port(a, left), Port(b, right), Port(node, result), None, ("out",) if ranks[1] == 2 else ())


def addmm_product(s: Solver, node: fx.Node) -> Product:
    """bias + a b; its relation refuses other weights than 1."""
    given = s.args(node)
    bias = given["self"]
    letters = ("row", "out")[-len(s.shape(bias)) :]
    return Product(node, Port(given["mat1"], ("row", "in")), Port(given["mat2"], ("in", "out")), Port(node, ("row", "out")), bias, letters)


def conv_product(s: Solver, node: fx.Node) -> Product:
    """A convolution, grouped or transposed: channels in groups, windows, and images."""
    given = s.args(node)
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given["groups"]
    transposed = given.get("transposed", "transpose" in str(node.target))
    space = len(s.shape(weight)) - 2
    image, window, result = (tuple(f"{name}{i}" for i in range(space)) for name in ("at", "window", "to"))
    lead = ("batch_",) if len(s.shape(x)) == space + 2 else ()
    axis = len(lead)
    kernel = ("group", "in", "out", *window) if transposed else ("group", "out", "in", *window)
    return Product(
        node,
        Port(x, (*lead, "group", "in", *image), split=(axis, groups)),
        Port(weight, kernel, split=(0, groups)),
        Port(node, (*lead, "group", "out", *result), split=(axis, groups)),
        bias,
        ("group", "out"),
        groups,
        _padding(node, given, transposed),
    )


def _padding(node: fx.Node, given: Mapping[str, Any], transposed: bool) -> str:
    padding = given.get("padding", 0)
    if transposed:
        return f"{node.name} is transposed: how many taps meet varies over the image"
    zeros = padding == "same" or (not isinstance(padding, str) and any(padding if isinstance(padding, list | tuple) else [padding]))
    return f"{node.name} pads with zeros, which a shift would have to change" if zeros else ""


def einsum_products(facts: Facts, node: fx.Node) -> list[Product]:
    """The products, two operands at a time from the left, that an equation spells; none for one operand, and where a letter stands twice."""
    operands: Any = node.args[1]
    parts, result = _spelled(facts, node)
    if len(parts) < 2 or any(len(set(p)) != len(p) for p in (*parts, result)):
        return []
    sizes = {letter: size for x, part in zip(operands, parts, strict=True) for letter, size in zip(part, facts.shape(x) or (), strict=True)}
    left, products = Port(operands[0], tuple(parts[0])), list[Product]()
    for number in range(1, len(parts)):
        wanted = set(result).union(*parts[number + 1 :])
        letters = tuple(dict.fromkeys(x for x in (*left.letters, *parts[number]) if x in wanted))
        is_last = number == len(parts) - 1
        out = Port(node, tuple(result)) if is_last else Port(Inner(node, number, tuple(sizes[x] for x in letters)), letters)
        products.append(Product(node, left, Port(operands[number], tuple(parts[number])), out, is_result=is_last))
        left = out
    return products


def _spelled(facts: Facts, node: fx.Node) -> tuple[list[str], str]:
    """The terms and the result, with a letter for every axis."""
    operands: Any = node.args[1]
    return spelled(str(node.args[0]), [len(facts.shape(x) or ()) for x in operands])


def einsum(s: Solver, node: fx.Node) -> None:
    """Several operands: products, one after the other. One: its axes in another order, if none is summed."""
    (terms, result), operands = _spelled(s.facts, node), node.args[1]
    assert isinstance(operands, list | tuple)
    if len(operands) == 1 and sorted(terms[0]) == sorted(result) and len(set(result)) == len(result):
        source, target = Port(operands[0], tuple(terms[0])), Port(node, tuple(result))
        for port, other in ((source, target), (target, source)):
            for label in s.labels(port.node):
                s.put(other.node, _moved(label.index, port, other), label.power)
        return None
    products = einsum_products(s.facts, node)
    for product in products:
        contract(s, product)
    return None if products else s.stop_all(node, [*operands, node], f"{node.name}: unknown op, an einsum {','.join(terms)}->{result}")


def simple(of: Any) -> Any:
    """The relation of an op that is one product."""

    def relation(s: Solver, node: fx.Node) -> None:
        """Of the product that `of` makes of a node."""
        contract(s, of(s, node))

    return relation


def addmm(s: Solver, node: fx.Node) -> None:
    """bias + a b, with factors of 1."""
    given = s.args(node)
    if given["beta"] != 1 or given["alpha"] != 1:
        return s.stop_all(node, [*node.all_input_nodes, node], f"{node.name} weighs its terms")
    return contract(s, addmm_product(s, node))


def attention(s: Solver, node: fx.Node) -> None:
    """softmax(q k^T c + mask) v: q against k, v to the result, heads alike. Heads of k and v may serve several of q."""
    given = s.args(node)
    q, k, v, mask = (given[n] for n in ("query", "key", "value", "attn_mask"))
    if given["dropout_p"]:
        return s.stop_all(node, [q, k, v, mask, node], f"{node.name} drops at random")
    lead = _lead(len(s.shape(q)) - 2)
    query, result = Port(q, (*lead, "row", "in")), Port(node, (*lead, "row", "out"))
    key = Port(k, (*lead, "place", "in"), repeat=_shared(s, q, k, given))
    value = Port(v, (*lead, "place", "out"), repeat=_shared(s, q, v, given))
    for port, partner, own in ((query, key, "in"), (key, query, "in"), (value, result, "out"), (result, value, "out")):
        for label in port.read(s):
            _attended(s, node, port, partner, own, label, [query, key, value, result], mask)
    if s.kind.is_mixing:
        _masked(s, node, mask, query)
    elif mask is not None:
        s.stop_all(node, [mask], f"{node.name}: the mask can't change")
    return None


def _shared(s: Solver, q: Any, other: Any, given: dict[str, Any]) -> tuple[int, int] | None:
    axis = len(s.shape(q)) - 3
    heads = [s.shape(x)[axis] for x in (q, other)] if axis >= 0 else [1, 1]
    known = all(isinstance(n, int) for n in heads)
    return (axis, heads[0] // heads[1]) if given["enable_gqa"] and known and heads[0] != heads[1] else None


def _attended(s: Solver, node: fx.Node, port: Port, partner: Port, own: str, label: Label, ports: list[Port], mask: Any) -> None:
    lead = tuple(x for x in port.letters if x.startswith("batch"))
    index = _only(s, port, label.index, (*lead, own))
    port.put(s, index, label.power)
    letters = _letters(port, index)
    if not letters:
        return
    if s.kind == Kind.REMOVE and len(letters) > 1 and not _each_apart(s, node):
        index = _only(s, port, index, lead if _by_entry(s, node, letters & {own}) else (own,))
        port.put(s, index, label.power)
        letters = _letters(port, index)
    if own not in letters:
        return _per_head(s, node, port, partner, Label(index, label.power), ports, mask)
    if s.kind == Kind.SHIFT and own == "in":
        if port.letters[-2] == "row":
            s.stop(node, index, f"{node.name}: a shift of the queries moves scores by different amounts")
        return
    if s.kind == Kind.SHIFT and (reason := _may_hide_rows(s, node, mask)):
        return s.stop(node, index, reason)
    inverse = own == "in" and not s.kind.is_mixing
    partner.put(s, _moved(index, port, partner), -label.power if inverse else label.power)
    if s.kind.is_mixing:
        sizes = [n if x in lead else 1 for x, n in zip(port.letters, index.shape, strict=True)]
        if max(sizes) > 1:
            s.classes.refine((node, port.letters), index, np.arange(int(np.prod(sizes))).reshape(sizes))


def _per_head(s: Solver, node: fx.Node, port: Port, partner: Port, label: Label, ports: list[Port], mask: Any) -> None:
    """A label on heads alone: moved together with all of a head's values, scaled with its partner."""
    if s.kind == Kind.ROTATE:
        return s.stop(node, label.index, f"{node.name} would mix heads")
    if not s.kind.is_mixing:
        if s.kind == Kind.SHIFT and port.letters[-1] == "in":
            return None if port.letters[-2] == "place" else s.stop(node, label.index, f"{node.name}: a shift of the queries")
        if s.kind == Kind.SHIFT and (reason := _may_hide_rows(s, node, mask)):
            return s.stop(node, label.index, reason)
        power = -label.power if port.letters[-1] == "in" else label.power
        return partner.put(s, _moved(label.index, port, partner), power)
    if s.kind == Kind.REMOVE and (of_copies := _of_copies(s, node, port, label.index, ports)) is not None:
        port.put(s, of_copies, label.power)
        label = Label(of_copies, label.power)
        ports = [p for p in ports if p.repeat is None]
    for other in ports:
        if other is not port:
            other.put(s, _moved(label.index, port, other), label.power)
    if mask is not None and not is_flat(s, mask, label.index):
        s.put(mask, label.index, label.power)
    return None


def _of_copies(s: Solver, node: fx.Node, port: Port, index: Index, ports: list[Port]) -> Index | None:
    """Of an index over heads, some of which share keys and values, the part that is one of every group's, if these are what goes."""
    axis, times = next((p.repeat for p in ports if p.repeat), (0, 1))
    if times == 1 or port.repeat or index.shape[axis] == 1:
        return None
    groups = index.reshape(*index.shape[:axis], -1, times, *index.shape[axis + 1 :])
    part = parted(s, node, groups, [a for a in (axis + 1,) if groups.shape[axis] > 1])
    return None if part is None else np.broadcast_to(part, groups.shape).reshape(index.shape)


def _may_hide_rows(s: Solver, node: fx.Node, mask: Any) -> str:
    """A row that sees no key gives 0 and not the shift; a constant mask is known to have none, and one that only adds numbers."""
    if mask is None:
        return ""
    source = mask
    while source.op == "call_function" and source.target in KEEPING:
        source = source.args[0]
    tensor = s.facts.program.constant(source)
    if tensor is None:
        value, low = s.facts.value(mask), torch.tensor(range_of(s.facts, mask)[0], dtype=torch.float64)
        is_safe = value.is_floating_point() and bool(_is_seen(low.to(value.dtype)))
        return "" if is_safe else f"{node.name}: the mask {mask.name} may hide all keys from a row, which then gives 0"
    return "" if bool(_is_seen(tensor).any(-1).all()) else f"{node.name}: the mask {mask.name} hides all keys from a row"


def _is_seen(mask: Tensor) -> Tensor:
    """Where a mask leaves a key visible. A number that is added does, however small: softmax of a row sees differences only. It must not become
    -inf, though, where it meets a score of -COMPUTED."""
    return mask if mask.dtype == torch.bool else (mask.double() - COMPUTED).to(mask.dtype) > -torch.inf


def _masked(s: Solver, node: fx.Node, mask: Any, query: Port) -> None:
    for label in s.labels(mask):
        index = s.coarsen(label.index, [label.index.ndim - 1, label.index.ndim - 2])
        s.put(mask, index, label.power)
        s.put(query.node, index, label.power)


def _until_softmax(s: Solver, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The scores on their way into softmaxes over their last axis, and the first reader that doesn't keep a shift of whole rows whole."""
    stack, scores = [(node, False)], [node]
    while stack:
        value, is_filled = stack.pop()
        for user in value.users:
            if _is_over_rows(s, user):
                continue
            if not _keeps_rows(s, value, user, is_filled):
                return scores, user
            stack.append((user, is_filled or user.target in MASKS))
            scores.append(user)
    return scores, None


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """What is computed from a node within a few steps, score by score as masks and caps do, and the node itself."""
    near = {node: None}
    for _ in range(STEPS):
        near |= dict.fromkeys(u for n in near for u in n.users if n.target not in PRODUCTS)
    yield from near


def _is_over_rows(s: Solver, node: fx.Node) -> bool:
    """Whether a node is a softmax over the last axis."""
    rank = len(s.shape(node))
    return node.target in SOFTMAX and bool(s.args(node)["dim"] % rank == rank - 1)


def _is_reshaped(s: Solver, node: fx.Node) -> bool:
    """Whether a node arranges all axes but the last anew."""
    if node.target not in RESHAPES:
        return False
    ends = [[len(s.shape(v)) - 1] for v in (node.args[0], node)]
    return tuple(ends) in s.facts.groups(node, node.args[0])  # type: ignore[arg-type]


def _keeps_rows(s: Solver, value: fx.Node, user: fx.Node, is_filled: bool) -> bool:
    """is_filled: whether a mask has put in scores that must stay as low as they are."""
    if _is_reshaped(s, user):
        return True
    if len(s.shape(user)) != len(s.shape(value)) or (is_filled and user.target not in (*COPIES, *MASKS)):
        return False
    if user.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        other = user.args[1] if user.args[0] is value else user.args[0]
        return user.args[0] is value and (not isinstance(other, fx.Node) or (s.shape(other) or (1,))[-1] == 1)
    if user.target in (aten.add.Tensor, aten.sub.Tensor):
        return user.args[0] is value or user.target is aten.add.Tensor
    if user.target in MASKS:  # what is filled in stays where it was: softmax must make 0 of it, whatever the scores are
        scores, filling = (s.args(user)[name] for name in MASKS[user.target])
        scores, filling = (scores, filling) if scores is value else (filling, scores)
        return filling is not value and range_of(s.facts, filling)[1] <= HIDDEN
    return user.target in COPIES


def _is_softmax(s: Solver, value: Any) -> bool:
    """Whether a value is a softmax over its last axis."""
    while isinstance(value, fx.Node):
        if value.target in SOFTMAX:
            return _is_over_rows(s, value)
        if value.target is aten.dropout.default and value.args[2]:
            return False
        if value.target not in COPIES and not _is_reshaped(s, value):
            return False
        value = value.args[0]
    return False


def outer(s: Solver, node: fx.Node) -> None:
    """Every entry of one vector times every one of another: a label on either is one of the result's axes."""
    given = s.args(node)
    contract(s, Product(node, Port(given["self"], ("row",)), Port(given["vec2"], ("out",)), Port(node, ("row", "out"))))


def baddbmm_product(s: Solver, node: fx.Node) -> Product:
    """a b, before it is added."""
    given, lead = s.args(node), _lead(1)
    a, b = Port(given["batch1"], (*lead, "row", "in")), Port(given["batch2"], (*lead, "in", "out"))
    return Product(node, a, b, Port(Inner(node, 0, s.shape(node)), (*lead, "row", "out")))


def baddbmm(s: Solver, node: fx.Node) -> None:
    """beta self + alpha a b, entry by entry."""
    given, product = s.args(node), baddbmm_product(s, node)
    inner = product.out.node
    contract(s, product)
    if s.kind == Kind.SHIFT:
        return triple(s, node, (given["self"], inner), (float(given["beta"]), float(given["alpha"])))
    return spread_over(s, [given["self"], inner, node])


STEPS = 6
HIDDEN = -3 * COMPUTED  # a score that softmax makes 0 beside any that is computed
MASKS: Mapping[Any, tuple[str, str]] = {  # per op that puts other scores in, the two that it chooses from
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), ("self", "value")),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), ("self", "other")),
}
SOFTMAX = (aten.softmax.int, aten._softmax.default)
COPIES = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.dropout.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int)
_CONVS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.convolution.default),
)
PRODUCTS: Mapping[Any, Any] = {
    aten.linear.default: linear_product,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default), matmul_product),
    aten.addmm.default: addmm_product,
    **dict.fromkeys(_CONVS, conv_product),
}
TABLE: Mapping[Any, Any] = {
    **{op: simple(of) for op, of in PRODUCTS.items()},
    aten.addmm.default: addmm,
    aten.einsum.default: einsum,
    aten.scaled_dot_product_attention.default: attention,
    aten.outer.default: outer,
    aten.baddbmm.default: baddbmm,
}


def products_of(facts: Facts, node: fx.Node) -> list[Product]:
    """The products that an op is, one after the other; the last one's result has the axes of the op's. Of attention none."""
    if node.target is aten.einsum.default:
        return einsum_products(facts, node)
    of = baddbmm_product if node.target is aten.baddbmm.default else PRODUCTS.get(node.target)
    return [] if of is None else [of(Solver(facts, Kind.PERMUTE), node)]
