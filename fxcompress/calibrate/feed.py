"""Feeds: calibration data that can be read again and again and has a content hash."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxcompress import cached
from fxcompress.errors import CalibrationError, FxcError, InputError
from fxcompress.interpret import run
from fxcompress.program import Program
from fxcompress.signature import Inputs, check_sizes


@runtime_checkable
class Feed(Protocol):
    """Items of the forms `Inputs.of` takes: a tuple, a dict by parameter name, Inputs. Every iteration gives the same items again."""

    def __iter__(self) -> Iterator[Any]: ...

    @property
    def digest(self) -> str:
        """SHA-256 over the content of all items."""
        ...


class Items:
    """A feed over something that can be iterated again, such as a list or a dataset. It is read once to check and hash it."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self.digest = content_digest(items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


class Spool:
    """A feed over a one-shot iterator: every item is written to disk once and read from there. The files go with the feed."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fxcompress-feed-")
        self._count = 0
        self.digest = content_digest(self._written(items))

    def _written(self, items: Iterator[Any]) -> Iterator[Inputs]:
        """The items; each is written once its reader found nothing wrong with it."""
        for item in _read(items):
            given = Inputs.of(item)
            yield given
            torch.save((given.args, given.kwargs, given.roles), self._path(self._count))
            self._count += 1

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index:06}.pt"

    def __iter__(self) -> Iterator[Inputs]:
        for index in range(self._count):
            args, kwargs, roles = torch.load(self._path(index), weights_only=True)
            yield Inputs(*args, roles=roles, **kwargs)


class FlatItems:
    """A feed as flat inputs of a program, every item checked against its signature. The last item is the probe of the contracts and no part
    of the iteration, unless it is the only one. CalibrationError names the item that doesn't fit or isn't finite, and why."""

    def __init__(self, feed: Feed, program: Program) -> None:
        self._feed, self._program = feed, program
        self.probe: tuple[Tensor, ...] = ()
        self.count = 0
        for item in _read(feed):
            self.probe = self._flat(item, self.count)
            for value, tensor in zip(program.inputs, self.probe, strict=True):
                _require_finite(tensor, f"item {self.count}, input {value.name!r}")
            self.count += 1
        if not self.count:
            raise _empty()
        if cached.keeps(program.inputs):
            self.probe = tuple(cached.continued(program.signature, program.inputs, item, self._run))

    def __len__(self) -> int:
        return max(self.count - 1, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index, item in zip(range(len(self)), _read(self._feed), strict=False):
            yield self._flat(item, index)

    def _run(self, tensors: Sequence[Tensor]) -> Any:
        return self._program.signature.unflatten(run(self._program, tensors))

    def _flat(self, item: Any, index: int) -> tuple[Tensor, ...]:
        try:
            tensors = cached.flat_inputs(self._program.signature, self._program.inputs, item)
            check_sizes(self._program.inputs, self._program.symbols, tensors)
        except InputError as error:
            what = f"calibration item {index} doesn't fit: {error.what}"
            raise CalibrationError(what, where=error.where, why=error.why, do=error.do) from None
        return tuple(tensors)


def as_feed(source: Any) -> Feed:
    """The feed behind `source`: a Feed as it is, an iterator spooled to disk, anything else iterable read in place.

    CalibrationError when it is empty, can't be iterated, fails on the way, or is a single dict or tensor instead of items.
    """
    if isinstance(source, Mapping | Tensor | Inputs | str):
        raise CalibrationError(
            "calibration needs several items", why=f"got one {type(source).__name__}", do="pass a list of items: calibration=[item]"
        )
    if isinstance(source, Feed):
        return source
    if isinstance(source, Iterator):
        return Spool(source)
    if isinstance(source, Iterable):
        return Items(source)
    raise CalibrationError("calibration can't be iterated", why=f"got {type(source).__name__}", do="pass a list of items or a feed")


def content_digest(items: Iterable[Any]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of every item, so a tuple and a dict differ.

    CalibrationError for no items, and for something that is neither tensor nor constant, with its place.
    """
    total = hashlib.sha256()
    count = 0
    for index, item in enumerate(_read(items)):
        given = Inputs.of(item)
        leaves, spec = pytree.tree_flatten_with_path((given.args, given.kwargs))
        total.update(repr((spec, sorted(given.roles.items()))).encode())
        for path, leaf in leaves:
            _update(total, leaf, f"item {index}, {pytree.keystr(path[1:])}")
        count += 1
    if not count:
        raise _empty()
    return total.hexdigest()


def _read(items: Iterable[Any]) -> Iterator[Any]:
    """The items; what their source raises becomes a CalibrationError that names the item."""
    count = 0
    try:
        for item in items:
            yield item
            count += 1
    except FxcError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise CalibrationError("the calibration feed failed", where=f"item {count}", why=why, do="mend the feed; try list(feed)") from error


def _empty() -> CalibrationError:
    return CalibrationError("the calibration feed is empty", why="it gave no item", do="pass at least one item; more are better")


def _update(total: Any, leaf: Any, place: str) -> None:
    if leaf is None or isinstance(leaf, bool | int | float | str):
        total.update(repr(leaf).encode())
        return
    if not isinstance(leaf, Tensor):
        raise CalibrationError("a calibration item can't be used", where=place, why=f"got {type(leaf).__name__}", do="pass tensors")
    total.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
    dense = leaf.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)  # one row of an expanded tensor has no stride
    total.update(dense.view(torch.uint8).numpy())


def _require_finite(tensor: Tensor, place: str) -> None:
    wrong = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
    if wrong:
        raise CalibrationError(
            "a calibration item isn't finite", where=place, why=f"{wrong} of {tensor.numel()} values are inf or nan", do="remove the item"
        )
