"""Faults in the constants that an edit stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fxcompress.dataflow import ancestors
from fxcompress.edit import Edit, Site
from tests.faults.fault import Fault, Undo


def constant_faults(edit: Edit) -> Iterator[Fault]:
    """Per recorded constant every wrong tensor; neighbours of one shape swapped."""
    constants = edit.program.constants
    recorded = {name: site for site in edit.sites for name in site.constants}
    for name, site in recorded.items():
        for kind, wrong in itertools.chain(wrong_tensors(constants[name]), _stale(edit, name, site), _along_the_other_axis(edit, name)):
            yield Fault(kind, name, site.name, partial(_stored, constants, {name: wrong}))
    for one, other in _alike(constants, recorded):
        swapped = {one: constants[other], other: constants[one]}
        yield Fault(f"swap with {other}", one, recorded[one].name, partial(_stored, constants, swapped))


def wrong_tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The ways to get one tensor wrong, of the same shape and dtype."""
    yield "negate", ~t if t.dtype == torch.bool else -t  # of unsigned numbers modulo their range
    if _is_inexact(t):
        yield "half more", (t * 1.5).to(t.dtype)
    if t.dim() > 1:
        yield "transpose", t.mT.reshape(t.shape)
    if t.dim() > 2:
        yield "wrong axis", t.movedim(0, -1).reshape(t.shape)
    for axis in (a for a in range(t.dim()) if t.shape[a] > 1):
        yield f"roll axis {axis}", t.roll(1, axis)
        yield f"halve a channel of axis {axis}", _halved(t, axis)
    if not _is_inexact(t):
        yield "one more", ~t if t.dtype == torch.bool else t + 1


def _halved(t: Tensor, axis: int) -> Tensor:
    wrong = t.clone()
    channel = wrong.select(axis, t.shape[axis] // 2)
    channel.copy_(channel / 2 if _is_inexact(t) else channel // 2)
    return wrong


def _stale(edit: Edit, name: str, site: Site) -> Iterator[tuple[str, Tensor]]:
    """What the constant was before; or, if it is new, the first like it that was read in its place."""
    old, new = edit.constants_before, edit.program.constants[name]
    names = [name] if name in old else _read_before(edit, site)
    like = [old[n] for n in names if n == name or (old[n].shape == new.shape and old[n].dtype == new.dtype)]
    yield from (("keep the old one", tensor) for tensor in like[:1])


def _read_before(edit: Edit, site: Site) -> list[str]:
    """Constants that went into the values the site replaced, as far as nothing else needs what lies between."""
    steps, alive = {s.node: s for s in edit.before}, ancestors([edit.program.output_node])
    stack = [n for n in (*site.replaced, *site.touched) if n in steps]
    seen = dict.fromkeys(stack)
    while stack:
        inputs = [n for n in steps[stack.pop()].inputs if n not in seen]
        seen.update(dict.fromkeys(inputs))
        stack += [n for n in inputs if n not in alive]
    return [str(n.target) for n in seen if n.op == "get_attr"]


def _along_the_other_axis(edit: Edit, name: str) -> Iterator[tuple[str, Tensor]]:
    """A square constant with its recorded change on the first two axes swapped."""
    old = edit.constants_before.get(name)
    changes = [c for n, changes in edit.changes.items() if n.op == "get_attr" and n.target == name for c in changes]
    if old is not None and changes and old.dim() > 1 and old.shape[0] == old.shape[1]:
        wrong = old.transpose(0, 1)
        for change in changes:
            wrong = change(wrong)
        yield "change along the other axis", wrong.transpose(0, 1).contiguous()


def _alike(constants: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault((constants[name].shape, constants[name].dtype), []).append(name)
    for group in groups.values():
        yield from itertools.pairwise(group)


def _stored(constants: dict[str, Tensor], wrong: Mapping[str, Tensor]) -> Undo:
    right = {name: constants[name] for name in wrong}
    constants.update(wrong)
    return partial(constants.update, right)


def _is_inexact(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()
