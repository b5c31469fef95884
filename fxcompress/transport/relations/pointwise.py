"""Ops that treat every position alone.

One line an op of one operand: what happens to a change by kind, in the order scale, sign, shift, permute, rotate, remove.
"=" it goes through; "." it is swallowed: the result stays as it was; "x" it stops; a number: it goes through with its power times that.
Scales are positive. Ops of two operands: `sums`, `products`, `alike` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.dataflow import is_constant
from fxcompress.transport.facts import FILLED, filling
from fxcompress.transport.labels import KINDS, Index, Kind, Label
from fxcompress.transport.policy import rank
from fxcompress.transport.solver import Inner, Solver

aten = torch.ops.aten

CURVES = "xxx=x="  # no symmetry at all
ODD, EVEN = "x=x=x=", "x.x=x="
SAME = "======"


def unary(s: Solver, node: fx.Node) -> None:
    """One operand, by the table."""
    code = UNARY[node.target][KINDS.index(s.kind)]
    x = node.args[0]
    if code == "x":
        s.stop_all(node, [x, node], f"{node.name} ({_name(node)}) doesn't commute with a {s.kind}")
    elif code != ".":
        power = 1.0 if code == "=" else float(code)
        for label in s.labels(x):
            s.put(node, label.index, label.power * power)
        for label in s.labels(node):
            s.put(x, label.index, label.power / power)
    elif s.labels(node):
        s.stop_all(node, [node], f"{node.name} ({_name(node)}) gives no value that a {s.kind} of its operand could change")


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def cast(s: Solver, node: fx.Node) -> None:
    """To another number format, which a second operand may lend. Into integers only moves pass."""
    x: Any = node.args[0]
    value = s.facts.value(node)
    if not s.kind.is_mixing and value is not None and not (value.dtype.is_floating_point or value.dtype.is_complex):
        return s.stop_all(node, [x, node], f"{node.name} rounds to {value.dtype}")
    spread_over(s, [x, node])


def alike(s: Solver, node: fx.Node) -> None:
    """One label for all operands and the result."""
    spread_over(s, [*_operands(node), node])


def spread_over(s: Solver, ports: Sequence[Any]) -> None:
    """What one port carries, all carry. A port that is constant along the labelled axes needs nothing when channels only move, or turn
    about their mean."""
    for port in ports:
        for label in s.labels(port):
            for other in ports:
                if other is not port and not _is_spared(s, port, other, label.index):
                    s.put(other, label.index, label.power)


def _is_spared(s: Solver, port: Any, value: Any, index: Index) -> bool:
    """Whether a value needs no label where channels only move: it is the same for all that may change places."""
    return s.is_unmoved((port, value), value, index) or (s.kind == Kind.REMOVE and is_flat(s, value, index))


def is_flat(s: Solver, value: Any, index: Index) -> bool:
    """Whether a value has one position only along every axis the label varies on."""
    shape = s.shape(value)
    lead = index.ndim - len(shape)
    return all(a < lead or shape[a - lead] == 1 for a, n in enumerate(index.shape) if n > 1)


def _operands(node: fx.Node) -> list[Any]:
    flat = [x for a in (*node.args, *node.kwargs.values()) for x in (a if isinstance(a, list | tuple) else [a])]
    return [x for x in flat if isinstance(x, fx.Node)]


def sums(s: Solver, node: fx.Node) -> None:
    """a + c b. A scale is one of all three; a shift of the result is one of an operand; a number becomes a vector where it must."""
    given = s.args(node)
    a, b, alpha = given["self"], given["other"], given.get("alpha", 1)
    sign = -1.0 if node.target in SUBTRACTIONS else 1.0
    if node.target in REVERSED:
        a, b = b, a
    if isinstance(alpha, fx.Node):
        return s.stop_all(node, [a, b, node], f"{node.name} has a factor that is computed")
    if s.kind == Kind.SHIFT:
        return triple(s, node, (a, b), (1.0, sign * float(alpha)) if node.target not in REVERSED else (1.0, -float(alpha)))
    _literals(s, node, a, b)
    spread_over(s, [p for p in (a, b, node) if isinstance(p, fx.Node)])


def _literals(s: Solver, node: fx.Node, a: Any, b: Any) -> None:
    """A number added to a labelled value."""
    number = next((x for x in (a, b) if not isinstance(x, fx.Node)), 0)
    if number == 0:
        return
    for label in s.labels(node):
        if s.kind == Kind.ROTATE:
            s.keep_mean(node, label.index)
        elif s.kind in (Kind.SCALE, Kind.SIGN):
            s.extra(node, "literal", label.index, label.power)


def products(s: Solver, node: fx.Node) -> None:
    """a b or a / b. A scale of the result is one of a factor, or factors change against each other."""
    given = s.args(node)
    a, b = given["self"], given["other"]
    power = -1.0 if node.target in QUOTIENTS else 1.0
    if given.get("rounding_mode"):
        return s.stop_all(node, [a, b, node], f"{node.name} rounds")
    if s.kind in (Kind.SCALE, Kind.SIGN):
        triple(s, node, (a, b), (1.0, power))
    elif s.kind == Kind.SHIFT:
        _shifted_product(s, node, a, b, power)
    elif s.kind == Kind.ROTATE:
        _rotated_product(s, node, a, b)
    else:
        spread_over(s, [a, b, node])


def _shifted_product(s: Solver, node: fx.Node, a: Any, b: Any, power: float) -> None:
    number, value = (b, a) if isinstance(b, int | float) else (a, b) if isinstance(a, int | float) and power == 1 else (None, None)
    if number is None or not number:
        return s.stop_all(node, [a, b, node], f"{node.name}: a shift times a factor that isn't one number would vary with it")
    factor = float(number) ** power
    for label in s.labels(value):
        s.put(node, label.index, label.power * factor)
    for label in s.labels(node):
        s.put(value, label.index, label.power / factor)


def _rotated_product(s: Solver, node: fx.Node, a: Any, b: Any) -> None:
    """The other factor must be the same for all channels."""
    if a is b:
        return squared(s, node)
    for port in (a, b, node):
        for label in s.labels(port):
            for x in (a, b) if port is node else (node,):
                other = (b if port is a else a) if port is not node else (b if x is a else a)
                if s.is_flat_in_rows((node, other), other, label.index) or is_uniform(s, other, label.index):
                    s.put(x, label.index, label.power)
                elif port is not node or x is _carrier(s, (a, b), label.index):
                    s.stop(node, label.index, f"{node.name} multiplies the channels by different factors, {described(other)}")


def _carrier(s: Solver, factors: tuple[Any, Any], index: Index) -> Any:
    """The factor that varies along the labelled axes; the first if both do."""
    return next((f for f in factors if not is_flat(s, f, index) and not is_uniform(s, f, index)), factors[0])


def is_uniform(s: Solver, value: Any, index: Index) -> bool:
    """Whether a constant has equal entries along the labelled axes."""
    if not isinstance(value, fx.Node):
        return True
    tensor = s.facts.program.constant(value)
    if tensor is None:
        return False
    lead = index.ndim - tensor.dim()
    axes = [a - lead for a, n in enumerate(index.shape) if n > 1 and a >= lead]
    first = tensor
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return bool(((tensor - first).abs() <= 1e-9 * first.abs()).all()) if axes else True


def described(value: Any) -> str:
    """A factor as reasons name it, with what would tell its numbers."""
    if not isinstance(value, fx.Node):
        return str(value)
    return f"{value.name}, made in the graph: fold constants first" if value.op != "get_attr" and is_constant(value) else value.name


def squared(s: Solver, node: fx.Node) -> None:
    """x²: a rotation is swallowed if everybody sums it over all rotated channels."""
    x: Any = node.args[0]
    for label in s.labels(x):
        if not all(_sums_over(s, user, label) for user in node.users):
            s.stop(node, label.index, f"{node.name} squares channels that aren't summed over")
        s.loosen([node])
    s.stop_all(node, [node], f"{node.name} squares: a rotation after it is none before it")


def _sums_over(s: Solver, user: fx.Node, label: Label) -> bool:
    if user.target not in (aten.mean.dim, aten.sum.dim_IntList):
        return False
    axes = {a % label.index.ndim for a in user.args[1] or range(label.index.ndim)}  # type: ignore[union-attr, operator]
    s.keep_rows(user, label.index, set(label.slot) - axes)
    return bool(set(label.slot) & axes)


def square(s: Solver, node: fx.Node) -> None:
    """The op that squares: a rotation as by any other product with itself, the rest by the table."""
    return squared(s, node) if s.kind == Kind.ROTATE else unary(s, node)


def powers(s: Solver, node: fx.Node) -> None:
    """x to a constant power."""
    x, exponent = node.args[0], node.args[1]
    if not isinstance(exponent, int | float) or isinstance(x, int | float):
        return s.stop_all(node, [x, exponent, node], f"{node.name} raises to a power that varies")
    if s.kind == Kind.ROTATE and exponent == 2:
        return squared(s, node)
    if s.kind == Kind.SCALE and exponent:
        for label in s.labels(x):
            s.put(node, label.index, label.power * exponent)
        for label in s.labels(node):
            s.put(x, label.index, label.power / exponent)
    elif s.kind == Kind.SIGN and exponent == int(exponent):
        if exponent % 2:
            return alike(s, node)
        s.stop_all(node, [node], f"{node.name} is even: its sign is nobody's")
    elif s.kind in (Kind.PERMUTE, Kind.REMOVE):
        alike(s, node)
    else:
        s.stop_all(node, [x, node], f"{node.name} doesn't commute with a {s.kind}")


def triple(s: Solver, node: fx.Node, operands: tuple[Any, Any], weights: tuple[float, float]) -> None:
    """result = w0 a + w1 b in the exponents (products) or in the values (sums). A change is carried by two of the three."""
    a, b = operands
    if a is b:
        total = weights[0] + weights[1] if s.kind != Kind.SIGN else 0.0  # a sign times itself is none
        for label in s.labels(a) if total else ():
            s.put(node, label.index, label.power * total)
        for label in s.labels(node):
            s.put(a, label.index, label.power / total) if total else s.stop(node, label.index, f"{node.name} meets {a.name} with itself")
        return
    ports = {"a": (a, weights[0]), "b": (b, weights[1]), "out": (node, -1.0)}
    if not any(s.labels(port) for port, _ in ports.values()):
        return
    route = s.choices.setdefault(node, _route(s, node, a, b))
    first, second, third = _paired(route)
    _balance(s, node, ports[first], ports[second])
    _balance(s, node, ports[second], ports[first])
    for label in s.labels(ports[third][0]):
        _odd_one(s, node, label, third, ports, [*s.labels(ports[first][0]), *s.labels(ports[second][0])])


def _paired(route: str) -> tuple[str, str, str]:
    first, second = route.split("-")
    return first, second, next(p for p in ("a", "b", "out") if p not in (first, second))


def _balance(s: Solver, node: fx.Node, source: tuple[Any, float], target: tuple[Any, float]) -> None:
    labels = s.labels(source[0])
    if len(labels) > 1 and not isinstance(target[0], fx.Node | Inner):
        return s.stop_all(node, [source[0]], f"{node.name}: two changes of {source[0].name} would meet in one number")
    for label in labels:
        _balance_one(s, node, label, source, target)


def _odd_one(s: Solver, node: fx.Node, label: Label, which: str, ports: Mapping[str, tuple[Any, float]], others: list[Label]) -> None:
    """A label on the port that the route leaves out: on other axes it goes its own way, on the same ones nobody could say which."""
    if which == "out" or any(_meets(label, other) for other in others):
        return s.stop(node, label.index, f"both operands of {node.name} would change")
    _balance_one(s, node, label, ports[which], ports["out"])


def _balance_one(s: Solver, node: fx.Node, label: Label, source: tuple[Any, float], target: tuple[Any, float]) -> None:
    power = -label.power * source[1] / target[1]
    if isinstance(target[0], fx.Node | Inner):
        s.put(target[0], label.index, power)
    else:
        s.extra(node, "literal", label.index, power)


def _meets(a: Label, b: Label) -> bool:
    pairs = zip(reversed(a.index.shape), reversed(b.index.shape), strict=False)
    return any(m > 1 and n > 1 for m, n in pairs)


def _route(s: Solver, node: fx.Node, a: Any, b: Any) -> str:
    """A labelled operand cancels in a constant that it fits, else goes on; a labelled result is given to the operand of higher rank."""
    mine, theirs = s.labels(a), s.labels(b)
    if mine and theirs:
        return "a-b"
    for labels, name, partner, other in ((mine, "a", b, "b"), (theirs, "b", a, "a")):
        if labels:
            absorbs = s.facts.is_constant(partner) and fits(s, partner, labels[0].index) and not s.labels(node)
            return f"{name}-{other}" if absorbs else f"{name}-out"
    ranks = [_rank(s, x, s.labels(node)[0].index) for x in (a, b)]
    return "b-out" if ranks[1] > ranks[0] else "a-out"


def _rank(s: Solver, value: Any, index: Index) -> float:
    """How well a factor can take a label: the policy's rank. A narrower one has to unite parameters: `is_frugal` says whether it is to be
    preferred to one that others read too."""
    if not isinstance(value, fx.Node) or is_flat(s, value, index):
        return -1
    found = rank(s, value)
    if fits(s, value, index):
        return found
    s.passed_over |= found > 1
    return 1.5 if s.is_frugal and found > 1 else -1


def fits(s: Solver, value: Any, index: Index) -> bool:
    """Whether a value has all the positions a label tells apart."""
    shape = s.shape(value)
    lead = index.ndim - len(shape)
    return all(a >= lead and shape[a - lead] == n for a, n in enumerate(index.shape) if n > 1)


def where(s: Solver, node: fx.Node) -> None:
    """One of two values by a condition. A number may stay if the change leaves it as it is."""
    given = s.args(node)
    if "condition" in given:
        condition, values = given["condition"], [given["self"], given["other"]]
    else:
        condition, values = given["mask"], [given["self"], given["value"]]
    ports = [node, *(v for v in values if isinstance(v, fx.Node))]
    if any(not isinstance(v, fx.Node) and not _stays(s.kind, v) for v in values):
        return s.stop_all(node, ports, f"{node.name} puts in a number that a {s.kind} would change")
    spread_over(s, ports)
    for label in s.labels(node):
        if is_flat(s, condition, label.index):
            continue
        if s.kind == Kind.ROTATE:
            s.stop(node, label.index, f"{node.name} chooses by channel")
        elif s.kind.is_mixing:
            s.put(condition, label.index, label.power)
    if s.kind.is_mixing:
        for label in s.labels(condition):
            s.put(node, label.index, label.power)


def _stays(kind: Kind, number: Any) -> bool:
    if kind in (Kind.PERMUTE, Kind.REMOVE) or number == 0:
        return kind != Kind.SHIFT
    return kind in (Kind.SCALE, Kind.SHIFT) and number in (float("inf"), float("-inf"))


def extremes(s: Solver, node: fx.Node) -> None:
    """The greater or smaller of two."""
    operands = [s.args(node)["self"], s.args(node)["other"]]
    if s.kind in (Kind.SIGN, Kind.ROTATE) or not all(isinstance(x, fx.Node) for x in operands):
        return s.stop_all(node, [*operands, node], f"{node.name} compares channels, and a {s.kind} would change who wins")
    spread_over(s, [*operands, node])


def clamp(s: Solver, node: fx.Node) -> None:
    """Bounds that are numbers. Only a bound of 0 scales."""
    given = s.args(node)
    x, bounds = given["self"], [given.get("min"), given.get("max")]
    one_sided = all(b is None or b == 0 for b in bounds if not isinstance(b, fx.Node))
    if s.kind in (Kind.PERMUTE, Kind.REMOVE) or (s.kind == Kind.SCALE and one_sided and not any(isinstance(b, fx.Node) for b in bounds)):
        return alike(s, node)
    s.stop_all(node, [x, node], f"{node.name} clips at bounds that a {s.kind} would move")


def prelu(s: Solver, node: fx.Node) -> None:
    """x where positive, w_c x elsewhere; w per channel (axis 1), or one number."""
    x, weight = node.args
    moves = s.kind in (Kind.PERMUTE, Kind.REMOVE)
    if not moves:
        s.stop_all(node, [weight], f"{node.name} has a slope that a {s.kind} would change")
    if not moves and s.kind != Kind.SCALE:
        return s.stop_all(node, [x, node], f"{node.name} doesn't commute with a {s.kind}")
    spread_over(s, [x, node])
    if moves and s.shape(weight) != (1,):
        vectors(s, node, [weight])


def vectors(s: Solver, node: fx.Node, operands: Sequence[Any]) -> None:
    """Operands with an entry per channel, the result's axis 1: they share its labels."""
    rank = len(s.shape(node))
    for label in s.labels(node):
        if 1 in label.slot or not s.kind.is_mixing:
            index = s.coarsen(label.index, [a for a in label.slot if a != 1])
            s.put(node, index, label.power)
            for operand in operands:
                s.put(operand, index.reshape(-1), label.power)
    for operand in operands:
        for label in s.labels(operand):
            s.put(node, label.index.reshape(1, -1, *(1,) * (rank - 2)), label.power)


def moves_only(s: Solver, node: fx.Node) -> None:
    """Comparisons and logic: channels may move, nothing else may change."""
    if s.kind in (Kind.PERMUTE, Kind.REMOVE):
        return alike(s, node)
    s.stop_all(node, [*_operands(node), node], f"{node.name} decides by the values of channels")


def blind(s: Solver, node: fx.Node) -> None:
    """Reads the form of a value, not its numbers."""
    if s.kind == Kind.REMOVE and s.shape(node):
        return alike(s, node)
    return generated(s, node)


def generated(s: Solver, node: fx.Node) -> None:
    """Values made in the graph. One number everywhere takes any order, a size that is written down any other; zeros any scale and rotation too;
    for what else changes them the op becomes a vector that is repeated."""
    number = filling(node) if node.target in FILLED else None
    if number is not None and (s.kind == Kind.PERMUTE or (s.kind == Kind.REMOVE and "size" in s.args(node))):
        return
    if not isinstance(number, int | float) or s.kind == Kind.REMOVE or not s.facts.value(node).is_floating_point():
        return s.stop_all(node, [node], f"{node.name} makes its values in the graph: fold constants first")
    for label in s.labels(node) if number or s.kind == Kind.SHIFT else ():
        s.extra(node, "filled", label.index, label.power)


SUBTRACTIONS = (aten.sub.Tensor, aten.sub.Scalar)
REVERSED = (aten.rsub.Tensor, aten.rsub.Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode)
EMPTY = (aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format)
LIKE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)

UNARY: Mapping[Any, Any] = {
    **dict.fromkeys((aten.relu.default, aten.leaky_relu.default), "=xx=x="),
    aten.abs.default: "=.x=x=",
    **dict.fromkeys((aten.tanh.default, aten.erf.default, aten.sin.default, aten.asin.default, aten.atan.default, aten.sinh.default), ODD),
    **dict.fromkeys((aten.cos.default, aten.cosh.default), EVEN),
    **dict.fromkeys((aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.hardsigmoid.default, aten.hardswish.default), CURVES),
    **dict.fromkeys((aten.exp.default, aten.log.default, aten.log1p.default, aten.expm1.default, aten.softplus.default), CURVES),
    **dict.fromkeys((aten.elu.default, aten.selu.default, aten.mish.default, aten.log_sigmoid.default, aten.relu6.default), CURVES),
    **dict.fromkeys((aten.hardtanh.default, aten.celu.default, aten.erfc.default, aten.exp2.default, aten.log2.default), CURVES),
    aten.neg.default: (*"==", -1, *"==="),
    aten.square.default: (2, *".x=", "x", "="),
    aten.sqrt.default: (0.5, *"xx=x="),
    aten.rsqrt.default: (-0.5, *"xx=x="),
    aten.reciprocal.default: (-1, *"=x=x="),
    aten.sign.default: ".=x=x=",
    **dict.fromkeys((aten.floor.default, aten.ceil.default, aten.round.default), "xxx=x="),
}

_COPIES = (
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default),
    *(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default),
)
_COMPARISONS = tuple(getattr(getattr(aten, name), form) for name in ("lt", "le", "gt", "ge", "eq", "ne") for form in ("Tensor", "Scalar"))
_LOGIC = (
    *(aten.logical_and.default, aten.logical_or.default, aten.logical_not.default, aten.bitwise_not.default, aten.bitwise_and.Tensor),
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.isinf.default, aten.isnan.default, aten.floor_divide.default),
    *(aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar),
)


def _dropout(s: Solver, node: fx.Node) -> None:
    x, p, training = node.args
    if training and p:
        return s.stop_all(node, [x, node], f"{node.name} drops at random")
    spread_over(s, [x, node])


def _copied(s: Solver, node: fx.Node) -> None:
    """aten.copy(self, src): src in the form of self."""
    given = s.args(node)
    spread_over(s, [given["src"], node] if s.kind != Kind.REMOVE else [given["self"], given["src"], node])


Relation = Callable[[Solver, fx.Node], None]
TABLE: Mapping[Any, Relation] = {
    **dict.fromkeys(UNARY, unary),
    aten.square.default: square,
    **dict.fromkeys(_COPIES, cast),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, *SUBTRACTIONS, *REVERSED), sums),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, *QUOTIENTS), products),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar), powers),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor), where),
    **dict.fromkeys((aten.maximum.default, aten.minimum.default, aten.min.other, aten.max.other), extremes),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), clamp),
    aten.prelu.default: prelu,
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default), _dropout),
    **dict.fromkeys((*_COMPARISONS, *_LOGIC), moves_only),
    **dict.fromkeys((*FILLED, *EMPTY), generated),
    **dict.fromkeys((*LIKE, aten.sym_size.int), blind),  # zeros_like and its like stand in both: they read a form too
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), generated),
    aten.copy.default: _copied,
}
