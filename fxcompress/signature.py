"""Signature: how a user's call becomes the flat inputs of a program, and flat outputs become the model's own output class again."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Final

import torch.utils._pytree as pytree
from torch import Tensor

from fxcompress.errors import InputError, nearest


class _Mark(Enum):
    INPUT = "input"  # an enum member stays itself when copied


INPUT: Final = _Mark.INPUT  # marks a leaf that is a tensor input; every other leaf is the constant it was at capture, or Bound


@dataclass(frozen=True, eq=False)
class Bound:
    """A leaf that was an input and is bound to a value: a call may repeat that value and no other."""

    value: Tensor

    def admits(self, given: Any) -> bool:
        """Whether the argument is the bound value, broadcast or not."""
        if not isinstance(given, Tensor) or given.dim() != self.value.dim():
            return False
        fits = all(size in (1, n) for size, n in zip(self.value.shape, given.shape, strict=True))
        return fits and bool((given == self.value).all())


class Inputs:
    """Arguments of one call with the roles of some of them: `Inputs(x, t, cond, roles={"t": "timestep"})`."""

    def __init__(self, *args: Any, roles: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        self.args, self.kwargs, self.roles = args, kwargs, dict(roles or {})

    @classmethod
    def of(cls, item: Any) -> Inputs:
        """The item as Inputs: a tuple is positional arguments, a dict is arguments by name, a tensor is the only argument."""
        if isinstance(item, Inputs):
            return item
        if isinstance(item, Mapping):
            return cls(**item)
        return cls(*item) if isinstance(item, tuple | list) else cls(item)


@dataclass(frozen=True)
class Signature:
    """names: forward's parameters that take tensors or containers of them at capture, in order, with `spec` the tree of their values.

    parameters: forward's own signature. leaves: per leaf of `spec` INPUT, or the constant captured there.
    out_spec, out_leaves: the same for the result. `input_names`, `output_names` follow the tensor leaves in order.
    """

    parameters: inspect.Signature
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    input_names: tuple[str, ...]
    out_spec: pytree.TreeSpec
    out_leaves: tuple[Any, ...]
    output_names: tuple[str, ...]
    fixed: Mapping[str, Any]  # arguments capture itself set; a call may repeat them

    @cached_property
    def _captured(self) -> dict[str, Any]:
        """The arguments at capture, INPUT for each tensor. Kept: a language model asks at every token."""
        captured: dict[str, Any] = pytree.tree_unflatten(self.leaves, self.spec)
        return captured

    @cached_property
    def _forms(self) -> dict[str, tuple[list[Any], pytree.TreeSpec]]:
        return {name: pytree.tree_flatten(template) for name, template in self._captured.items()}

    def captured(self) -> list[str]:
        """Names of the arguments the program was captured with."""
        return list(self._captured)

    def flatten(self, item: Any) -> list[Tensor]:
        """The tensors of one call on the CPU, in the order of the program's inputs. InputError when it doesn't have the captured form."""
        given = bind(self.parameters, Inputs.of(item))
        return [tensor.cpu() for tensor in self._match(self._captured_only(given))]

    def _captured_only(self, given: dict[str, Any]) -> dict[str, Any]:
        names = self.captured()
        for name in [n for n in given if n not in names]:
            default = default_of(self.parameters, name)
            if not same_constant(given[name], self.fixed.get(name, default)) and not same_constant(given[name], default):
                raise InputError(
                    f"argument {name!r} was not among the example inputs",
                    why=f"the program was captured with {name}={default!r}; this call passes {describe(given[name])}",
                    do=f"compile again with {name} in example_inputs, or leave it out of the call",
                )
            del given[name]
        for name in [n for n in names if n not in given]:
            bound = self._captured[name]
            given[name] = bound.value if isinstance(bound, Bound) else default_of(self.parameters, name)
        return {name: given[name] for name in names}

    def _match(self, given: dict[str, Any]) -> list[Tensor]:
        tensors: list[Tensor] = []
        for name, template in self._captured.items():
            want, want_spec = self._forms[name]
            have, have_spec = pytree.tree_flatten(_in_order(given[name], template))
            if want_spec != have_spec:
                raise _misfit(name, template, given[name])
            for expected, value in zip(want, have, strict=True):
                if expected is INPUT and isinstance(value, Tensor):
                    tensors.append(value)
                elif isinstance(expected, Bound) and expected.admits(value):
                    continue
                elif expected is INPUT or not same_constant(value, expected):
                    raise _misfit(name, template, given[name])
        return tensors

    def item(self, tensors: Sequence[Tensor]) -> Inputs:
        """The inverse of `flatten`: a call that has these tensors, in the order of the program's inputs."""
        values = iter(tensors)
        leaves = [next(values) if leaf is INPUT else leaf.value if isinstance(leaf, Bound) else leaf for leaf in self.leaves]
        given: dict[str, Any] = pytree.tree_unflatten(leaves, self.spec)
        args: list[Any] = []
        for name, parameter in self.parameters.parameters.items():
            if name in given and parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                args.append(given.pop(name))
            elif name in given and parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(given.pop(name))
        return Inputs(*args, **given)

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The model's own output from the program's flat results."""
        values = iter(results)
        return pytree.tree_unflatten([next(values) if leaf is INPUT else leaf for leaf in self.out_leaves], self.out_spec)


def bind(parameters: inspect.Signature, item: Inputs) -> dict[str, Any]:
    """The call's arguments by parameter name, without defaults; what `**kwargs` caught is merged in. InputError when they don't bind."""
    try:
        bound = parameters.bind(*item.args, **item.kwargs)
    except TypeError as error:
        known = [p.name for p in parameters.parameters.values()]
        unknown = next((n for n in item.kwargs if n not in known), "")
        raise InputError(
            "the inputs don't fit the model's forward",
            why=f"{error}" + (f"; {'' if unknown in str(error) else f'{unknown!r} is unknown, '}{nearest(unknown, known)}" if unknown else ""),
            do=f"forward takes ({', '.join(known)})",
        ) from None
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = parameters.parameters[name].kind
        given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return given


def default_of(parameters: inspect.Signature, name: str) -> Any:
    """The default of one parameter; None where it has none or came through `**kwargs`."""
    parameter = parameters.parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def same_constant(a: Any, b: Any) -> bool:
    """Whether two non-tensor leaves are the same captured constant; a tensor never is."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return a is b or (type(a) is type(b) and bool(a == b))


def leaf_names(tree: Any, root: str) -> list[str]:
    """One name per leaf of the tree, from its path: "logits", "hidden_states_0". A bare leaf, or a container unknown here, goes by `root`.

    A name that two leaves would have ({"a": {"b": x}, "a_b": y}) is numbered from the second on.
    """
    names = ["_".join(path) or root for path in _paths(tree, ())]
    count = len(pytree.tree_leaves(tree))
    names = names if len(names) == count else [f"{root}_{i}" for i in range(count)]
    taken: set[str] = set()
    for i, name in enumerate(names):
        names[i] = name if name not in taken else next(f"{name}_{k}" for k in range(1, count + 1) if f"{name}_{k}" not in {*taken, *names})
        taken.add(names[i])
    return names


def _in_order(value: Any, template: Any) -> Any:
    """The value with its dicts in the key order of the template's, where both have the same keys: order is no part of a call's form."""
    if type(value) is dict and isinstance(template, dict) and value.keys() == template.keys():
        return {name: _in_order(value[name], inner) for name, inner in template.items()}
    if type(value) in (tuple, list) and type(value) is type(template) and len(value) == len(template):
        return type(value)(_in_order(v, t) for v, t in zip(value, template, strict=True))
    return value


def _paths(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(tree, Mapping):
        items = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, tuple | list):
        items = [(str(i), v) for i, v in enumerate(tree)]
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        items = [(f.name, v) for f in dataclasses.fields(tree) if (v := getattr(tree, f.name)) is not None]
    else:
        yield path
        return
    for name, value in items:
        yield from _paths(value, (*path, "".join(c if c.isalnum() else "_" for c in name)))


def forward_signature(model: Callable[..., Any]) -> inspect.Signature:
    """The signature of the model's forward, without self."""
    return inspect.signature(getattr(model, "forward", model))


def describe(value: Any) -> str:
    """A value in a few words: shape and dtype of a tensor, else its repr, shortened."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    text = "a tensor" if value is INPUT else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _misfit(name: str, template: Any, value: Any) -> InputError:
    form = pytree.tree_map(describe, template)
    have = pytree.tree_map(describe, value)
    return InputError(
        f"argument {name!r} doesn't have the form it had at capture",
        why=f"captured with {_plain(form)}, called with {_plain(have)}",
        do="call it in the captured form (None stays None, constants keep their value), or compile again with these inputs",
    )


def _plain(form: Any) -> str:
    return form if isinstance(form, str) else repr(form).replace("'", "")


def check_sizes(inputs: Sequence[Any], symbols: Mapping[str, tuple[int, int]], tensors: Sequence[Tensor]) -> None:
    """InputError unless dtypes, ranks, fixed axes, ranges and equal sizes of the tensors are those of the program's `inputs`."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(inputs, tensors, strict=True):
        if tensor.dtype != value.dtype or tensor.dim() != len(value.shape):
            raise _bad_input(value, tensor, "dtype or rank differs")
        if value.below is not None and not bool(((tensor >= 0) & (tensor < value.below)).all()):
            raise _bad_input(value, tensor, f"it indexes a table of {value.below} rows, values {int(tensor.min())}..{int(tensor.max())}")
        for axis, (want, have) in enumerate(zip(value.shape, tensor.shape, strict=True)):
            if isinstance(want, int) and want != have:
                raise _bad_input(value, tensor, f"axis {axis} is fixed to {want}")
            if isinstance(want, str) and want in symbols:
                low, high = symbols[want]
                if not low <= have <= high:
                    raise _bad_input(value, tensor, f"axis {axis} must be in {low}..{high}")
                if sizes.setdefault(want, have) != have:
                    raise _bad_input(value, tensor, f"axis {axis} is {want}, which is {sizes[want]} elsewhere in this call")


def _bad_input(value: Any, tensor: Tensor, why: str) -> InputError:
    shape = ", ".join(str(d) for d in value.shape)
    dtype = str(value.dtype).removeprefix("torch.")
    return InputError(
        f"input {value.name!r} doesn't fit",
        why=f"expected {dtype} [{shape}], got {describe(tensor)}: {why}",
        do="pass the captured form, or compile again with dynamic= naming that axis",
    )
