"""A plan with numbers, put into an edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.edit import Edit, Site
from fxcompress.interpret import evaluate
from fxcompress.transport.change import Change, Elementwise, applied
from fxcompress.transport.facts import FILLED, filling
from fxcompress.transport.labels import Kind, Label
from fxcompress.transport.plan import Plan
from fxcompress.transport.resize import Resizer
from fxcompress.transport.solver import Extra

aten = torch.ops.aten
# the place of an operand among the arguments; of a bias elsewhere, as in convolutions, the third
BIAS_ARGUMENT: dict[Any, int] = {
    aten.layer_norm.default: 3,
    aten.group_norm.default: 3,
    aten.linear.default: 2,
}
WITH_TENSOR: dict[Any, Any] = {  # where an overload takes numbers only
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.rsub.Scalar: aten.rsub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
GAIN_ARGUMENT: dict[Any, int] = {
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default), 2),
    aten.batch_norm.default: 1,
}


class Applied:
    """One application of a plan."""

    def __init__(self, plan: Plan, edit: Edit, vector: Any, leaves: Mapping[fx.Node, Tensor]) -> None:
        self.plan, self.edit, self.program, self.leaves = plan, edit, edit.program, leaves
        self.numbers, self.changes = plan.numbers(vector), plan.changes(vector)

    def run(self, reason: str, start: fx.Node) -> Site:
        """Constants, extras, records, in one site."""
        resizer = Resizer(self.plan.facts, self.edit, self.changes)
        updates = resizer.updates() if self.plan.kind == Kind.REMOVE else []
        with self.edit.site(start, reason or f"a {self.plan.kind} of {self.plan.count} channels") as site:
            for node, change in self.changes.items():
                if node.op == "get_attr":
                    self._fold(node, change)
                else:
                    self.edit.carry(node, change)
            self.edit.loosen(self.plan.loose)
            for extra in sorted(self.plan.extras, key=lambda e: e.node):  # in the graph's order: what is made reads what was made
                getattr(self, f"_{extra.role}")(extra)
            if self.plan.kind == Kind.REMOVE:
                resizer.apply(updates)
        return site

    def _fold(self, node: fx.Node, change: Change) -> None:
        tensor = self.program.constants[str(node.target)]
        self.edit.carry(node, change)
        moved = self.plan.kind.is_mixing and self.plan.kind != Kind.ROTATE
        new = change(tensor if moved or tensor.is_complex() else tensor.double()).to(tensor.dtype).contiguous()
        self.edit.fold(node, self.leaves.get(node, new), resized=self.plan.kind == Kind.REMOVE)

    def _number(self, extra: Extra) -> Tensor:
        """The change on the extra's operand, as it acts on 1 or on 0."""
        label = Label(extra.index, extra.power)
        base = torch.zeros(extra.index.shape) if self.plan.kind == Kind.SHIFT else torch.ones(extra.index.shape)
        return applied(self.plan.kind, base.double(), label, self.numbers)

    def _literal(self, extra: Extra) -> None:
        """c -> c v, or c + v: an operand that is a number becomes a vector."""
        node, change = extra.node, Elementwise((Label(extra.index, extra.power),), self.plan.kind, self.numbers)
        if change.is_identity():
            return None
        number: Any = next((a for a in node.args[:2] if not isinstance(a, fx.Node)), None)
        if number is None:  # another plan has made it a vector
            return self._rechange(node, next(a for a in node.args[:2] if a not in self.plan.values), change)
        vector = self._constant(node, "constant", change(torch.full(extra.index.shape, number, dtype=torch.float64)))
        if node.target not in WITH_TENSOR:
            return self.edit.update(node, *(vector if a is number else a for a in node.args), **node.kwargs)
        alpha = self.plan.facts.arguments(node).get("alpha", 1)
        kwargs = {} if alpha == 1 else {"alpha": alpha}
        return self.edit.update(node, node.args[0], vector, op=WITH_TENSOR[node.target], **kwargs)

    def _filled(self, extra: Extra) -> None:
        """One number everywhere -> a vector, repeated."""
        node = extra.node
        change = self.changes.get(node)
        if change is None:
            return None
        if node.target not in FILLED:  # another plan has made it a vector
            return self._rechange(node, node.args[0], lambda old: change(old.expand(np.broadcast_shapes(old.shape, extra.index.shape))))
        given = self.plan.facts.arguments(node)
        vector = self._constant(node, "constant", change(torch.full(self._varying(node), filling(node), dtype=torch.float64)))
        if "size" in given:
            return self.edit.update(node, vector, given["size"], op=aten.expand.default)
        return self.edit.update(node, vector, given["self"], op=aten.expand_as.default)

    def _varying(self, node: fx.Node) -> tuple[int, ...]:
        """The sizes of a value, 1 along axes on which none of its labels varies."""
        return np.broadcast_shapes(*(label.index.shape for label in self.plan.values[node]))

    def _bias(self, extra: Extra) -> None:
        """A bias where there was none."""
        delta = self._number(extra)
        if not delta.any():
            return
        self._add_bias(extra.node, delta)

    def _gain(self, extra: Extra) -> None:
        """A gain where there was none."""
        factor = self._number(extra)
        if bool((factor == 1).all()):
            return None
        node, place = extra.node, GAIN_ARGUMENT[extra.node.target]
        gain = node.args[place] if len(node.args) > place else node.kwargs.get("weight")
        if gain is not None:  # another plan has made it
            return self._rechange(node, gain, lambda old: old * factor)
        return self._set(node, place, self._constant(node, "weight", factor))

    def _rechange(self, node: fx.Node, constant: Any, change: Change) -> None:
        new = self._constant(node, "constant", change(self.program.constants[str(constant.target)].double()))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: new if n is constant else n)
        self.edit.update(node, *args, **kwargs)

    def _input(self, extra: Extra) -> None:
        """b -> b - W z for an input shifted by z."""
        port = extra.port
        weight = self._value(port.node).double()
        if port.split:
            axis, groups = port.split
            weight = weight.reshape(*weight.shape[:axis], groups, -1, *weight.shape[axis + 1 :])
        z = self._number(extra)
        if not z.any():
            return
        axes = [a for a, letter in enumerate(port.letters) if letter not in ("group", "out")]
        self._add_bias(extra.node, -(weight * z).sum(axes).flatten())

    def _add_bias(self, node: fx.Node, delta: Tensor) -> None:
        if node.target in (aten.mm.default, aten.matmul.default, aten.bmm.default):
            self._insert_add(node, delta)
            return
        place = 0 if node.target is aten.addmm.default else BIAS_ARGUMENT.get(node.target, 2)
        bias: Any = node.args[place] if len(node.args) > place else node.kwargs.get("bias")
        if bias is None:
            self._set(node, place, self._constant(node, "bias", delta))
            return
        old = self.program.constants[str(bias.target)]
        new = (old.double() + delta.reshape(-1)).to(old.dtype)
        if len(bias.users) == 1 and new.shape == old.shape:
            self.edit.carry(bias, lambda value: (value.double() + delta.reshape(-1)).to(value.dtype))
            self.edit.fold(bias, new)
        else:
            self._set(node, place, self.edit.constant(str(bias.target), new, like=node))

    def _insert_add(self, node: fx.Node, delta: Tensor) -> None:
        made = next((site.replaced[node] for site in self.edit.sites if node in site.replaced), None)
        if made is not None:  # another plan has made it
            return self._rechange(made, made.args[1], lambda old: old + delta)
        place, target = node.next, node.target
        assert callable(target)
        product = self.edit.insert(target, *node.args, like=node, before=place, val=node.meta.get("val"), **node.kwargs)
        bias = self._constant(node, "bias", delta, place)
        return self.edit.replace(node, self.edit.insert(aten.add.Tensor, product, bias, like=node, before=place, val=node.meta.get("val")))

    def _constant(self, node: fx.Node, name: str, value: Tensor, before: fx.Node | None = None) -> fx.Node:
        module = node.meta.get("module", ("",))[-1]
        dtype = self.plan.facts.value(node).dtype
        return self.edit.constant(f"{module}.{name}" if module else f"{node.name}.{name}", value.to(dtype), like=node, before=before)

    def _set(self, node: fx.Node, place: int, value: fx.Node) -> None:
        schema = node.target._schema  # type: ignore[union-attr]
        name = schema.arguments[place].name
        if name in node.kwargs or len(node.args) < place:
            self.edit.update(node, *node.args, **{**node.kwargs, name: value})
        else:
            self.edit.update(node, *node.args[:place], value, *node.args[place + 1 :], **node.kwargs)

    def _value(self, node: fx.Node) -> Tensor:
        """A constant, or what views make of one."""
        if node.op == "get_attr":
            return self.program.constants[str(node.target)]
        source = node.all_input_nodes[0]
        value: Tensor = evaluate(node, {source: self._value(source)}, self.program.constants)
        return value
