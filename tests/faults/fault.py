"""A fault, and how arguments are changed and given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

Undo = Callable[[], None]


@dataclass(frozen=True)
class Fault:
    """One slip. at: the constant or node it is in; site: where the edit recorded that; plant: makes the slip and returns what takes it back."""

    kind: str
    at: str
    site: str
    plant: Callable[[], Undo]

    def __str__(self) -> str:
        """What is wrong where."""
        return f"{self.kind} at {self.at}"


def given(node: fx.Node, args: Any, kwargs: Any) -> Undo:
    """The node gets other arguments."""
    right = node.args, node.kwargs

    def undo() -> None:
        node.args, node.kwargs = right

    node.args, node.kwargs = args, kwargs
    return undo


def reading(node: fx.Node, now: fx.Node, instead: fx.Node) -> Undo:
    """The node reads one value in place of another."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: instead if n is now else n)
    return given(node, args, kwargs)


def in_turn(*undo: Undo) -> Undo:
    """All of them, last first."""

    def all_of_them() -> None:
        for one in reversed(undo):
            one()

    return all_of_them


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a tensor of floats."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
